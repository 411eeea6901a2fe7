//! Why a listener did not take a memory.

use std::fmt;

use crate::panics::{caught, discard};
use crate::range::GuestRange;

/// How many causes of causes are told.
const MOST_CAUSES: usize = 32;

/// What a listener's cause is kept as.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a listener did not take a memory.
///
/// There are two kinds, with different consequences. One that *refuses* answers no to this memory:
/// the change is undone for all. One that is *away* (it died, hung up, fell silent) holds nothing
/// that matters any more: its [`Attendance`](crate::Attendance) decides whether the change goes on
/// without it.
#[derive(Debug)]
pub struct ListenerError {
    away: bool,
    range: Option<GuestRange>,
    cause: Kept,
}

/// A cause, which is code of others: it may panic when it is displayed or dropped.
struct Kept(Option<Cause>);

impl ListenerError {
    /// It does not take the memory.
    pub fn refused(cause: impl Into<Cause>) -> Self {
        Self {
            away: false,
            range: None,
            cause: Kept(Some(cause.into())),
        }
    }

    /// It is gone, or what it holds is not known any more.
    pub fn away(cause: impl Into<Cause>) -> Self {
        Self {
            away: true,
            ..Self::refused(cause)
        }
    }

    /// Names the region at which it failed.
    #[must_use]
    pub fn at(mut self, range: GuestRange) -> Self {
        self.range = Some(range);
        self
    }

    /// Whether it is away, rather than refusing.
    pub fn is_away(&self) -> bool {
        self.away
    }

    /// The region at which it failed, if it was one.
    pub fn range(&self) -> Option<GuestRange> {
        self.range
    }

    /// The cause and the causes of it, in one line. If they panic, that is the cause from now on.
    pub(crate) fn reason(&mut self) -> String {
        let text = || {
            let mut texts = Vec::new();
            let mut cause = std::error::Error::source(self);
            // One that names itself as its cause has no end.
            while let Some(error) = cause
                && texts.len() < MOST_CAUSES
            {
                texts.push(error.to_string());
                cause = error.source();
            }
            texts.join(": ")
        };
        caught(text).unwrap_or_else(|panic| {
            let text = format!("its error panicked when it was displayed: {panic}");
            self.cause = Kept(Some(text.clone().into()));
            text
        })
    }

    /// Why.
    pub fn into_cause(mut self) -> Box<dyn std::error::Error + Send + Sync> {
        let Some(cause) = self.cause.0.take() else {
            unreachable!("only this takes it, and takes the rest, too");
        };
        cause
    }
}

impl fmt::Display for ListenerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.away { "away" } else { "refused" })
    }
}

impl std::error::Error for ListenerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let cause = self.cause.0.as_deref()?;
        Some(cause)
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(cause) => cause.fmt(f),
            None => f.write_str("None"),
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        discard(self.0.take());
    }
}
