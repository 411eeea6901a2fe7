//! What of each region is allocated, where regions share backings.

use std::collections::BTreeMap;

use super::error::{StatsError, failed};
use crate::backing::{Allocation, FileIdentity};
use crate::ram::Ram;
use crate::range::RangeSet;

type Result<T> = std::result::Result<T, StatsError>;

const ALLOCATED: &str = "ask for the allocated pages of a backing";

/// For each region what of it is allocated, in bytes; and what cannot be told to be in one of
/// them.
pub(super) fn per_region(rams: &[&Ram]) -> Result<(Vec<u64>, u64)> {
    let mut allocated = vec![0; rams.len()];
    let mut unlocated = 0;
    for group in by_backing(rams) {
        let regions: Vec<&Ram> = group.iter().map(|at| rams[*at]).collect();
        let (of_group, rest) = of_one_backing(&regions)?;
        for (at, bytes) in group.into_iter().zip(of_group) {
            allocated[at] = bytes;
        }
        unlocated += rest;
    }
    Ok((allocated, unlocated))
}

/// The same for regions on one backing.
fn of_one_backing(regions: &[&Ram]) -> Result<(Vec<u64>, u64)> {
    let backing = &regions[0].backing;
    let size = |ram: &&Ram| ram.mapping.len() as u64;
    let (total, covered) = match backing.allocation().map_err(failed(ALLOCATED))? {
        Allocation::Nothing => return Ok((vec![0; regions.len()], 0)),
        Allocation::Everything => return Ok((regions.iter().map(size).collect(), 0)),
        Allocation::Some(bytes) => (bytes, covers_once(regions)),
        Allocation::AtMost(bytes) => (bytes, false),
    };
    if covered && regions.len() == 1 {
        return Ok((vec![total], 0));
    }
    if backing.is_hugetlb() {
        let mapped: Vec<u64> = regions.iter().map(mapped).collect::<Result<_>>()?;
        let unlocated = unlocated(regions, total, mapped.iter().sum());
        return Ok((mapped, unlocated));
    }
    // The largest is what the others leave of the total, if there is nothing but regions.
    let largest = (0..regions.len()).max_by_key(|at| size(&regions[*at]));
    let spared = largest.filter(|_| covered);
    let mut allocated = vec![0; regions.len()];
    for (at, ram) in regions.iter().enumerate() {
        if Some(at) != spared {
            let bytes = backing.allocated_in(ram.pages());
            allocated[at] = bytes.map_err(failed(ALLOCATED))?;
        }
    }
    if let Some(at) = spared {
        let others: u64 = allocated.iter().sum();
        allocated[at] = total.saturating_sub(others).min(size(&regions[at]));
    }
    Ok((allocated, 0))
}

/// What of a hugetlb backing is allocated, and may be in these regions, besides what is known to
/// be.
pub(super) fn unlocated(regions: &[&Ram], total: u64, located: u64) -> u64 {
    let size: u64 = regions.iter().map(|ram| ram.mapping.len() as u64).sum();
    total.min(size).saturating_sub(located)
}

/// What of a region on hugetlb this process has mapped.
fn mapped(ram: &&Ram) -> Result<u64> {
    Ok(mapped_parts(ram)?.len())
}

/// Which parts those are, in bytes from the start of the region.
pub(super) fn mapped_parts(ram: &Ram) -> Result<RangeSet> {
    let mapped = ram.mapping.mapped(ram.backing.page_size());
    mapped.map_err(failed("ask mincore(2) for the mapped pages"))
}

/// Whether the regions have all of their backing, and no part of it twice.
fn covers_once(regions: &[&Ram]) -> bool {
    let covered: RangeSet = regions.iter().map(|ram| ram.pages()).collect();
    let end = regions[0].backing.end();
    let sizes = regions.iter().map(|ram| ram.mapping.len() as u64);
    covered.contains(0..end) && sizes.sum::<u64>() == end
}

/// The regions of each backing: their places in `rams`, in the order of the first of each.
pub(super) fn by_backing(rams: &[&Ram]) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<FileIdentity, Vec<usize>> = BTreeMap::new();
    for (at, ram) in rams.iter().enumerate() {
        groups.entry(ram.backing.identity()).or_default().push(at);
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort_unstable();
    groups
}
