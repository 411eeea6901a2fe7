//! Why a change of the address space did not happen.

use std::fmt;

use super::status::ListenerStatus;
use crate::listener::ListenerError;
use crate::region::MemoryError;

pub(super) type Result<T, E = AddressSpaceError> = std::result::Result<T, E>;

/// Why a change of the guest's memory did not happen, or a listener is not up to date.
///
/// After a change that failed the memory is what it was, and so is what every listener holds,
/// except those that the error calls stale.
///
/// Where a listener failed, [`source`](std::error::Error::source) is the cause as the listener
/// gave it:
///
/// ```
/// use std::error::Error;
///
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, ListenerError, MemoryListener};
///
/// #[derive(Debug, thiserror::Error)]
/// #[error("all windows are taken")]
/// struct NoWindow;
///
/// struct Bus;
///
/// impl MemoryListener for Bus {
///     fn check(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
///         Err(ListenerError::refused(NoWindow))
///     }
///     fn update(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
///         Ok(())
///     }
/// }
///
/// let space = AddressSpace::new(GuestMemoryShm::<()>::new());
/// let error = space.attach("bus", Bus).unwrap_err();
/// assert!(error.source().is_some_and(|cause| cause.is::<NoWindow>()));
/// let text = "listener \"bus\" was not attached because it refuses the memory";
/// assert_eq!(error.to_string(), text);
/// ```
#[non_exhaustive]
#[derive(Debug)]
pub enum AddressSpaceError {
    /// Nothing was changed: a listener refuses, or is away and
    /// [required](crate::AddressSpace::attach_required).
    #[non_exhaustive]
    Change {
        /// The name that it is attached by.
        listener: String,
        /// What it answered; the region is one that the change is about, if it named none.
        error: ListenerError,
        /// Which listeners are stale now: those that could not be put back, and those that were
        /// stale before.
        stale: Vec<ListenerStatus>,
    },

    /// A listener was not attached: it refuses the memory, or is away.
    #[non_exhaustive]
    Attach {
        /// The name that it was to be attached by.
        listener: String,
        /// What it answered.
        error: ListenerError,
        /// What it answered when it was to let go of the memory again, if that failed: it may hold
        /// a part of it.
        stale: Option<ListenerError>,
    },

    /// A listener was not brought up to date: it refuses the memory, or is away, and is stale. The
    /// others were not told anything.
    #[non_exhaustive]
    Refresh {
        /// The name that it is attached by.
        listener: String,
        /// What it answered.
        error: ListenerError,
    },

    /// The memory cannot be changed like that: no such region, or regions that overlap. No
    /// listener was asked or told.
    Memory(MemoryError),

    /// The listener was detached, or is attached to another address space.
    NoSuchListener,

    /// The address space was called by code that it was calling itself: a listener, a handler of
    /// bases, or the closure of [`with_listener`](crate::AddressSpace::with_listener). The call
    /// would wait for itself; nothing was done.
    ///
    /// [`AddressSpace::published`](crate::AddressSpace::published) and
    /// [`AddressSpace::atomic`](crate::AddressSpace::atomic) can be called there.
    Reentrant,

    /// Other code replaced the memory in [`AddressSpace::atomic`](crate::AddressSpace::atomic),
    /// and no listener was told. The memory of the address space is there again, nothing else was
    /// done, and the next change works as before.
    MirrorReplaced,
}

impl fmt::Display for AddressSpaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Change {
                listener,
                error,
                stale,
            } => {
                f.write_str("nothing was changed")?;
                for (at, stale) in stale.iter().enumerate() {
                    f.write_str(if at == 0 { ", but " } else { ", " })?;
                    match stale.name() == listener {
                        // The source says why.
                        true => write!(f, "{listener:?} is stale")?,
                        false => stale.fmt(f)?,
                    }
                }
                write!(f, ": listener {listener:?} {error}")?;
                bring_back(
                    f,
                    error,
                    ", detach it, or attach it without requiring it (AddressSpace::attach)",
                )
            }
            Self::Attach {
                listener,
                error,
                stale,
            } => {
                write!(
                    f,
                    "listener {listener:?} was not attached because it {error}"
                )?;
                if let Some(stale) = stale {
                    f.write_str(", and is stale")?;
                    if stale.reason() != error.reason() {
                        write!(f, " ({})", stale.reason())?;
                    }
                }
                match error.is_away() {
                    true => f.write_str("; connect it anew and attach it then"),
                    false => Ok(()),
                }
            }
            Self::Refresh { listener, error } => {
                write!(
                    f,
                    "listener {listener:?} is stale, and the others were not told anything: it \
                     {error}"
                )?;
                bring_back(f, error, ", or detach it")
            }
            Self::Memory(error) => error.fmt(f),
            Self::NoSuchListener => f.write_str(
                "no such listener is attached here: it was detached, or belongs to another \
                 address space",
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

/// What to do about a listener that is away, if it is.
fn bring_back(f: &mut fmt::Formatter<'_>, error: &ListenerError, or: &str) -> fmt::Result {
    match error.is_away() {
        true => write!(
            f,
            "; bring it back (AddressSpace::reconnect_session for a session, reconnect for a \
             share, refresh for any other listener){or}"
        ),
        false => Ok(()),
    }
}

impl std::error::Error for AddressSpaceError {
    /// The listener's own error: what it did with the memory has been said.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Change { error, .. }
            | Self::Attach { error, .. }
            | Self::Refresh { error, .. } => error.source(),
            Self::Memory(error) => error.source(),
            Self::NoSuchListener | Self::Reentrant | Self::MirrorReplaced => None,
        }
    }
}

/// A listener that was not attached, given back, and the reason.
pub struct AttachError<L> {
    pub(super) error: AddressSpaceError,
    pub(super) listener: L,
}

impl<L> AttachError<L> {
    /// Why it was not attached.
    pub fn error(&self) -> &AddressSpaceError {
        &self.error
    }

    /// Takes both apart.
    pub fn into_parts(self) -> (AddressSpaceError, L) {
        (self.error, self.listener)
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

impl From<MemoryError> for AddressSpaceError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

impl<L> From<AttachError<L>> for AddressSpaceError {
    /// Keeps the reason and drops the listener.
    fn from(refused: AttachError<L>) -> Self {
        refused.error
    }
}
