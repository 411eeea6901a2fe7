//! On made-up trees: files in directories that look like the kernel's.

use std::fs;

use super::*;

const MIB: u64 = 1 << 20;

/// A tree of groups.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Writes the files of a group, made if need be.
    fn group(&self, path: &str, files: &[(&str, &str)]) {
        let dir = self.0.path().join(path);
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    fn mount(&self, fs_type: &str, root: &str, options: &str) -> Mount {
        Mount {
            dev: (0, 30),
            root: root.into(),
            point: self.0.path().to_owned(),
            fs_type: fs_type.to_owned(),
            options: options.split(',').map(str::to_owned).collect(),
        }
    }

    /// What each limit leaves that a process in this group meets, by its file in the tree.
    fn left(&self, mount: &Mount, line: &str, swap: u64) -> Vec<(String, u64)> {
        let branches = Branch::all("memory", line, std::slice::from_ref(mount));
        let groups = branches.iter().flat_map(Branch::memory);
        let left = groups.flat_map(|group| group.left(swap, u64::MAX));
        left.map(|left| self.named(left)).collect()
    }

    fn named(&self, left: Left) -> (String, u64) {
        let file = left.file.strip_prefix(self.0.path()).unwrap();
        (file.display().to_string(), left.bytes)
    }
}

fn named(file: &str, bytes: u64) -> (String, u64) {
    (file.to_owned(), bytes)
}

#[test]
fn every_group_up_to_the_root_counts_and_pages_that_can_be_dropped_do_not() {
    let tree = Tree::new();
    tree.group("", &[("memory.current", "7000")]);
    tree.group(
        "a",
        &[
            ("memory.max", "1000\n"),
            ("memory.current", "900\n"),
            (
                "memory.stat",
                "anon 5\nshmem 100\nactive_file 300\ninactive_file 200\nfile_dirty 60\n\
                 file_writeback 40\nunevictable 50\n",
            ),
        ],
    );
    tree.group("a/b", &[("memory.max", "max\n"), ("memory.current", "900")]);
    tree.group(
        "a/b/c",
        &[("memory.max", "5000"), ("memory.current", "900")],
    );
    // A process that is not in it.
    tree.group("a/d", &[("memory.max", "1"), ("memory.current", "1")]);
    let mount = tree.mount("cgroup2", "/", "rw");
    let expected = [named("a/b/c/memory.max", 4100), named("a/memory.max", 500)];
    assert_eq!(tree.left(&mount, "0::/a/b/c\n", 0), expected);
    assert_eq!(tree.left(&mount, "4:memory:/a/d\n0::/\n", 0), []);
}

#[test]
fn a_container_sees_its_part_of_the_tree() {
    let tree = Tree::new();
    let limited = [("memory.max", "1000"), ("memory.current", "100")];
    tree.group("", &limited);
    tree.group("b", &[("memory.max", "10"), ("memory.current", "0")]);
    for (root, path, expected) in [
        ("/docker/x", "/docker/x", vec![named("memory.max", 900)]),
        (
            "/docker/x",
            "/docker/x/b",
            vec![named("b/memory.max", 10), named("memory.max", 900)],
        ),
        // Its paths are not those of the mount: what is mounted holds for it all the same.
        ("/docker/x", "/elsewhere", vec![named("memory.max", 900)]),
    ] {
        let mount = tree.mount("cgroup2", root, "rw");
        let line = format!("0::{path}\n");
        assert_eq!(tree.left(&mount, &line, 0), expected, "{root} {path}");
    }
}

#[test]
fn a_group_of_version_1_limits_memory_and_memory_with_swap() {
    let tree = Tree::new();
    tree.group("", &[("memory.limit_in_bytes", "9223372036854771712\n")]);
    let stat = "cache 400\nshmem 300\ninactive_file 1\ntotal_inactive_file 100\n\
                total_active_file 50\ntotal_dirty 20\ntotal_writeback 10\n";
    tree.group(
        "vm",
        &[
            ("memory.limit_in_bytes", "1000"),
            ("memory.usage_in_bytes", "700"),
            ("memory.memsw.limit_in_bytes", "9223372036854771712\n"),
            ("memory.memsw.usage_in_bytes", "750"),
            ("memory.swappiness", "60"),
            ("memory.stat", stat),
        ],
    );
    let mount = tree.mount("cgroup", "/", "rw,memory");
    let line = "9:name=systemd:/\n4:memory:/vm\n0::/\n";
    let left = |swap| tree.left(&mount, line, swap);
    // 120 of the 150 bytes of files can be dropped; shared memory cannot.
    assert_eq!(left(0), [named("vm/memory.limit_in_bytes", 420)]);
    assert_eq!(left(50), [named("vm/memory.limit_in_bytes", 470)]);
    tree.group("vm", &[("memory.swappiness", "0")]);
    assert_eq!(left(50), [named("vm/memory.limit_in_bytes", 420)]);
    tree.group("vm", &[("memory.memsw.limit_in_bytes", "1040")]);
    let expected = [
        named("vm/memory.limit_in_bytes", 420),
        named("vm/memory.memsw.limit_in_bytes", 410),
    ];
    assert_eq!(left(50), expected);
    // More is used than would be allowed now.
    tree.group("vm", &[("memory.limit_in_bytes", "100")]);
    assert_eq!(left(0)[0], named("vm/memory.limit_in_bytes", 0));
    // Another controller's mount is not asked.
    let other = tree.mount("cgroup", "/", "rw,cpu");
    assert_eq!(tree.left(&other, line, 0), []);
}

#[test]
fn statistics_are_only_read_where_they_matter() {
    let tree = Tree::new();
    tree.group(
        "",
        &[
            ("memory.max", "1000"),
            ("memory.current", "600"),
            ("memory.stat", "active_file 500\n"),
        ],
    );
    let mount = tree.mount("cgroup2", "/", "rw");
    let groups = Branch::all("memory", "0::/\n", &[mount]).remove(0).memory();
    let left = |enough| groups[0].left(7, enough).remove(0).bytes;
    assert_eq!(left(400), 400, "a lower bound");
    assert_eq!(left(401), 907);
}

#[test]
fn swap_of_version_2_has_a_limit_and_high_slows_down() {
    let tree = Tree::new();
    tree.group(
        "",
        &[
            ("memory.max", "1000"),
            ("memory.high", "800"),
            ("memory.current", "600"),
            ("memory.stat", "inactive_file 100\n"),
            ("memory.swap.max", "50"),
            ("memory.swap.current", "20"),
        ],
    );
    let mount = tree.mount("cgroup2", "/", "rw");
    let group = Branch::all("memory", "0::/\n", &[mount]).remove(0).memory();
    let group = &group[0];
    assert_eq!(group.swap_left(), Some(30));
    let high = group.left_to_high().map(|left| tree.named(left));
    assert_eq!(high, Some(named("memory.high", 300)));
    tree.group("", &[("memory.swap.max", "max"), ("memory.high", "max")]);
    assert_eq!((group.swap_left(), group.left_to_high()), (None, None));
}

#[test]
fn huge_pages_are_limited_by_size_used_and_promised() {
    let tree = Tree::new();
    tree.group(
        "",
        &[("hugetlb.2MB.max", "max"), ("hugetlb.1GB.max", "max")],
    );
    tree.group(
        "vm",
        &[
            ("hugetlb.2MB.max", "67108864"),
            ("hugetlb.2MB.current", "4194304"),
            ("hugetlb.2MB.rsvd.max", "33554432"),
            ("hugetlb.2MB.rsvd.current", "0"),
            ("hugetlb.1GB.max", "0"),
            ("hugetlb.1GB.current", "0"),
            ("hugetlb.64KB.max", "max"),
        ],
    );
    let mount = tree.mount("cgroup2", "/", "rw,memory_hugetlb_accounting");
    let branches = Branch::all("hugetlb", "0::/vm\n", &[mount]);
    let left = |size, reserving| -> Vec<_> {
        let left = branches[0].hugetlb(size, reserving).into_iter();
        left.map(|left| tree.named(left)).collect()
    };
    let used = named("vm/hugetlb.2MB.max", 60 * MIB);
    let promised = named("vm/hugetlb.2MB.rsvd.max", 32 * MIB);
    assert_eq!(left(2 * MIB, true), [used, promised]);
    assert_eq!(left(2 * MIB, false).len(), 1, "of those that are used");
    assert_eq!(left(1 << 30, true), [named("vm/hugetlb.1GB.max", 0)]);
    assert_eq!(left(64 << 10, true), []);
    assert!(branches[0].accounts_hugetlb());

    let one = Tree::new();
    one.group(
        "vm",
        &[
            ("hugetlb.2MB.limit_in_bytes", "67108864"),
            ("hugetlb.2MB.usage_in_bytes", "0"),
            ("hugetlb.2MB.rsvd.limit_in_bytes", "9223372036854771712"),
            ("hugetlb.2MB.rsvd.usage_in_bytes", "0"),
        ],
    );
    let mount = one.mount("cgroup", "/", "rw,hugetlb");
    let branches = Branch::all("hugetlb", "3:hugetlb:/vm\n", &[mount]);
    let left = branches[0].hugetlb(2 * MIB, true).remove(0);
    assert_eq!(
        one.named(left),
        named("vm/hugetlb.2MB.limit_in_bytes", 64 * MIB)
    );
    assert!(!branches[0].accounts_hugetlb());
}

#[test]
fn only_lines_of_the_controller_count() {
    for (controllers, controller, version) in [
        ("", "memory", Some(Version::Two)),
        ("", "hugetlb", Some(Version::Two)),
        ("memory", "memory", Some(Version::One)),
        ("cpu,memory", "memory", Some(Version::One)),
        ("memory", "hugetlb", None),
        ("hugetlb", "hugetlb", Some(Version::One)),
        ("name=systemd", "memory", None),
    ] {
        let found = Version::of(controllers, controller);
        assert_eq!(found, version, "{controllers} {controller}");
    }
}
