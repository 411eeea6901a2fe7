//! The crate's integration tests, one binary; each module is about one topic.

mod support;
