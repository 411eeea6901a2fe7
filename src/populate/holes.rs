//! What was not there before: remembered, and given back if populating comes to nothing.
//!
//! Where cachestat(2) is there (Linux 6.5), the pages of a tmpfs are counted. Elsewhere holes are
//! looked for with lseek(2), `SEEK_DATA` and `SEEK_HOLE`: that takes pages for holes that are
//! allocated, but were never written nor read, and then the number of allocated pages tells that
//! this is no list of what is missing. A hugetlbfs does not tell of its holes at all.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::part::Part;
use super::plan::Chunk;
use crate::backing::{Allocation, ShmBacking};
use crate::logs;
use crate::mapping::to_usize;
use crate::range::RangeSet;

/// How much is read at once, in bytes, to see whether it is all zero.
const BLOCK: u64 = 128 << 10;

/// The holes of each part, as ranges of its backing, sorted.
#[derive(Debug)]
pub(super) struct Holes {
    of: Vec<RangeSet>,
}

impl Holes {
    /// The holes that the parts have now; none where they cannot be told.
    pub(super) fn of(parts: &[Part]) -> Self {
        let holes = |part| {
            holes(part).unwrap_or_else(|error| {
                logs::debug!("cannot look for holes: {error}");
                RangeSet::default()
            })
        };
        Self {
            of: parts.iter().map(holes).collect(),
        }
    }

    /// Gives back the pages of the chunk that were holes and are zero now.
    pub(super) fn give_back(&self, parts: &[Part], chunk: &Chunk) -> io::Result<()> {
        let part = &parts[chunk.part];
        let chunk_range = part.ram.in_backing(chunk.range.clone());
        for range in self.of[chunk.part].within(chunk_range) {
            let backing = part.backing();
            zeros(backing, range, backing.page_size(), |zeros| {
                let start = zeros.start - part.ram.offset;
                let end = zeros.end - part.ram.offset;
                part.ram.remove(start..end)
            })?;
        }
        Ok(())
    }
}

fn holes(part: &Part) -> io::Result<RangeSet> {
    let range = part.ram.in_backing(part.range.clone());
    let backing = part.backing();
    let none = RangeSet::default();
    let there = match backing.allocation()? {
        Allocation::Nothing => none,
        Allocation::Everything => return Ok(none),
        _ if backing.is_hugetlb() => return Ok(none),
        _ if backing.counts_pages()? => backing.extents_in(range.clone(), backing.page_size())?,
        Allocation::Some(bytes) => {
            let data = backing.data();
            let parts = data.parts(backing.start()..backing.end());
            let data = parts.collect::<io::Result<RangeSet>>()?;
            // Or else there are pages that look like holes.
            if data.len() != bytes {
                return Ok(none);
            }
            data
        }
        Allocation::AtMost(_) => return Ok(none),
    };
    Ok(there.gaps(range).collect())
}

/// Calls `found` with each run of pages in `range` that are all zero; holes among them are.
fn zeros(
    backing: &ShmBacking,
    range: Range<u64>,
    page_size: u64,
    mut found: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0_u8; to_usize(BLOCK)];
    let unit = to_usize(page_size.min(BLOCK));
    // Where the run begins that is being followed.
    let mut start = range.start;
    for data in backing.data().parts(range.clone()) {
        let data = data?;
        for block in data.clone().step_by(to_usize(BLOCK)) {
            let bytes = &mut buffer[..to_usize(BLOCK.min(data.end - block))];
            backing.file().read_exact_at(bytes, block)?;
            for (at, bytes) in (block..).step_by(unit).zip(bytes.chunks(unit)) {
                if is_zero(bytes) {
                    continue;
                }
                let page = at - at % page_size;
                if start < page {
                    found(start..page)?;
                }
                start = page + page_size;
            }
        }
    }
    if start < range.end {
        found(start..range.end)?;
    }
    Ok(())
}

/// Without a branch per byte, so that it is done in vectors.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FallocateFlags, fallocate};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::options::{Populate, RamOptions};
    use crate::region::GuestRegionShm;

    const PAGE: u64 = 4096;

    fn part(pages: u64) -> Part {
        let options = RamOptions::new();
        let region = GuestRegionShm::<()>::new((GuestAddress(0), pages * PAGE), &options).unwrap();
        Part::whole(region.ram().clone(), Populate::Prefault)
    }

    fn write(part: &Part, page: u64, byte: u8) {
        let bytes = vec![byte; PAGE as usize];
        part.backing()
            .file()
            .write_all_at(&bytes, page * PAGE)
            .unwrap();
    }

    fn pages(ranges: &RangeSet) -> Vec<Range<u64>> {
        let pages = |range: Range<u64>| range.start / PAGE..range.end / PAGE;
        ranges.iter().map(pages).collect()
    }

    fn data(part: &Part) -> Vec<Range<u64>> {
        let data = part.backing().data();
        pages(&data.parts(part.range.clone()).map(Result::unwrap).collect())
    }

    #[test]
    fn holes_are_what_was_never_allocated() {
        let mut part = part(16);
        assert_eq!(pages(&holes(&part).unwrap()), vec![0..16]);
        for page in [0, 5, 6, 15] {
            write(&part, page, 0);
        }
        assert_eq!(pages(&holes(&part).unwrap()), [1..5, 7..15]);
        part.range = 2 * PAGE..6 * PAGE;
        assert_eq!(pages(&holes(&part).unwrap()), vec![2..5]);
    }

    #[test]
    fn pages_that_are_allocated_and_untouched_are_never_taken_for_holes() {
        let part = part(16);
        write(&part, 0, 1);
        let (start, len) = (4 * PAGE as i64, PAGE as i64);
        fallocate(part.backing(), FallocateFlags::empty(), start, len).unwrap();
        // The control: the kernel does call them holes.
        assert_eq!(data(&part), vec![0..1]);
        let found = pages(&holes(&part).unwrap());
        assert!(found == [1..4, 5..16] || found.is_empty(), "{found:?}");
    }

    #[test]
    fn only_zero_pages_that_were_holes_are_given_back() {
        let part = part(64);
        write(&part, 3, 0);
        let holes = Holes::of(std::slice::from_ref(&part));
        for page in 0..64 {
            write(&part, page, u8::from(page == 7 || page == 40));
        }
        let chunk = Chunk {
            part: 0,
            range: 0..50 * PAGE,
        };
        holes
            .give_back(std::slice::from_ref(&part), &chunk)
            .unwrap();
        assert_eq!(data(&part), [3..4, 7..8, 40..41, 50..64]);
        assert_eq!(part.backing().allocated().unwrap(), 17 * PAGE);
    }

    #[test]
    fn a_page_larger_than_what_is_read_at_once_is_zero_only_as_a_whole() {
        let part = part(512 * 4);
        let huge = 512 * PAGE;
        for page in [0, 600, 601, 1023, 1024 + 511] {
            write(&part, page, 1);
        }
        for page in 1536..2048 {
            write(&part, page, 0);
        }
        let mut found = Vec::new();
        zeros(part.backing(), 0..4 * huge, huge, |run| {
            found.push(run);
            Ok(())
        })
        .unwrap();
        assert_eq!(found, vec![3 * huge..4 * huge]);
    }
}
