//! Limits on this process: descriptors, and the memory of its control group.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};

use super::mounts;

/// How many descriptors this process may still open, and its limit, or `None` if nobody tells.
///
/// Other threads open and close some at any time: it is a fair warning, no promise.
pub(crate) fn descriptors_left() -> Option<(u64, u64)> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let mut taken = 0_u64;
    for entry in fs::read_dir("/proc/self/fd").ok()? {
        let number = entry.ok()?.file_name().to_str()?.parse::<u64>().ok()?;
        // The limit is one on the number of a new descriptor: inherited ones may lie beyond it.
        taken += u64::from(number < limit);
    }
    // The directory that is read here is among them, and is closed by now.
    Some((limit.saturating_sub(taken.saturating_sub(1)), limit))
}

/// The control group that leaves this process the least memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlGroup {
    pub(crate) name: String,
    /// In bytes.
    pub(crate) limit: u64,
    /// In bytes, without what the kernel can drop: cached pages of files.
    pub(crate) used: u64,
}

impl ControlGroup {
    pub(crate) fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }

    /// The tightest of the groups that this process is in, or `None` if none is limited
    /// (Documentation/admin-guide/cgroup-v2.rst, `memory.max`; cgroup-v1/memory.rst).
    pub(crate) fn tightest() -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = mounts::all();
        let found = groups.lines().filter_map(|line| {
            let mut words = line.splitn(3, ':').skip(1);
            let (controllers, path) = (words.next()?, words.next()?);
            let version = Version::of(controllers)?;
            let mount = mounts.iter().find(|mount| match version {
                Version::Two => mount.fs_type == "cgroup2",
                Version::One => mount.fs_type == "cgroup" && mount.has_option("memory"),
            })?;
            // In a container the mount shows a part of the tree.
            let path = Path::new(path);
            let inside = path.strip_prefix(&mount.root).unwrap_or(path);
            let inside = inside.strip_prefix("/").unwrap_or(inside);
            Self::tightest_of(&mount.point, inside, version)
        });
        found.min_by_key(Self::left)
    }

    /// The tightest from the group `path` up to the root of the tree that is mounted at `mount`.
    fn tightest_of(mount: &Path, path: &Path, version: Version) -> Option<Self> {
        path.ancestors()
            .filter_map(|group| Self::read(mount, group, version))
            .min_by_key(Self::left)
    }

    fn read(mount: &Path, group: &Path, version: Version) -> Option<Self> {
        let dir: PathBuf = mount.join(group);
        let number = |name: &str| -> Option<u64> {
            let text = fs::read_to_string(dir.join(name)).ok()?;
            text.trim().parse().ok()
        };
        let (limit, usage, cached) = version.files();
        // "max", or for version 1 a number near 2^63, means that there is no limit.
        let limit = number(limit).filter(|limit| *limit < 1 << 62)?;
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let cached: u64 = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(name, _)| cached.contains(name))
            .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
            .sum();
        Some(Self {
            name: format!("/{}", group.display()),
            limit,
            used: number(usage)?.saturating_sub(cached),
        })
    }
}

/// The two interfaces of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// Which one limits memory by a line of `/proc/self/cgroup` with these controllers, if one.
    fn of(controllers: &str) -> Option<Self> {
        if controllers.is_empty() {
            Some(Self::Two)
        } else if controllers.split(',').any(|name| name == "memory") {
            Some(Self::One)
        } else {
            None
        }
    }

    /// The files of the limit and the usage, and what the kernel can drop in `memory.stat`.
    fn files(self) -> (&'static str, &'static str, [&'static str; 2]) {
        match self {
            Self::One => (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                ["total_active_file", "total_inactive_file"],
            ),
            Self::Two => (
                "memory.max",
                "memory.current",
                ["active_file", "inactive_file"],
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_up_to_the_root_counts_and_cached_files_do_not() {
        let tree = tempfile::tempdir().unwrap();
        let group = tree.path().join("a/b");
        fs::create_dir_all(&group).unwrap();
        let write = |path: &str, text: &str| fs::write(tree.path().join(path), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "7000\n");
        write("a/memory.max", "1000\n");
        write("a/memory.current", "900\n");
        write(
            "a/memory.stat",
            "anon 5\nactive_file 300\ninactive_file 200\n",
        );
        write("a/b/memory.max", "5000\n");
        write("a/b/memory.current", "900\n");
        let found = ControlGroup::tightest_of(tree.path(), Path::new("a/b"), Version::Two);
        let found = found.unwrap();
        assert_eq!(
            (found.name.as_str(), found.limit, found.used),
            ("/a", 1000, 400)
        );
        assert_eq!(found.left(), 600);
    }

    #[test]
    fn a_group_of_version_1_without_a_limit_has_none() {
        let tree = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| fs::write(tree.path().join(path), text).unwrap();
        write("memory.limit_in_bytes", "9223372036854771712\n");
        write("memory.usage_in_bytes", "4096\n");
        let root = Path::new("");
        assert_eq!(
            ControlGroup::tightest_of(tree.path(), root, Version::One),
            None
        );
        write("memory.limit_in_bytes", "8192\n");
        let found = ControlGroup::tightest_of(tree.path(), root, Version::One).unwrap();
        assert_eq!((found.limit, found.used), (8192, 4096));
    }

    #[test]
    fn only_the_memory_controller_counts() {
        assert_eq!(Version::of(""), Some(Version::Two));
        assert_eq!(Version::of("memory"), Some(Version::One));
        assert_eq!(Version::of("cpu,memory"), Some(Version::One));
        assert_eq!(Version::of("name=systemd"), None);
    }

    #[test]
    fn some_descriptors_are_left() {
        let (left, limit) = descriptors_left().unwrap();
        assert!(left > 0 && left < limit);
    }
}
