//! The dirty log that a daemon sets bits in: shared memory, read word by word.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemoryRegion, VolatileMemory, VolatileSlice};

use crate::backing::{ShmBacking, base_page_size};
use crate::mapping::to_usize;
use crate::range::{GuestRange, RangeSet};
use crate::region::{GuestRegionShm, MemoryError};
use crate::vhost_user::table::MemoryTable;
use crate::vhost_user::wire::Descriptor;

/// Bytes of guest memory per bit (vhost-user specification, "Migration"), whatever the page size.
const PAGE: u64 = 4096;
/// Pages per word.
const WORD: u64 = 64;

/// The dirty log of one daemon: a memfd in which it sets a bit for each page of 4 KiB that it
/// writes.
///
/// The bits count from guest address 0 to the end of the last region of the table or beyond it
/// (vhost-user specification, "Migration"): page `n` is bit `n % 8` of byte `n / 8`. Only bits of
/// regions that the daemon was told of count; what else it sets is its own business.
///
/// It is one file from [`start_log`](crate::VhostUserShare::start_log) to
/// [`stop_log`](crate::VhostUserShare::stop_log), in which no mapping of it can fault: it grows in
/// place, and is sealed against shrinking (`F_SEAL_SHRINK` and `F_SEAL_SEAL`). So a daemon may set
/// bits in whichever mapping of it there is, one from before it grew or from before a reconnection
/// too, and they are all found. It is not sealed against growing: a daemon can make it longer,
/// which costs memory where the daemon writes.
#[derive(Clone, Debug)]
pub(super) struct DaemonLog {
    bits: GuestRegionShm,
    size: u64,
    /// The pages of regions that the daemon was told of since it logs, as far as the log has bits
    /// for them.
    pages: RangeSet,
}

impl DaemonLog {
    /// How many bytes a log for this table has, a multiple of 8; 0 for an empty table.
    pub(super) fn size_for(table: &MemoryTable) -> u64 {
        let last = table.regions().last();
        let end = last.map(|region| region.range().addrs().end);
        end.unwrap_or(0).div_ceil(PAGE).div_ceil(WORD) * 8
    }

    /// A log without a bit set, in which no page counts yet. The size is a multiple of 8.
    pub(super) fn new(size: u64) -> Result<Self, MemoryError> {
        let backing = ShmBacking::create_growable("dirty-log", file_len(size))?;
        Ok(Self {
            bits: map(&backing)?,
            size,
            pages: RangeSet::default(),
        })
    }

    /// Makes it longer, a multiple of 8 bytes, if it is shorter than that. Mappings from before
    /// are mappings of the same bits.
    pub(super) fn grow(&mut self, size: u64) -> Result<(), MemoryError> {
        let len = file_len(size);
        if len > self.bits.backing().end() {
            self.bits = map(&self.bits.backing().grow(len)?)?;
        }
        self.size = self.size.max(size);
        Ok(())
    }

    /// The size in bytes, a multiple of 8. The descriptor's file may be longer, and is never
    /// shorter: as many bytes can be mapped without a fault.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Has the pages of these regions count too, from now on, as far as the log has bits for them.
    pub(super) fn watch(&mut self, table: &MemoryTable) {
        let regions: RangeSet = table
            .regions()
            .iter()
            .map(|r| pages_of(r.range()))
            .collect();
        self.pages.extend(regions.within(0..self.size * 8));
    }

    /// Sets the bits of a range, as far as the log has bits for it.
    pub(super) fn mark(&self, range: GuestRange) {
        let pages = pages_of(range);
        for (word, mask) in words(pages.start..pages.end.min(self.size * 8)) {
            self.with_word(word, |bits| bits.fetch_or(mask.to_le(), Ordering::SeqCst));
        }
    }

    /// Takes the bits that are set: the pages are sorted, and joined where they touch.
    pub(super) fn drain(&self) -> Vec<GuestRange> {
        let mut dirty = RangeSet::default();
        self.take_words(|word, bits| dirty.insert_bits(word * WORD, bits));
        dirty.to_guest(PAGE)
    }

    /// Takes each word that is not 0, with the bits that count; the others stay.
    fn take_words(&self, mut take: impl FnMut(u64, u64)) {
        for (word, mask) in self.pages.iter().flat_map(words) {
            let bits = self.with_word(word, |bits| match bits.load(Ordering::Relaxed) {
                0 => 0,
                // At once: a bit that is set from now on is seen next time. A copy of
                // the page made after this has what was written before its bit was set.
                _ => bits.fetch_and(!mask.to_le(), Ordering::SeqCst),
            });
            let bits = u64::from_le(bits) & mask;
            if bits != 0 {
                take(word, bits);
            }
        }
    }

    fn with_word(&self, word: u64, access: impl FnOnce(&AtomicU64) -> u64) -> u64 {
        let all: Option<VolatileSlice<'_, _>> = self.bits.as_volatile_slice().ok();
        let offset = to_usize(word * 8);
        let word = all
            .as_ref()
            .and_then(|all| all.get_atomic_ref::<AtomicU64>(offset).ok());
        // The mapping begins at a page, and all words are inside it.
        word.map_or(0, access)
    }
}

impl DaemonLog {
    /// The descriptor, to be sent.
    pub(super) fn descriptor(&self) -> Descriptor {
        Arc::new(self.bits.backing().clone())
    }
}

impl AsFd for DaemonLog {
    /// The descriptor of the memfd, in which the log starts at offset 0.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bits.backing().as_fd()
    }
}

/// The length of the file of a log.
fn file_len(size: u64) -> u64 {
    size.next_multiple_of(base_page_size())
}

fn map(backing: &ShmBacking) -> Result<GuestRegionShm, MemoryError> {
    GuestRegionShm::from_backing(backing, 0, (GuestAddress(0), backing.end()))
}

fn pages_of(range: GuestRange) -> Range<u64> {
    range.start_addr().0 / PAGE..range.last_addr().0 / PAGE + 1
}

/// The words that hold the bits of these pages, each with the bits that do.
fn words(pages: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    (pages.start / WORD..pages.end.div_ceil(WORD)).map(move |word| {
        let start = word * WORD;
        let below = pages.start.saturating_sub(start);
        let above = (start + WORD).saturating_sub(pages.end);
        // Both less than 64: the word has at least one of the pages.
        (word, u64::MAX << below & u64::MAX >> above)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemoryShm;

    fn table(ranges: &[(u64, usize)]) -> MemoryTable {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(start, pages)| (GuestAddress(start * PAGE), pages * 4096))
            .collect();
        GuestMemoryShm::<()>::from_ranges(&ranges)
            .unwrap()
            .memory_table()
    }

    fn log(ranges: &[(u64, usize)]) -> DaemonLog {
        let table = table(ranges);
        let mut log = DaemonLog::new(DaemonLog::size_for(&table)).unwrap();
        log.watch(&table);
        log
    }

    /// As a daemon sets a bit: in a byte, through the descriptor.
    fn set(log: &DaemonLog, pages: &[u64]) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::from(log.as_fd().try_clone_to_owned().unwrap());
        for page in pages {
            let mut byte = [0];
            file.read_exact_at(&mut byte, page / 8).unwrap();
            byte[0] |= 1 << (page % 8);
            file.write_all_at(&byte, page / 8).unwrap();
        }
    }

    /// First page and number of pages.
    fn drain(log: &DaemonLog) -> Vec<(u64, u64)> {
        let dirty = log.drain();
        dirty
            .iter()
            .map(|r| (r.start_addr().0 / PAGE, r.size() / PAGE))
            .collect()
    }

    #[test]
    fn the_size_is_whole_words_up_to_the_end_of_the_last_region() {
        for (regions, size) in [
            (&[][..], 0),
            (&[(0, 1)], 8),
            (&[(0, 64)], 8),
            (&[(0, 1), (63, 1)], 8),
            (&[(64, 1)], 16),
            (&[(0, 1), (1 << 20, 1)], (1 << 17) + 8),
        ] {
            let table = match regions {
                [] => MemoryTable::default(),
                regions => self::table(regions),
            };
            assert_eq!(DaemonLog::size_for(&table), size, "{regions:?}");
        }
        let log = log(&[(64, 1)]);
        let file = std::fs::File::from(log.as_fd().try_clone_to_owned().unwrap());
        assert_eq!(file.metadata().unwrap().len(), 4096);
        // A daemon cannot make our reading of it a SIGBUS.
        file.set_len(0).unwrap_err();
    }

    #[test]
    fn bits_are_taken_once_and_joined_to_ranges() {
        let log = log(&[(0, 300)]);
        set(&log, &[0, 1, 2, 63, 64, 65, 127, 128, 200, 299]);
        let expected = [(0, 3), (63, 3), (127, 2), (200, 1), (299, 1)];
        assert_eq!(drain(&log), expected);
        assert_eq!(drain(&log), []);
        let all: Vec<u64> = (0..300).collect();
        set(&log, &all);
        assert_eq!(drain(&log), [(0, 300)]);
    }

    #[test]
    fn only_bits_of_regions_count() {
        let log = log(&[(3, 2), (70, 100)]);
        let all: Vec<u64> = (0..192).collect();
        set(&log, &all);
        assert_eq!(drain(&log), [(3, 2), (70, 100)]);
    }

    #[test]
    fn ranges_that_are_marked_are_dirty() {
        let log = log(&[(0, 300)]);
        for (start, size) in [(5, 1), (60, 10), (128, 64), (290, 100)] {
            log.mark(GuestRange::new(GuestAddress(start * PAGE), size * PAGE).unwrap());
        }
        assert_eq!(drain(&log), [(5, 1), (60, 10), (128, 64), (290, 10)]);
    }

    #[test]
    fn bits_that_are_set_in_any_mapping_from_any_time_are_found() {
        let (first, second) = (table(&[(0, 64)]), table(&[(0, 64), (1 << 20, 64)]));
        let mut log = log(&[(0, 64)]);
        let mapped_before = log.bits.clone();
        let set_in = |bits: &GuestRegionShm, page: usize| {
            let all = bits.as_volatile_slice().unwrap();
            let word = all.get_atomic_ref::<AtomicU64>(page / 64 * 8).unwrap();
            word.fetch_or(1_u64.to_le() << (page % 64), Ordering::SeqCst);
        };
        set_in(&mapped_before, 1);
        log.grow(DaemonLog::size_for(&second)).unwrap();
        log.watch(&second);
        set_in(&mapped_before, 2);
        // In the same page of the file, and in another one.
        set(&log, &[3, 1 << 20]);
        assert_eq!(drain(&log), [(1, 3), (1 << 20, 1)]);
        // A shorter table leaves it as it is.
        log.grow(DaemonLog::size_for(&first)).unwrap();
        assert_eq!(log.size(), DaemonLog::size_for(&second));
        set_in(&mapped_before, 5);
        set(&log, &[(1 << 20) + 1]);
        assert_eq!(drain(&log), [(5, 1), ((1 << 20) + 1, 1)]);
    }

    #[test]
    fn masks_have_the_bits_of_the_pages() {
        let found = |pages| words(pages).collect::<Vec<_>>();
        assert_eq!(found(0..64), [(0, u64::MAX)]);
        assert_eq!(found(3..5), [(0, 0b11000)]);
        assert_eq!(found(63..65), [(0, 1 << 63), (1, 1)]);
        assert_eq!(found(64..64), []);
    }
}
