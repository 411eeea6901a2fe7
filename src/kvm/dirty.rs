//! Pages that the guest wrote, as KVM notes them.

use std::fmt;

use super::error::{KvmError, Result};
use super::log_buffer::LogBuffer;
use super::slot::KvmSlot;
use super::slots::KvmSlots;
use crate::host::base_page_size;
use crate::logs;
use crate::range::{GuestRange, RangeSet};

/// What the guest wrote of one region: [`KvmSlots::dirty_log`].
#[derive(Clone, PartialEq, Eq)]
pub struct DirtyPages {
    region: GuestRange,
    words: Vec<u64>,
}

impl DirtyPages {
    pub(super) fn new(region: GuestRange, words: Vec<u64>) -> Self {
        Self { region, words }
    }

    /// The guest addresses of the region.
    pub fn region(&self) -> GuestRange {
        self.region
    }

    /// The size of a page in bytes: the host's base page size.
    pub fn page_size(&self) -> u64 {
        base_page_size()
    }

    /// One bit per page, the lowest bit of the first word for the first page.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages were written.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// The pages that were written, neighbours together, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = GuestRange> {
        let page_size = base_page_size();
        let first = self.region.start_addr().0 / page_size;
        let mut pages = RangeSet::default();
        for (page, word) in (first..).step_by(64).zip(&self.words) {
            pages.insert_bits(page, *word);
        }
        pages.to_guest(page_size).into_iter()
    }
}

impl KvmSlots {
    /// Has KVM log the guest's writes (`KVM_MEM_LOG_DIRTY_PAGES`) to all regions, and to those
    /// that come later from the moment that they are there. Does nothing if it does so already.
    ///
    /// Nothing counts as written at first: a copy of the memory begins with all of it, and with
    /// all of a region that comes later.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoLogBuffer`] if there is no room to read logs; [`KvmError::Refused`]: nothing
    /// is logged, unless KVM refused to put that back as well
    /// ([`is_logging`](crate::KvmSlot::is_logging)).
    pub fn start_dirty_logging(&mut self) -> Result<()> {
        if self.is_dirty_logging() {
            return Ok(());
        }
        // Before the first bit is set, so that no harvest fails for want of it.
        let pages = self.slots.values().map(KvmSlot::pages).max();
        let log = LogBuffer::new(pages.unwrap_or(1))?;
        let mut done = Vec::new();
        for (start, slot) in &mut self.slots {
            let was = slot.is_logging();
            match slot.log(true) {
                Ok(()) if was => {}
                Ok(()) => done.push(*start),
                Err(error) => {
                    self.log_no_more(&done);
                    return Err(error);
                }
            }
        }
        self.log = Some(log);
        Ok(())
    }

    /// Ends the logging of the guest's writes. What was not harvested is lost.
    ///
    /// # Errors
    ///
    /// [`KvmError::Refused`], for the first slot that KVM goes on logging; it has ended for the
    /// others, and for regions that come later. Another call tries the rest once more.
    pub fn stop_dirty_logging(&mut self) -> Result<()> {
        self.log = None;
        let mut done = Ok(());
        for slot in self.slots.values_mut() {
            done = done.and(slot.log(false));
        }
        done
    }

    /// Whether the guest's writes are logged.
    pub fn is_dirty_logging(&self) -> bool {
        self.log.is_some()
    }

    /// Harvests KVM's dirty log (KVM_GET_DIRTY_LOG): which pages the guest wrote since it was last
    /// asked, or since the log was started. Regions without any are left out; the others come in
    /// the order of their addresses.
    ///
    /// The VM must clear the log as it gives it, as it does unless
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is enabled. The last writes to a region that is
    /// unplugged are gone with it; if it comes back, all of it counts as written. So it is when
    /// the unplugging is undone because a listener refused it.
    ///
    /// # Errors
    ///
    /// [`KvmError::NotLogging`]; [`KvmError::NoDirtyLog`] and [`KvmError::NoLogBuffer`]: what
    /// other regions gave comes with the next answer. Of a region whose log KVM did not give, all
    /// pages count as written when it does: KVM may have cleared the log, or another slot was in
    /// the place of this one.
    pub fn dirty_log(&mut self) -> Result<Vec<DirtyPages>> {
        let Some(log) = &mut self.log else {
            return Err(KvmError::NotLogging);
        };
        for slot in self.slots.values_mut() {
            slot.harvest(log)?;
        }
        let dirty = self.slots.values_mut().filter_map(|slot| {
            let words = std::mem::take(&mut slot.pending);
            let any = words.iter().any(|word| *word != 0);
            any.then(|| DirtyPages::new(slot.range(), words))
        });
        Ok(dirty.collect())
    }

    /// Puts back that the slots at `starts` are not logged.
    fn log_no_more(&mut self, starts: &[u64]) {
        for start in starts.iter().rev() {
            let Some(slot) = self.slots.get_mut(start) else {
                continue;
            };
            if let Err(error) = slot.log(false) {
                logs::warn!("the guest's writes go on being logged: {error}");
            }
        }
    }
}

impl fmt::Debug for DirtyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyPages")
            .field("region", &format_args!("{}", self.region))
            .field("ranges", &self.ranges().collect::<Vec<_>>())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn ranges(pages: u64, words: &[u64]) -> Vec<(u64, u64)> {
        let page = base_page_size();
        let start = GuestAddress(7 * page);
        let region = GuestRange::new(start, pages * page).unwrap();
        let dirty = DirtyPages::new(region, words.to_vec());
        let found: Vec<_> = dirty
            .ranges()
            .map(|r| (r.start_addr().0 / page - 7, r.size() / page))
            .collect();
        let pages: u64 = found.iter().map(|(_, pages)| pages).sum();
        assert_eq!(dirty.count(), pages);
        found
    }

    #[test]
    fn neighbours_are_one_range_across_words() {
        assert_eq!(ranges(128, &[0, 0]), []);
        assert_eq!(ranges(1, &[1]), [(0, 1)]);
        assert_eq!(ranges(64, &[u64::MAX]), [(0, 64)]);
        assert_eq!(ranges(128, &[1 << 63, 1]), [(63, 2)]);
        assert_eq!(ranges(192, &[6, 0, 1 << 63]), [(1, 2), (191, 1)]);
        assert_eq!(ranges(192, &[u64::MAX << 4, u64::MAX, 1]), [(4, 125)]);
        assert_eq!(ranges(70, &[0, 0b10_1111]), [(64, 4), (69, 1)]);
    }
}
