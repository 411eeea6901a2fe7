//! Guest ranges: where RAM lies in the guest, checked before anything is created.
//!
//! Pure arithmetic: no I/O, no unsafe code. A [`GuestRange`] is never empty and never runs past
//! the end of the 64-bit address space, so nobody after this module has to think about overflow.

use std::fmt;

use vm_memory::GuestAddress;

use crate::error::{Error, Result};
use crate::units::HumanSize;

/// A contiguous range of guest addresses, at least one byte long, whose end fits in 64 bits.
///
/// ```
/// use guest_memory_shm::GuestRange;
/// use vm_memory::GuestAddress;
///
/// let range = GuestRange::new(GuestAddress(0x1000), 0x2000)?;
/// assert_eq!(range.last_addr(), GuestAddress(0x2fff));
/// assert!(GuestRange::new(GuestAddress(u64::MAX), 2).is_err());
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestRange {
    start: u64,
    size: u64,
}

impl GuestRange {
    /// The range of `size` bytes that starts at `start`.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyRange`] if `size` is 0, and [`Error::RangeOverflow`] if the byte after the
    /// range has no 64-bit address (vhost-user and KVM cannot express such a range either).
    pub fn new(start: GuestAddress, size: u64) -> Result<Self> {
        if size == 0 {
            return Err(Error::EmptyRange { start });
        }
        if start.0.checked_add(size).is_none() {
            return Err(Error::RangeOverflow { start, size });
        }
        Ok(Self {
            start: start.0,
            size,
        })
    }

    /// The first address.
    pub fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    /// The last address, inclusive.
    pub fn last_addr(&self) -> GuestAddress {
        GuestAddress(self.start + (self.size - 1))
    }

    /// The size in bytes, never 0.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the two ranges have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start_addr() <= other.last_addr() && other.start_addr() <= self.last_addr()
    }

    /// Checks that the start and the size are multiples of `align` bytes.
    pub(crate) fn check_aligned(&self, align: u64) -> Result<()> {
        if !self.start.is_multiple_of(align) {
            return Err(Error::UnalignedAddress {
                range: *self,
                page_size: align,
            });
        }
        if !self.size.is_multiple_of(align) {
            return Err(Error::UnalignedSize {
                size: self.size,
                page_size: align,
            });
        }
        Ok(())
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x}..={:#x} ({})",
            self.start,
            self.last_addr().0,
            HumanSize(self.size)
        )
    }
}

impl fmt::Debug for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestRange({self})")
    }
}

/// The ranges of `size` bytes of RAM that starts at guest address 0 and leaves `hole` free: RAM
/// below the hole, and the rest right behind it.
///
/// That is how PC-like machines leave room for PCI below 4 GiB. All ranges can come from one
/// backing (see [`GuestMemoryShmBuilder::with_ram`](crate::GuestMemoryShmBuilder::with_ram)).
///
/// ```
/// use guest_memory_shm::{GuestRange, ram_around_hole};
/// use vm_memory::GuestAddress;
///
/// let hole = GuestRange::new(GuestAddress(3 << 30), 1 << 30)?;
/// let ranges = ram_around_hole(4 << 30, hole)?;
/// assert_eq!(ranges, [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::EmptyRange`] if `size` is 0; [`Error::RangeOverflow`] if the RAM behind the hole does
/// not fit in the address space.
pub fn ram_around_hole(size: u64, hole: GuestRange) -> Result<Vec<(GuestAddress, u64)>> {
    let below = size.min(hole.start);
    let behind = GuestAddress(hole.start + hole.size);
    let mut ranges = Vec::with_capacity(2);
    if below > 0 || size == 0 {
        ranges.push(GuestRange::new(GuestAddress(0), below)?);
    }
    if size > below {
        ranges.push(GuestRange::new(behind, size - below)?);
    }
    Ok(ranges
        .iter()
        .map(|range| (range.start_addr(), range.size()))
        .collect())
}

/// Checks that no two of `ranges` overlap, whatever their order.
pub(crate) fn check_disjoint(ranges: &[GuestRange]) -> Result<()> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0].overlaps(&pair[1])) {
        Some(pair) => Err(Error::Overlap {
            first: pair[0],
            second: pair[1],
        }),
        None => Ok(()),
    }
}

/// The offsets at which `ranges`, in this order, lie one behind the other in a backing from
/// `start` on, and the end of the last.
pub(crate) fn pack(start: u64, ranges: &[GuestRange]) -> Result<(Vec<u64>, u64)> {
    let mut end = start;
    let mut offsets = Vec::with_capacity(ranges.len());
    for range in ranges {
        offsets.push(end);
        let sum = end.saturating_add(range.size);
        // A file is at most i64::MAX bytes long (off_t).
        let limit = i64::MAX.unsigned_abs();
        if sum > limit {
            return Err(Error::BackingTooLong { size: sum, limit });
        }
        end = sum;
    }
    Ok((offsets, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, size: u64) -> GuestRange {
        GuestRange::new(GuestAddress(start), size).unwrap()
    }

    #[test]
    fn a_range_may_end_just_below_the_end_of_the_address_space() {
        assert_eq!(range(u64::MAX - 1, 1).last_addr().0, u64::MAX - 1);
        assert!(matches!(
            GuestRange::new(GuestAddress(u64::MAX), 1),
            Err(Error::RangeOverflow { .. })
        ));
        assert!(matches!(
            GuestRange::new(GuestAddress(5), 0),
            Err(Error::EmptyRange {
                start: GuestAddress(5)
            })
        ));
    }

    #[test]
    fn overlap_is_found_in_any_order() {
        for (ranges, overlap) in [
            (vec![range(0, 10), range(10, 10)], false),
            (vec![range(10, 10), range(0, 10)], false),
            (vec![range(0, 11), range(10, 10)], true),
            (vec![range(10, 10), range(30, 1), range(0, 11)], true),
            (vec![range(0, 100), range(50, 1), range(200, 1)], true),
            (vec![range(5, 5), range(5, 5)], true),
        ] {
            assert_eq!(check_disjoint(&ranges).is_err(), overlap, "{ranges:?}");
        }
    }

    #[test]
    fn ram_is_laid_around_the_hole() {
        let hole = range(0xc000_0000, 0x4000_0000);
        let ranges = |size| {
            ram_around_hole(size, hole).map(|r| {
                r.iter()
                    .map(|(addr, size)| (addr.0, *size))
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(ranges(1 << 20).unwrap(), [(0, 1 << 20)]);
        assert_eq!(ranges(0xc000_0000).unwrap(), [(0, 0xc000_0000)]);
        assert_eq!(
            ranges(4 << 30).unwrap(),
            [(0, 0xc000_0000), (4 << 30, 1 << 30)]
        );
        assert!(matches!(ranges(0), Err(Error::EmptyRange { .. })));
        assert!(matches!(ranges(u64::MAX), Err(Error::RangeOverflow { .. })));
        let from_zero = ram_around_hole(4096, range(0, 4096)).unwrap();
        assert_eq!(from_zero, [(GuestAddress(4096), 4096)]);
    }

    #[test]
    fn packed_ranges_follow_each_other() {
        let (offsets, end) = pack(4096, &[range(1 << 32, 8192), range(0, 4096)]).unwrap();
        assert_eq!((offsets, end), (vec![4096, 12288], 16384));
        assert!(matches!(
            pack(0, &[range(0, 1 << 62), range(1 << 63, 1 << 62)]),
            Err(Error::BackingTooLong { .. })
        ));
    }
}
