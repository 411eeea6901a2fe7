//! Placement on NUMA nodes: what the kernel says of the mappings, and what is refused.

use std::fs;

use guest_memory_shm::{
    BackingError, BackingSource, BuildNote, Error, GuestMemoryShm, GuestRegionShm, NodeSet,
    NumaPolicy, RamOptions,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::isolation::assert_refused;
use crate::proc::leaves_nothing;
use crate::{isolation::in_own_process, support::skip};

const MIB: u64 = 1 << 20;

pub(crate) fn nodes(nodes: &[u32]) -> NodeSet {
    NodeSet::from_nodes(nodes.iter().copied()).unwrap()
}

fn memory(options: RamOptions) -> Result<GuestMemoryShm, Error> {
    GuestMemoryShm::builder()
        .add_ram(options, [(GuestAddress(0), 4 * MIB)])
        .build()
        .map_err(Error::from)
}

/// The policy of the mapping at `start` in /proc/self/numa_maps, as `bind:0`, and the words after
/// it.
pub(crate) fn numa_maps(start: *const u8) -> Option<(String, String)> {
    let text = fs::read_to_string("/proc/self/numa_maps").ok()?;
    let prefix = format!("{:x} ", start.addr());
    let line = text.lines().find_map(|line| line.strip_prefix(&prefix))?;
    let (policy, rest) = line.split_once(' ').unwrap_or((line, ""));
    Some((policy.to_owned(), rest.to_owned()))
}

/// Whether there are nodes at all; otherwise says why not.
pub(crate) fn numa() -> bool {
    let there = fs::metadata("/proc/self/numa_maps").is_ok();
    if !there {
        skip("the kernel knows no NUMA nodes");
    }
    there
}

#[test]
fn the_kernel_knows_the_policy_of_each_mapping() {
    if !numa() {
        return;
    }
    let zero = nodes(&[0]);
    for (policy, expected) in [
        (NumaPolicy::Default, &["default"][..]),
        (NumaPolicy::Bind(zero), &["bind:0"]),
        (NumaPolicy::Interleave(zero), &["interleave:0"]),
        // The second is that of kernels before 5.15.
        (
            NumaPolicy::Preferred(zero),
            &["prefer (many):0", "prefer:0"],
        ),
    ] {
        for backing in [BackingSource::Memfd, BackingSource::PosixShm] {
            let options = RamOptions::new().with_backing(backing).with_numa(policy);
            let memory = memory(options).unwrap();
            memory.write_obj(1u8, GuestAddress(0)).unwrap();
            let region = memory.iter().next().unwrap();
            let (found, rest) = numa_maps(region.as_ptr()).expect("the region is mapped");
            let found = format!("{found} {rest}");
            assert!(
                expected.iter().any(|text| found.starts_with(text)),
                "{policy:?}: {found}"
            );
            assert!(rest.contains("N0=1"), "the page is on node 0: {rest}");
        }
    }
}

#[test]
fn the_policy_belongs_to_the_object_and_holds_for_other_mappings_of_it() {
    if !numa() {
        return;
    }
    let options = RamOptions::new().with_numa(NumaPolicy::Bind(nodes(&[0])));
    let memory = memory(options).unwrap();
    let backing = memory.iter().next().unwrap().backing().clone();
    drop(memory);
    // Adopted as a daemon would, without any options.
    let fd = std::os::fd::AsFd::as_fd(&backing)
        .try_clone_to_owned()
        .unwrap();
    let theirs = guest_memory_shm::ShmBacking::adopt(fd, &guest_memory_shm::AdoptPolicy::new());
    let region =
        GuestRegionShm::<()>::from_backing(&theirs.unwrap(), 0, (GuestAddress(0), MIB)).unwrap();
    let (policy, _) = numa_maps(region.as_ptr()).unwrap();
    assert_eq!(policy, "bind:0");
}

#[test]
fn a_node_that_is_not_there_is_refused_before_anything_is_created() {
    if !numa() {
        return;
    }
    let present = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap();
    in_own_process(|| {
        for policy in [
            NumaPolicy::Bind(nodes(&[126, 127])),
            NumaPolicy::Preferred(nodes(&[126, 127])),
            NumaPolicy::Interleave(nodes(&[126, 127])),
        ] {
            let options = RamOptions::new().with_numa(policy);
            let refused = leaves_nothing(|| memory(options.clone()));
            assert_refused!(
                refused,
                Error::Backing(BackingError::NoSuchNodes { .. }),
                format!(
                    "cannot place RAM on host-nodes=126-127 (policy={}): this machine has memory \
                     on nodes {}; choose nodes that are there and that this process may use \
                     (cpuset)",
                    policy.name(),
                    present.trim(),
                )
            );
        }
    });
}

#[test]
fn a_policy_where_there_is_one_node_is_reported_to_have_no_effect() {
    if !numa() {
        return;
    }
    let one = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap();
    let policy = NumaPolicy::Bind(nodes(&[0]));
    let (_, report) = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new().with_name("low").with_numa(policy),
            [(GuestAddress(0), MIB)],
        )
        .build_with_report()
        .unwrap();
    if one.trim() == "0" {
        let (_, note) = report.notes().next().unwrap();
        assert!(matches!(note, BuildNote::OneNode { .. }));
        assert_eq!(
            report.to_string(),
            "low: policy=bind with host-nodes=0 has no effect: this machine has one node"
        );
    } else {
        assert!(report.is_empty(), "{report}");
    }
}
