//! Files of the kernel whose lines are a name, a colon and a value: `meminfo` and `status`.

/// The value of the line with this name. Lines of the `meminfo` of a node begin with the node.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let line = match line.strip_prefix("Node ") {
            Some(rest) => rest.split_once(' ')?.1,
            None => line,
        };
        Some(line.strip_prefix(name)?.strip_prefix(':')?.trim())
    })
}

/// The same in bytes, of a line like `MemTotal:  64 kB`.
pub(super) fn bytes(text: &str, name: &str) -> Option<u64> {
    let kib: u64 = field(text, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_in_bytes_of_the_machine_and_of_a_node() {
        let machine = "MemTotal:       24654560 kB\nMemAvailable:   23068672 kB\n\
                       HugePages_Free:        7\n";
        assert_eq!(bytes(machine, "MemAvailable"), Some(23_068_672 << 10));
        assert_eq!(bytes(machine, "Mem"), None);
        assert_eq!(bytes(machine, "MemFree"), None);
        assert_eq!(bytes(machine, "HugePages_Free"), None);
        assert_eq!(field(machine, "HugePages_Free"), Some("7"));
        let node = "Node 0 MemTotal:       4096 kB\nNode 0 Active(file):     12 kB\n";
        assert_eq!(bytes(node, "MemTotal"), Some(4 << 20));
        assert_eq!(bytes(node, "Active(file)"), Some(12 << 10));
        let status = "VmPeak:\t 10 kB\nVmLck:\t      64 kB\nMems_allowed_list:\t0-1\n";
        assert_eq!(bytes(status, "VmLck"), Some(64 << 10));
        assert_eq!(field(status, "Mems_allowed_list"), Some("0-1"));
    }
}
