//! Which slot numbers are free.

use std::collections::BTreeSet;
use std::ops::Range;

/// The slot numbers that may be used. The lowest free one is used first: KVM's table of slots, and
/// what the VMM has to remember, stays as small as the memory.
#[derive(Debug)]
pub(super) struct Numbers {
    all: Range<u32>,
    /// None from here on was ever used.
    next: u32,
    /// Those below `next` that are free again.
    free: BTreeSet<u32>,
}

impl Numbers {
    pub(super) fn new(all: Range<u32>) -> Self {
        Self {
            next: all.start,
            all,
            free: BTreeSet::new(),
        }
    }

    /// How many there are, free or not.
    pub(super) fn count(&self) -> u32 {
        self.all.end - self.all.start
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(lowest) = self.free.pop_first() {
            return Some(lowest);
        }
        let number = self.next;
        (number < self.all.end).then(|| {
            self.next += 1;
            number
        })
    }

    pub(super) fn give_back(&mut self, number: u32) {
        self.free.insert(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_next_and_no_other_is_ever_given() {
        let mut numbers = Numbers::new(3..6);
        assert_eq!(numbers.count(), 3);
        let mut taken = || numbers.take();
        assert_eq!([taken(), taken(), taken()], [Some(3), Some(4), Some(5)]);
        assert_eq!(taken(), None);
        numbers.give_back(5);
        numbers.give_back(3);
        assert_eq!(numbers.take(), Some(3));
        assert_eq!(numbers.take(), Some(5));
        assert_eq!(numbers.take(), None);
    }
}
