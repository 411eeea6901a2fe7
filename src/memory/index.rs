//! From a guest address to the region that holds it, in constant time.
//!
//! The span from the first region to the last is cut into at most 4,096 equal buckets of a power
//! of two bytes. Each bucket names the region that has most of it. Buckets are chosen so small
//! that, in every realistic layout, nearly all RAM is named by its bucket; the little that is not
//! (low memory of a PC, beside the RAM above it) is found by a binary search.

use std::sync::Arc;

use crate::mapping::to_usize;
use crate::range::{GuestRange, Placed};

/// Enough for 509 memory slots of different sizes, and 128 KiB at most.
const MAX_BUCKETS: u64 = 4096;

/// The part of the RAM that may be left to the binary search for the sake of fewer buckets, which
/// stay in the cache: one byte in so many.
const SEARCHED: u64 = 1024;

/// The index of sorted, disjoint regions.
///
/// The buckets hold handles of the regions, with all that an access needs: a look-up and the
/// access after it read one cache line.
pub(super) struct Index<R> {
    /// The first address of the first region.
    start: u64,
    /// The logarithm of the size of a bucket in bytes.
    shift: u32,
    /// For each bucket the region that has most of it, or any if none touches it.
    buckets: Arc<[R]>,
}

impl<R: Placed + Clone> Index<R> {
    /// The index of `regions`, which must be sorted and disjoint.
    pub(super) fn new(regions: &[Arc<R>]) -> Self {
        let ranges: Vec<GuestRange> = regions.iter().map(|region| region.range()).collect();
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
                let (first_addr, last_addr) = bucket_at(start, shift, bucket);
                while ranges[touching].last_addr().0 < first_addr {
                    touching += 1;
                }
                let largest = (touching..ranges.len())
                    .take_while(|at| ranges[*at].start_addr().0 <= last_addr)
                    .max_by_key(|at| common(&ranges[*at], first_addr, last_addr));
                R::clone(&regions[largest.unwrap_or(touching)])
            })
            .collect();
        Self {
            start,
            shift,
            buckets,
        }
    }

    /// The region that holds `addr`, if the bucket of `addr` names it; otherwise another, or none.
    /// None if no region holds it, for all addresses past the last region.
    #[inline]
    pub(super) fn get(&self, addr: u64) -> Option<&R> {
        // Below the first region this wraps to some number, with or without a bucket: the caller
        // checks the region in any case.
        let bucket = addr.wrapping_sub(self.start) >> self.shift;
        self.buckets.get(to_usize(bucket))
    }
}

impl<R> Clone for Index<R> {
    fn clone(&self) -> Self {
        Self {
            start: self.start,
            shift: self.shift,
            buckets: self.buckets.clone(),
        }
    }
}

/// The first and the last address of a bucket.
fn bucket_at(start: u64, shift: u32, bucket: u64) -> (u64, u64) {
    let first = start + (bucket << shift);
    (first, first.saturating_add((1 << shift) - 1))
}

/// How many bytes a range that touches `first..=last` has of it, less one.
fn common(range: &GuestRange, first: u64, last: u64) -> u64 {
    range.last_addr().0.min(last) - range.start_addr().0.max(first)
}

/// The logarithm of the size of a bucket: the largest that leaves little to the binary search,
/// but no smaller than `MAX_BUCKETS` allows.
fn bucket_shift(ranges: &[GuestRange], start: u64, span: u64) -> u32 {
    let smallest = (0..u64::BITS - 1)
        .find(|shift| span >> shift < MAX_BUCKETS)
        .unwrap_or(u64::BITS - 1);
    let total: u64 = ranges.iter().map(GuestRange::size).sum();
    (smallest + 1..u64::BITS)
        .take_while(|shift| span >> (shift - 1) > 0)
        .take_while(|shift| searched(ranges, start, *shift) <= total / SEARCHED)
        .last()
        .unwrap_or(smallest)
}

/// How many bytes of RAM are not named by their bucket.
fn searched(ranges: &[GuestRange], start: u64, shift: u32) -> u64 {
    let bucket = |addr: u64| (addr - start) >> shift;
    let mut searched = 0;
    // Only the first and the last bucket that a range touches can be shared with another one.
    let mut shared: Option<(u64, u64)> = None;
    for pair in ranges.windows(2) {
        let at = bucket(pair[1].start_addr().0);
        if bucket(pair[0].last_addr().0) != at {
            shared = None;
            continue;
        }
        let (first, last) = bucket_at(start, shift, at);
        let largest = match shared {
            Some((before, largest)) if before == at => largest,
            _ => common(&pair[0], first, last) + 1,
        };
        let next = common(&pair[1], first, last) + 1;
        searched += largest.min(next);
        shared = Some((at, largest.max(next)));
    }
    searched
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    impl Placed for GuestRange {
        fn range(&self) -> GuestRange {
            *self
        }
    }

    fn ranges(places: &[(u64, u64)]) -> Vec<GuestRange> {
        places
            .iter()
            .map(|(start, size)| GuestRange::new(GuestAddress(*start), *size).unwrap())
            .collect()
    }

    fn index(ranges: &[GuestRange]) -> Index<GuestRange> {
        let ranges: Vec<_> = ranges.iter().map(|range| Arc::new(*range)).collect();
        Index::new(&ranges)
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
    fn low_memory_of_a_pc_costs_no_buckets() {
        let low = ranges(&[(0, 640 << 10), (1 << 20, 3 << 30), (4 << 30, 60 << 30)]);
        let index = index(&low);
        assert!(index.buckets.len() <= 32, "{}", index.buckets.len());
        assert_eq!(index.get(2 << 20), Some(&low[1]));
        assert_eq!(index.get(60 << 30), Some(&low[2]));
    }

    #[test]
    fn a_bucket_names_the_range_that_has_most_of_it() {
        // More small ranges than buckets, and a hole: every bucket is shared.
        let many: Vec<_> = (0..20_000)
            .map(|n| (n * 0x3000, 0x1000 + (n % 2) * 0x1000))
            .collect();
        let many = ranges(&many);
        let index = index(&many);
        assert!(index.buckets.len() as u64 <= MAX_BUCKETS);
        for (at, named) in index.buckets.iter().enumerate() {
            let (first, last) = bucket_at(index.start, index.shift, at as u64);
            let touching =
                |range: &&GuestRange| range.start_addr().0 <= last && range.last_addr().0 >= first;
            let most = many
                .iter()
                .filter(touching)
                .map(|range| common(range, first, last))
                .max();
            assert_eq!(most, Some(common(named, first, last)));
        }
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
