//! Errors for people: what could not be done, why, on one line.

use std::error::Error;
use std::fmt;

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// What could not be done, and its cause.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            cause: None,
        }
    }
}

/// Says what was attempted when something fails.
pub(crate) trait OrFail<T> {
    fn or_fail<W: Into<String>>(self, what: impl FnOnce() -> W) -> Result<T>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> OrFail<T> for std::result::Result<T, E> {
    fn or_fail<W: Into<String>>(self, what: impl FnOnce() -> W) -> Result<T> {
        self.map_err(|cause| Failure {
            what: what().into(),
            cause: Some(cause.into()),
        })
    }
}

impl fmt::Display for Failure {
    /// One line with the whole chain of causes. Many errors repeat their cause in their own text:
    /// what was said already is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = self.what.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !line.contains(&text) {
                line.push_str(": ");
                line.push_str(&text);
            }
            cause = error.source();
        }
        // Paths may contain anything.
        f.write_str(&line.replace(char::is_control, " "))
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        let cause = self.cause.as_deref();
        cause.map(|cause| cause as &(dyn Error + 'static))
    }
}
