//! The root of the crate's errors: a sum of those of the modules.

use crate::range::InvalidRange;
use crate::shortage::Shortage;

use crate::address_space::{AddressSpaceError, AttachError};
pub use crate::backing::{AdoptError, BackingError, FileError};
pub use crate::discard::DiscardError;
#[cfg(feature = "kvm")]
use crate::kvm::KvmError;
pub use crate::mapping::MapError;
pub use crate::options::OptionsError;
pub use crate::populate::PopulateError;
pub use crate::region::MemoryError;
use crate::stats::StatsError;
use crate::vhost_user::receive::ReceiveError;
#[cfg(feature = "vhost-user")]
use crate::vhost_user::session::SessionError;
#[cfg(feature = "vhost-user")]
use crate::vhost_user::share::ShareError;
#[cfg(feature = "vhost-user")]
use crate::vhost_user::table::TableError;

/// What went wrong, with the values that were asked for, the limit they met, and what to do.
///
/// `Display` says what failed and how to mend it; [`source`](std::error::Error::source) says why
/// the system refused, where it did.
///
/// ```
/// use guest_memory_shm::{Error, GuestRegionShm, InvalidRange, RamOptions};
/// use vm_memory::GuestAddress;
///
/// let place = (GuestAddress(0), 5000);
/// let error = GuestRegionShm::<()>::new(place, &RamOptions::new()).unwrap_err();
/// // One type for all that fails, where that is enough.
/// let error = Error::from(error);
/// assert!(matches!(error, Error::Range(InvalidRange::Unaligned { value: 5000, .. })));
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The options are wrong, by themselves or together; nothing was created.
    #[error(transparent)]
    Options(OptionsError),

    /// Something that RAM needs is short: huge pages, room in a file system, memory, descriptors.
    #[error(transparent)]
    Shortage(Box<Shortage>),

    /// A file cannot be RAM.
    #[error(transparent)]
    File(#[from] FileError),

    /// A backing could not be created or adopted, or is not what it was.
    #[error(transparent)]
    Backing(BackingError),

    /// A backing could not be mapped.
    #[error(transparent)]
    Map(MapError),

    /// RAM could not be populated.
    #[error(transparent)]
    Populate(#[from] PopulateError),

    /// Memory could not be given back.
    #[error(transparent)]
    Discard(DiscardError),

    /// The kernel does not report which RAM is allocated.
    #[error(transparent)]
    Stats(#[from] StatsError),

    /// A change of the guest's memory did not happen, or a listener is not up to date.
    #[error(transparent)]
    AddressSpace(Box<AddressSpaceError>),

    /// A memory table cannot be made, or a daemon cannot be sent it.
    #[cfg(feature = "vhost-user")]
    #[error(transparent)]
    Table(#[from] TableError),

    /// A daemon does not hold the memory that it should.
    #[cfg(feature = "vhost-user")]
    #[error(transparent)]
    Share(#[from] ShareError),

    /// A session with a daemon cannot do what it is told.
    #[cfg(feature = "vhost-user")]
    #[error(transparent)]
    Session(#[from] SessionError),

    /// A daemon does not take what it was sent of a memory table.
    #[error(transparent)]
    Receive(Box<ReceiveError>),

    /// KVM's memory slots could not be made what they should be.
    #[cfg(feature = "kvm")]
    #[error(transparent)]
    Kvm(KvmError),

    /// A range is not what it should be: empty, too large, not whole pages, or taken.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// A region or a ROM cannot be made, or regions do not make a memory.
    #[error(transparent)]
    Memory(Box<MemoryError>),
}

impl Error {
    /// What is short, if that is the reason: of RAM, of the dirty log that a daemon was to be
    /// sent, or of what a daemon was to map.
    pub fn shortage(&self) -> Option<&Shortage> {
        match self {
            #[cfg(feature = "vhost-user")]
            Self::Share(ShareError::Log(error))
            | Self::Session(SessionError::Share(ShareError::Log(error))) => error.shortage(),
            Self::Receive(error) => match &**error {
                ReceiveError::Region { cause, .. } => cause.shortage(),
                _ => None,
            },
            Self::Shortage(shortage)
            | Self::Populate(
                PopulateError::Shortage { shortage, .. } | PopulateError::CannotLook { shortage },
            ) => Some(shortage),
            _ => None,
        }
    }
}

#[cfg(feature = "kvm")]
impl From<KvmError> for Error {
    fn from(error: KvmError) -> Self {
        match error {
            KvmError::Range(error) => error.into(),
            error => Self::Kvm(error),
        }
    }
}

impl From<AddressSpaceError> for Error {
    fn from(error: AddressSpaceError) -> Self {
        match error {
            AddressSpaceError::Memory(error) => error.into(),
            error => Self::AddressSpace(Box::new(error)),
        }
    }
}

impl<L> From<AttachError<L>> for Error {
    /// Keeps the reason and drops the listener.
    fn from(refused: AttachError<L>) -> Self {
        AddressSpaceError::from(refused).into()
    }
}

impl From<DiscardError> for Error {
    fn from(error: DiscardError) -> Self {
        match error {
            DiscardError::Range(error) => Self::Range(error),
            error => Self::Discard(error),
        }
    }
}

impl From<Shortage> for Error {
    fn from(shortage: Shortage) -> Self {
        Self::Shortage(Box::new(shortage))
    }
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Range(error) => error.into(),
            MemoryError::Backing(error) => error.into(),
            MemoryError::Map(error) => error.into(),
            MemoryError::Populate(error) => error.into(),
            error => Self::Memory(Box::new(error)),
        }
    }
}

impl From<OptionsError> for Error {
    fn from(error: OptionsError) -> Self {
        match error {
            OptionsError::Range(error) => error.into(),
            error => Self::Options(error),
        }
    }
}

impl From<BackingError> for Error {
    fn from(error: BackingError) -> Self {
        match error {
            BackingError::Options(error) => error.into(),
            BackingError::Range(error) => error.into(),
            BackingError::Shortage(shortage) => Self::Shortage(shortage),
            BackingError::File(error) => error.into(),
            error => Self::Backing(error),
        }
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        match error {
            MapError::Backing(error) => error.into(),
            error => Self::Map(error),
        }
    }
}

impl From<ReceiveError> for Error {
    fn from(error: ReceiveError) -> Self {
        Self::Receive(Box::new(error))
    }
}

impl From<AdoptError> for Error {
    /// Keeps the reason and closes the descriptor.
    fn from(refused: AdoptError) -> Self {
        BackingError::from(refused).into()
    }
}

#[cfg(test)]
mod tests;
