//! Why a daemon does not take what it was sent of a memory table.

use std::fmt;

use nix::errno::Errno;
use vm_memory::GuestAddress;

use crate::backing::BackingError;
use crate::mapping::MapError;
use crate::range::RangePart;
use crate::region::MemoryError;
use crate::units::{Counted, HumanSize};

/// Why a daemon does not take a memory table, a change of it, or an address.
///
/// Whatever it was, nothing changed: the table that the daemon has is whole, and the descriptors
/// that came with the message are closed. The texts name a region by its addresses; `index` is its
/// place in the message, from 0.
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
/// assert!(matches!(refused, ReceiveError::Descriptors { regions: 1, descriptors: 0, .. }));
/// assert_ne!(refused.reply_code(), 0);
/// ```
#[non_exhaustive]
#[derive(Debug)]
pub enum ReceiveError {
    /// The payload of a message is not as long as its contents say.
    #[non_exhaustive]
    Payload {
        /// The message.
        message: &'static str,
        /// The length of the payload in bytes.
        len: usize,
        /// The length that its contents need, in bytes.
        expected: u64,
    },

    /// A table without any region.
    NoRegions,

    /// The number of descriptors is not that of the regions.
    #[non_exhaustive]
    Descriptors {
        /// The number of regions.
        regions: usize,
        /// The number of descriptors.
        descriptors: usize,
    },

    /// More regions than the daemon takes.
    #[non_exhaustive]
    TooManyRegions {
        /// The number of regions that the table would have.
        regions: usize,
        /// The number that the policy allows.
        limit: usize,
    },

    /// More memory than the daemon maps.
    #[non_exhaustive]
    TooMuchMemory {
        /// The size that all regions would have together, in bytes.
        size: u128,
        /// The size that the policy allows, in bytes.
        limit: u64,
    },

    /// A region whose end has no 64-bit address, or lies where no file can be.
    #[non_exhaustive]
    Wraps {
        /// Which region it is.
        index: usize,
        /// Its guest address.
        guest_addr: GuestAddress,
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
    #[non_exhaustive]
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

    /// A region that is empty or not whole pages, whose descriptor cannot be adopted or has too
    /// short a file, or that cannot be mapped.
    #[non_exhaustive]
    Region {
        /// Which region it is.
        index: usize,
        /// Its guest address and its size in bytes, as they were sent.
        range: (GuestAddress, u64),
        /// Why it was not mapped.
        cause: Box<MemoryError>,
    },

    /// A region that is to be removed and is not there: guest address, user address and size must
    /// be those of one region.
    #[non_exhaustive]
    NoSuchRegion {
        /// The guest address.
        guest_addr: u64,
        /// The user address.
        user_addr: u64,
        /// The size in bytes.
        size: u64,
    },

    /// A user address that is in no region.
    #[non_exhaustive]
    NotMapped {
        /// The address.
        user_addr: u64,
    },

    /// A ring that runs past the end of its region.
    #[non_exhaustive]
    RingEnds {
        /// Where the ring starts.
        user_addr: u64,
        /// Its length in bytes.
        len: u64,
        /// What is left of the region from there, in bytes.
        left: u64,
    },
}

impl ReceiveError {
    /// The region at this place in the message was not mapped, for this reason.
    pub(super) fn region(
        index: usize,
        range: (GuestAddress, u64),
        cause: impl Into<MemoryError>,
    ) -> Self {
        Self::Region {
            index,
            range,
            cause: Box::new(cause.into()),
        }
    }

    /// What to answer to a message that wants to know (REPLY_ACK): never 0, which is success.
    ///
    /// Any other number is a failure (vhost-user specification,
    /// "VHOST_USER_PROTOCOL_F_REPLY_ACK"; vhost's `BackendReqHandler` answers 1 to all). These are
    /// numbers of errno(3), for people who read the frontend's log:
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
            Self::Region { cause, .. } => errno(cause),
            Self::Payload { .. }
            | Self::NoRegions
            | Self::Descriptors { .. }
            | Self::Wraps { .. } => Errno::EINVAL,
        };
        (errno as i32).unsigned_abs().into()
    }
}

/// The code for a region that was not mapped.
fn errno(cause: &MemoryError) -> Errno {
    match cause {
        MemoryError::Range(_) => Errno::EINVAL,
        MemoryError::Map(MapError::NotShareable { .. }) => Errno::EBADF,
        MemoryError::Backing(cause) => match cause {
            BackingError::WriteSealed { .. } | BackingError::NotSealed { .. } => Errno::EPERM,
            BackingError::NotMemory { .. }
            | BackingError::NotWritable
            | BackingError::OnDisk { .. }
            | BackingError::Inspect { .. }
            | BackingError::FileSystemUnknown { .. }
            | BackingError::File(_) => Errno::EBADF,
            BackingError::TooShort { .. }
            | BackingError::Outside { .. }
            | BackingError::Truncated { .. } => Errno::ENXIO,
            _ => Errno::ENOMEM,
        },
        _ => Errno::ENOMEM,
    }
}

impl fmt::Display for ReceiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Payload {
                message,
                len,
                expected,
            } => write!(
                f,
                "the payload of {message} has {} and must have {expected}: the frontend and this \
                 daemon do not speak the same protocol",
                Counted(len, "byte")
            ),
            Self::NoRegions => f.write_str(
                "the memory table has no region, and a daemon without memory can do nothing: send \
                 one",
            ),
            Self::Descriptors {
                regions,
                descriptors,
            } => write!(
                f,
                "{} came with {}: send one for each region",
                Counted(regions, "region"),
                Counted(descriptors, "file descriptor")
            ),
            Self::TooManyRegions { regions, limit } => write!(
                f,
                "{regions} regions are more than the {limit} that this daemon takes: use fewer \
                 regions, or have the daemon offer more memory slots \
                 (ReceivePolicy::with_mem_slots)"
            ),
            Self::TooMuchMemory { size, limit } => write!(
                f,
                "{} of memory are more than the {} that this daemon maps: share less, or have the \
                 daemon allow more (ReceivePolicy::with_max_size)",
                huge_size(*size),
                HumanSize(*limit)
            ),
            Self::Wraps {
                guest_addr,
                part,
                start,
                size,
                limit,
                ..
            } => write!(
                f,
                "the region at guest address {:#x} has {} at {part} {start:#x}, which ends past \
                 {limit:#x}: lower its {part} or its size",
                guest_addr.0,
                HumanSize(*size)
            ),
            Self::Overlap {
                part,
                range,
                other,
                other_range,
                ..
            } => write!(
                f,
                "the region with the {part}es {} overlaps {}, which has {}: move or shorten one \
                 of them",
                Span(range.0, range.1),
                match other {
                    Some(_) => "another of the same message",
                    None => "one that is there already",
                },
                Span(other_range.0, other_range.1)
            ),
            Self::Region { range, cause, .. } => {
                write!(f, "region {}: {cause}", Span(range.0.0, range.1))
            }
            Self::NoSuchRegion {
                guest_addr,
                user_addr,
                size,
            } => write!(
                f,
                "there is no region of {} at guest address {guest_addr:#x} and user address \
                 {user_addr:#x}: remove a region as it was added",
                HumanSize(*size)
            ),
            Self::NotMapped { user_addr } => write!(
                f,
                "user address {user_addr:#x} is in no region of the memory table: send the table \
                 before the addresses in it, and addresses in terms of that table"
            ),
            Self::RingEnds {
                user_addr,
                len,
                left,
            } => write!(
                f,
                "{} at user address {user_addr:#x} run past the end of their region, {} further \
                 on: a ring must lie inside one region",
                HumanSize(*len),
                HumanSize(*left)
            ),
        }
    }
}

impl std::error::Error for ReceiveError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Region { cause, .. } => cause.source(),
            _ => None,
        }
    }
}

/// A range by its start and its size, which may be empty or wrap.
struct Span(u64, u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)?;
        if let Some(more) = self.1.checked_sub(1) {
            write!(f, "..={:#x}", self.0.saturating_add(more))?;
        }
        write!(f, " ({})", HumanSize(self.1))
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
