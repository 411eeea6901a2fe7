//! What populating needs: the pages that are not there yet, and the tables to map them.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::part::Part;
use super::watch::Watch;
use crate::backing::{Allocation, FileIdentity};
use crate::host::memory::{Demand, Short};
use crate::options::Populate;
use crate::range::RangeSet;

/// A table of pages has one byte for so many bytes of what it maps, where pages are 4 KiB.
const MAPPED_PER_BYTE: u64 = 512;

/// What is short of what the parts need, and the part at which it ends.
pub(super) fn shortage(parts: &[Part], watch: &Watch) -> Option<(usize, Short)> {
    // Nothing of it may be there yet: if all fits, nothing needs to be counted.
    let all: Vec<u64> = parts.iter().map(Part::len).collect();
    let all = demand(parts, &all);
    all.shortage(&watch.bounds(&all))?;
    let missing = missing_of_all(parts);
    let needed = demand(parts, &missing);
    let bounds = watch.bounds(&needed);
    let short = needed.shortage(&bounds)?;
    // Part by part, until it is too much.
    let mut sum = Demand::default();
    let ends = parts.iter().zip(missing).position(|(part, bytes)| {
        part.watched().is_some_and(|kind| {
            sum.add(kind, bytes);
            sum.shortage(&bounds).is_some()
        })
    });
    Some((ends.unwrap_or(0), short))
}

/// So many bytes of each part, as far as it is to be looked at.
fn demand(parts: &[Part], bytes: &[u64]) -> Demand {
    let mut demand = Demand::default();
    for (part, bytes) in parts.iter().zip(bytes) {
        if let Some(kind) = part.watched() {
            demand.add(kind, *bytes);
        }
    }
    demand
}

/// What is missing of each part, in bytes; of parts that are the same RAM, only once.
fn missing_of_all(parts: &[Part]) -> Vec<u64> {
    let mut seen: BTreeMap<FileIdentity, RangeSet> = BTreeMap::new();
    let missing = |part: &Part| {
        let (identity, range) = (
            part.backing().identity(),
            part.ram.in_backing(part.range.clone()),
        );
        let of_file = seen.entry(identity).or_default();
        let new = of_file.gaps(range.clone());
        let pages = new.map(|range| missing_pages(part, range)).sum();
        of_file.insert(range.clone());
        pages + missing_tables(part, range, pages)
    };
    parts.iter().map(missing).collect()
}

/// How many bytes are missing of a range of the part's backing, and to map it.
pub(super) fn missing(part: &Part, range: Range<u64>) -> u64 {
    let pages = missing_pages(part, range.clone());
    pages + missing_tables(part, range, pages)
}

/// What is missing for the tables that map a range, besides those for `pages` that are missing, of
/// whose need they are a part: pages that are there, by another process perhaps, are not mapped
/// yet. None where that cannot be told.
fn missing_tables(part: &Part, range: Range<u64>, pages: u64) -> u64 {
    // Those of huge pages are small.
    if part.mode != Populate::Prefault || !part.through_descriptor() {
        return 0;
    }
    let in_region = range.start - part.ram.offset..range.end - part.ram.offset;
    match part.ram.mapping.mapped_in(in_region) {
        Ok(Some(mapped)) => {
            let unmapped = (range.end - range.start).saturating_sub(mapped);
            unmapped.saturating_sub(pages) / MAPPED_PER_BYTE
        }
        Ok(None) | Err(_) => 0,
    }
}

/// How many bytes of a range of the part's backing have no page yet; all that cannot be told.
fn missing_pages(part: &Part, range: Range<u64>) -> u64 {
    let len = range.end - range.start;
    len.saturating_sub(there(part, range).unwrap_or(0))
}

fn there(part: &Part, range: Range<u64>) -> io::Result<u64> {
    let backing = part.backing();
    let len = range.end - range.start;
    // What is allocated besides the range is at most as large as that.
    let outside = backing.size().saturating_sub(len);
    let at_least = match backing.allocation()? {
        Allocation::Nothing => return Ok(0),
        Allocation::Everything => return Ok(len),
        Allocation::Some(bytes) => bytes.saturating_sub(outside),
        Allocation::AtMost(_) => 0,
    };
    if backing.is_hugetlb() {
        // The kernel does not tell which.
        return Ok(at_least);
    }
    // Before Linux 6.5 pages are not seen that were allocated and never touched.
    Ok(backing.allocated_in(range)?.max(at_least))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    use super::*;
    use crate::backing::ShmBacking;
    use crate::options::RamOptions;
    use crate::region::GuestRegionShm;

    const MIB: u64 = 1 << 20;

    fn part(backing: &ShmBacking, offset: u64, size: u64) -> Part {
        let region = GuestRegionShm::<()>::from_backing(backing, offset, (GuestAddress(0), size));
        Part::whole(region.unwrap().ram().clone(), Populate::Allocate)
    }

    #[test]
    fn only_pages_that_are_not_there_count_and_each_only_once() {
        let backing = ShmBacking::create(&RamOptions::new(), 16 * MIB).unwrap();
        let other = ShmBacking::create(&RamOptions::new(), MIB).unwrap();
        let region = GuestRegionShm::<()>::from_backing(&backing, 0, (GuestAddress(0), 16 * MIB));
        let region = region.unwrap();
        for at in [0, 4096, 9 * MIB] {
            region.write_obj(1u8, MemoryRegionAddress(at)).unwrap();
        }
        let parts = [
            part(&backing, 0, 8 * MIB),
            // Overlaps with the first.
            part(&backing, 4 * MIB, 8 * MIB),
            part(&other, 0, MIB),
            part(&backing, 0, 16 * MIB),
        ];
        let expected = [8 * MIB - 8192, 4 * MIB - 4096, MIB, 4 * MIB];
        assert_eq!(missing_of_all(&parts), expected);
        // Allocated and never touched is there, too.
        nix::fcntl::posix_fallocate(&backing, 0, 16 * MIB as i64).unwrap();
        assert_eq!(missing_of_all(&parts), [0, 0, MIB, 0]);
    }

    #[test]
    fn pages_that_are_there_and_not_mapped_need_tables() {
        let backing = ShmBacking::create(&RamOptions::new(), 16 * MIB).unwrap();
        nix::fcntl::posix_fallocate(&backing, 0, 8 * MIB as i64).unwrap();
        let allocate = || part(&backing, 0, 16 * MIB);
        assert_eq!(missing_of_all(&[allocate()]), [8 * MIB]);
        let mut prefault = allocate();
        prefault.mode = Populate::Prefault;
        match prefault.ram.mapping.mapped_in(0..MIB) {
            Ok(Some(mapped)) => assert_eq!(mapped, 0),
            cannot => return eprintln!("skipped: what is mapped cannot be told: {cannot:?}"),
        }
        assert_eq!(missing(&prefault, 8 * MIB..16 * MIB), 8 * MIB);
        assert_eq!(missing(&prefault, 4 * MIB..8 * MIB), 4 * MIB / 512);
        prefault
            .ram
            .mapping
            .populate(0..4 * MIB, Default::default())
            .unwrap();
        let parts = [prefault];
        assert_eq!(missing_of_all(&parts), [8 * MIB + 4 * MIB / 512]);
        let [prefault] = parts;
        assert_eq!(missing(&prefault, 0..4 * MIB), 0);
    }
}
