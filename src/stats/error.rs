//! Why it is not known what of the RAM exists.

use std::io;

/// The kernel does not say what of the RAM exists; `source()` is its answer.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}, to report which RAM is allocated: mount procfs, and see the cause")]
pub struct StatsError {
    doing: &'static str,
    source: io::Error,
}

/// Makes an error of the answer to what was done.
pub(super) fn failed(doing: &'static str) -> impl Fn(io::Error) -> StatsError {
    move |source| StatsError { doing, source }
}
