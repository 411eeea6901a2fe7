//! The crate's one error type: each variant names the operation, the values and the way out.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use crate::range::InvalidRange;
use crate::shortage::Shortage;
use crate::units::HumanSize;

pub(crate) mod text;

use crate::address_space::{AddressSpaceError, AttachError};
pub use crate::backing::FileError;
pub use crate::discard::DiscardError;
#[cfg(feature = "kvm")]
use crate::kvm::KvmError;
pub use crate::mapping::NumaError;
pub use crate::options::OptionsError;
pub use crate::populate::PopulateError;
pub use crate::region::MemoryError;
use crate::stats::StatsError;
pub use crate::vhost_user::receive::{ReceiveError, RegionError, RegionSpace};
#[cfg(feature = "vhost-user")]
use crate::vhost_user::share::ShareError;
#[cfg(feature = "vhost-user")]
use crate::vhost_user::table::TableError;
use text::{human_sizes, shm_remedy};

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
    Options(#[from] OptionsError),

    /// Something that RAM needs is short: huge pages, room in a file system, memory, descriptors.
    #[error(transparent)]
    Shortage(Box<Shortage>),

    /// A file cannot be RAM.
    #[error(transparent)]
    File(#[from] FileError),

    /// RAM could not be populated.
    #[error(transparent)]
    Populate(#[from] PopulateError),

    /// Memory could not be given back.
    #[error(transparent)]
    Discard(DiscardError),

    /// The kernel does not say what of the RAM exists.
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

    /// Regions make no memory.
    #[error(transparent)]
    Memory(MemoryError),

    /// A backing of size 0, or longer than a file can be.
    #[error(
        "a backing of {} cannot exist: it must have at least one page and at most {}",
        HumanSize(*.size), HumanSize(*.limit)
    )]
    BackingTooLong {
        /// The size that was asked for, in bytes.
        size: u64,
        /// The largest size of a file, in bytes.
        limit: u64,
    },

    /// A page size that the kernel does not offer for huge pages.
    #[error(
        "huge pages of {} are not offered by this kernel, which has {}",
        HumanSize(*.page_size), human_sizes(.offered)
    )]
    NoSuchHugePageSize {
        /// The page size that was asked for, in bytes.
        page_size: u64,
        /// The sizes that the kernel offers, in bytes, smallest first.
        offered: Vec<u64>,
    },

    /// Huge pages of a pool were asked for in POSIX shared memory, which has none.
    #[error(
        "POSIX shared memory has no huge pages of a pool: use a memfd backing, or page size \
         transparent"
    )]
    HugePosixShm,

    /// The state of the pools of huge pages cannot be read.
    #[error(
        "cannot read the pools of huge pages in /sys/kernel/mm/hugepages: mount sysfs there, or \
         leave out hugetlb=on (PageSize::Base)"
    )]
    HugePoolUnreadable {
        /// The system's answer.
        source: io::Error,
    },

    /// The RAM cannot be placed on the NUMA nodes that were asked for.
    #[error(transparent)]
    Numa(Box<NumaError>),

    /// POSIX shared memory cannot be had at all: `/dev/shm` is missing, read-only or forbidden.
    #[error(
        "cannot create POSIX shared memory: {}; or use a memfd backing",
        shm_remedy(.source)
    )]
    ShmUnavailable {
        /// The answer of `shm_open`.
        source: io::Error,
    },

    /// Every name that was tried for a POSIX shared memory object exists already.
    #[error("{tried} names for POSIX shared memory exist already, the last is {last}: remove them")]
    ShmNamesTaken {
        /// How many names were tried.
        tried: usize,
        /// The last of them.
        last: String,
    },

    /// A system call on the way to a backing failed.
    #[error("cannot {doing} for a {kind} backing of {}", HumanSize(*.size))]
    CreateBacking {
        /// The step that failed.
        doing: &'static str,
        /// The kind of backing.
        kind: &'static str,
        /// The size that was asked for, in bytes.
        size: u64,
        /// The system's answer.
        source: io::Error,
    },

    /// A descriptor that was to be adopted is no file with pages that can be shared.
    #[error(
        "cannot adopt a descriptor of a {found}: RAM needs a memfd, POSIX shm or hugetlbfs file"
    )]
    AdoptNotMemory {
        /// What the descriptor is.
        found: &'static str,
    },

    /// A descriptor that was to be adopted is a file on disk (or on a file system that this crate
    /// does not know), and the policy does not allow that.
    #[error(
        "cannot adopt a file on a file system of type {fs_type:#x}: RAM on disk is slow and is \
         written back, allow it with AdoptPolicy::with_disk_files if that is meant"
    )]
    AdoptDiskFile {
        /// The type of the file system (`f_type` of statfs(2)).
        fs_type: u64,
    },

    /// A descriptor that was to be adopted is not open for reading and writing.
    #[error("cannot adopt a descriptor that is not open for reading and writing: open it O_RDWR")]
    AdoptReadOnly,

    /// A file that was to be adopted is shorter than the RAM.
    #[error(
        "cannot adopt a file of {} for RAM of {}: touching RAM behind the end of the file would \
         be SIGBUS, make the file longer first",
        HumanSize(*.len), HumanSize(*.needed)
    )]
    AdoptTooShort {
        /// The length of the file in bytes.
        len: u64,
        /// The length that is needed, in bytes.
        needed: u64,
    },

    /// A file that was to be adopted is not sealed as the policy demands, or is sealed against
    /// writing.
    #[error("cannot adopt a file whose seals are: {found}; {remedy}")]
    AdoptSeals {
        /// The seals that the file has.
        found: crate::backing::Seals,
        /// What would be accepted.
        remedy: &'static str,
    },

    /// A system call on a descriptor that was to be adopted failed.
    #[error("cannot adopt a descriptor: {doing} failed")]
    Adopt {
        /// The step that failed.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },

    /// A region reaches past the end of its backing.
    #[error(
        "a region of {} at offset {offset:#x} runs past the end of its backing at {end:#x}: \
         touching it there would be SIGBUS",
        HumanSize(*.size)
    )]
    OutsideBacking {
        /// The offset in the backing, in bytes.
        offset: u64,
        /// The size of the region in bytes.
        size: u64,
        /// Where the RAM of the backing ends in it, in bytes.
        end: u64,
    },

    /// A backing that is not sealed became shorter since it was created or adopted.
    #[error(
        "the backing had at least {} and has {} now: another process truncated it, touching what is gone \
         would be SIGBUS; use a sealed memfd or a trusted peer",
        HumanSize(*.end), HumanSize(*.now)
    )]
    BackingTruncated {
        /// Where its RAM ends in it, in bytes: it was at least that long.
        end: u64,
        /// The length that it has, in bytes.
        now: u64,
    },

    /// Memory could not be mapped.
    #[error(
        "cannot {doing} of {}: the address space of this process is limited, by the CPU, by \
         RLIMIT_AS and by vm.max_map_count",
        HumanSize(*.size)
    )]
    Map {
        /// The step that failed.
        doing: &'static str,
        /// The size in bytes.
        size: u64,
        /// The system's answer.
        source: io::Error,
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

/// A descriptor that was not adopted, given back, and the reason.
#[derive(Debug)]
pub struct AdoptError {
    pub(crate) error: Box<Error>,
    pub(crate) fd: OwnedFd,
}

impl AdoptError {
    /// Why the descriptor was not adopted.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Takes the descriptor back, as it was given.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl fmt::Display for AdoptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for AdoptError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
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
            error => Self::Memory(error),
        }
    }
}

impl From<NumaError> for Error {
    fn from(error: NumaError) -> Self {
        Self::Numa(Box::new(error))
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
        *refused.error
    }
}

#[cfg(test)]
mod tests;
