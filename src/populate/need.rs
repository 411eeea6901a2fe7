//! What populating needs: the pages that are not there yet, and of which kind.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use super::plan::Part;
use crate::backing::{Allocation, FileIdentity};
use crate::host::memory::{Demand, Kind, MemoryLimits, Short};
use crate::host::nodes;
use crate::options::{NodeSet, NumaPolicy, OnShortage, Populate};
use crate::range::RangeSet;

/// A table of pages has one byte for so many bytes of what it maps, where pages are 4 KiB.
const MAPPED_PER_BYTE: u64 = 512;

/// What the pages of each part are made of: none where the kernel could drop them, as those of a
/// file on a disk, and where nothing is to be looked at.
pub(super) fn kinds(parts: &[Part]) -> Vec<Option<Kind>> {
    let allowed = nodes::only_allowed();
    let kind = |part: &Part| match part.on_shortage {
        OnShortage::TryAnyway => None,
        OnShortage::Refuse => kind(part, allowed),
    };
    parts.iter().map(kind).collect()
}

pub(super) fn kind(part: &Part, allowed: NodeSet) -> Option<Kind> {
    let backing = part.backing();
    let options = backing.map_options();
    if backing.is_hugetlb() {
        return Some(Kind::Huge {
            page_size: backing.page_size(),
            reserving: options.unreserved,
        });
    }
    // Of all policies only this one takes pages from no other node.
    let nodes = match options.numa {
        NumaPolicy::Bind(nodes) if allowed.is_empty() => nodes,
        NumaPolicy::Bind(nodes) => nodes.intersection(allowed),
        _ => allowed,
    };
    backing.is_on_tmpfs().then_some(Kind::Base(nodes))
}

/// What is short of what the parts need, and the part at which it ends.
pub(super) fn shortage(
    limits: &MemoryLimits,
    parts: &[Part],
    kinds: &[Option<Kind>],
) -> Option<(usize, Short)> {
    // Nothing of it may be there yet: if all fits, nothing needs to be counted.
    let all = demand(parts, kinds, |part| part.len());
    all.shortage(&limits.bounds(&all, 0))?;
    let missing = missing_of_all(parts);
    let demand = |count: usize| {
        let mut demand = Demand::default();
        for at in 0..count {
            if let Some(kind) = kinds[at] {
                demand.add(kind, missing[at]);
            }
        }
        demand
    };
    let needed = demand(parts.len());
    let bounds = limits.bounds(&needed, 0);
    let shortage = needed.shortage(&bounds)?;
    let ends = (1..=parts.len()).find(|count| demand(*count).shortage(&bounds).is_some());
    Some((ends.map_or(0, |count| count - 1), shortage))
}

fn demand(parts: &[Part], kinds: &[Option<Kind>], bytes: impl Fn(&Part) -> u64) -> Demand {
    let mut demand = Demand::default();
    for (part, kind) in parts.iter().zip(kinds) {
        if let Some(kind) = kind {
            demand.add(*kind, bytes(part));
        }
    }
    demand
}

/// What is missing of each part, in bytes; of parts that are the same RAM, only once.
fn missing_of_all(parts: &[Part]) -> Vec<u64> {
    let mut seen: HashMap<FileIdentity, RangeSet> = HashMap::new();
    let missing = |part: &Part| {
        let (identity, range) = (part.backing().identity(), part.in_backing(&part.range));
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
    use crate::options::{Backing, PageSize, Populate, RamOptions};
    use crate::region::GuestRegionShm;

    const MIB: u64 = 1 << 20;

    fn part(backing: &ShmBacking, offset: u64, size: u64) -> Part {
        let region = GuestRegionShm::<()>::from_backing(backing, offset, GuestAddress(0), size);
        Part::whole(region.unwrap().ram().clone(), Populate::Allocate)
    }

    #[test]
    fn only_pages_that_are_not_there_count_and_each_only_once() {
        let backing = ShmBacking::create(&RamOptions::new(), 16 * MIB).unwrap();
        let other = ShmBacking::create(&RamOptions::new(), MIB).unwrap();
        let region = GuestRegionShm::<()>::from_backing(&backing, 0, GuestAddress(0), 16 * MIB);
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
        let prefault = Part {
            mode: Populate::Prefault,
            ..allocate()
        };
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

    #[test]
    fn pages_that_the_kernel_can_drop_are_no_need() {
        let set = |nodes: &[u32]| NodeSet::from_nodes(nodes.iter().copied()).unwrap();
        let of = |options: &RamOptions, allowed| {
            let backing = ShmBacking::create(options, MIB).unwrap();
            kind(&part(&backing, 0, MIB), allowed)
        };
        let (plain, anywhere) = (RamOptions::new(), NodeSet::new());
        assert_eq!(of(&plain, anywhere), Some(Kind::Base(anywhere)));
        assert_eq!(of(&plain, set(&[1])), Some(Kind::Base(set(&[1]))));
        let thp = plain.clone().with_page_size(PageSize::Transparent);
        assert_eq!(of(&thp, anywhere), Some(Kind::Base(anywhere)));
        let bound = plain.clone().with_numa(NumaPolicy::Bind(set(&[0])));
        assert_eq!(of(&bound, anywhere), Some(Kind::Base(set(&[0]))));
        assert_eq!(of(&bound, set(&[0, 1])), Some(Kind::Base(set(&[0]))));
        let spread = plain.clone().with_numa(NumaPolicy::Interleave(set(&[0])));
        assert_eq!(of(&spread, anywhere), Some(Kind::Base(anywhere)));
        let file = |dir: &str| plain.clone().with_backing(Backing::File(dir.into()));
        assert_eq!(of(&file("/dev/shm"), anywhere), Some(Kind::Base(anywhere)));
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert_eq!(of(&file(disk.path().to_str().unwrap()), anywhere), None);
    }
}
