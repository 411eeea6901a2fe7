//! Threads kept to the CPUs of the NUMA nodes that their pages come from (sched_setaffinity(2)).
//!
//! A page is on the right node whichever thread allocates it: mbind(2) does that. But clearing
//! it from another node takes far longer.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::host::NodeSet;
use crate::host::nodes;

/// Where the current thread may run.
pub(super) struct Affinity {
    /// Where it might at first, read when it is first changed.
    before: Option<CpuSet>,
    nodes: NodeSet,
}

impl Affinity {
    /// Changes nothing yet.
    pub(super) fn of_this_thread() -> Self {
        Self {
            before: None,
            nodes: NodeSet::new(),
        }
    }

    /// Keeps the thread to the CPUs of `nodes` that it may use at all, or, if there are none, or
    /// no nodes are given, to where it was at first.
    pub(super) fn keep_to(&mut self, nodes: NodeSet) -> Result<(), Errno> {
        if nodes == self.nodes {
            return Ok(());
        }
        self.nodes = nodes;
        let before = match self.before {
            Some(before) => before,
            None => *self.before.insert(sched_getaffinity(THIS)?),
        };
        let near = intersection(&before, &cpus_of(nodes));
        sched_setaffinity(THIS, &near.unwrap_or(before))
    }
}

impl Drop for Affinity {
    /// It may be a thread of the caller's.
    fn drop(&mut self) {
        // If this is refused, so was what it would undo.
        let _ = self.keep_to(NodeSet::new());
    }
}

const THIS: Pid = Pid::from_raw(0);

/// The CPUs of these nodes; none of a node that has only memory.
fn cpus_of(nodes: NodeSet) -> Vec<u32> {
    nodes.iter().filter_map(nodes::cpus).flatten().collect()
}

/// Those of `cpus` that are in `set`, or `None` if none is.
fn intersection(set: &CpuSet, cpus: &[u32]) -> Option<CpuSet> {
    let mut both = CpuSet::new();
    let mut any = false;
    for cpu in cpus {
        let cpu = *cpu as usize;
        // A number beyond what the set can hold is an error, and not in it.
        if set.is_set(cpu) == Ok(true) && both.set(cpu).is_ok() {
            any = true;
        }
    }
    any.then_some(both)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        for cpu in cpus {
            set.set(*cpu).unwrap();
        }
        set
    }

    #[test]
    fn only_cpus_that_the_thread_may_use_count() {
        assert_eq!(
            intersection(&set(&[1, 2, 3]), &[0, 1, 3]),
            Some(set(&[1, 3]))
        );
        assert_eq!(intersection(&set(&[1]), &[0]), None);
        assert_eq!(intersection(&set(&[1]), &[]), None);
        assert_eq!(intersection(&set(&[1]), &[u32::MAX]), None);
    }

    #[test]
    fn a_thread_is_kept_to_a_node_and_goes_back() {
        let first = NodeSet::from_nodes([0]).unwrap();
        let of_node = cpus_of(first);
        if of_node.is_empty() {
            eprintln!("skipped: this machine tells nothing of node 0");
            return;
        }
        std::thread::spawn(move || {
            let before = sched_getaffinity(THIS).unwrap();
            let near = intersection(&before, &of_node).unwrap();
            let mut affinity = Affinity::of_this_thread();
            affinity.keep_to(first).unwrap();
            assert_eq!(sched_getaffinity(THIS).unwrap(), near);
            // A node without CPUs: anywhere.
            affinity
                .keep_to(NodeSet::from_nodes([127]).unwrap())
                .unwrap();
            assert_eq!(sched_getaffinity(THIS).unwrap(), before);
            // One CPU, so that there is something to see on a machine with one node.
            let one = (0..CpuSet::count()).find(|cpu| near.is_set(*cpu) == Ok(true));
            sched_setaffinity(THIS, &set(&[one.unwrap()])).unwrap();
            affinity.keep_to(first).unwrap();
            assert_eq!(sched_getaffinity(THIS).unwrap(), near);
            drop(affinity);
            assert_eq!(sched_getaffinity(THIS).unwrap(), before);
        })
        .join()
        .unwrap();
    }
}
