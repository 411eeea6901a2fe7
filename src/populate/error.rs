//! Why RAM could not be populated.

use std::io;

use vm_memory::GuestAddress;

use crate::range::GuestRange;
use crate::shortage::Shortage;
use crate::units::HumanSize;

/// Why RAM could not be populated.
///
/// The range is the part of the RAM that was being worked on; `needed` is what was still missing
/// of all that was to be populated.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, GuestRange, Populate, PopulateError, PopulateOptions};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let beyond = GuestRange::new(GuestAddress(0), 2 << 20)?;
/// let refused = memory.populate(PopulateOptions::new(Populate::Allocate).with_range(beyond));
/// assert!(matches!(refused, Err(PopulateError::NotRam { .. })));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PopulateError {
    /// A part of the range that was given is no RAM. Nothing was populated.
    #[error(
        "cannot populate {range}: there is no RAM at guest address {:#x}, give a range of RAM \
         only",
        .first.0
    )]
    #[non_exhaustive]
    NotRam {
        /// The range that was given.
        range: GuestRange,
        /// The first address in it that is no RAM.
        first: GuestAddress,
    },

    /// There is not enough room in the file system, or not enough memory: the pool of huge pages,
    /// a control group, the machine or its NUMA nodes do not leave enough. Either nothing was
    /// populated, or others took it meanwhile. Where only this crate refuses, there is
    /// [`OnShortage::TryAnyway`](crate::OnShortage::TryAnyway).
    #[error("cannot populate {range}: {shortage}")]
    #[non_exhaustive]
    Shortage {
        /// The part of the RAM at which it would end, or that was being worked on.
        range: GuestRange,
        /// What is short.
        shortage: Box<Shortage>,
    },

    /// What limits memory cannot be looked at without a file descriptor, and populating without
    /// looking may end in SIGKILL.
    #[error(
        "cannot see whether there is memory to populate: {shortage}; or try anyway \
         (OnShortage::TryAnyway, on-shortage=try-anyway)"
    )]
    #[non_exhaustive]
    CannotLook {
        /// The descriptors that are short.
        shortage: Box<Shortage>,
    },

    /// Another process truncated the backing, which was not sealed.
    #[error(
        "cannot populate {range}: its backing had at least {} and has {} now, another process \
         truncated it; use a sealed memfd or a trusted peer",
        HumanSize(*.end), HumanSize(*.now)
    )]
    #[non_exhaustive]
    Truncated {
        /// The part of the RAM.
        range: GuestRange,
        /// Where the RAM ends in the backing, in bytes: it was at least that long.
        end: u64,
        /// The length that it has, in bytes.
        now: u64,
    },

    /// It was cancelled by its token.
    #[error("populating was cancelled after {} of {}", HumanSize(*.done), HumanSize(*.total))]
    #[non_exhaustive]
    Cancelled {
        /// What was populated, in bytes.
        done: u64,
        /// What was to be populated, in bytes.
        total: u64,
    },

    /// The thread that works in the background could not be started.
    #[error(
        "cannot start a thread to populate RAM in the background: raise RLIMIT_NPROC or pids.max, \
         or populate in this thread"
    )]
    #[non_exhaustive]
    NoThread {
        /// The system's answer.
        source: io::Error,
    },

    /// The handle is a copy in a child of fork(2), which has none of the threads.
    #[error(
        "populating in the background goes on in the process that started it, not in its \
         children: wait for it there"
    )]
    OtherProcess,

    /// Pages could not be allocated, for a reason that has no variant of its own.
    #[error("cannot populate {range}: the kernel did not allocate pages by fallocate(2)")]
    #[non_exhaustive]
    Allocate {
        /// The part of the RAM.
        range: GuestRange,
        /// The system's answer.
        source: io::Error,
    },

    /// Pages could not be mapped, for a reason that has no variant of its own.
    #[error(
        "cannot populate {range}: the kernel did not map pages by madvise(2), \
         MADV_POPULATE_WRITE, which Linux has since 5.14 and a seccomp filter has to allow"
    )]
    #[non_exhaustive]
    Map {
        /// The part of the RAM.
        range: GuestRange,
        /// The system's answer.
        source: io::Error,
    },
}

impl PopulateError {
    /// The part of the RAM that was being worked on, if it is about one.
    pub(crate) fn range(&self) -> Option<GuestRange> {
        match self {
            Self::NotRam { range, .. }
            | Self::Shortage { range, .. }
            | Self::Truncated { range, .. }
            | Self::Allocate { range, .. }
            | Self::Map { range, .. } => Some(*range),
            Self::CannotLook { .. }
            | Self::Cancelled { .. }
            | Self::NoThread { .. }
            | Self::OtherProcess => None,
        }
    }

    pub(super) fn short(range: GuestRange, shortage: impl Into<Shortage>) -> Self {
        let shortage = Box::new(shortage.into());
        Self::Shortage { range, shortage }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shortage::ResourceLimit;

    #[test]
    fn texts_name_the_cause_the_range_and_the_way_out() {
        let range = GuestRange::new(GuestAddress(1 << 32), 16 << 20).unwrap();
        let prefix = "cannot populate 0x100000000..=0x100ffffff (16 MiB): ";
        let cases = [
            (
                PopulateError::NotRam {
                    range,
                    first: GuestAddress(0x1_0010_0000),
                },
                "there is no RAM at guest address 0x100100000, give a range of RAM only",
            ),
            (
                PopulateError::short(range, {
                    let limit = ResourceLimit::Machine { size: 2 << 30 };
                    Shortage::new(1 << 30, 1 << 20, limit)
                }),
                "1 GiB more are needed, and 1 MiB are left of this machine's 2 GiB of memory and \
                 swap (/proc/meminfo): free memory or add swap, or ask for less RAM, or try \
                 anyway and risk SIGKILL (OnShortage::TryAnyway, on-shortage=try-anyway)",
            ),
            (
                PopulateError::Truncated {
                    range,
                    end: 1 << 30,
                    now: 0,
                },
                "its backing had at least 1 GiB and has 0 bytes now, another process truncated \
                 it; use a sealed memfd or a trusted peer",
            ),
            (
                PopulateError::Allocate {
                    range,
                    source: io::Error::from_raw_os_error(5),
                },
                "the kernel did not allocate pages by fallocate(2)",
            ),
            (
                PopulateError::Map {
                    range,
                    source: io::Error::from_raw_os_error(1),
                },
                "the kernel did not map pages by madvise(2), MADV_POPULATE_WRITE, which Linux has \
                 since 5.14 and a seccomp filter has to allow",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), format!("{prefix}{text}"));
        }
        let cancelled = PopulateError::Cancelled {
            done: 3 << 30,
            total: 4 << 30,
        };
        assert_eq!(
            cancelled.to_string(),
            "populating was cancelled after 3 GiB of 4 GiB"
        );
    }
}
