//! The crate's one error type: each variant names the operation, the values and the way out.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use vm_memory::GuestAddress;

use crate::range::GuestRange;
use crate::shortage::MemoryShortage;
use crate::units::HumanSize;

mod change;
pub(crate) mod text;

use crate::address_space::{AddressSpaceError, AttachError};
pub use crate::backing::FileError;
pub use crate::discard::DiscardError;
#[cfg(feature = "kvm")]
pub use crate::kvm::KvmError;
pub use crate::mapping::NumaError;
pub use crate::options::OptionsError;
pub use crate::populate::PopulateError;
pub use crate::vhost_user::receive::{ReceiveError, RegionError, RegionSpace};
pub use change::{MemTableChange, SlotLimit};
use text::{found_instead, human_sizes, shm_remedy, too_many};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the values that were asked for, the limit they met, and what to do.
///
/// `Display` says what failed and how to mend it; [`source`](std::error::Error::source) says why
/// the system refused, where it did.
///
/// ```
/// use guest_memory_shm::{Error, GuestMemoryShm};
/// use vm_memory::GuestAddress;
///
/// let error = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 5000)]).unwrap_err();
/// assert!(matches!(error, Error::UnalignedSize { size: 5000, .. }));
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The options are wrong, by themselves or together; nothing was created.
    #[error(transparent)]
    Options(#[from] OptionsError),

    /// A file cannot be RAM.
    #[error(transparent)]
    File(#[from] FileError),

    /// RAM could not be populated.
    #[error(transparent)]
    Populate(#[from] PopulateError),

    /// Memory could not be given back.
    #[error(transparent)]
    Discard(#[from] DiscardError),

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

    /// A range of guest addresses is empty.
    #[error("the range at guest address {:#x} has size 0: give it at least one page", .start.0)]
    EmptyRange {
        /// Where the range was to start.
        start: GuestAddress,
    },

    /// A range of guest addresses runs past 2^64.
    #[error(
        "the range of {} at guest address {:#x} has no 64-bit address behind it: lower its address \
         or its size",
        HumanSize(*.size), .start.0
    )]
    RangeOverflow {
        /// Where the range was to start.
        start: GuestAddress,
        /// Its size in bytes.
        size: u64,
    },

    /// A guest address is not a multiple of the page size of its backing.
    #[error(
        "guest address {:#x} is not a multiple of the page size {}: the nearest is {:#x}",
        .range.start_addr().0, HumanSize(*.page_size),
        .range.start_addr().0 - .range.start_addr().0 % .page_size
    )]
    UnalignedAddress {
        /// The range that starts there.
        range: GuestRange,
        /// The page size of the backing in bytes.
        page_size: u64,
    },

    /// A size is not a multiple of the page size of its backing.
    #[error(
        "size {} is not a multiple of the page size {}: the nearest larger is {}",
        HumanSize(*.size), HumanSize(*.page_size),
        HumanSize(.size.checked_next_multiple_of(*.page_size).unwrap_or(*.size - *.size % *.page_size))
    )]
    UnalignedSize {
        /// The size in bytes.
        size: u64,
        /// The page size of the backing in bytes.
        page_size: u64,
    },

    /// Two ranges of guest addresses have addresses in common.
    #[error("guest ranges {first} and {second} overlap: move or shorten one of them")]
    Overlap {
        /// The lower one.
        first: GuestRange,
        /// The higher one.
        second: GuestRange,
    },

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

    /// The pool of huge pages is too small for the RAM.
    #[error(
        "needs {needed} huge pages of {}, {available} are free ({free} unused, {reserved} of them \
         reserved by others): raise /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages by {} or \
         leave out hugetlb=on (PageSize::Base)",
        HumanSize(*.page_size), .page_size / 1024, .needed.saturating_sub(*.available)
    )]
    HugePoolShort {
        /// Pages that the RAM needs.
        needed: u64,
        /// Pages that can still be promised: unused, less reserved, plus what may be overcommitted.
        available: u64,
        /// Unused pages in the pool.
        free: u64,
        /// Unused pages that are promised to somebody already.
        reserved: u64,
        /// The page size in bytes.
        page_size: u64,
    },

    /// A control group of this process does not leave the huge pages that the RAM needs.
    #[error("cannot have huge pages: {shortage}")]
    HugePagesLimited {
        /// What is short.
        shortage: Box<MemoryShortage>,
    },

    /// The state of the pools of huge pages cannot be read.
    #[error(
        "cannot read the pools of huge pages in /sys/kernel/mm/hugepages: mount sysfs there, or \
         leave out hugetlb=on (PageSize::Base)"
    )]
    HugePoolUnreadable {
        /// The system's answer.
        source: io::Error,
    },

    /// The size exceeds the process's limit on file sizes, which shared memory obeys too.
    #[error(
        "a backing of {} exceeds RLIMIT_FSIZE, which is {}: raise it (ulimit -f)",
        HumanSize(*.size), HumanSize(*.limit)
    )]
    FileSizeLimit {
        /// The size that was asked for, in bytes.
        size: u64,
        /// The soft limit in bytes.
        limit: u64,
    },

    /// No more file descriptors.
    #[error(
        "no file descriptor is left for {doing}: the process may have {limit}, \
         raise RLIMIT_NOFILE (ulimit -n)"
    )]
    NoDescriptors {
        /// What needed one.
        doing: &'static str,
        /// The soft limit on descriptors of this process.
        limit: u64,
        /// The system's answer, `EMFILE`.
        source: io::Error,
    },

    /// The whole system has as many files open as it may: a limit of the process is of no concern.
    #[error(
        "no file can be opened for {doing}: the whole system has as many open as it may, raise the \
         limit (sysctl fs.file-max), or close some"
    )]
    NoSystemDescriptors {
        /// What needed one.
        doing: &'static str,
        /// The system's answer, `ENFILE`.
        source: io::Error,
    },

    /// Fewer file descriptors are left than the backings need.
    #[error(
        "{needed} backings need a file descriptor each and {left} are left of {limit}: raise \
         RLIMIT_NOFILE (ulimit -n), or put several ranges on one backing"
    )]
    TooFewDescriptors {
        /// Descriptors that are needed.
        needed: u64,
        /// Descriptors that this process can still have.
        left: u64,
        /// The soft limit on descriptors of this process.
        limit: u64,
    },

    /// The RAM cannot be placed on the NUMA nodes that were asked for.
    #[error(transparent)]
    Numa(Box<NumaError>),

    /// The file system behind POSIX shm can never hold the RAM, or, for RAM that is to be
    /// populated, cannot hold it now.
    #[error(
        "POSIX shared memory of {} does not fit into the file system behind it, which holds {} \
         ({} of them free): remount /dev/shm with a larger size or use a memfd backing",
        HumanSize(*.size), HumanSize(*.capacity), HumanSize(*.free)
    )]
    ShmTooSmall {
        /// The size that was asked for, in bytes.
        size: u64,
        /// The size of the file system in bytes.
        capacity: u64,
        /// What is free of it, in bytes.
        free: u64,
    },

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

    /// An offset into a backing is not a multiple of its page size.
    #[error(
        "offset {offset:#x} in the backing is not a multiple of its page size {}: the nearest is \
         {:#x}",
        HumanSize(*.page_size), .offset - .offset % .page_size
    )]
    UnalignedOffset {
        /// The offset in bytes.
        offset: u64,
        /// The page size of the backing in bytes.
        page_size: u64,
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

    /// A second view on the RAM, as vm-memory's own type, could not be made.
    #[error("cannot map {range} once more as vm-memory's GuestMemoryMmap")]
    Remap {
        /// The range of the region.
        range: GuestRange,
        /// vm-memory's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The kernel does not say what of the RAM exists.
    #[error("cannot {doing}, to say what of the RAM exists: mount procfs, and see the cause")]
    Stats {
        /// The step that failed.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
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

impl From<AddressSpaceError> for Error {
    fn from(error: AddressSpaceError) -> Self {
        match error {
            AddressSpaceError::Memory(error) => *error,
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
