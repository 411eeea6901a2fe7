//! The crate's integration tests, one binary; each module is about one topic.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests: where they fail, the test that called them fails"
)]

mod peers;
mod share;
mod support;
