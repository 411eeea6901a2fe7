//! The memory of the machine (proc_meminfo(5)) and of its NUMA nodes, in bytes.

/// The value of a line of `/proc/meminfo`, or of the `meminfo` of a node, whose lines begin with
/// the node.
pub(crate) fn value(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| {
        let line = match line.strip_prefix("Node ") {
            Some(rest) => rest.split_once(' ')?.1,
            None => line,
        };
        line.strip_prefix(name)?.strip_prefix(':')
    })?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_in_bytes_of_the_machine_and_of_a_node() {
        let machine = "MemTotal:       24654560 kB\nMemAvailable:   23068672 kB\n\
                       HugePages_Free:        7\n";
        assert_eq!(value(machine, "MemAvailable"), Some(23_068_672 << 10));
        assert_eq!(value(machine, "Mem"), None);
        assert_eq!(value(machine, "MemFree"), None);
        assert_eq!(value(machine, "HugePages_Free"), None);
        let node = "Node 0 MemTotal:       4096 kB\nNode 0 Active(file):     12 kB\n";
        assert_eq!(value(node, "MemTotal"), Some(4 << 20));
        assert_eq!(value(node, "Active(file)"), Some(12 << 10));
    }
}
