//! On which nodes the pages of this process are (`/proc/self/numa_maps`, numa(7)).

use std::fs;
use std::io;

/// What of the mappings that start at these addresses is on which node: node, bytes. Pages that
/// only other processes have mapped are not seen.
pub(crate) fn bytes_on_nodes(mappings: &[u64]) -> io::Result<Vec<(u32, u64)>> {
    let text = fs::read_to_string("/proc/self/numa_maps")?;
    let lines = text.lines().map(parse_numa_line);
    let ours = lines
        .flatten()
        .filter(|line| mappings.contains(&line.start));
    Ok(ours.flat_map(|line| line.nodes).collect())
}

/// A line of it.
#[derive(Debug, PartialEq, Eq)]
struct NumaLine {
    start: u64,
    /// Node, bytes.
    nodes: Vec<(u32, u64)>,
}

fn parse_numa_line(line: &str) -> Option<NumaLine> {
    let mut words = line.split_ascii_whitespace();
    let start = u64::from_str_radix(words.next()?, 16).ok()?;
    let (mut nodes, mut page_size) = (Vec::new(), 4 * 1024);
    for word in words {
        let Some((name, value)) = word.split_once('=') else {
            continue;
        };
        if name == "kernelpagesize_kB" {
            page_size = value.parse::<u64>().ok()? * 1024;
        } else if let Some(node) = name.strip_prefix('N').and_then(|node| node.parse().ok()) {
            nodes.push((node, value.parse::<u64>().ok()?));
        }
    }
    for (_, pages) in &mut nodes {
        *pages *= page_size;
    }
    Some(NumaLine { start, nodes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_numa_maps_are_read() {
        let shm = "7f10a0000000 bind:0-1 file=/memfd:ram\\040(deleted) dirty=3 active=0 N0=2 N1=1 \
                   kernelpagesize_kB=4";
        let line = parse_numa_line(shm).unwrap();
        assert_eq!(line.start, 0x7f10_a000_0000);
        assert_eq!(line.nodes, [(0, 8192), (1, 4096)]);
        let huge = "7f10a0000000 default file=/anon_hugepage huge dirty=3 N1=3 \
                    kernelpagesize_kB=2048";
        assert_eq!(parse_numa_line(huge).unwrap().nodes, [(1, 6 << 20)]);
        assert_eq!(parse_numa_line("7f10a0000000 default").unwrap().nodes, []);
        assert_eq!(parse_numa_line(""), None);
    }
}
