//! Facts about RAM as a table for people.

use std::fmt;

use super::{Extents, MemoryStats};
use crate::backing::Seals;
use crate::range::GuestRange;
use crate::units::{ShortSize, columns};

fn known(bytes: Option<u64>) -> String {
    bytes.map_or_else(
        || "unknown".to_owned(),
        |bytes| ShortSize(bytes).to_string(),
    )
}

/// A line of headings, a line per region, the totals, the nodes, what is locked, and the notes.
impl fmt::Display for MemoryStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headings = [
            "guest address",
            "size",
            "allocated",
            "huge",
            "page",
            "sealed",
            "backing",
            "name",
        ];
        let mut rows = vec![headings.map(str::to_owned).to_vec()];
        rows.extend(self.regions.iter().map(|region| {
            let sealed = region.seals.contains(Seals::RESIZE);
            vec![
                format!("{:#x}", region.range.start_addr().0),
                ShortSize(region.size()).to_string(),
                ShortSize(region.allocated).to_string(),
                known(region.huge),
                ShortSize(region.page_size).to_string(),
                (if sealed { "yes" } else { "no" }).to_owned(),
                region.kind.to_string(),
                region.name.clone(),
            ]
        }));
        rows.push(vec![
            "total".to_owned(),
            ShortSize(self.size()).to_string(),
            ShortSize(self.allocated()).to_string(),
            known(self.huge()),
        ]);
        f.write_str(&columns("lrrrrlll", &rows))?;
        if self.unlocated > 0 {
            write!(f, "\n{}", unlocated(self.unlocated))?;
        }
        for (node, allocated) in &self.nodes {
            write!(f, "\nallocated on node {node}: {}", ShortSize(*allocated))?;
        }
        write!(f, "\nlocked by this process: {}", ShortSize(self.locked))?;
        let mut notes = self.notes.notes();
        notes.try_for_each(|(backing, note)| write!(f, "\n{backing}: {note}"))
    }
}

/// A line per range, and what cannot be told.
impl fmt::Display for Extents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.iter().map(GuestRange::to_string);
        let unlocated = (self.unlocated > 0).then(|| unlocated(self.unlocated));
        f.write_str(&ranges.chain(unlocated).collect::<Vec<_>>().join("\n"))
    }
}

fn unlocated(bytes: u64) -> String {
    format!("in a region that cannot be told: {}", ShortSize(bytes))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use std::collections::BTreeMap;

    use super::super::RegionStats;
    use super::*;
    use crate::backing::BackingKind;
    use crate::report::{BuildNote, BuildReport};

    #[test]
    fn columns_are_aligned_and_units_are_human() {
        let region = |start, size, allocated, huge| RegionStats {
            range: GuestRange::new(GuestAddress(start), size).unwrap(),
            kind: BackingKind::HugetlbMemfd,
            name: "ram".to_owned(),
            page_size: 2 << 20,
            allocated,
            huge,
            seals: Seals::RESIZE,
        };
        let mut stats = MemoryStats {
            regions: vec![
                region(0, 3 << 30, (1 << 30) + (600 << 20), Some(2 << 20)),
                region(4 << 30, 4096, 0, None),
            ],
            nodes: BTreeMap::from([(0, 12 << 20)]),
            unlocated: 2 << 20,
            locked: 100,
            notes: BuildReport::default(),
        };
        stats.notes.add("ram", [BuildNote::Merge]);
        let text = stats.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "guest address    size allocated    huge  page sealed backing       name",
                "0x0             3 GiB   1.5 GiB   2 MiB 2 MiB yes    hugetlb memfd ram",
                "0x100000000     4 KiB       0 B unknown 2 MiB yes    hugetlb memfd ram",
                "total         3.0 GiB   1.5 GiB unknown",
                "in a region that cannot be told: 2 MiB",
                "allocated on node 0: 12 MiB",
                "locked by this process: 100 B",
                "ram: merge=on has no effect: the kernel merges private \
                 pages only, never shared ones",
            ]
        );
    }
    #[test]
    fn extents_are_a_line_each() {
        let range = |start| GuestRange::new(GuestAddress(start), 4096).unwrap();
        let mut extents = Extents {
            ranges: vec![range(0), range(8192)],
            unlocated: 0,
        };
        let lines = "0x0..=0xfff (4 KiB)\n0x2000..=0x2fff (4 KiB)";
        assert_eq!(extents.to_string(), lines);
        extents.unlocated = 2 << 20;
        let rest = "in a region that cannot be told: 2 MiB";
        assert_eq!(extents.to_string(), format!("{lines}\n{rest}"));
    }
}
