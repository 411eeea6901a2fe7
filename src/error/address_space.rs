//! Why a change of the address space did not happen.

use std::fmt;

use crate::layout::GuestRange;

/// Why a change of the guest's memory did not happen, or a listener is not up to date.
///
/// After a change that failed the memory is what it was, and so is what every listener holds, but
/// for those that the error calls stale.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AddressSpaceError {
    /// A listener refuses a memory, and works.
    #[error(
        "listener {listener:?} refuses {}: {source}; {}",
        Region(.region), Aftermath(.stale)
    )]
    Refused {
        /// The name that it was attached by.
        listener: String,
        /// The region at which it failed, or else one that the change is about.
        region: Option<GuestRange>,
        /// Who could not be put back, and why.
        stale: Vec<StaleListener>,
        /// The listener's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A listener is away whose attendance is required, or who is being attached or brought up to
    /// date.
    #[error(
        "listener {listener:?} is away and cannot be told of {}: {source}; connect it anew \
         (AddressSpace::reconnect), detach it, or attach it with Attendance::MayLag; {}",
        Region(.region), Aftermath(.stale)
    )]
    Away {
        /// The name that it was attached by.
        listener: String,
        /// The region at which it failed, or else one that the change is about.
        region: Option<GuestRange>,
        /// Who is not up to date: this listener, unless it is back already, and whoever could not be
        /// put back.
        stale: Vec<StaleListener>,
        /// What became of it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The listener was detached, or is attached to another address space.
    #[error(
        "no such listener is attached here: it was detached, or belongs to another address space"
    )]
    NoSuchListener,
}

/// A listener that does not hold what it should, and why.
///
/// It is told everything at the next change, or by
/// [`AddressSpace::refresh`](crate::AddressSpace::refresh).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleListener {
    pub(crate) name: String,
    pub(crate) reason: String,
}

impl StaleListener {
    /// The name that it was attached by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why it is stale.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl fmt::Display for StaleListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is stale ({})", self.name, self.reason)
    }
}

struct Region<'a>(&'a Option<GuestRange>);

impl fmt::Display for Region<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(range) => write!(f, "the region {range}"),
            None => f.write_str("the memory"),
        }
    }
}

struct Aftermath<'a>(&'a [StaleListener]);

impl fmt::Display for Aftermath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing was changed")?;
        for (at, stale) in self.0.iter().enumerate() {
            let separator = if at == 0 { ", but " } else { ", " };
            write!(f, "{separator}{stale}")?;
        }
        Ok(())
    }
}

/// A listener that was not attached, given back, and the reason.
pub struct AttachError<L> {
    pub(crate) error: Box<crate::Error>,
    pub(crate) listener: L,
}

impl<L> AttachError<L> {
    /// Why it was not attached.
    pub fn error(&self) -> &crate::Error {
        &self.error
    }

    /// Takes both apart.
    pub fn into_parts(self) -> (crate::Error, L) {
        (*self.error, self.listener)
    }

    /// Takes the listener back. It holds nothing, unless the error calls it stale.
    pub fn into_listener(self) -> L {
        self.listener
    }
}

impl<L> fmt::Debug for AttachError<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<L> fmt::Display for AttachError<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<L> std::error::Error for AttachError<L> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl<L> From<AttachError<L>> for crate::Error {
    /// Keeps the reason and drops the listener.
    fn from(refused: AttachError<L>) -> Self {
        *refused.error
    }
}

impl From<AddressSpaceError> for crate::Error {
    fn from(error: AddressSpaceError) -> Self {
        Self::AddressSpace(Box::new(error))
    }
}
