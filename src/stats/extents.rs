//! Which parts of the RAM are allocated.

use std::ops::Range;

use super::allocated::{by_backing, mapped_parts, unlocated};
use super::error::{StatsError, failed};
use crate::backing::Allocation;
use crate::memory::GuestMemoryShm;
use crate::ram::Ram;
use crate::range::{GuestRange, RangeSet, outwards};

/// Which parts of the RAM are allocated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Extents {
    /// The parts that have an allocated page, sorted, and merged where they touch.
    pub ranges: Vec<GuestRange>,
    /// What is allocated besides, in bytes, but the kernel does not say where: huge pages of
    /// hugetlb that only other processes have touched, in a backing that is not full.
    pub unlocated: u64,
}

impl<B> GuestMemoryShm<B> {
    /// Which parts of the RAM are allocated now, in steps of `resolution` bytes from the start of
    /// each region: a step with any allocated page counts as a whole, except past the end of its
    /// region.
    ///
    /// The resolution is rounded up to a multiple of the page size of each backing, 0 to one page.
    /// What is swapped out is allocated, and so is what was allocated but never touched
    /// ([`Populate::Allocate`](crate::Populate::Allocate)). The RAM is in use meanwhile: what
    /// comes or goes may be seen or not.
    ///
    /// Costs less than a microsecond for each step that is allocated in part of a backing, and for
    /// each hole; full and empty backings cost nothing. The calls are cachestat(2) for shared
    /// memory (lseek(2) on kernels before 6.5, which takes pages that were never touched for
    /// holes) and lseek(2) with `SEEK_DATA` for files on disks. hugetlb has neither, and there
    /// mincore(2) tells the pages that this process has mapped.
    ///
    /// ```
    /// use guest_memory_shm::{GuestMemoryShm, GuestRange};
    /// use vm_memory::{Bytes, GuestAddress};
    ///
    /// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
    /// memory.write_obj(1u8, GuestAddress(0x5000)).expect("there is RAM");
    /// let pages = memory.extents(4096)?;
    /// assert_eq!(pages.ranges, [GuestRange::new(GuestAddress(0x5000), 4096)?]);
    /// let coarse = memory.extents(2 << 20)?;
    /// assert_eq!(coarse.ranges, [GuestRange::new(GuestAddress(0), 2 << 20)?]);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If a system call fails.
    pub fn extents(&self, resolution: u64) -> Result<Extents, StatsError> {
        let regions = self.arc_regions();
        let rams: Vec<&Ram> = regions.iter().map(|region| region.ram()).collect();
        let mut found = Vec::new();
        let mut unlocated = 0;
        for group in by_backing(&rams) {
            let on_it: Vec<&Ram> = group.into_iter().map(|at| rams[at]).collect();
            unlocated += of_one_backing(&on_it, resolution, &mut found)?;
        }
        let found: RangeSet = found.into_iter().collect();
        Ok(Extents {
            ranges: found.to_guest(1),
            unlocated,
        })
    }
}

/// Adds the allocated parts of regions on one backing, in guest addresses; gives what is allocated
/// besides.
fn of_one_backing(
    regions: &[&Ram],
    resolution: u64,
    found: &mut Vec<Range<u64>>,
) -> Result<u64, StatsError> {
    let backing = &regions[0].backing;
    let allocation = backing.allocation();
    let allocation = allocation.map_err(failed("look for the allocated parts of a backing"))?;
    let total = match allocation {
        Allocation::Nothing => return Ok(0),
        Allocation::Everything => backing.size(),
        Allocation::Some(bytes) | Allocation::AtMost(bytes) => bytes,
    };
    let mut located = 0;
    for ram in regions {
        // Of the last page there may be less in the guest.
        let size = ram.range.size();
        let parts = if allocation == Allocation::Everything {
            located += ram.mapping.len() as u64;
            RangeSet::from(0..size)
        } else if backing.is_hugetlb() {
            let mapped = mapped_parts(ram)?;
            located += mapped.len();
            let step = step(resolution, backing.page_size());
            mapped.iter().map(|part| outwards(part, step)).collect()
        } else {
            let parts = backing.extents_in(ram.pages(), step(resolution, backing.page_size()));
            let parts = parts.map_err(failed("look for the allocated parts of a backing"))?;
            let inside = |part: Range<u64>| part.start - ram.offset..part.end - ram.offset;
            parts.iter().map(inside).collect()
        };
        let parts = parts.within(0..size);
        found.extend(parts.map(|part| ram.in_guest(part).addrs()));
    }
    if backing.is_hugetlb() {
        Ok(unlocated(regions, total, located))
    } else {
        Ok(0)
    }
}

/// The resolution in whole pages.
fn step(resolution: u64, page_size: u64) -> u64 {
    let whole = resolution.max(1).checked_next_multiple_of(page_size);
    whole.unwrap_or(u64::MAX - u64::MAX % page_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolution_is_whole_pages_and_at_least_one() {
        for (resolution, step_of) in [(0, 10), (1, 10), (10, 10), (11, 20), (25, 30)] {
            assert_eq!(step(resolution, 10), step_of);
        }
        assert!(step(u64::MAX, 4096).is_multiple_of(4096));
    }
}
