//! Why RAM could not be populated.

use std::io;

use vm_memory::GuestAddress;

use crate::error::text::more_descriptors;
use crate::range::GuestRange;
use crate::shortage::MemoryShortage;
use crate::units::HumanSize;

/// Why RAM could not be populated.
///
/// The range is the part of the RAM that was being worked on; `needed` is what was still missing
/// of all that was to be populated.
///
/// ```
/// use guest_memory_shm::{Error, GuestMemoryShm, GuestRange, Populate, PopulateError, PopulateOptions};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let beyond = GuestRange::new(GuestAddress(0), 2 << 20)?;
/// let refused = memory.populate(PopulateOptions::new(Populate::Allocate).with_range(beyond));
/// assert!(matches!(refused, Err(Error::Populate(PopulateError::NotRam { .. }))));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PopulateError {
    /// A part of the range that was given is no RAM. Nothing was populated.
    #[error(
        "cannot populate {range}: there is no RAM at guest address {:#x}, give a range of RAM only",
        .start.0
    )]
    NotRam {
        /// The range that was given.
        range: GuestRange,
        /// The first address in it that is no RAM.
        start: GuestAddress,
    },

    /// The file system behind the RAM is full.
    #[error(
        "cannot populate {range}: {} more are needed, the file system behind the RAM holds {} and \
         has {} free: remove files from it, remount it with a larger size, or use a memfd backing",
        HumanSize(*.needed), HumanSize(*.size), HumanSize(*.free)
    )]
    FileSystemFull {
        /// The part of the RAM.
        range: GuestRange,
        /// What was still missing, in bytes.
        needed: u64,
        /// The size of the file system in bytes.
        size: u64,
        /// What was free of it, in bytes.
        free: u64,
    },

    /// The pool of huge pages is empty, and the RAM has none reserved.
    #[error(
        "cannot populate {range}: {needed} more huge pages of {} are needed, {available} are free: \
         raise /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages by {}, or \
         leave out hugetlb=on (PageSize::Base)",
        HumanSize(*.page_size), .page_size / 1024, .needed.saturating_sub(*.available)
    )]
    HugePoolEmpty {
        /// The part of the RAM.
        range: GuestRange,
        /// Huge pages that were still missing.
        needed: u64,
        /// Huge pages that could be had.
        available: u64,
        /// The page size in bytes.
        page_size: u64,
    },

    /// There is not enough memory: a control group, the machine or its NUMA nodes do not leave
    /// enough. Either nothing was populated, or others took memory meanwhile. To try anyway there
    /// is [`OnShortage::TryAnyway`](crate::OnShortage::TryAnyway).
    #[error("cannot populate {range}: {shortage}")]
    NotEnoughMemory {
        /// The part of the RAM at which the memory would end, or that was being worked on.
        range: GuestRange,
        /// What is short.
        shortage: Box<MemoryShortage>,
    },

    /// What limits memory cannot be looked at without a file descriptor, and populating without
    /// looking may end in SIGKILL.
    #[error(
        "cannot see whether there is memory to populate: {}, or try anyway \
         (OnShortage::TryAnyway, on-shortage=try-anyway)",
        more_descriptors(.source)
    )]
    CannotLook {
        /// The system's answer, `EMFILE` or `ENFILE`.
        source: io::Error,
    },

    /// Somebody truncated the backing, which was not sealed.
    #[error(
        "cannot populate {range}: its backing had at least {} and has {} now, another process truncated it; \
         use a sealed memfd or a trusted peer",
        HumanSize(*.end), HumanSize(*.now)
    )]
    Truncated {
        /// The part of the RAM.
        range: GuestRange,
        /// Where the RAM ends in the backing, in bytes: it was at least that long.
        end: u64,
        /// The length that it has, in bytes.
        now: u64,
    },

    /// It was cancelled, by the progress callback, by the token or by the handle.
    #[error("populating was cancelled after {} of {}", HumanSize(*.done), HumanSize(*.total))]
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
    NoThread {
        /// The system's answer.
        source: io::Error,
    },

    /// The handle is a copy in a child of fork(2), which has none of the threads.
    #[error(
        "populating in the background goes on in the process that started it, not in its children: \
         wait for it there"
    )]
    OtherProcess,

    /// A system call failed for a reason that has no variant of its own.
    #[error("cannot populate {range}: the kernel could not {doing}")]
    System {
        /// The part of the RAM.
        range: GuestRange,
        /// What the system call was to do.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shortage::MemoryLimit;

    #[test]
    fn texts_name_the_cause_the_range_and_the_way_out() {
        let range = GuestRange::new(GuestAddress(1 << 32), 16 << 20).unwrap();
        let prefix = "cannot populate 0x100000000..=0x100ffffff (16 MiB): ";
        let cases = [
            (
                PopulateError::NotRam {
                    range,
                    start: GuestAddress(0x1_0010_0000),
                },
                "there is no RAM at guest address 0x100100000, give a range of RAM only",
            ),
            (
                PopulateError::FileSystemFull {
                    range,
                    needed: 1 << 30,
                    size: 64 << 20,
                    free: 1 << 20,
                },
                "1 GiB more are needed, the file system behind the RAM holds 64 MiB and has 1 MiB \
                 free: remove files from it, remount it with a larger size, or use a memfd backing",
            ),
            (
                PopulateError::HugePoolEmpty {
                    range,
                    needed: 512,
                    available: 40,
                    page_size: 2 << 20,
                },
                "512 more huge pages of 2 MiB are needed, 40 are free: raise \
                 /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages by 472, or leave out hugetlb=on (PageSize::Base)",
            ),
            (
                PopulateError::NotEnoughMemory {
                    range,
                    shortage: Box::new(MemoryShortage {
                        needed: 1 << 30,
                        left: 1 << 20,
                        limit: MemoryLimit::Machine,
                    }),
                },
                "1 GiB more are needed, and 1 MiB are left of this machine's memory and swap \
                 (/proc/meminfo): free memory or add swap, or ask for less RAM, or try anyway and risk \
                 SIGKILL (OnShortage::TryAnyway, on-shortage=try-anyway)",
            ),
            (
                PopulateError::Truncated {
                    range,
                    end: 1 << 30,
                    now: 0,
                },
                "its backing had at least 1 GiB and has 0 bytes now, another process truncated it; use a \
                 sealed memfd or a trusted peer",
            ),
            (
                PopulateError::System {
                    range,
                    doing: "allocate pages",
                    source: io::Error::from_raw_os_error(5),
                },
                "the kernel could not allocate pages",
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
