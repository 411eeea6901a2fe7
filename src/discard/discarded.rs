//! What became of a range that was discarded.

use std::fmt;
use std::ops::{AddAssign, Range};

use crate::range::inwards;
use crate::units::HumanSize;

/// What became of a range that was discarded, in bytes: the three together are the range.
///
/// ```
/// use guest_memory_shm::{Discarded, GuestMemoryShm};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// // Half a page, a page, and half a page.
/// let discarded = memory.discard((GuestAddress(0x800), 0x2000))?;
/// assert_eq!(discarded.freed, 0x1000);
/// assert_eq!((discarded.kept_head, discarded.kept_tail), (0x800, 0x800));
/// assert_eq!(discarded.len(), 0x2000);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Discarded {
    /// Whole pages of the backing that are holes now: they take no memory and read as zeroes, in
    /// every process.
    pub freed: u64,
    /// What is still there at the start of the range, with its contents or zeroed: the rest of a
    /// page that began before it, or all of the range if it lies inside one page.
    pub kept_head: u64,
    /// What is still there at the end of the range: the beginning of a page that ends after it.
    pub kept_tail: u64,
}

impl Discarded {
    /// The length of the range.
    #[expect(clippy::len_without_is_empty, reason = "no empty range is discarded")]
    pub fn len(&self) -> u64 {
        self.freed + self.kept_head + self.kept_tail
    }

    /// What is still there.
    pub fn kept(&self) -> u64 {
        self.kept_head + self.kept_tail
    }
}

impl AddAssign for Discarded {
    fn add_assign(&mut self, other: Self) {
        self.freed += other.freed;
        self.kept_head += other.kept_head;
        self.kept_tail += other.kept_tail;
    }
}

impl fmt::Display for Discarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (freed, kept) = (HumanSize(self.freed), HumanSize(self.kept()));
        write!(f, "{freed} given back, {kept} kept")
    }
}

/// The whole pages in a range of offsets, and the report if all of them become free.
pub(super) fn split(range: Range<u64>, page_size: u64) -> (Range<u64>, Discarded) {
    let whole = inwards(range.clone(), page_size);
    let discarded = Discarded {
        freed: whole.end - whole.start,
        kept_head: whole.start - range.start,
        kept_tail: range.end - whole.end,
    };
    (whole, discarded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn discarded(freed: u64, kept_head: u64, kept_tail: u64) -> Discarded {
        Discarded {
            freed,
            kept_head,
            kept_tail,
        }
    }

    #[test]
    fn only_whole_pages_are_freed_and_nothing_is_lost() {
        for (range, whole, report) in [
            (0..20, 0..20, discarded(20, 0, 0)),
            (5..25, 10..20, discarded(10, 5, 5)),
            (5..15, 10..10, discarded(0, 5, 5)),
            (12..18, 18..18, discarded(0, 6, 0)),
            (10..18, 10..10, discarded(0, 0, 8)),
            (12..20, 20..20, discarded(0, 8, 0)),
        ] {
            assert_eq!(split(range.clone(), 10), (whole, report), "{range:?}");
            assert_eq!(report.len(), range.end - range.start);
        }
    }
}
