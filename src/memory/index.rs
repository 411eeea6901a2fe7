//! From a guest address to the region that holds it, in constant time.
//!
//! The span from the first region to the last is cut into at most 4,096 equal buckets of a power
//! of two bytes. A bucket names the first region that ends in it or behind it; as long as at most
//! one region touches each bucket, which the choice of the bucket size sees to in every realistic
//! layout, that region is the answer or there is none. Otherwise a binary search among the
//! regions that touch the bucket follows.

use crate::layout::GuestRange;
use crate::mapping::to_usize;

/// Enough for 509 memory slots of different sizes, and 16 KiB in all: they stay in the cache.
const MAX_BUCKETS: u64 = 4096;

/// The index of a sorted set of disjoint ranges.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    /// The first address of the first range.
    start: u64,
    /// The logarithm of the size of a bucket in bytes.
    shift: u32,
    /// For each bucket the number of the first range that ends in it or behind it.
    buckets: Box<[u32]>,
}

impl Index {
    /// The index of `ranges`, which must be sorted and disjoint, at most 2^32 of them.
    pub(super) fn new(ranges: &[GuestRange]) -> Self {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
            return Self::default();
        };
        let start = first.start_addr().0;
        let span = last.last_addr().0 - start;
        // The smallest size of a bucket that gives few enough of them; it doubles as long as no
        // two ranges come to touch the same bucket, because fewer buckets stay in the cache.
        let mut shift = 0;
        while span >> shift >= MAX_BUCKETS {
            shift += 1;
        }
        while shift < u64::BITS - 1 && span >> shift > 0 && separates(ranges, start, shift + 1) {
            shift += 1;
        }
        let count = (span >> shift) + 1;
        let mut range = 0;
        let buckets = (0..count)
            .map(|bucket| {
                let first_addr = start + (bucket << shift);
                while ranges[range].last_addr().0 < first_addr {
                    range += 1;
                }
                u32::try_from(range).unwrap_or(u32::MAX)
            })
            .collect();
        Self {
            start,
            shift,
            buckets,
        }
    }

    /// The range to try first for `addr`, and the last one that can hold it.
    #[inline]
    pub(super) fn candidates(&self, addr: u64) -> Option<(usize, usize)> {
        let bucket = to_usize(addr.wrapping_sub(self.start) >> self.shift);
        let first = *self.buckets.get(bucket)? as usize;
        let last = self
            .buckets
            .get(bucket + 1)
            .map_or(usize::MAX, |next| *next as usize);
        Some((first, last))
    }
}

/// Whether at most one range touches each bucket of 2^shift bytes.
fn separates(ranges: &[GuestRange], start: u64, shift: u32) -> bool {
    ranges.windows(2).all(|pair| {
        (pair[0].last_addr().0 - start) >> shift != (pair[1].start_addr().0 - start) >> shift
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn ranges(places: &[(u64, u64)]) -> Vec<GuestRange> {
        places
            .iter()
            .map(|(start, size)| GuestRange::new(GuestAddress(*start), *size).unwrap())
            .collect()
    }

    /// The number of the range that holds `addr`, found by the index as `GuestMemoryShm` does.
    fn find(index: &Index, ranges: &[GuestRange], addr: u64) -> Option<usize> {
        let (first, last) = index.candidates(addr)?;
        (first..=last.min(ranges.len() - 1))
            .find(|at| (ranges[*at].start_addr().0..=ranges[*at].last_addr().0).contains(&addr))
    }

    #[test]
    fn realistic_layouts_have_one_range_in_a_bucket() {
        let pci_hole = ranges(&[(0, 3 << 30), (4 << 30, 60 << 30)]);
        let index = Index::new(&pci_hole);
        assert!(index.buckets.len() <= 128, "{}", index.buckets.len());
        let slots: Vec<_> = (0..509)
            .map(|n| ((4 << 30) + n * (128 << 20), 128 << 20))
            .collect();
        let slots = ranges(&slots);
        assert_eq!(Index::new(&slots).buckets.len(), 509);
        assert_eq!(Index::new(&ranges(&[(0x1000, 1 << 40)])).buckets.len(), 1);
    }

    #[test]
    fn every_edge_is_found_and_every_hole_is_a_hole() {
        let layouts: &[&[(u64, u64)]] = &[
            &[(0, 1)],
            &[(5, 10), (15, 1), (16, 1), (1000, 7)],
            &[(0, 0x1000), (0x1000, 0x1000), (u64::MAX - 0x1000, 0x1000)],
            &[(0, 1 << 62), (1 << 62, 1 << 62), (u64::MAX - 1, 1)],
            &[
                (1 << 63, 4096),
                ((1 << 63) + 4096, 4096),
                ((1 << 63) + 12288, 4096),
            ],
            &[
                (0xfff0, 0x10),
                (0x1_0000, 1 << 40),
                ((1 << 40) + 0x1_0000, 0x10),
            ],
        ];
        for places in layouts {
            let ranges = ranges(places);
            let index = Index::new(&ranges);
            for range in &ranges {
                let (start, last) = (range.start_addr().0, range.last_addr().0);
                for addr in [
                    start.wrapping_sub(1),
                    start,
                    start + (last - start) / 2,
                    last,
                    last.wrapping_add(1),
                    0,
                    u64::MAX,
                ] {
                    let naive = ranges.iter().position(|range| {
                        (range.start_addr().0..=range.last_addr().0).contains(&addr)
                    });
                    assert_eq!(
                        find(&index, &ranges, addr),
                        naive,
                        "{addr:#x} in {ranges:?}"
                    );
                }
            }
        }
        assert!(Index::new(&[]).candidates(0).is_none());
    }
}
