//! What can be short, with one text for each: how much is needed, how much is left, which limit
//! says so, and what to do. Used as an error, and in the notes of a report.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::host::NodeSet;
use crate::host::pools::Pool;
use crate::host::{descriptors, memory};
use crate::units::HumanSize;

/// Something that is short: how much of it is needed, how much is left, and which limit says so.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, Populate, RamOptions, ResourceLimit};
/// use vm_memory::GuestAddress;
///
/// // More than any machine has.
/// let options = RamOptions::new().with_populate(Populate::Prefault);
/// let refused = GuestMemoryShm::<()>::builder()
///     .add_ram(options, [(GuestAddress(0), 1 << 46)])
///     .build()
///     .unwrap_err();
/// let shortage = refused.shortage().expect("memory is short");
/// assert!(shortage.needed > shortage.left);
/// if let ResourceLimit::ControlGroup { file, .. } = &shortage.limit {
///     println!("{} bytes are left by {}", shortage.left, file.display());
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{}", self.fact(), self.or_try_anyway())]
#[non_exhaustive]
pub struct Shortage {
    /// What is needed: a number of descriptors, or of bytes. Of memory, pages that are there
    /// already do not count, and what the kernel needs to manage the others, at most one byte in
    /// 128, does.
    pub needed: u64,
    /// What can still be had, in the same unit. Of memory without what cannot be reclaimed, with
    /// what can be swapped out, and less a margin for what this process needs besides.
    pub left: u64,
    /// The limit that leaves so little.
    pub limit: ResourceLimit,
}

/// What limits something that RAM needs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResourceLimit {
    /// A control group that this process is in (cgroups(7)).
    #[non_exhaustive]
    ControlGroup {
        /// The file in which the limit stands: `memory.max`, `memory.limit_in_bytes`, or that of
        /// another controller or resource. That of `memory.high` slows the group down, the others
        /// end a process.
        file: PathBuf,
    },
    /// The memory and the swap space of the machine (proc_meminfo(5)): `MemAvailable` and
    /// `SwapFree` are left.
    #[non_exhaustive]
    Machine {
        /// `MemTotal` and `SwapTotal` together, in bytes.
        size: u64,
    },
    /// The memory of the NUMA nodes that the RAM is bound to, or that this process may use at all
    /// (cpuset(7)).
    #[non_exhaustive]
    Nodes {
        /// The nodes.
        nodes: NodeSet,
    },
    /// A pool of huge pages (`/sys/kernel/mm/hugepages`). What is left are unused pages, less
    /// those that are reserved, plus those that may be overcommitted.
    #[non_exhaustive]
    HugePages {
        /// The size of a page in bytes.
        page_size: u64,
        /// Unused pages in the pool.
        free: u64,
        /// Unused pages that are promised to other mappings already.
        reserved: u64,
    },
    /// The file system that the RAM is on.
    #[non_exhaustive]
    FileSystem {
        /// Something that is on it, if its name is known.
        path: Option<PathBuf>,
        /// Its size in bytes.
        size: u64,
    },
    /// How long this process may make a file (`RLIMIT_FSIZE`), which shared memory obeys too.
    FileSize,
    /// How many descriptors this process may have (`RLIMIT_NOFILE`).
    #[non_exhaustive]
    Descriptors {
        /// The soft limit.
        limit: u64,
    },
    /// How many files the whole system may have open (`fs.file-max`): none is left.
    SystemDescriptors,
}

impl Shortage {
    pub(crate) fn new(needed: u64, left: u64, limit: ResourceLimit) -> Self {
        Self {
            needed,
            left,
            limit,
        }
    }

    /// The shortage of so many pages of a pool, if there is one.
    ///
    /// Others may take them right after: the reservation at mmap time decides, and this gives a
    /// clear error beforehand.
    pub(crate) fn of_pool(page_size: u64, pages: u64) -> io::Result<Option<Self>> {
        let pool = Pool::read(page_size)?;
        let limit = ResourceLimit::HugePages {
            page_size,
            free: pool.free,
            reserved: pool.reserved,
        };
        let bytes = |pages: u64| pages.saturating_mul(page_size);
        let short = pages > pool.available();
        Ok(short.then(|| Self::new(bytes(pages), bytes(pool.available()), limit)))
    }

    /// The shortage of descriptors, if that is what an answer of the system means.
    pub(crate) fn of_descriptors(answer: &io::Error) -> Option<Self> {
        descriptors::is_none_left(answer).then(|| Self::no_descriptors(answer))
    }

    /// No descriptor is left, as an answer of the system says (`EMFILE`, `ENFILE`).
    pub(crate) fn no_descriptors(answer: &io::Error) -> Self {
        let limit = match answer.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENFILE) => ResourceLimit::SystemDescriptors,
            _ => ResourceLimit::Descriptors {
                limit: descriptors::limit(),
            },
        };
        Self::new(1, 0, limit)
    }

    /// The text without a way to insist, for a note: nothing was refused.
    pub(crate) fn fact(&self) -> String {
        let (needed, left) = (HumanSize(self.needed), HumanSize(self.left));
        match &self.limit {
            ResourceLimit::ControlGroup { file } => format!(
                "{needed} more are needed, and {left} are left of the control group's limit in \
                 {}: raise it, or ask for less RAM",
                file.display()
            ),
            ResourceLimit::Machine { size } => format!(
                "{needed} more are needed, and {left} are left of this machine's {} of memory and \
                 swap (/proc/meminfo): free memory or add swap, or ask for less RAM",
                HumanSize(*size)
            ),
            ResourceLimit::Nodes { nodes } => format!(
                "{needed} more are needed, and {left} are left of the memory of node {nodes} \
                 (/sys/devices/system/node): free memory there or allow more nodes, or ask for \
                 less RAM"
            ),
            ResourceLimit::HugePages {
                page_size,
                free,
                reserved,
            } => {
                let needed = self.needed.div_ceil(*page_size);
                let (pages, are) = if needed == 1 {
                    ("page", "is")
                } else {
                    ("pages", "are")
                };
                format!(
                    "{needed} more huge {pages} of {} {are} needed, and {} can be had ({free} \
                     unused, {reserved} of them reserved by others): raise \
                     /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages by {}, or leave out \
                     hugetlb=on (PageSize::Base)",
                    HumanSize(*page_size),
                    self.left / page_size,
                    page_size / 1024,
                    self.needed.saturating_sub(self.left).div_ceil(*page_size)
                )
            }
            ResourceLimit::FileSystem { path, size } => {
                let which = match path {
                    Some(path) => format!("of {}", path.display()),
                    None => "that backs the RAM".to_owned(),
                };
                let never = if self.needed > *size {
                    "; RAM that stays sparse is allowed by reserve=off"
                } else {
                    ""
                };
                format!(
                    "{needed} more are needed, and the file system {which} holds {} and has \
                     {left} free: remove files from it, remount it with a larger size, or use a \
                     memfd backing{never}",
                    HumanSize(*size)
                )
            }
            ResourceLimit::FileSize => format!(
                "a file of {needed} exceeds RLIMIT_FSIZE, which is {left}: raise it (ulimit -f)"
            ),
            ResourceLimit::Descriptors { limit } if self.needed == 1 => format!(
                "no file descriptor is left of the {limit} that this process may have: raise \
                 RLIMIT_NOFILE (ulimit -n)"
            ),
            ResourceLimit::Descriptors { limit } => format!(
                "{} file descriptors are needed, and {} are left of the {limit} that this process \
                 may have: raise RLIMIT_NOFILE (ulimit -n), or put several ranges on one backing",
                self.needed, self.left
            ),
            ResourceLimit::SystemDescriptors => {
                "no file can be opened: the whole system has as many open as it may, raise the \
                 limit (sysctl fs.file-max), or close some"
                    .to_owned()
            }
        }
    }

    /// Where only this crate refuses, and the kernel would not.
    fn or_try_anyway(&self) -> &'static str {
        match self.limit {
            ResourceLimit::ControlGroup { .. }
            | ResourceLimit::Machine { .. }
            | ResourceLimit::Nodes { .. } => {
                ", or try anyway and risk SIGKILL (OnShortage::TryAnyway, on-shortage=try-anyway)"
            }
            _ => "",
        }
    }
}

impl From<memory::Short> for Shortage {
    fn from(short: memory::Short) -> Self {
        let limit = match short.limit {
            memory::Limit::ControlGroup { file } => ResourceLimit::ControlGroup { file },
            memory::Limit::Machine { size } => ResourceLimit::Machine { size },
            memory::Limit::Nodes { nodes } => ResourceLimit::Nodes { nodes },
        };
        Self::new(short.needed, short.left, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_need_rest_limit_and_the_way_out() {
        const WAY_OUT: &str = "or ask for less RAM, or try anyway and risk SIGKILL \
                               (OnShortage::TryAnyway, on-shortage=try-anyway)";
        let nodes = NodeSet::from_nodes([1]).unwrap();
        for (limit, text) in [
            (
                ResourceLimit::ControlGroup {
                    file: "/sys/fs/cgroup/vm/memory.max".into(),
                },
                format!(
                    "1 GiB more are needed, and 1 MiB are left of the control group's limit in \
                     /sys/fs/cgroup/vm/memory.max: raise it, {WAY_OUT}"
                ),
            ),
            (
                ResourceLimit::Machine { size: 2 << 30 },
                format!(
                    "1 GiB more are needed, and 1 MiB are left of this machine's 2 GiB of memory \
                     and swap (/proc/meminfo): free memory or add swap, {WAY_OUT}"
                ),
            ),
            (
                ResourceLimit::Nodes { nodes },
                format!(
                    "1 GiB more are needed, and 1 MiB are left of the memory of node 1 \
                     (/sys/devices/system/node): free memory there or allow more nodes, {WAY_OUT}"
                ),
            ),
            (
                ResourceLimit::FileSystem {
                    path: Some("/dev/shm".into()),
                    size: 2 << 30,
                },
                "1 GiB more are needed, and the file system of /dev/shm holds 2 GiB and has 1 MiB \
                 free: remove files from it, remount it with a larger size, or use a memfd backing"
                    .to_owned(),
            ),
            (
                ResourceLimit::FileSystem {
                    path: None,
                    size: 64 << 20,
                },
                "1 GiB more are needed, and the file system that backs the RAM holds 64 MiB and \
                 has 1 MiB free: remove files from it, remount it with a larger size, or use a \
                 memfd backing; RAM that stays sparse is allowed by reserve=off"
                    .to_owned(),
            ),
            (
                ResourceLimit::FileSize,
                "a file of 1 GiB exceeds RLIMIT_FSIZE, which is 1 MiB: raise it (ulimit -f)"
                    .to_owned(),
            ),
        ] {
            let shortage = Shortage::new(1 << 30, 1 << 20, limit);
            assert_eq!(shortage.to_string(), text);
        }
    }

    #[test]
    fn pages_and_descriptors_are_counted() {
        let pool = ResourceLimit::HugePages {
            page_size: 2 << 20,
            free: 44,
            reserved: 4,
        };
        let shortage = Shortage::new(512 << 21, 40 << 21, pool);
        assert_eq!(
            shortage.to_string(),
            "512 more huge pages of 2 MiB are needed, and 40 can be had (44 unused, 4 of them \
             reserved by others): raise /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages \
             by 472, or leave out hugetlb=on (PageSize::Base)"
        );
        let process = ResourceLimit::Descriptors { limit: 1024 };
        assert_eq!(
            Shortage::new(5, 2, process).to_string(),
            "5 file descriptors are needed, and 2 are left of the 1024 that this process may \
             have: raise RLIMIT_NOFILE (ulimit -n), or put several ranges on one backing"
        );
        let of = |errno: Errno| Shortage::of_descriptors(&errno.into());
        assert!(of(Errno::EMFILE).is_some_and(|short| {
            let text = short.to_string();
            text.starts_with("no file descriptor is left of the ")
                && text.contains("RLIMIT_NOFILE")
        }));
        assert!(
            of(Errno::ENFILE)
                .is_some_and(|short| short.to_string().contains("sysctl fs.file-max"))
        );
        assert_eq!(of(Errno::ENOENT), None);
    }

    #[test]
    fn a_fact_offers_no_other_try() {
        let limit = ResourceLimit::Machine { size: 1 << 30 };
        let fact = Shortage::new(2 << 30, 1 << 20, limit).fact();
        assert!(fact.ends_with("or ask for less RAM"), "{fact}");
    }
}
