//! Why a daemon does not take what it was sent of a memory table.

use std::fmt;

use nix::errno::Errno;

use crate::backing::BackingError;
use crate::mapping::MapError;
use crate::range::{InvalidRange, RangePart};
use crate::region::MemoryError;
use crate::units::{Counted, HumanSize};

/// Why a daemon does not take a memory table, a change of it, or an address.
///
/// Whatever it was, nothing changed: the table that the daemon has is whole, and the descriptors
/// that came with the message are closed. Regions are named by their place in the message, from 0.
///
/// ```
/// use std::os::fd::OwnedFd;
///
/// use guest_memory_shm::receive::{ReceiveError, ReceivePolicy, ReceivedRegion, ReceivedTable};
/// use vm_memory::GuestAddress;
///
/// let region = ReceivedRegion {
///     guest_addr: GuestAddress(0),
///     size: 1 << 20,
///     user_addr: 0x7f00_0000_0000,
///     mmap_offset: 0,
/// };
/// let table = ReceivedTable::<()>::new(ReceivePolicy::new());
/// let refused = table.set([region], Vec::<OwnedFd>::new()).unwrap_err();
/// assert!(matches!(refused, ReceiveError::Descriptors { regions: 1, descriptors: 0 }));
/// assert_ne!(refused.reply_code(), 0);
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The payload of a message is not as long as its contents say.
    #[error(
        "the payload of {message} has {} and must have {expected}: the frontend and this daemon \
         do not speak the same protocol",
        Counted(len, "byte")
    )]
    Payload {
        /// The message.
        message: &'static str,
        /// The length of the payload in bytes.
        len: usize,
        /// The length that its contents need, in bytes.
        expected: u64,
    },

    /// A table without any region.
    #[error(
        "the memory table has no region, and a daemon without memory can do nothing: send one"
    )]
    NoRegions,

    /// The number of descriptors is not that of the regions.
    #[error(
        "{} came with {}: send one for each region",
        Counted(regions, "region"),
        Counted(descriptors, "file descriptor")
    )]
    Descriptors {
        /// The number of regions.
        regions: usize,
        /// The number of descriptors.
        descriptors: usize,
    },

    /// More regions than the daemon takes.
    #[error(
        "{regions} regions are more than the {limit} that this daemon takes: use fewer regions, \
         or have the daemon offer more memory slots (ReceivePolicy::with_mem_slots)"
    )]
    TooManyRegions {
        /// The number of regions that the table would have.
        regions: usize,
        /// The number that the policy allows.
        limit: usize,
    },

    /// More memory than the daemon maps.
    #[error(
        "{} of memory are more than the {} that this daemon maps: share less, or have the daemon \
         allow more (ReceivePolicy::with_max_size)",
        huge_size(*.size), HumanSize(*.limit)
    )]
    TooMuchMemory {
        /// The size that all regions would have together, in bytes.
        size: u128,
        /// The size that the policy allows, in bytes.
        limit: u64,
    },

    /// A region whose end has no 64-bit address, or lies where no file can be.
    #[error(
        "region {index} has {} at {part} {start:#x}, which ends past {limit:#x}: lower its {part} \
         or its size",
        HumanSize(*.size)
    )]
    Wraps {
        /// Which region it is.
        index: usize,
        /// Which of its numbers is too high.
        part: RangePart,
        /// That number.
        start: u64,
        /// Its size in bytes.
        size: u64,
        /// The highest end that it may have.
        limit: u64,
    },

    /// Two regions have addresses in common.
    #[error(
        "region {index} has the {part}es {}, of which {} has {}: move or shorten one of them",
        Span(.range.0, .range.1), other_region(*.other), Span(.other_range.0, .other_range.1)
    )]
    Overlap {
        /// Which region it is.
        index: usize,
        /// Which addresses: those in the guest or the user addresses.
        part: RangePart,
        /// The start and the size of the region in it.
        range: (u64, u64),
        /// The other region in the message; `None` for one that the daemon has already.
        other: Option<usize>,
        /// The start and the size of the other region.
        other_range: (u64, u64),
    },

    /// A region that is empty, or does not consist of whole pages of its file.
    #[error("region {index}: {cause}")]
    Range {
        /// Which region it is.
        index: usize,
        /// What is wrong with it.
        cause: InvalidRange,
    },

    /// A region that reaches past the end of its file, where touching it would be SIGBUS.
    #[error(
        "region {index} has {} at mmap offset {offset:#x}, and its file has {}: touching what is \
         past the end would be SIGBUS, make the file longer or the region shorter",
        HumanSize(*.size), HumanSize(*.len)
    )]
    FileTooShort {
        /// Which region it is.
        index: usize,
        /// Where it starts in the file, in bytes.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// The length of the file in bytes.
        len: u64,
    },

    /// A region whose descriptor cannot be adopted, or that cannot be mapped.
    #[error(transparent)]
    Region(#[from] RegionError),

    /// A region that is to be removed and is not there: guest address, user address and size must
    /// be those of one region.
    #[error(
        "there is no region of {} at guest address {guest_addr:#x} and user address \
         {user_addr:#x}: remove a region as it was added",
        HumanSize(*.size)
    )]
    NoSuchRegion {
        /// The guest address.
        guest_addr: u64,
        /// The user address.
        user_addr: u64,
        /// The size in bytes.
        size: u64,
    },

    /// A user address that is in no region.
    #[error(
        "user address {user_addr:#x} is in no region of the memory table: send the table before \
         the addresses in it, and addresses in terms of that table"
    )]
    NotMapped {
        /// The address.
        user_addr: u64,
    },

    /// A ring that runs past the end of its region.
    #[error(
        "{} at user address {user_addr:#x} run past the end of their region, {} further on: a \
         ring must lie inside one region",
        HumanSize(*.len), HumanSize(*.left)
    )]
    RingEnds {
        /// Where the ring starts.
        user_addr: u64,
        /// Its length in bytes.
        len: u64,
        /// What is left of the region from there, in bytes.
        left: u64,
    },
}

/// Why one region of a message was not mapped.
#[derive(Debug)]
pub struct RegionError {
    pub(crate) index: usize,
    pub(crate) error: Box<MemoryError>,
}

impl ReceiveError {
    /// What to answer to a message that wants to know (REPLY_ACK): never 0, which is success.
    ///
    /// Any other number is a failure (vhost-user specification,
    /// "VHOST_USER_PROTOCOL_F_REPLY_ACK"). These are numbers of errno(3), for people who read the
    /// frontend's log:
    ///
    /// | code | for |
    /// |---|---|
    /// | `EINVAL` (22) | what no daemon could take: a payload of a wrong length, sizes, wraps, alignments, the number of descriptors |
    /// | `EEXIST` (17) | an overlap with another region |
    /// | `ENOENT` (2) | a region that is to be removed and is not there |
    /// | `EFAULT` (14) | an address that is in no region, a ring that runs out of its region |
    /// | `ENOSPC` (28) | more regions than there are memory slots |
    /// | `EFBIG` (27) | more memory than the policy allows |
    /// | `ENXIO` (6) | a region past the end of its file |
    /// | `EPERM` (1) | seals that are not as the policy demands |
    /// | `EBADF` (9) | a descriptor that is no memory, or of a kind that the policy does not allow |
    /// | `ENOMEM` (12) | the daemon cannot map it: no address space, no huge pages, no descriptors |
    pub fn reply_code(&self) -> u64 {
        let errno = match self {
            Self::Overlap { .. } => Errno::EEXIST,
            Self::NoSuchRegion { .. } => Errno::ENOENT,
            Self::NotMapped { .. } | Self::RingEnds { .. } => Errno::EFAULT,
            Self::TooManyRegions { .. } => Errno::ENOSPC,
            Self::TooMuchMemory { .. } => Errno::EFBIG,
            Self::FileTooShort { .. } => Errno::ENXIO,
            Self::Region(refused) => refused.errno(),
            Self::Payload { .. }
            | Self::NoRegions
            | Self::Descriptors { .. }
            | Self::Range { .. }
            | Self::Wraps { .. } => Errno::EINVAL,
        };
        (errno as i32).unsigned_abs().into()
    }
}

impl RegionError {
    /// Which region of the message it is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Why it was not mapped.
    pub fn error(&self) -> &MemoryError {
        &self.error
    }

    fn errno(&self) -> Errno {
        match &*self.error {
            MemoryError::Backing(
                BackingError::WriteSealed { .. } | BackingError::NotSealed { .. },
            ) => Errno::EPERM,
            MemoryError::Backing(
                BackingError::NotMemory { .. }
                | BackingError::NotWritable
                | BackingError::OnDisk { .. }
                | BackingError::Inspect { .. },
            )
            | MemoryError::Map(MapError::NotShareable { .. }) => Errno::EBADF,
            MemoryError::Range(_) => Errno::EINVAL,
            MemoryError::Backing(
                BackingError::Truncated { .. } | BackingError::Outside { .. },
            ) => Errno::ENXIO,
            _ => Errno::ENOMEM,
        }
    }
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}: {}", self.index, self.error)
    }
}

impl std::error::Error for RegionError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// A range that is not empty and does not wrap, by its start and its size.
struct Span(u64, u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.0.saturating_add(self.1.saturating_sub(1));
        write!(f, "{:#x}..={last:#x} ({})", self.0, HumanSize(self.1))
    }
}

fn other_region(other: Option<usize>) -> String {
    match other {
        Some(index) => format!("region {index}"),
        None => "a region that is there already".to_owned(),
    }
}

/// A sum of sizes may be more than any size.
fn huge_size(size: u128) -> String {
    match u64::try_from(size) {
        Ok(size) => HumanSize(size).to_string(),
        Err(_) => format!("more than {}", HumanSize(u64::MAX)),
    }
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
