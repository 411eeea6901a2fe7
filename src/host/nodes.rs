//! The NUMA nodes of this machine (`/sys/devices/system/node`, Documentation/ABI/stable/sysfs-devices-node).

use std::fs;

use crate::options::NodeSet;

const NODES: &str = "/sys/devices/system/node";

/// The nodes that have memory, or `None` if the kernel does not tell, as one without NUMA.
pub(crate) fn with_memory() -> Option<NodeSet> {
    let text = fs::read_to_string(format!("{NODES}/has_memory")).ok()?;
    NodeSet::from_nodes(parse_list(&text)?).ok()
}

/// The CPUs of a node, or `None` if the kernel does not tell.
pub(crate) fn cpus(node: u32) -> Option<Vec<u32>> {
    parse_list(&fs::read_to_string(format!("{NODES}/node{node}/cpulist")).ok()?)
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
    fn this_machine_has_a_node_with_memory() {
        let nodes = with_memory();
        assert!(nodes.is_none_or(|nodes| !nodes.is_empty()));
    }
}
