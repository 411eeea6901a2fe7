//! Machines and groups that are made up: files in directories that look like the kernel's.

use super::*;

const MIB: u64 = 1 << 20;
/// Memory and swap of the machine.
const SIZE: u64 = (8 << 30) + (99_999_999 << 10);
const ANYWHERE: Pages = Pages::Base(NodeSet::new());

/// A machine with 8 GiB, of which some are available, and a tree of groups of version 2.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new(available: u64, swap_free: u64) -> Self {
        let this = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        this.write(
            "proc/meminfo",
            &format!(
                "MemTotal: {} kB\nMemAvailable: {} kB\nSwapTotal: 99999999 kB\nSwapFree: {} kB\n",
                8 << 20,
                available / 1024,
                swap_free / 1024
            ),
        );
        this.write("proc/sys/vm/swappiness", "60\n");
        this
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A group that may have so much and uses nothing.
    fn group(&self, path: &str, max: u64) {
        self.write(&format!("cgroup/{path}/memory.max"), &max.to_string());
        self.write(&format!("cgroup/{path}/memory.current"), "0");
    }

    fn limits(&self, group: &str, options: &str) -> MemoryLimits {
        let mount = Mount {
            dev: (0, 30),
            root: "/".into(),
            point: self.dir.path().join("cgroup"),
            fs_type: "cgroup2".to_owned(),
            options: options.split(',').map(str::to_owned).collect(),
        };
        let line = format!("0::{group}\n");
        let (proc, nodes) = (self.dir.path().join("proc"), self.dir.path().join("nodes"));
        MemoryLimits::new(&line, &line, &[mount], &proc, &nodes).unwrap()
    }
}

fn short(limits: &MemoryLimits, pages: Pages, bytes: u64) -> Option<Short> {
    let demand = Demand::of(pages, bytes);
    demand.shortage(&limits.bounds(&demand, 0))
}

/// Whether the limit stands in this file.
fn is_in(short: &Short, name: &str) -> bool {
    matches!(&short.limit, Limit::ControlGroup { file } if file.ends_with(name))
}

#[test]
fn the_machine_gives_what_is_available_and_can_be_swapped_less_a_reserve() {
    let machine = Machine::new(1000 * MIB, 200 * MIB);
    let limits = machine.limits("/", "rw");
    // One byte in 512 of the machine stays, and one in 128 is the kernel's.
    let left = 1200 * MIB - 16 * MIB;
    assert_eq!(short(&limits, ANYWHERE, left - left / 128), None);
    let shortage = short(&limits, ANYWHERE, left).unwrap();
    assert_eq!(shortage.left, left);
    assert_eq!(shortage.needed, left + left / 128);
    assert_eq!(shortage.limit, Limit::Machine { size: SIZE });
    // It is looked at again each time.
    machine.write("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 0 kB\n");
    assert_eq!(short(&limits, ANYWHERE, 4096).unwrap().left, 0);
    // Where nothing is told, nothing is claimed.
    let silent = Machine::new(0, 0);
    fs::remove_file(silent.dir.path().join("proc/meminfo")).unwrap();
    assert_eq!(short(&silent.limits("/", "rw"), ANYWHERE, u64::MAX), None);
}

#[test]
fn the_tightest_of_all_limits_is_named() {
    let machine = Machine::new(4096 * MIB, 0);
    machine.group("a", 512 * MIB);
    machine.group("a/b", 2048 * MIB);
    machine.group("c", 64 * MIB);
    let file = |path: &str| Limit::ControlGroup {
        file: machine.dir.path().join("cgroup").join(path),
    };
    let limits = machine.limits("/a/b", "rw");
    assert_eq!(short(&limits, ANYWHERE, 500 * MIB), None);
    let shortage = short(&limits, ANYWHERE, 512 * MIB).unwrap();
    assert_eq!(
        (shortage.left, shortage.limit),
        (508 * MIB, file("a/memory.max"))
    );
    // Of several that are too small, the one that is raised first for nothing is not named.
    let shortage = short(&limits, ANYWHERE, 5000 * MIB).unwrap();
    assert_eq!(shortage.limit, file("a/memory.max"));
    machine.group("a", 8192 * MIB);
    machine.group("a/b", 8192 * MIB);
    let shortage = short(&limits, ANYWHERE, 5000 * MIB).unwrap();
    assert_eq!(shortage.limit, Limit::Machine { size: SIZE });
}

#[test]
fn swap_counts_in_a_group_as_far_as_the_group_may_swap() {
    let machine = Machine::new(4096 * MIB, 100 * MIB);
    machine.group("vm", 64 * MIB);
    let limits = machine.limits("/vm", "rw");
    let left = |limits: &MemoryLimits| short(limits, ANYWHERE, 1024 * MIB).unwrap().left;
    assert_eq!(left(&limits), 160 * MIB);
    machine.write("cgroup/vm/memory.swap.max", &(30 * MIB).to_string());
    machine.write("cgroup/vm/memory.swap.current", &(10 * MIB).to_string());
    assert_eq!(left(&machine.limits("/vm", "rw")), 80 * MIB);
    machine.write("proc/sys/vm/swappiness", "0\n");
    assert_eq!(left(&machine.limits("/vm", "rw")), 60 * MIB);
}

#[test]
fn huge_pages_are_no_memory_of_the_machine_and_of_a_group_only_if_it_counts_them() {
    let machine = Machine::new(0, 0);
    machine.group("vm", 64 * MIB);
    machine.write("cgroup/vm/hugetlb.2MB.max", &(32 * MIB).to_string());
    machine.write("cgroup/vm/hugetlb.2MB.current", &(2 * MIB).to_string());
    let huge = Pages::Huge {
        page_size: 2 * MIB,
        reserving: false,
    };
    let limits = machine.limits("/vm", "rw");
    assert_eq!(short(&limits, huge, 30 * MIB), None);
    let shortage = short(&limits, huge, 32 * MIB).unwrap();
    assert_eq!((shortage.needed, shortage.left), (32 * MIB, 30 * MIB));
    assert!(is_in(&shortage, "vm/hugetlb.2MB.max"));
    let other = Pages::Huge {
        page_size: 1 << 30,
        reserving: false,
    };
    assert_eq!(short(&limits, other, 1 << 40), None);

    machine.group("vm", 16 * MIB);
    let limits = machine.limits("/vm", "rw,memory_hugetlb_accounting");
    let shortage = short(&limits, huge, 20 * MIB).unwrap();
    assert!(is_in(&shortage, "vm/memory.max"));
}

#[test]
fn nodes_have_what_is_free_and_clean_less_a_reserve() {
    let machine = Machine::new(4096 * MIB, 0);
    let node = |number: u32, free: u64| {
        let text = format!(
            "Node {number} MemTotal: 4194304 kB\nNode {number} MemFree: {} kB\n\
             Node {number} Active(file): 20480 kB\nNode {number} Inactive(file): 10240 kB\n\
             Node {number} Dirty: 10240 kB\nNode {number} Writeback: 0 kB\n",
            free / 1024
        );
        machine.write(&format!("nodes/node{number}/meminfo"), &text);
    };
    node(0, 100 * MIB);
    node(1, 1000 * MIB);
    let limits = machine.limits("/", "rw");
    let on = |nodes: &[u32]| Pages::Base(NodeSet::from_nodes(nodes.iter().copied()).unwrap());
    // 20 MiB of files can be dropped, 8 MiB of 4 GiB stay.
    let shortage = short(&limits, on(&[0]), 200 * MIB).unwrap();
    assert_eq!(shortage.left, 112 * MIB);
    let nodes = NodeSet::from_nodes([0]).unwrap();
    assert_eq!(shortage.limit, Limit::Nodes { nodes });
    assert_eq!(short(&limits, on(&[0]), 100 * MIB), None);
    assert_eq!(short(&limits, on(&[0, 1]), 1000 * MIB), None);
    assert_eq!(
        short(&limits, on(&[0, 1]), 2000 * MIB).unwrap().left,
        1124 * MIB
    );
    // All of it comes from the machine, too.
    let mut demand = Demand::of(on(&[0]), 1);
    demand.add(on(&[1]), 4096 * MIB);
    let bounds = limits.bounds(&demand, 0);
    let of_machine = bounds
        .iter()
        .find(|bound| bound.limit == Limit::Machine { size: SIZE });
    assert_eq!(demand.on(of_machine.unwrap()), 4096 * MIB + 32 * MIB + 1);
}

#[test]
fn ram_is_noted_that_a_group_would_slow_down_or_end() {
    let machine = Machine::new(0, 0);
    machine.group("vm", 64 * MIB);
    let limits = machine.limits("/vm", "rw");
    let demand = |size| Demand::of(ANYWHERE, size);
    assert_eq!(limits.too_small_for(&demand(16 * MIB)), []);
    machine.write("cgroup/vm/memory.high", &(8 * MIB).to_string());
    let limits = machine.limits("/vm", "rw");
    let found = |size| {
        let [short] = &limits.too_small_for(&demand(size))[..] else {
            return None;
        };
        let Limit::ControlGroup { file } = &short.limit else {
            return None;
        };
        let name = file.file_name()?.to_str()?.to_owned();
        Some((short.needed / MIB, short.left / MIB, name))
    };
    assert_eq!(found(MIB), None);
    assert_eq!(found(16 * MIB), Some((16, 8, "memory.high".to_owned())));
    assert_eq!(found(256 * MIB), Some((256, 8, "memory.high".to_owned())));
}

#[test]
fn demands_are_added_and_taken_back() {
    let mut demand = Demand::default();
    assert!(demand.is_empty());
    demand.add(ANYWHERE, MIB);
    demand.add(ANYWHERE, MIB);
    assert_eq!(demand.total(), 2 * MIB + 2 * MIB / 128);
    demand.take(ANYWHERE, MIB);
    assert!(!demand.is_empty());
    demand.take(ANYWHERE, 3 * MIB);
    assert!(demand.is_empty());
    demand.add(ANYWHERE, u64::MAX);
    demand.add(ANYWHERE, u64::MAX);
    assert_eq!(demand.on(&Bound::of_machine(0)), u64::MAX);
}

#[test]
fn this_process_has_limits_that_can_be_looked_at_without_a_descriptor() {
    let limits = MemoryLimits::of_this_process().unwrap();
    let demand = Demand::of(ANYWHERE, 1 << 50);
    let bounds = limits.bounds(&demand, 0);
    assert!(demand.shortage(&bounds).is_some(), "{bounds:?}");
}
