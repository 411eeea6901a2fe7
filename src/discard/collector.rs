//! Bitmaps of reported pages, for each unit that is to be discarded as a whole. No I/O.
//!
//! Bitmaps and not sets of ranges: a guest that reports every second page would need 64 times as
//! much for those, and decides itself how much memory of the host that is.

use std::collections::BTreeMap;
use std::iter;
use std::ops::Range;

use crate::mapping::to_usize;
use crate::range::RangeSet;

/// The units that a region is cut into, in guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Units {
    /// The first address of the region and the one after it.
    pub(super) start: u64,
    pub(super) end: u64,
    /// Where the region starts in its backing: units are aligned there.
    pub(super) offset: u64,
    /// The size of a unit in bytes, of which the region may have parts at its ends.
    pub(super) size: u64,
    /// Whether a unit is discarded only when all of it is reported.
    pub(super) whole: bool,
}

/// Pages that are reported and not discarded yet. `T` says which region a unit is of.
#[derive(Debug)]
pub(super) struct Collector<T> {
    /// By the first address. Disjoint, never empty.
    units: BTreeMap<u64, Unit<T>>,
    page: u64,
    pages: u64,
}

/// A unit that has reported pages.
#[derive(Debug)]
pub(super) struct Unit<T> {
    pub(super) range: Range<u64>,
    pub(super) region: T,
    /// Whether it is discarded only when all of it is reported.
    pub(super) whole: bool,
    /// A bit for each page, and how many are set.
    bits: Box<[u64]>,
    set: u64,
}

impl Units {
    /// The unit that has the address: its first address, and the one after it.
    fn at(&self, addr: u64) -> Range<u64> {
        let offset = addr - self.start + self.offset;
        let before = offset % self.size;
        let start = addr - before.min(addr - self.start);
        let end = addr.saturating_add(self.size - before).min(self.end);
        start..end
    }

    /// The units that have an address in the range, and the part of it that each has.
    fn parts(self, mut range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Range<u64>)> {
        iter::from_fn(move || {
            (!range.is_empty()).then(|| {
                let unit = self.at(range.start);
                let part = range.start..unit.end.min(range.end);
                range.start = part.end;
                (unit, part)
            })
        })
    }
}

impl<T: PartialEq + Clone> Collector<T> {
    /// `page` is the size of the pages that are counted, in bytes.
    pub(super) fn new(page: u64) -> Self {
        Self {
            units: BTreeMap::new(),
            page,
            pages: 0,
        }
    }

    /// Notes that the pages of `range`, whole ones in one region, are free, and gives back what is
    /// to be discarded now, in order: that is not noted any more.
    pub(super) fn add(&mut self, units: &Units, region: &T, range: Range<u64>) -> RangeSet {
        if !units.whole {
            // All of it; what was refused of it before is among it.
            self.remove(range.clone());
            return RangeSet::from(range);
        }
        self.evict(units, region, &range);
        let mut complete = RangeSet::default();
        for (whole, part) in units.parts(range) {
            if part == whole || self.set(&whole, units.whole, region, part) {
                self.remove(whole.clone());
                complete.insert(whole);
            }
        }
        complete
    }

    /// Notes again what was to be discarded, and could not be.
    pub(super) fn put_back(&mut self, units: &Units, region: &T, range: Range<u64>) {
        self.evict(units, region, &range);
        for (whole, part) in units.parts(range) {
            self.set(&whole, units.whole, region, part);
        }
    }

    /// Forgets the pages of `range`.
    pub(super) fn remove(&mut self, range: Range<u64>) {
        for start in self.touching(&range) {
            let Some(unit) = self.units.get_mut(&start) else {
                continue;
            };
            let part = range.start.max(unit.range.start)..range.end.min(unit.range.end);
            self.pages -= unit.change(part, self.page, false);
            if unit.set == 0 {
                self.units.remove(&start);
            }
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.units.clear();
        self.pages = 0;
    }

    /// How many bytes are noted.
    pub(super) fn pending(&self) -> u64 {
        self.pages * self.page
    }

    /// The units that have reported pages, by address.
    pub(super) fn units(&self) -> impl Iterator<Item = &Unit<T>> {
        self.units.values()
    }

    /// Forgets what was noted of a region that was here before.
    fn evict(&mut self, units: &Units, region: &T, range: &Range<u64>) {
        let touched = units.at(range.start).start..units.at(range.end - 1).end;
        for start in self.touching(&touched) {
            if let Some(unit) = self.units.get(&start)
                && unit.region != *region
            {
                self.pages -= unit.set;
                self.units.remove(&start);
            }
        }
    }

    /// The keys of the units that have an address in `range`.
    fn touching(&self, range: &Range<u64>) -> Vec<u64> {
        if self.units.is_empty() {
            return Vec::new();
        }
        let below = self.units.range(..range.end).rev();
        below
            .take_while(|(_, unit)| unit.range.end > range.start)
            .map(|(start, _)| *start)
            .collect()
    }

    /// Notes pages of one unit; says whether it is complete.
    fn set(&mut self, unit: &Range<u64>, whole: bool, region: &T, part: Range<u64>) -> bool {
        let pages = (unit.end - unit.start) / self.page;
        let entry = self.units.entry(unit.start);
        let unit = entry.or_insert_with(|| Unit {
            range: unit.clone(),
            region: region.clone(),
            whole,
            bits: vec![0; to_usize(pages.div_ceil(64))].into(),
            set: 0,
        });
        self.pages += unit.change(part, self.page, true);
        unit.set == pages
    }
}

impl<T> Unit<T> {
    /// The runs of reported pages in it, or nothing as long as only the whole can be discarded.
    pub(super) fn ready(&self, page: u64) -> RangeSet {
        if self.whole && self.set * page < self.range.end - self.range.start {
            return RangeSet::default();
        }
        self.runs(page)
    }

    /// The runs of reported pages in it.
    pub(super) fn runs(&self, page: u64) -> RangeSet {
        let mut pages = RangeSet::default();
        for (first, word) in (0..).step_by(64).zip(&self.bits) {
            pages.insert_bits(first, *word);
        }
        let start = self.range.start;
        let run = |run: Range<u64>| start + run.start * page..start + run.end * page;
        pages.iter().map(run).collect()
    }

    /// Sets or clears the bits of a part; says how many it changed.
    fn change(&mut self, part: Range<u64>, page: u64, on: bool) -> u64 {
        let index = |addr: u64| to_usize((addr - self.range.start) / page);
        let (mut at, end) = (index(part.start), index(part.end));
        let mut changed = 0;
        while at < end {
            let last = (at / 64 * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - (last - at))) << (at % 64);
            let word = &mut self.bits[at / 64];
            let before = *word;
            *word = if on { before | mask } else { before & !mask };
            changed += u64::from((*word ^ before).count_ones());
            at = last;
        }
        if on {
            self.set += changed;
        } else {
            self.set -= changed;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 16;

    #[test]
    fn units_are_aligned_in_the_backing_and_cut_at_the_ends_of_the_region() {
        let units = Units {
            start: 1000,
            end: 2000,
            offset: 70,
            size: 100,
            whole: true,
        };
        assert_eq!(units.at(1000), 1000..1030);
        assert_eq!(units.at(1029), 1000..1030);
        assert_eq!(units.at(1030), 1030..1130);
        assert_eq!(units.at(1999), 1930..2000);
    }

    #[test]
    fn another_region_at_the_same_address_starts_anew() {
        let units = Units {
            start: 0,
            end: 64,
            offset: 0,
            size: 64,
            whole: true,
        };
        let mut collector = Collector::new(PAGE);
        assert_eq!(collector.add(&units, &1, 0..48).len(), 0);
        assert_eq!(collector.pending(), 48);
        assert_eq!(collector.add(&units, &2, 48..64).len(), 0);
        assert_eq!(collector.pending(), 16);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Add(Range<u64>),
        Remove(Range<u64>),
        PutBack(Range<u64>),
    }

    /// Ranges of whole pages in 0..limit.
    fn page_range(pages: u64) -> impl Strategy<Value = Range<u64>> {
        (0..pages, 1..=pages)
            .prop_map(move |(from, len)| from * PAGE..(from + len).min(pages) * PAGE)
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 512,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// The model: a set of pages; a unit is discarded at once when all of its pages are in it.
        #[test]
        fn the_collector_does_what_a_set_of_pages_does(
            start in 0u64..8, pages in 1u64..300, offset in 0u64..100, unit in 1u64..140,
            whole in any::<bool>(),
            ops in prop::collection::vec((0u8..4, page_range(300)), 1..60),
        ) {
            let base = start * PAGE;
            let units = Units {
                start: base,
                end: base + pages * PAGE,
                offset: offset * PAGE,
                size: unit * PAGE,
                whole,
            };
            let mut collector = Collector::new(PAGE);
            let mut model: BTreeSet<u64> = BTreeSet::new();
            // The unit of a page, by its number in the backing.
            let unit_of = |page: u64| (page + offset) / unit;
            for (kind, range) in ops {
                let range = range.start.min((pages - 1) * PAGE)..range.end.min(pages * PAGE);
                if range.is_empty() { continue; }
                let numbers = range.start / PAGE..range.end / PAGE;
                let range = base + range.start..base + range.end;
                let op = match kind {
                    0 | 1 => Op::Add(range),
                    2 => Op::Remove(range),
                    _ => Op::PutBack(range),
                };
                match op {
                    Op::Add(range) => {
                        let found = collector.add(&units, &(), range);
                        let found: Vec<u64> = found
                            .into_iter()
                            .map(|range| range.start - base..range.end - base)
                            .flat_map(|range| range.start / PAGE..range.end / PAGE)
                            .collect();
                        let mut expected = Vec::new();
                        if whole {
                            model.extend(numbers.clone());
                            let touched: BTreeSet<u64> = numbers.map(unit_of).collect();
                            for touched in touched {
                                let of: Vec<u64> =
                                    (0..pages).filter(|page| unit_of(*page) == touched).collect();
                                if of.iter().all(|page| model.contains(page)) {
                                    expected.extend(&of);
                                }
                            }
                        } else {
                            expected.extend(numbers);
                        }
                        model.retain(|page| !expected.contains(page));
                        prop_assert_eq!(found, expected);
                    }
                    Op::Remove(range) => {
                        collector.remove(range);
                        model.retain(|page| !numbers.contains(page));
                    }
                    Op::PutBack(range) => {
                        collector.put_back(&units, &(), range);
                        model.extend(numbers);
                    }
                }
                prop_assert_eq!(collector.pending(), model.len() as u64 * PAGE);
                let noted: Vec<u64> = collector
                    .units()
                    .flat_map(|unit| unit.runs(PAGE))
                    .flat_map(|run| (run.start - base) / PAGE..(run.end - base) / PAGE)
                    .collect();
                prop_assert_eq!(noted, model.iter().copied().collect::<Vec<_>>());
                prop_assert!(collector.units().all(|unit| unit.set > 0));
            }
        }
    }
}
