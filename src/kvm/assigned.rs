//! Which number a region gets that was told, or had one a moment ago.

use std::collections::BTreeMap;

use super::error::Result;
use super::numbers::{SlotNumber, SlotNumbers};
use crate::range::GuestRange;

/// Numbers that belong to ranges.
pub(super) struct Assigned {
    numbers: SlotNumbers,
    /// Those that were asked for. `None` while a slot has it.
    asked: BTreeMap<GuestRange, Promise>,
    /// Those of slots that the change under way has removed. Undoing it gives them back.
    before: BTreeMap<GuestRange, u32>,
}

/// A number that was asked for.
struct Promise {
    number: u32,
    /// The number itself, unless a slot has it.
    kept: Option<SlotNumber>,
}

impl Assigned {
    pub(super) fn new(numbers: SlotNumbers) -> Self {
        Self {
            numbers,
            asked: BTreeMap::new(),
            before: BTreeMap::new(),
        }
    }

    /// Sets a number aside for a range that overlaps no other.
    pub(super) fn add(&mut self, range: GuestRange, number: u32) -> Result<()> {
        let kept = Some(self.numbers.take_number(number)?);
        self.asked.insert(range, Promise { number, kept });
        Ok(())
    }

    /// The range that was asked for and that `range` overlaps, with its number.
    pub(super) fn overlapping(&self, range: GuestRange) -> Option<(GuestRange, u32)> {
        let mut asked = self.asked.iter();
        let (other, promise) = asked.find(|(other, _)| other.overlaps(&range))?;
        Some((*other, promise.number))
    }

    /// Whether a number is kept for exactly this range.
    pub(super) fn keeps(&self, range: GuestRange) -> bool {
        let promise = self.asked.get(&range);
        promise.is_some_and(|promise| promise.kept.is_some())
    }

    /// The number for the slot of a range; `None` if there is none left.
    ///
    /// # Errors
    ///
    /// [`KvmError::NumberTaken`](crate::KvmError::NumberTaken) if the number that was asked for is
    /// lost: its slot was refused and then not let go.
    pub(super) fn number_for(&mut self, range: GuestRange) -> Result<Option<SlotNumber>> {
        if let Some(promise) = self.asked.get_mut(&range) {
            return match promise.kept.take() {
                Some(number) => Ok(Some(number)),
                None => self.numbers.take_number(promise.number).map(Some),
            };
        }
        let before = self.before.get(&range);
        let before = before.and_then(|number| self.numbers.take_number(*number).ok());
        Ok(before.or_else(|| self.numbers.take().ok()))
    }

    /// A range has no slot any more, or did not get one.
    pub(super) fn put_back(&mut self, range: GuestRange, number: Option<SlotNumber>) {
        let Some(number) = number else { return };
        match self.asked.get_mut(&range) {
            Some(promise) if promise.number == number.number() => promise.kept = Some(number),
            _ => {
                self.before.insert(range, number.number());
                number.rest();
            }
        }
    }

    /// A change is over and will not be undone: what has a slot, has its number.
    pub(super) fn settle(&mut self, has_slot: impl Fn(GuestRange) -> bool) {
        self.asked.retain(|range, _| !has_slot(*range));
        for number in std::mem::take(&mut self.before).into_values() {
            self.numbers.wake(number);
        }
    }

    /// Nothing is undone that was done to this range.
    pub(super) fn forget(&mut self, range: GuestRange) {
        self.asked.remove(&range);
        if let Some(number) = self.before.remove(&range) {
            self.numbers.wake(number);
        }
    }
}

impl Drop for Assigned {
    fn drop(&mut self) {
        self.settle(|_| true);
    }
}
