//! What the mock can fail at.

use std::io;

pub(super) type Result<T, E = MockError> = std::result::Result<T, E>;

/// What the mock daemon could not do.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub struct MockError {
    doing: &'static str,
    source: io::Error,
}

impl MockError {
    /// Of which kind the system's answer is, or the reason.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// The reason as an error of a step.
    pub(super) fn at<E>(doing: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |error| Self {
            doing,
            source: io::Error::other(error),
        }
    }

    pub(super) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { doing, source }
    }

    pub(super) fn new(doing: &'static str, kind: io::ErrorKind, reason: String) -> Self {
        Self::io(doing)(io::Error::new(kind, reason))
    }
}
