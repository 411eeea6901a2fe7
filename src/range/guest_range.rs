//! Where RAM lies in the guest, and why a range is invalid.

use std::convert::Infallible;
use std::fmt;
use std::ops::Range;

use vm_memory::GuestAddress;

use crate::units::HumanSize;

/// The result of operations that only an invalid range makes fail.
type Result<T, E = InvalidRange> = std::result::Result<T, E>;

/// A contiguous range of guest addresses, at least one byte long, whose end fits in 64 bits.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, GuestRange};
/// use vm_memory::GuestAddress;
///
/// let range = GuestRange::new(GuestAddress(0x1000), 0x2000)?;
/// assert_eq!(range.last_addr(), GuestAddress(0x2fff));
/// assert!(GuestRange::new(GuestAddress(u64::MAX), 2).is_err());
///
/// // Where RAM is made, discarded or unplugged, an address and a size will do.
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// memory.discard(range)?;
/// memory.discard((GuestAddress(0x1000), 0x2000))?;
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct GuestRange {
    start: u64,
    size: u64,
}

impl GuestRange {
    /// The range of `size` bytes that starts at `start`.
    ///
    /// # Errors
    ///
    /// [`InvalidRange::Empty`] if `size` is 0, and [`InvalidRange::Overflow`] if the byte after
    /// the range has no 64-bit address (vhost-user and KVM cannot express such a range either).
    pub fn new(start: GuestAddress, size: u64) -> Result<Self> {
        if size == 0 {
            return Err(InvalidRange::Empty { start });
        }
        if start.0.checked_add(size).is_none() {
            return Err(InvalidRange::Overflow { start, size });
        }
        Ok(Self {
            start: start.0,
            size,
        })
    }

    /// Checks what a caller gave as a place: a range, or an address and a size.
    pub(crate) fn at(place: impl TryInto<Self, Error: Into<InvalidRange>>) -> Result<Self> {
        place.try_into().map_err(Into::into)
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

    /// The addresses: from the first to the one after the last.
    pub(crate) fn addrs(&self) -> Range<u64> {
        self.start..self.start + self.size
    }

    /// Whether the two ranges have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start_addr() <= other.last_addr() && other.start_addr() <= self.last_addr()
    }

    /// Checks that the start and the size are multiples of `align` bytes.
    pub(crate) fn check_aligned(&self, align: u64) -> Result<()> {
        RangePart::Address.check_aligned(self.start, align)?;
        RangePart::Size.check_aligned(self.size, align)
    }

    /// Checks that a region of this range consists of whole pages.
    pub(crate) fn check_pages(&self, page_size: u64) -> Result<()> {
        self.check_aligned(page_size)
            .map_err(|_| InvalidRange::PartialPages {
                range: *self,
                page_size,
            })
    }
}

impl TryFrom<(GuestAddress, u64)> for GuestRange {
    type Error = InvalidRange;

    /// An address and a size in bytes, as [`new`](Self::new).
    fn try_from((start, size): (GuestAddress, u64)) -> Result<Self> {
        Self::new(start, size)
    }
}

/// What is no range is an error.
#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for GuestRange {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Numbers {
            start: u64,
            size: u64,
        }
        let Numbers { start, size } = Numbers::deserialize(deserializer)?;
        Self::new(GuestAddress(start), size).map_err(serde::de::Error::custom)
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

/// Why a range cannot be a place in the guest or in a backing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRange {
    /// It is empty.
    #[error("the range at guest address {:#x} has size 0: give it at least one page", .start.0)]
    #[non_exhaustive]
    Empty {
        /// Where it was to start.
        start: GuestAddress,
    },

    /// It runs past 2^64.
    #[error(
        "the range of {} at guest address {:#x} has no 64-bit address after it: lower its address \
         or its size",
        HumanSize(*.size), .start.0
    )]
    #[non_exhaustive]
    Overflow {
        /// Where it was to start.
        start: GuestAddress,
        /// Its size in bytes.
        size: u64,
    },

    /// Two ranges have addresses in common.
    #[error("guest ranges {first} and {second} overlap: move or shorten one of them")]
    #[non_exhaustive]
    Overlap {
        /// The lower one.
        first: GuestRange,
        /// The higher one.
        second: GuestRange,
    },

    /// A region or a ROM is there already.
    #[error(
        "guest range {range} overlaps {there}, which is there already: move or shorten it, or \
         remove what is there first"
    )]
    #[non_exhaustive]
    Taken {
        /// What was to be placed.
        range: GuestRange,
        /// What is there.
        there: GuestRange,
    },

    /// It does not consist of whole pages of its backing.
    #[error(
        "{} is not a multiple of the page size {}: the nearest {}",
        .part.show(*.value), HumanSize(*.page_size), .part.show_nearest(*.value, *.page_size)
    )]
    #[non_exhaustive]
    Unaligned {
        /// The number that is not aligned.
        part: RangePart,
        /// Its value in bytes.
        value: u64,
        /// The page size of the backing in bytes.
        page_size: u64,
    },

    /// A region that is there does not consist of whole pages: vm-memory's constructors allow
    /// that.
    #[error(
        "the region {range} is not whole pages of {}, which memory tables, memory slots and \
         discards need: make it of an address and a size that are multiples of that",
        HumanSize(*.page_size)
    )]
    #[non_exhaustive]
    PartialPages {
        /// The range of the region.
        range: GuestRange,
        /// The page size of its backing in bytes.
        page_size: u64,
    },
}

impl From<Infallible> for InvalidRange {
    /// Never happens: a [`GuestRange`] is valid already.
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl InvalidRange {
    /// The error that two ranges overlap, given in any order.
    pub(crate) fn overlap(one: GuestRange, other: GuestRange) -> Self {
        Self::Overlap {
            first: one.min(other),
            second: one.max(other),
        }
    }
}

/// Which number of a range or region it is, for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RangePart {
    /// The guest address at which it starts.
    Address,
    /// The user address at which it starts: what a vhost-user frontend calls it.
    UserAddress,
    /// Its size.
    Size,
    /// The offset in the backing at which it starts.
    Offset,
}

impl fmt::Display for RangePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Address => "guest address",
            Self::UserAddress => "user address",
            Self::Size => "size",
            Self::Offset => "offset",
        })
    }
}

impl RangePart {
    /// Checks that a value is a multiple of the page size.
    pub(crate) fn check_aligned(self, value: u64, page_size: u64) -> Result<()> {
        if value.is_multiple_of(page_size) {
            return Ok(());
        }
        Err(InvalidRange::Unaligned {
            part: self,
            value,
            page_size,
        })
    }

    fn show(self, value: u64) -> String {
        match self {
            Self::Size => format!("{self} {}", HumanSize(value)),
            Self::Address | Self::UserAddress | Self::Offset => format!("{self} {value:#x}"),
        }
    }

    fn show_nearest(self, value: u64, page_size: u64) -> String {
        let below = value - value % page_size;
        match self {
            Self::Address | Self::UserAddress | Self::Offset => format!("is {below:#x}"),
            // RAM that is a little larger serves; nothing is larger than the largest multiple.
            Self::Size => match value.checked_next_multiple_of(page_size) {
                Some(above) => format!("larger is {}", HumanSize(above)),
                None => format!("is {}", HumanSize(below)),
            },
        }
    }
}

/// The ranges of `size` bytes of RAM that starts at guest address 0 and leaves `hole` free: RAM
/// below the hole, and the rest right after it.
///
/// That is how PC-like machines leave room for PCI below 4 GiB. All ranges can come from one
/// backing (see [`GuestMemoryShmBuilder::add_ram`](crate::GuestMemoryShmBuilder::add_ram)).
///
/// ```
/// use guest_memory_shm::{GuestRange, ram_around_hole};
/// use vm_memory::GuestAddress;
///
/// let hole = GuestRange::new(GuestAddress(3 << 30), 1 << 30)?;
/// let ranges = ram_around_hole(4 << 30, hole)?;
/// assert_eq!(ranges[0], GuestRange::new(GuestAddress(0), 3 << 30)?);
/// assert_eq!(ranges[1], GuestRange::new(GuestAddress(4 << 30), 1 << 30)?);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
///
/// # Errors
///
/// [`InvalidRange::Empty`] if `size` is 0; [`InvalidRange::Overflow`] if the RAM after the hole
/// does not fit in the address space.
pub fn ram_around_hole(size: u64, hole: GuestRange) -> Result<Vec<GuestRange>> {
    let below = size.min(hole.start);
    let after = GuestAddress(hole.start + hole.size);
    let mut ranges = Vec::with_capacity(2);
    if below > 0 || size == 0 {
        ranges.push(GuestRange::new(GuestAddress(0), below)?);
    }
    if size > below {
        ranges.push(GuestRange::new(after, size - below)?);
    }
    Ok(ranges)
}

/// Checks that no two of `ranges` overlap, whatever their order.
pub(crate) fn check_disjoint(ranges: &[GuestRange]) -> Result<()> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0].overlaps(&pair[1])) {
        Some(pair) => Err(InvalidRange::overlap(pair[0], pair[1])),
        None => Ok(()),
    }
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
            Err(InvalidRange::Overflow { .. })
        ));
        assert!(matches!(
            GuestRange::new(GuestAddress(5), 0),
            Err(InvalidRange::Empty {
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
        let ranges = |size| ram_around_hole(size, hole);
        assert_eq!(ranges(1 << 20).unwrap(), [range(0, 1 << 20)]);
        assert_eq!(ranges(0xc000_0000).unwrap(), [range(0, 0xc000_0000)]);
        assert_eq!(
            ranges(4 << 30).unwrap(),
            [range(0, 0xc000_0000), range(4 << 30, 1 << 30)]
        );
        assert!(matches!(ranges(0), Err(InvalidRange::Empty { .. })));
        assert!(matches!(
            ranges(u64::MAX),
            Err(InvalidRange::Overflow { .. })
        ));
        let from_zero = ram_around_hole(4096, range(0, 4096)).unwrap();
        assert_eq!(from_zero, [range(4096, 4096)]);
    }

    #[test]
    fn texts_name_the_values_and_the_way_out() {
        let cases = [
            (
                range(5, 10).check_aligned(4),
                "guest address 0x5 is not a multiple of the page size 4 bytes: the nearest is 0x4",
            ),
            (
                range(0x30_0000, 0x20_0000).check_aligned(2 << 20),
                "guest address 0x300000 is not a multiple of the page size 2 MiB: the nearest is \
                 0x200000",
            ),
            (
                range(0, 5000).check_aligned(4096),
                "size 4.8 KiB (5000 bytes) is not a multiple of the page size 4 KiB: the nearest \
                 larger is 8 KiB",
            ),
            (
                RangePart::Size.check_aligned(u64::MAX, 1 << 63),
                "size 15.9 EiB (18446744073709551615 bytes) is not a multiple of the page size \
                 8 EiB: the nearest is 8 EiB",
            ),
            (
                RangePart::Offset.check_aligned(0x30_0000, 2 << 20),
                "offset 0x300000 is not a multiple of the page size 2 MiB: the nearest is \
                 0x200000",
            ),
            (
                GuestRange::new(GuestAddress(0x1000), 0).map(drop),
                "the range at guest address 0x1000 has size 0: give it at least one page",
            ),
            (
                GuestRange::new(GuestAddress(u64::MAX - 4095), 8192).map(drop),
                "the range of 8 KiB at guest address 0xfffffffffffff000 has no 64-bit address \
                 after it: lower its address or its size",
            ),
            (
                range(0x1000, 300).check_pages(4096),
                "the region 0x1000..=0x112b (300 bytes) is not whole pages of 4 KiB, which \
                 memory tables, memory slots and discards need: make it of an address and a size \
                 that are multiples of that",
            ),
            (
                check_disjoint(&[range(4096, 4096), range(0, 8192)]),
                "guest ranges 0x0..=0x1fff (8 KiB) and 0x1000..=0x1fff (4 KiB) overlap: move or \
                 shorten one of them",
            ),
        ];
        for (refused, text) in cases {
            assert_eq!(refused.unwrap_err().to_string(), text);
        }
    }
}
