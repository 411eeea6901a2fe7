//! Regions: contiguous guest RAM, one mapping of one backing, placed at a guest address.
#![expect(
    unsafe_code,
    reason = "vm-memory's VolatileSlice is made from a raw pointer"
)]

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::{BS, Bitmap, NewBitmap};
use vm_memory::guest_memory::{Error as AccessError, Result as AccessResult};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

#[cfg(doc)]
use crate::backing::BackingError;
use crate::backing::ShmBacking;
use crate::mapping::{HostAddr, Mapping, to_usize};
use crate::options::Access;
use crate::ram::Ram;
use crate::range::{GuestRange, Placed};
use crate::report::BuildReport;

mod error;

pub use error::MemoryError;
pub(crate) use error::Result;

/// A contiguous range of guest RAM: one shared mapping of a part of a [`ShmBacking`].
///
/// Implements vm-memory's `GuestMemoryRegion`; `B` is the dirty bitmap, `()` for none. It is
/// always shared (`MAP_SHARED`), always has a descriptor, and always lies inside its backing.
/// It is a handle: a clone is the same region, and the last one unmaps it.
///
/// A region takes three of the map entries that a process may have (`vm.max_map_count`, 65,530
/// unless changed): the RAM, and a guard page on either side. A child of fork(2) shares the RAM
/// with its parent, as any process that maps the descriptor.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, GuestRegionShm, RamOptions};
/// use std::sync::Arc;
/// use vm_memory::{Bytes, GuestAddress};
///
/// // Hotplug: immutable memory plus a region is a new memory.
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let region = GuestRegionShm::new((GuestAddress(4 << 30), 1 << 20), &RamOptions::new())?;
/// let larger = memory.insert_region(Arc::new(region))?;
/// larger.write_obj(42u32, GuestAddress(4 << 30)).expect("there is RAM now");
/// assert!(memory.write_obj(42u32, GuestAddress(4 << 30)).is_err());
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
// All that an access reads, in half a cache line.
#[repr(align(32))]
pub struct GuestRegionShm<B = ()> {
    range: GuestRange,
    host: HostAddr,
    shared: Arc<Shared<B>>,
}

/// What the handles of a region share.
#[derive(Debug)]
struct Shared<B> {
    /// Where the handles' `host` points to.
    ram: Ram,
    bitmap: B,
    file_offset: FileOffset,
}

/// The bitmap of a region, unless a function makes another one.
pub(crate) fn new_bitmap<B: NewBitmap>(range: GuestRange) -> B {
    B::with_len(to_usize(range.size()))
}

impl<B> GuestRegionShm<B> {
    /// Maps the pages of the range, which begin at `offset`; it need not end with the last of
    /// them. Nothing is populated.
    pub(crate) fn place(
        backing: &ShmBacking,
        offset: u64,
        range: GuestRange,
        bitmap: B,
    ) -> Result<Self> {
        if backing.map_options().access == Access::ReadOnly {
            return Err(MemoryError::ReadOnlyRam);
        }
        let pages = range.size().checked_next_multiple_of(backing.page_size());
        let mapping = Mapping::new(backing, offset, pages.unwrap_or(range.size()))?;
        Ok(Self {
            range,
            host: mapping.host_addr(),
            shared: Arc::new(Shared {
                bitmap,
                ram: Ram {
                    range,
                    mapping: Arc::new(mapping),
                    backing: backing.clone(),
                    offset,
                },
                file_offset: FileOffset::from_arc(backing.file().clone(), offset),
            }),
        })
    }

    /// The guest addresses of the region.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// The backing that the region is a part of.
    pub fn backing(&self) -> &ShmBacking {
        &self.shared.ram.backing
    }

    /// The dirty bitmap of the whole region, to be harvested and cleared.
    ///
    /// (vm-memory's `GuestMemoryRegion::bitmap` gives a slice of it, which can only be marked and
    /// asked.)
    ///
    /// ```
    /// use guest_memory_shm::GuestMemoryShm;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    ///
    /// let memory = GuestMemoryShm::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// memory.write_obj(1u8, GuestAddress(0x3000)).expect("there is RAM");
    /// let region = memory.find_region(GuestAddress(0)).expect("there is RAM");
    /// assert_eq!(region.dirty_bitmap().get_and_reset(), [1 << 3, 0, 0, 0]);
    /// assert_eq!(region.dirty_bitmap().get_and_reset(), [0; 4]);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    pub fn dirty_bitmap(&self) -> &B {
        &self.shared.bitmap
    }

    /// What of its options has no effect, and limits that were near when it was made.
    pub fn report(&self) -> BuildReport {
        let Ram {
            backing, mapping, ..
        } = self.ram();
        let mut report = BuildReport::default();
        let notes = backing.notes().iter().chain(mapping.notes());
        report.add(&backing.label(), notes.cloned());
        report
    }

    /// Whether both are handles of one region.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Where the region starts in its backing, in bytes.
    pub fn offset(&self) -> u64 {
        self.shared.ram.offset
    }

    /// The region without its bitmap.
    pub(crate) fn ram(&self) -> &Ram {
        &self.shared.ram
    }

    /// The offset of `addr` in the region, if it is in it.
    #[inline]
    pub(crate) fn offset_of(&self, addr: GuestAddress) -> Option<u64> {
        let offset = self.wrapping_offset_of(addr);
        (offset < self.range.size()).then_some(offset)
    }

    /// The offset of `addr` in the region, or a number that is larger than any offset in it.
    #[inline]
    pub(crate) fn wrapping_offset_of(&self, addr: GuestAddress) -> u64 {
        addr.0.wrapping_sub(self.range.start_addr().0)
    }

    /// The host address of the first byte, for hypervisors and the wire.
    ///
    /// A memory slot of KVM is made of the region like this: `guest_phys_addr` is its
    /// `start_addr()`, `memory_size` its `len()`, `userspace_addr` this address.
    ///
    /// The memory is valid as long as the region lives. The guest and other processes write to
    /// it: no reference to it may be made, and it is accessed by volatile or atomic operations.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.host.as_ptr()
    }
}

impl<B: Bitmap> GuestRegionShm<B> {
    /// The `count` bytes from `offset` on, if the region has all of them.
    #[inline]
    pub(crate) fn slice(&self, offset: u64, count: usize) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        // The room from the offset on, as vm-memory's iterator of slices computes it: written like
        // this, the compiler sees that the iterator never asks for more.
        let room = self.range.size().checked_sub(offset)?;
        if count as u64 > room {
            return None;
        }
        let at = to_usize(offset);
        let start = self.as_ptr().wrapping_add(at);
        let bitmap = self.shared.bitmap.slice_at(at);
        // SAFETY: `start..start + count` lies in the range, as just checked, and the mapping is at
        // least as long. It lives as long as `self.shared`, and so as `self`, which the slice
        // borrows. The RAM is only ever accessed by volatile or atomic operations: this crate
        // makes no reference to it.
        Some(unsafe { VolatileSlice::with_bitmap(start, count, bitmap, None) })
    }
}

impl<B> Placed for GuestRegionShm<B> {
    fn range(&self) -> GuestRange {
        self.range
    }
}

impl<B> Clone for GuestRegionShm<B> {
    /// Another handle of the same region: nothing is copied or mapped.
    fn clone(&self) -> Self {
        Self {
            range: self.range,
            host: self.host,
            shared: self.shared.clone(),
        }
    }
}

impl<B> fmt::Debug for GuestRegionShm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRegionShm")
            .field("range", &format_args!("{}", self.range))
            .field("mapping", &self.shared.ram.mapping)
            .field("offset", &format_args!("{:#x}", self.offset()))
            .field("backing", &self.shared.ram.backing)
            .finish()
    }
}

impl<B: Bitmap> GuestMemoryRegion for GuestRegionShm<B> {
    type B = B;

    #[inline]
    fn len(&self) -> GuestUsize {
        self.range.size()
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.range.start_addr()
    }

    #[inline]
    fn last_addr(&self) -> GuestAddress {
        self.range.last_addr()
    }

    #[inline]
    fn bitmap(&self) -> BS<'_, Self::B> {
        self.shared.bitmap.slice_at(0)
    }

    #[inline]
    fn get_host_address(&self, addr: MemoryRegionAddress) -> AccessResult<*mut u8> {
        if addr.0 < self.range.size() {
            Ok(self.as_ptr().wrapping_add(to_usize(addr.0)))
        } else {
            Err(AccessError::InvalidBackendAddress)
        }
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        Some(&self.shared.file_offset)
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, BS<'_, B>>> {
        self.slice(offset.0, count)
            .ok_or(AccessError::InvalidBackendAddress)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        Some(self.shared.ram.backing.is_hugetlb())
    }
}

impl<B: Bitmap> GuestMemoryRegionBytes for GuestRegionShm<B> {}
