//! From a guest address to the region that holds it, in constant time.
//!
//! The span from the first region to the last is cut into at most 4,096 equal buckets of a power
//! of two bytes. Each bucket names the region that has most of it. As long as at most one region
//! touches each bucket, which the choice of the bucket size sees to in every realistic layout,
//! that region holds the address, or none does; otherwise a binary search follows.

use std::sync::Arc;

use crate::layout::GuestRange;
use crate::mapping::to_usize;

/// Enough for 509 memory slots of different sizes, and 32 KiB at most: they stay in the cache.
const MAX_BUCKETS: u64 = 4096;

/// The index of a sorted set of disjoint ranges, each with what lies there.
///
/// The buckets hold the ranges' owners themselves, not numbers of them: a look-up is one load.
#[derive(Debug)]
pub(super) struct Index<T> {
    /// The first address of the first range.
    start: u64,
    /// The logarithm of the size of a bucket in bytes.
    shift: u32,
    /// For each bucket the owner of the range that has most of it, or any if none touches it.
    buckets: Arc<[T]>,
}

impl<T: Clone> Index<T> {
    /// The index of `owners` of ranges, which must be sorted and disjoint.
    pub(super) fn new(owners: &[T], range_of: impl Fn(&T) -> GuestRange) -> Self {
        let ranges: Vec<GuestRange> = owners.iter().map(range_of).collect();
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
            return Self {
                start: 0,
                shift: 0,
                buckets: Arc::new([]),
            };
        };
        let start = first.start_addr().0;
        let span = last.last_addr().0 - start;
        let shift = bucket_shift(&ranges, start, span);
        let mut touching = 0;
        let buckets = (0..=span >> shift)
            .map(|bucket| {
                let first_addr = start + (bucket << shift);
                let last_addr = first_addr.saturating_add((1 << shift) - 1);
                while ranges[touching].last_addr().0 < first_addr {
                    touching += 1;
                }
                let largest = (touching..ranges.len())
                    .take_while(|at| ranges[*at].start_addr().0 <= last_addr)
                    .max_by_key(|at| {
                        let range = ranges[*at];
                        range.last_addr().0.min(last_addr) - range.start_addr().0.max(first_addr)
                    });
                owners[largest.unwrap_or(touching)].clone()
            })
            .collect();
        Self {
            start,
            shift,
            buckets,
        }
    }

    /// The owner of the range that holds `addr`, unless a smaller one in the same bucket does, or
    /// none.
    #[inline]
    pub(super) fn get(&self, addr: u64) -> Option<&T> {
        // Below the first range this is some number, with or without a bucket.
        let bucket = addr.wrapping_sub(self.start) >> self.shift;
        self.buckets.get(to_usize(bucket))
    }
}

impl<T> Clone for Index<T> {
    fn clone(&self) -> Self {
        Self {
            start: self.start,
            shift: self.shift,
            buckets: self.buckets.clone(),
        }
    }
}

/// The logarithm of the smallest size of a bucket that gives few enough of them; larger as long as
/// no two ranges come to touch the same bucket, because fewer buckets stay in the cache.
fn bucket_shift(ranges: &[GuestRange], start: u64, span: u64) -> u32 {
    let mut shift = 0;
    while span >> shift >= MAX_BUCKETS {
        shift += 1;
    }
    while shift < u64::BITS - 1 && span >> shift > 0 && separates(ranges, start, shift + 1) {
        shift += 1;
    }
    shift
}

/// Whether at most one range touches each bucket of 2^shift bytes.
fn separates(ranges: &[GuestRange], start: u64, shift: u32) -> bool {
    let bucket = |addr: u64| (addr - start) >> shift;
    ranges
        .windows(2)
        .all(|pair| bucket(pair[0].last_addr().0) != bucket(pair[1].start_addr().0))
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

    fn index(ranges: &[GuestRange]) -> Index<GuestRange> {
        Index::new(ranges, |range| *range)
    }

    fn holds(range: &GuestRange, addr: u64) -> bool {
        (range.start_addr().0..=range.last_addr().0).contains(&addr)
    }

    #[test]
    fn realistic_layouts_have_one_range_in_a_bucket() {
        let pci_hole = ranges(&[(0, 3 << 30), (4 << 30, 60 << 30)]);
        assert!(index(&pci_hole).buckets.len() <= 32);
        let slots: Vec<_> = (0..509)
            .map(|n| ((4 << 30) + n * (128 << 20), 128 << 20))
            .collect();
        assert_eq!(index(&ranges(&slots)).buckets.len(), 509);
        assert_eq!(index(&ranges(&[(0x1000, 1 << 40)])).buckets.len(), 1);
    }

    #[test]
    fn a_bucket_names_the_range_that_has_most_of_it() {
        // A PC's low memory shares the first bucket with the RAM above it.
        let low = ranges(&[(0, 640 << 10), (1 << 20, 64 << 30)]);
        let index = index(&low);
        assert!(index.buckets.len() <= 4097, "{}", index.buckets.len());
        assert_eq!(index.get(2 << 20), Some(&low[1]));
        assert_eq!(index.get(60 << 30), Some(&low[1]));
    }

    #[test]
    fn where_one_range_touches_a_bucket_it_is_the_answer() {
        let layouts: &[&[(u64, u64)]] = &[
            &[(0, 1)],
            &[(5, 10), (15, 1), (16, 1), (1000, 7)],
            &[(0, 0x1000), (0x1000, 0x1000), (u64::MAX - 0x1000, 0x1000)],
            &[(0, 1 << 62), (1 << 62, 1 << 62), (u64::MAX - 1, 1)],
            &[(1 << 63, 4096), ((1 << 63) + 4096, 4096)],
            &[(0, u64::MAX)],
            &[(u64::MAX - 1, 1)],
        ];
        for places in layouts {
            let ranges = ranges(places);
            let index = index(&ranges);
            for (at, range) in ranges.iter().enumerate() {
                let (start, last) = (range.start_addr().0, range.last_addr().0);
                let shared = |addr: u64| {
                    let bucket = |addr: u64| (addr - index.start) >> index.shift;
                    let others = ranges.iter().enumerate().filter(|(other, _)| *other != at);
                    others.into_iter().any(|(_, other)| {
                        let (from, to) = (other.start_addr().0, other.last_addr().0);
                        (bucket(from)..=bucket(to)).contains(&bucket(addr))
                    })
                };
                for addr in [start, start + (last - start) / 2, last] {
                    if !shared(addr) {
                        let found = index.get(addr).filter(|range| holds(range, addr));
                        assert_eq!(found, Some(range), "{addr:#x} in {ranges:?}");
                    }
                }
            }
        }
        assert!(index(&[]).get(0).is_none());
    }
}
