//! Errors for people: what could not be done, why, on one line, in the words of the command line.

use std::error::Error;
use std::fmt;

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// What the crate's errors call something, and what it is called in this program's command line.
/// The crate addresses programmers; the user of a program cannot call a function.
pub(crate) type Words = &'static [(&'static str, &'static str)];

/// What could not be done, and its cause.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
    usage: bool,
}

impl Failure {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            cause: None,
            usage: false,
        }
    }

    /// The command line asks for what cannot be, whatever this machine is like.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self {
            usage: true,
            ..Self::new(what)
        }
    }

    /// 2 for a wrong command line, as other programs do, and 1 for everything else.
    pub(crate) fn exit_code(&self) -> u8 {
        if self.usage { 2 } else { 1 }
    }

    /// The same, said to be due to the command line.
    #[allow(
        dead_code,
        reason = "not all examples look into their arguments so closely"
    )]
    pub(crate) fn into_usage(self) -> Self {
        Self {
            usage: true,
            ..self
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
            cause: Some(cause.into()),
            ..Failure::new(what())
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
        f.write_str(&in_words(&line, crate::WORDS).replace(char::is_control, " "))
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        let cause = self.cause.as_deref();
        cause.map(|cause| cause as &(dyn Error + 'static))
    }
}

/// A text of the crate's in the words of this program. Names of functions and types that remain,
/// in parentheses after what people know, are left out.
pub(crate) fn in_words(text: &str, words: Words) -> String {
    let replace = |text: String, (theirs, ours): &(&str, &str)| text.replace(theirs, ours);
    let mut text = words.iter().fold(text.to_owned(), replace);
    let mut from = 0;
    while let Some(open) = text[from..].find(" (").map(|at| from + at)
        && let Some(close) = text[open..].find(')').map(|at| open + at)
    {
        if text[open..close].contains("::") {
            text.replace_range(open..=close, "");
        } else {
            from = open + 1;
        }
    }
    text
}
