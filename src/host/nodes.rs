//! The NUMA nodes of this machine (`/sys/devices/system/node`,
//! Documentation/ABI/stable/sysfs-devices-node).

use std::fs;

use super::fields::field;
use crate::host::NodeSet;

pub(super) const DIR: &str = "/sys/devices/system/node";

/// The nodes that have memory, or `None` if the kernel does not tell, as one without NUMA.
pub(crate) fn with_memory() -> Option<NodeSet> {
    let text = fs::read_to_string(format!("{DIR}/has_memory")).ok()?;
    NodeSet::from_nodes(parse_list(&text)?)
}

/// The nodes that pages may come from that this thread allocates, if they are not all that have
/// memory (cpuset(7)); empty if they are, or if the kernel does not tell.
pub(crate) fn only_allowed() -> NodeSet {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    with_memory()
        .and_then(|all| restriction(&status, all))
        .unwrap_or_default()
}

fn restriction(status: &str, with_memory: NodeSet) -> Option<NodeSet> {
    let listed = parse_list(field(status, "Mems_allowed_list")?)?.into_iter();
    let there = listed.filter(|node| with_memory.contains(*node));
    let allowed = NodeSet::from_nodes(there)?;
    (allowed != with_memory).then_some(allowed)
}

/// The CPUs of a node, or `None` if the kernel does not tell.
pub(crate) fn cpus(node: u32) -> Option<Vec<u32>> {
    parse_list(&fs::read_to_string(format!("{DIR}/node{node}/cpulist")).ok()?)
}

/// The numbers of a list in the kernel's syntax, `0,2-3`.
pub(crate) fn parse_list(text: &str) -> Option<Vec<u32>> {
    let text = text.trim();
    let mut numbers = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_list("0\n"), Some(vec![0]));
        assert_eq!(parse_list("0,2-4,7\n"), Some(vec![0, 2, 3, 4, 7]));
        assert_eq!(parse_list("\n"), Some(vec![]));
        assert_eq!(parse_list("0-x"), None);
    }

    #[test]
    fn nodes_are_a_restriction_only_if_others_have_memory() {
        let set = |nodes: &[u32]| NodeSet::from_nodes(nodes.iter().copied()).unwrap();
        let status = |list: &str| format!("Name:\tx\nMems_allowed_list:\t{list}\n");
        let both = set(&[0, 1]);
        assert_eq!(restriction(&status("0-1"), both), None);
        // Kernels list nodes that could be, too.
        assert_eq!(restriction(&status("0-63"), both), None);
        assert_eq!(restriction(&status("1"), both), Some(set(&[1])));
        assert_eq!(restriction("Name:\tx\n", both), None);
    }

    #[test]
    fn this_machine_has_a_node_with_memory() {
        let nodes = with_memory();
        assert!(nodes.is_none_or(|nodes| !nodes.is_empty()));
    }
}
