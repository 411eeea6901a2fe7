//! Why a listener did not take a memory.

use std::fmt;
use std::sync::Arc;

use crate::panics::{caught, discard};
use crate::range::GuestRange;

/// How many causes of causes are told: one that names itself as its cause has no end.
const MOST_CAUSES: usize = 32;

/// Why a listener did not take a memory. Clones share the cause.
///
/// There are two kinds, with different consequences. One that *refuses* answers no to this memory:
/// the change is undone for all. One that is *away* (it died, hung up, fell silent) holds nothing
/// that matters any more: the change goes on without it, unless it was attached as
/// [required](crate::AddressSpace::attach_required).
///
/// [`source`](std::error::Error::source) is the cause as the listener gave it.
#[derive(Clone)]
pub struct ListenerError {
    away: bool,
    range: Option<GuestRange>,
    cause: Arc<Cause>,
}

/// A cause, which is code of others: it may panic when it is displayed or dropped.
struct Cause {
    /// Absent only while it is dropped.
    error: Option<Box<dyn std::error::Error + Send + Sync>>,
    reason: String,
}

impl ListenerError {
    /// It does not take the memory.
    ///
    /// The cause is displayed here, once. If it panics at that, the panic is the cause instead.
    pub fn refused(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            away: false,
            range: None,
            cause: Arc::new(Cause::new(cause.into())),
        }
    }

    /// It is gone, or what it holds is not known any more.
    pub fn away(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            away: true,
            ..Self::refused(cause)
        }
    }

    /// What a listener answers that panicked.
    pub(crate) fn panicked(message: &str) -> Self {
        Self::refused(format!("it panicked: {message}"))
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

    /// The cause and what caused it, in one line.
    pub fn reason(&self) -> &str {
        &self.cause.reason
    }
}

impl Cause {
    fn new(error: Box<dyn std::error::Error + Send + Sync>) -> Self {
        match caught(|| one_line(error.as_ref())) {
            Ok(reason) => Self {
                error: Some(error),
                reason,
            },
            Err(panic) => {
                discard(error);
                let reason = format!("its error panicked when it was displayed: {panic}");
                Self {
                    error: Some(reason.clone().into()),
                    reason,
                }
            }
        }
    }
}

fn one_line(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let texts = causes.take(MOST_CAUSES).map(|error| error.to_string());
    texts.collect::<Vec<_>>().join(": ")
}

impl fmt::Display for ListenerError {
    /// What the listener does, without its name and the reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.away {
            true => "is away and cannot be told of ",
            false => "refuses ",
        })?;
        match self.range {
            Some(range) => write!(f, "the region {range}"),
            None => f.write_str("the memory"),
        }
    }
}

impl std::error::Error for ListenerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let cause = self.cause.error.as_deref()?;
        Some(cause)
    }
}

impl fmt::Debug for ListenerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListenerError")
            .field("away", &self.away)
            .field("range", &self.range)
            .field("reason", &self.reason())
            .finish_non_exhaustive()
    }
}

impl Drop for Cause {
    fn drop(&mut self) {
        discard(self.error.take());
    }
}
