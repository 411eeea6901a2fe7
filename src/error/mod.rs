//! The crate's one error type: each variant names the operation, the values and the way out.

use std::io;
use std::time::Duration;

use vm_memory::GuestAddress;

use crate::range::{GuestRange, InvalidRange};
use crate::shortage::Shortage;
use crate::units::HumanSize;

mod change;
pub(crate) mod text;

pub use crate::address_space::{AddressSpaceError, AttachError, Occasion, StaleListener};
pub use crate::backing::{AdoptError, BackingError, FileError};
pub use crate::discard::DiscardError;
#[cfg(feature = "kvm")]
pub use crate::kvm::KvmError;
pub use crate::mapping::MapError;
pub use crate::options::OptionsError;
pub use crate::populate::PopulateError;
use crate::stats::StatsError;
pub use crate::vhost_user::receive::{ReceiveError, RegionError, RegionSpace};
pub use change::{MemTableChange, SlotLimit};
use text::{found_instead, too_many};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the values that were asked for, the limit they met, and what to do.
///
/// `Display` says what failed and how to mend it; [`source`](std::error::Error::source) says why
/// the system refused, where it did.
///
/// ```
/// use guest_memory_shm::{Error, GuestMemoryShm, InvalidRange};
/// use vm_memory::GuestAddress;
///
/// let error = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 5000)]).unwrap_err();
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
    Discard(#[from] DiscardError),

    /// The kernel does not say what of the RAM exists.
    #[error(transparent)]
    Stats(#[from] StatsError),

    /// A change of the guest's memory did not happen, or a listener is not up to date.
    #[error(transparent)]
    AddressSpace(Box<AddressSpaceError>),

    /// A daemon does not take what it was sent of a memory table.
    #[error(transparent)]
    Receive(Box<ReceiveError>),

    /// KVM's memory slots could not be made what they should be.
    #[cfg(feature = "kvm")]
    #[error(transparent)]
    Kvm(#[from] KvmError),

    /// A range is not what it should be: empty, too large, not whole pages, or taken.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// Guest memory without any range was asked for.
    #[error("no range of guest RAM was given: give at least one")]
    NoRanges,

    /// No region has exactly this address and size.
    #[error(
        "no region of {} starts at guest address {:#x}, where {}",
        HumanSize(*.size), .start.0, found_instead(*.found)
    )]
    NoSuchRegion {
        /// The address that was looked for.
        start: GuestAddress,
        /// The size that was looked for, in bytes.
        size: u64,
        /// The size of the region that starts there, if one does.
        found: Option<u64>,
    },

    /// A second view on the RAM, as vm-memory's own type, could not be made.
    #[error("cannot map {range} once more as vm-memory's GuestMemoryMmap")]
    Remap {
        /// The range of the region.
        range: GuestRange,
        /// vm-memory's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A constant that cannot be added to guest addresses to make user addresses; nothing was sent.
    #[error(
        "{constant:#x} is no user address for guest address 0: for the region {range} it must be \
         at most {limit:#x}, so that no address runs past 2^64, and a multiple of {}",
        HumanSize(*.page_size)
    )]
    OpaqueConstant {
        /// The region whose user addresses it would make.
        range: GuestRange,
        /// The constant in bytes.
        constant: u64,
        /// The largest constant for this region.
        limit: u64,
        /// The page size in bytes.
        page_size: u64,
    },

    /// In-kernel vhost cannot be told of a region that is not mapped in this process at its user
    /// address; nothing was sent.
    #[error(
        "the kernel would use the region {range} at its user address in this process, where it is \
         not mapped: send a table with host addresses (UserAddresses::Host) of memory that is \
         still alive; nothing was sent"
    )]
    NoHostAddress {
        /// The region.
        range: GuestRange,
    },

    /// A daemon cannot be sent a dirty log.
    #[error(
        "the daemon cannot log what it writes in memory that is shared with us: negotiate \
         LOG_SHMFD with it, or stop the log (VhostUserShare::stop_log)"
    )]
    LogNotShared,

    /// An empty memory table, which SET_MEM_TABLE cannot carry; nothing was sent.
    #[error(
        "SET_MEM_TABLE cannot carry an empty memory table: keep a region in it, or negotiate \
         CONFIGURE_MEM_SLOTS; nothing was sent"
    )]
    EmptyTable,

    /// A memory table has more regions than the daemon takes; nothing was sent.
    #[error(
        "the memory table has {regions} regions, {}; nothing was sent",
        too_many(*.limit, *.slots)
    )]
    TooManyRegions {
        /// The number of regions.
        regions: usize,
        /// The number that the daemon takes.
        limit: u64,
        /// Which limit was met.
        slots: SlotLimit,
    },

    /// The daemon refused a change of its memory table. Whether the share goes on, says
    /// `VhostUserShare::broken`.
    #[error("the daemon refused to {change}: {}: look at its log", change.likely_refusal())]
    DaemonRefused {
        /// The change.
        change: MemTableChange,
        /// vhost's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The daemon hung up during a change or right after it; the share is broken.
    #[error(
        "the daemon hung up when told to {change}: it died, or that is how it refuses; \
         restart it or reconnect to it"
    )]
    DaemonHungUp {
        /// The change that was not, or not lastingly, acknowledged.
        change: MemTableChange,
        /// vhost's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The daemon had hung up before it was told anything; the share is broken.
    #[error("the daemon hung up some time ago: restart it or reconnect to it")]
    DaemonGone,

    /// The daemon did not answer in time; the connection was closed, the share is broken.
    #[error(
        "the daemon did not answer within {limit:?} when told to {change}: the connection was \
         closed, restart the daemon or allow more with VhostUserShare::with_time_limit"
    )]
    DaemonSilent {
        /// The change that was not acknowledged.
        change: MemTableChange,
        /// The time that it had.
        limit: Duration,
    },

    /// The exchange with the daemon failed in another way; the share is broken.
    #[error(
        "the daemon could not be made to {change}: its answer does not fit the protocol, and the \
         connection was closed; it is faulty, or the share was given protocol features other than \
         those acknowledged (SET_PROTOCOL_FEATURES)"
    )]
    DaemonProtocol {
        /// The change.
        change: MemTableChange,
        /// vhost's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The daemon answered as daemons do while postcopy listens, and what this share talks through
    /// cannot go on with that; the share is broken.
    #[error(
        "the daemon could not be made to {change}: it answered with addresses for postcopy, which \
         this connection cannot acknowledge; the connection was closed, build guest-memory-shm \
         with its feature postcopy, or implement MemTableSink::acknowledge_bases"
    )]
    NoPostcopy {
        /// The change.
        change: MemTableChange,
    },

    /// A call on the connection to a daemon took too long; the connection was closed.
    #[error(
        "the daemon did not answer within {limit:?}: the connection was closed, restart the \
         daemon or allow more time"
    )]
    TimeLimit {
        /// The time that it had.
        limit: Duration,
    },

    /// Nobody can watch the time that a daemon takes; nothing was sent.
    #[error(
        "the daemon's time to answer cannot be limited, and it might never answer: nothing was \
         sent; raise RLIMIT_NPROC (ulimit -u), or connect anew in this process"
    )]
    NoTimeLimit {
        /// Why there is no thread to watch it.
        source: io::Error,
    },

    /// A share was used after it broke.
    #[error("the share with this daemon is broken ({reason}): reconnect first")]
    ShareBroken {
        /// Why it broke.
        reason: String,
    },

    /// The mock daemon, or a driver of the mock with any daemon, could not do its part.
    #[error("cannot {doing}")]
    Mock {
        /// The step that failed.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// What is short, if that is the reason.
    pub fn shortage(&self) -> Option<&Shortage> {
        match self {
            Self::Shortage(shortage)
            | Self::Populate(
                PopulateError::Shortage { shortage, .. } | PopulateError::CannotLook { shortage },
            ) => Some(shortage),
            _ => None,
        }
    }
}

impl From<Shortage> for Error {
    fn from(shortage: Shortage) -> Self {
        Self::Shortage(Box::new(shortage))
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
