//! The control groups of this process: where they are, and what their limits leave
//! (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, cgroup-v1/hugetlb.rst).
//!
//! A limit holds for a group and all below it: every group from that of the process up to the root
//! of what is mounted is looked at.

use std::io;
use std::path::{Path, PathBuf};

use super::kept::Kept;
use super::mounts::Mount;

/// Version 1 writes a number near 2^63 where there is no limit, version 2 writes `max`.
const UNLIMITED: u64 = 1 << 62;

/// The two interfaces of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The groups of this process that a controller may limit, from its own up to the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Branch {
    version: Version,
    /// Their directories.
    groups: Vec<PathBuf>,
    /// Whether pages of a hugetlb pool are charged to the memory controller, too.
    accounts_hugetlb: bool,
}

/// What a limit leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// The file in which the limit stands.
    pub(super) file: PathBuf,
    /// In bytes.
    pub(super) bytes: u64,
}

impl Branch {
    /// Those of a controller (`memory`, `hugetlb`), of a process with this `/proc/PID/cgroup`
    /// among these mounts: none, one, or, where both versions are mounted, two.
    pub(super) fn all(controller: &str, groups: &str, mounts: &[Mount]) -> Vec<Self> {
        let found = groups.lines().filter_map(|line| {
            let mut words = line.splitn(3, ':').skip(1);
            let (controllers, path) = (words.next()?, words.next()?);
            let version = Version::of(controllers, controller)?;
            let of_version = mounts.iter().filter(|mount| match version {
                Version::Two => mount.fs_type == "cgroup2",
                Version::One => mount.fs_type == "cgroup" && mount.has_option(controller),
            });
            let mut places = of_version.map(|mount| {
                // In a container the mount shows a part of the tree.
                let path = Path::new(path);
                let inside = path.strip_prefix(&mount.root).unwrap_or(path);
                let inside = inside.strip_prefix("/").unwrap_or(inside);
                (mount, inside)
            });
            let first = places.next()?;
            // It may be mounted several times, each with another part of the tree.
            let (mount, inside) = std::iter::once(first)
                .chain(places)
                .find(|(mount, inside)| mount.point.join(inside).is_dir())
                .unwrap_or(first);
            Some(Self {
                version,
                groups: inside
                    .ancestors()
                    .map(|group| mount.point.join(group))
                    .collect(),
                accounts_hugetlb: mount.has_option("memory_hugetlb_accounting"),
            })
        });
        found.collect()
    }

    pub(super) fn accounts_hugetlb(&self) -> bool {
        self.accounts_hugetlb
    }

    /// The groups' files of the memory controller.
    pub(super) fn memory(&self) -> Vec<MemoryGroup> {
        let group = |dir: &PathBuf| MemoryGroup::new(dir, self.version);
        self.groups.iter().map(group).collect()
    }

    /// What each limit on huge pages of this size leaves. With `reserving`, of those that are
    /// promised as well.
    pub(super) fn hugetlb(&self, page_size: u64, reserving: bool) -> Vec<Left> {
        let size = size_name(page_size);
        let (limit, usage) = match self.version {
            Version::One => ("limit_in_bytes", "usage_in_bytes"),
            Version::Two => ("max", "current"),
        };
        let kinds: &[&str] = if reserving { &["", "rsvd."] } else { &[""] };
        let number = |path: &Path| -> Option<u64> {
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        let left = |group: &PathBuf, kind: &str| {
            let file = group.join(format!("hugetlb.{size}.{kind}{limit}"));
            let limit = number(&file).filter(|limit| *limit < UNLIMITED)?;
            let used = number(&group.join(format!("hugetlb.{size}.{kind}{usage}")))?;
            let bytes = limit.saturating_sub(used);
            Some(Left { file, bytes })
        };
        let groups = self.groups.iter();
        let all = groups.flat_map(|group| kinds.iter().filter_map(move |kind| left(group, kind)));
        all.collect()
    }
}

impl Version {
    /// Which one a line of `/proc/PID/cgroup` with these controllers is about, if the controller
    /// may be among them.
    fn of(controllers: &str, controller: &str) -> Option<Self> {
        if controllers.is_empty() {
            Some(Self::Two)
        } else if controllers.split(',').any(|name| name == controller) {
            Some(Self::One)
        } else {
            None
        }
    }
}

/// As the files of the controller name a size of huge pages.
fn size_name(page_size: u64) -> String {
    match page_size {
        size if size >= 1 << 30 => format!("{}GB", size >> 30),
        size if size >= 1 << 20 => format!("{}MB", size >> 20),
        size => format!("{}KB", size >> 10),
    }
}

/// A group's files of the memory controller.
#[derive(Debug)]
pub(super) struct MemoryGroup {
    version: Version,
    limit: Kept,
    usage: Kept,
    stat: Kept,
    /// Of memory and swap together in version 1, of swap alone in version 2.
    swap_limit: Kept,
    swap_usage: Kept,
    /// Where reclaim begins to slow the group down; version 2 only.
    high: Kept,
    /// Whether anything is swapped out at all; version 1 only.
    swappiness: Kept,
}

impl MemoryGroup {
    fn new(dir: &Path, version: Version) -> Self {
        let file = |one: &str, two: &str| {
            Kept::new(dir.join(match version {
                Version::One => one,
                Version::Two => two,
            }))
        };
        Self {
            version,
            limit: file("memory.limit_in_bytes", "memory.max"),
            usage: file("memory.usage_in_bytes", "memory.current"),
            stat: file("memory.stat", "memory.stat"),
            swap_limit: file("memory.memsw.limit_in_bytes", "memory.swap.max"),
            swap_usage: file("memory.memsw.usage_in_bytes", "memory.swap.current"),
            high: file("memory.high", "memory.high"),
            swappiness: file("memory.swappiness", "memory.swappiness"),
        }
    }

    /// Opens what is needed to see what is left, however few descriptors there are later.
    pub(super) fn open(&self) -> io::Result<()> {
        self.limit.open()?;
        self.swap_limit.open()?;
        if limit_in(&self.limit).is_some() || limit_in(&self.swap_limit).is_some() {
            self.usage.open()?;
            self.stat.open()?;
            self.swap_usage.open()?;
            self.swappiness.open()?;
        }
        Ok(())
    }

    /// What its limit leaves of swap space; none if it has no limit of that alone.
    pub(super) fn swap_left(&self) -> Option<u64> {
        if self.version == Version::One {
            return None;
        }
        let limit = limit_in(&self.swap_limit)?;
        Some(limit.saturating_sub(self.swap_usage.number()?))
    }

    /// What its limits leave, with `swap` bytes of swap space to be had; a lower bound if that is
    /// `enough`, to spare reading the statistics, which the kernel first has to gather.
    pub(super) fn left(&self, swap: u64, enough: u64) -> Vec<Left> {
        let mut left = Vec::new();
        let limit = limit_in(&self.limit);
        let both = match self.version {
            Version::One => limit_in(&self.swap_limit),
            Version::Two => None,
        };
        if limit.is_none() && both.is_none() {
            return left;
        }
        // Of a group that is gone nothing is known.
        let Some(used) = self.usage.number() else {
            return left;
        };
        let used_both = both.and_then(|_| self.swap_usage.number());
        let reaches = |limit: Option<u64>, used: Option<u64>| match (limit, used) {
            (Some(limit), Some(used)) => limit.saturating_sub(used) >= enough,
            _ => true,
        };
        let plenty = reaches(limit, Some(used)) && reaches(both, used_both);
        let droppable = if plenty { 0 } else { self.droppable() };
        if let Some(limit) = limit {
            let swap = if plenty || !self.swaps() { 0 } else { swap };
            left.push(Left {
                file: self.limit.path().to_owned(),
                bytes: (limit.saturating_sub(used.saturating_sub(droppable))).saturating_add(swap),
            });
        }
        if let (Some(limit), Some(used)) = (both, used_both) {
            left.push(Left {
                file: self.swap_limit.path().to_owned(),
                bytes: limit.saturating_sub(used.saturating_sub(droppable)),
            });
        }
        left
    }

    /// What is left until the group is slowed down.
    pub(super) fn left_to_high(&self) -> Option<Left> {
        let limit = limit_in(&self.high)?;
        let used = self.usage.number()?.saturating_sub(self.droppable());
        Some(Left {
            file: self.high.path().to_owned(),
            bytes: limit.saturating_sub(used),
        })
    }

    fn swaps(&self) -> bool {
        self.version == Version::Two || self.swappiness.number() != Some(0)
    }

    /// What the kernel can drop at once when the group needs memory: clean pages of files. (Shared
    /// memory counts as cache, too, but is on the lists of anonymous memory; what is locked is on
    /// none of these.)
    fn droppable(&self) -> u64 {
        let stat = self.stat.read().unwrap_or_default();
        let sum = |names: [&str; 2]| -> u64 {
            let lines = stat.lines().filter_map(|line| line.split_once(' '));
            let values = lines.filter(|(name, _)| names.contains(name));
            values
                .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
                .sum()
        };
        let (cached, written_first) = match self.version {
            Version::One => (
                ["total_active_file", "total_inactive_file"],
                ["total_dirty", "total_writeback"],
            ),
            Version::Two => (
                ["active_file", "inactive_file"],
                ["file_dirty", "file_writeback"],
            ),
        };
        sum(cached).saturating_sub(sum(written_first))
    }
}

fn limit_in(file: &Kept) -> Option<u64> {
    file.number().filter(|limit| *limit < UNLIMITED)
}

#[cfg(test)]
#[path = "control_group_tests.rs"]
mod tests;
