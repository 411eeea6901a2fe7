//! Sets of numbers, kept as ranges: the one place where ranges are merged, cut and subtracted.

use std::iter;
use std::ops::Range;

use vm_memory::GuestAddress;

use super::guest_range::GuestRange;

/// A set of addresses, of offsets, or of numbers of pages, as ranges in ascending order with gaps
/// between them: ranges that touch are one.
///
/// Ranges are half open, as those of files and regions are: no set has 2^64-1, nor has any
/// [`GuestRange`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RangeSet {
    ranges: Vec<Range<u64>>,
}

impl RangeSet {
    /// Adds all of `range`. It is cheapest past all others.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        match self.ranges.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if (last.start..=last.end).contains(&range.start) => {
                last.end = last.end.max(range.end);
            }
            Some(last) if range.start < last.start => self.insert_among(range),
            _ => self.ranges.push(range),
        }
    }

    fn insert_among(&mut self, range: Range<u64>) {
        let first = self.ranges.partition_point(|there| there.end < range.start);
        let touching = self.ranges[first..].partition_point(|there| there.start <= range.end);
        let touching = first..first + touching;
        let merge = |all: Range<u64>, there: &Range<u64>| {
            all.start.min(there.start)..all.end.max(there.end)
        };
        let merged = self.ranges[touching.clone()].iter().fold(range, merge);
        self.ranges.splice(touching, [merged]);
    }

    /// Takes all of `range` out.
    #[cfg(any(feature = "kvm", test))]
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        let first = self
            .ranges
            .partition_point(|there| there.end <= range.start);
        let cut = self.ranges[first..].partition_point(|there| there.start < range.end);
        let cut = &self.ranges[first..first + cut];
        if let (false, Some(low), Some(high)) = (range.is_empty(), cut.first(), cut.last()) {
            let left = [low.start..range.start, range.end..high.end];
            let left = left.into_iter().filter(|left| !left.is_empty());
            self.ranges.splice(first..first + cut.len(), left);
        }
    }

    /// Adds `first` and what comes after it, as far as the bits are set, the lowest one first.
    pub(crate) fn insert_bits(&mut self, first: u64, mut bits: u64) {
        while bits != 0 {
            let start = bits.trailing_zeros();
            let count = (bits >> start).trailing_ones();
            let from = first + u64::from(start);
            self.insert(from..from + u64::from(count));
            bits &= u64::MAX.checked_shl(start + count).unwrap_or(0);
        }
    }

    /// The ranges, in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().cloned()
    }

    /// How many numbers it has.
    pub(crate) fn len(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Whether it has all of `range`.
    pub(crate) fn contains(&self, range: Range<u64>) -> bool {
        self.gaps(range).next().is_none()
    }

    /// The parts of `range` that are in the set, in ascending order.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self
            .ranges
            .partition_point(|there| there.end <= range.start);
        self.ranges[first..]
            .iter()
            .map(move |there| there.start.max(range.start)..there.end.min(range.end))
            .take_while(|part| !part.is_empty())
    }

    /// The parts of `range` that are not in the set, in ascending order.
    pub(crate) fn gaps(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let end = range.end;
        let mut from = range.start;
        let mut there = self.within(range).chain(iter::once(end..end));
        iter::from_fn(move || {
            loop {
                let there = there.next()?;
                let gap = from..there.start;
                from = there.end;
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
        })
    }

    /// The ranges as guest addresses, where each number stands for `unit` bytes.
    pub(crate) fn to_guest(&self, unit: u64) -> Vec<GuestRange> {
        let range = |range: &Range<u64>| {
            let start = GuestAddress(range.start * unit);
            // No range is empty or runs past 2^64.
            GuestRange::new(start, (range.end - range.start) * unit).ok()
        };
        self.ranges.iter().filter_map(range).collect()
    }
}

impl From<Range<u64>> for RangeSet {
    fn from(range: Range<u64>) -> Self {
        iter::once(range).collect()
    }
}

impl Extend<Range<u64>> for RangeSet {
    fn extend<T: IntoIterator<Item = Range<u64>>>(&mut self, ranges: T) {
        ranges.into_iter().for_each(|range| self.insert(range));
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<T: IntoIterator<Item = Range<u64>>>(ranges: T) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().collect();
        // Nothing goes between other ranges.
        ranges.sort_unstable_by_key(|range| range.start);
        let mut set = Self::default();
        set.extend(ranges);
        set
    }
}

impl IntoIterator for RangeSet {
    type Item = Range<u64>;
    type IntoIter = std::vec::IntoIter<Range<u64>>;

    fn into_iter(self) -> Self::IntoIter {
        self.ranges.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Numbers from here on are looked at: at both ends of what there is.
    fn bases() -> impl Strategy<Value = u64> {
        prop_oneof![Just(0), Just(1 << 40), Just(u64::MAX - 200)]
    }

    fn some_range() -> impl Strategy<Value = Range<u64>> {
        (0..200_u64, 0..50_u64).prop_map(|(start, len)| start..(start + len).min(200))
    }

    fn members(ranges: impl Iterator<Item = Range<u64>>) -> Vec<u64> {
        ranges.flatten().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// The model: a set of numbers.
        #[test]
        fn it_does_what_a_set_of_numbers_does(
            base in bases(),
            ranges in prop::collection::vec(some_range(), 0..20),
            words in prop::collection::vec((0..130_u64, any::<u64>()), 0..3),
            asked in some_range(),
            removed in some_range(),
        ) {
            let at = |range: Range<u64>| base + range.start..base + range.end;
            let mut set = RangeSet::default();
            let mut model = BTreeSet::new();
            for range in ranges.iter().cloned().map(at) {
                set.insert(range.clone());
                model.extend(range);
            }
            prop_assert_eq!(&set, &ranges.into_iter().map(at).collect::<RangeSet>());
            for (first, bits) in words {
                set.insert_bits(base + first, bits);
                let set = (0..64).filter(|bit| bits & (1 << bit) != 0);
                model.extend(set.map(|bit| base + first + bit));
            }
            prop_assert_eq!(members(set.iter()), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), model.len() as u64);
            // As few ranges as can be.
            prop_assert!(set.ranges.iter().all(|range| !range.is_empty()));
            prop_assert!(set.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));

            let asked = at(asked);
            let (there, not): (Vec<u64>, Vec<u64>) =
                asked.clone().partition(|number| model.contains(number));
            prop_assert_eq!(set.contains(asked.clone()), not.is_empty());
            prop_assert_eq!(members(set.within(asked.clone())), there);
            prop_assert_eq!(members(set.gaps(asked.clone())), not);
            prop_assert!(set.within(asked.clone()).all(|range| !range.is_empty()));
            prop_assert!(set.gaps(asked).all(|range| !range.is_empty()));

            set.remove(at(removed.clone()));
            model.retain(|number| !at(removed.clone()).contains(number));
            prop_assert_eq!(&set, &model.into_iter().map(|one| one..one + 1).collect());
        }
    }

    #[test]
    fn gaps_are_what_lies_between() {
        let gaps = |ranges: &[Range<u64>]| {
            let set: RangeSet = ranges.iter().cloned().collect();
            set.gaps(2..9).collect::<Vec<_>>()
        };
        assert_eq!(gaps(&[]), vec![2..9]);
        assert_eq!(gaps(&[0..1, 4..5, 12..13]), [2..4, 5..9]);
        assert_eq!(gaps(&[0..3, 8..12]), vec![3..8]);
        assert_eq!(gaps(&[0..5, 5..12]), []);
        assert_eq!(gaps(&[20..30, 3..5, 4..6, 0..1]), [2..3, 6..9]);
    }

    #[test]
    fn runs_of_bits_are_one_range_across_words() {
        let runs = |words: &[u64]| {
            let mut set = RangeSet::default();
            for (word, bits) in (0..).zip(words) {
                set.insert_bits(word * 64, *bits);
            }
            set.iter()
                .map(|run| (run.start, run.end - run.start))
                .collect::<Vec<_>>()
        };
        assert_eq!(runs(&[0, 0]), []);
        assert_eq!(runs(&[u64::MAX]), [(0, 64)]);
        assert_eq!(runs(&[1 << 63, 1]), [(63, 2)]);
        assert_eq!(runs(&[6, 0, 1 << 63]), [(1, 2), (191, 1)]);
        assert_eq!(runs(&[u64::MAX << 4, u64::MAX, 1]), [(4, 125)]);
        assert_eq!(runs(&[0, 0b10_1111]), [(64, 4), (69, 1)]);
    }

    #[test]
    fn numbers_of_pages_become_guest_addresses() {
        let set: RangeSet = [3..4, 8..10].into_iter().collect();
        let range = |start, size| GuestRange::new(GuestAddress(start), size).unwrap();
        assert_eq!(
            set.to_guest(4096),
            [range(0x3000, 0x1000), range(0x8000, 0x2000)]
        );
    }
}
