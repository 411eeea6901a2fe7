//! Why a change of the address space did not happen.

use std::fmt;

use crate::range::GuestRange;

/// Why a change of the guest's memory did not happen, or a listener is not up to date.
///
/// After a change that failed the memory is what it was, and so is what every listener holds, but
/// for those that the error calls stale.
#[non_exhaustive]
#[derive(Debug)]
pub enum AddressSpaceError {
    /// A listener refuses a memory.
    Refused {
        /// The name that it is attached by.
        listener: String,
        /// When that was.
        occasion: Occasion,
        /// The region at which it failed, or else one that the change is about.
        region: Option<GuestRange>,
        /// Who is stale now, and why: who could not be put back, and who was stale before.
        stale: Vec<StaleListener>,
        /// The listener's reason.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A listener is away whose attendance is required, or who is being attached or brought up to
    /// date.
    Away {
        /// The name that it is attached by.
        listener: String,
        /// When that was noticed.
        occasion: Occasion,
        /// The region at which it failed, or else one that the change is about.
        region: Option<GuestRange>,
        /// Who is stale now, and why: this listener, unless it is back already, who could not be
        /// put back, and who was stale before.
        stale: Vec<StaleListener>,
        /// What became of it.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The listener was detached, or is attached to another address space.
    NoSuchListener,

    /// The address space was called by what it was calling itself: a listener, a handler of bases,
    /// or the closure of [`with_listener`](crate::AddressSpace::with_listener). To go on would be
    /// to wait for itself; nothing was done.
    ///
    /// [`AddressSpace::memory`](crate::AddressSpace::memory) and
    /// [`AddressSpace::atomic`](crate::AddressSpace::atomic) can be called there.
    Reentrant,

    /// Other code replaced the memory in [`AddressSpace::atomic`](crate::AddressSpace::atomic),
    /// past all listeners. The memory of the address space is there again, nothing else was done,
    /// and the next change goes on as ever.
    MirrorReplaced,
}

impl fmt::Display for AddressSpaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused {
                listener,
                occasion,
                region,
                stale,
                cause,
            } => {
                write!(f, "{}", Outcome(*occasion, listener, stale))?;
                write!(
                    f,
                    "listener {listener:?} refuses {}: {cause}",
                    Region(region)
                )
            }
            Self::Away {
                listener,
                occasion,
                region,
                stale,
                cause,
            } => {
                write!(f, "{}", Outcome(*occasion, listener, stale))?;
                let (region, remedy) = (Region(region), occasion.remedy());
                write!(
                    f,
                    "listener {listener:?} is away and cannot be told of {region}, "
                )?;
                write!(f, "{remedy}: {cause}")
            }
            Self::NoSuchListener => f.write_str(
                "no such listener is attached here: it was detached, or belongs to another address \
                 space",
            ),
            Self::Reentrant => f.write_str(
                "the address space was called by code that it was running itself (a listener, a \
                 handler of bases, or the closure of with_listener), and would wait for itself: \
                 return from there first; memory() and atomic() may be called there",
            ),
            Self::MirrorReplaced => f.write_str(
                "nothing was changed: other code replaced the memory in AddressSpace::atomic(), \
                 which no listener was told of; it is put back, so try again, and let only the \
                 address space publish (AddressSpace::transaction)",
            ),
        }
    }
}

impl std::error::Error for AddressSpaceError {
    /// What is behind the cause: the cause itself has been said.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Refused { cause, .. } | Self::Away { cause, .. } => cause.source(),
            Self::NoSuchListener | Self::Reentrant | Self::MirrorReplaced => None,
        }
    }
}

/// A listener that does not hold what it should, and why.
///
/// It is told everything at the next change, or by
/// [`AddressSpace::refresh`](crate::AddressSpace::refresh).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleListener {
    pub(crate) id: u64,
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

/// What a listener was told for when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Occasion {
    /// A change of the memory.
    Change,
    /// It was being attached.
    Attach,
    /// It was being brought up to date, or connected to anew.
    Refresh,
}

impl Occasion {
    fn remedy(self) -> &'static str {
        match self {
            Self::Change => {
                "connect it anew (AddressSpace::reconnect), detach it, or attach it with \
                 Attendance::MayLag"
            }
            Self::Attach => "connect it anew and attach it then",
            Self::Refresh => "connect it anew (AddressSpace::reconnect), or detach it",
        }
    }

    fn outcome(self) -> &'static str {
        match self {
            Self::Change => "nothing was changed",
            Self::Attach => "it was not attached",
            Self::Refresh => "the others were not told anything",
        }
    }
}

/// What came of it: for which occasion, because of which listener, and who is stale.
struct Outcome<'a>(Occasion, &'a str, &'a [StaleListener]);

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(occasion, listener, stale) = self;
        f.write_str(occasion.outcome())?;
        for (at, stale) in stale.iter().enumerate() {
            f.write_str(if at == 0 { ", but " } else { ", " })?;
            match stale.name == *listener {
                // Why is said behind this.
                true => write!(f, "{listener:?} is stale")?,
                false => stale.fmt(f)?,
            }
        }
        f.write_str(": ")
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
