//! Guest memory: an immutable, sorted set of regions, found by guest address in constant time.

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, MS, NewBitmap};
use vm_memory::guest_memory::{Error as AccessError, Result as AccessResult};
use vm_memory::mmap::GuestRegionMmap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

use crate::mapping::to_usize;
use crate::range::{GuestRange, InvalidRange, holder, place_of};
use crate::region::{GuestRegionShm, MemoryError, Result};

mod access;
mod builder;
mod drop_in;
mod index;
mod pieces;
mod populate;
mod report;

pub use builder::GuestMemoryShmBuilder;
use index::Index;

/// The RAM of a guest: shared-memory regions that implement vm-memory's traits.
///
/// Takes the place of vm-memory's `GuestMemoryMmap`: a VMM changes its type alias and keeps the
/// code that uses it; what differs is in docs/porting.md. `B` is the dirty bitmap of each region,
/// `()` for none. It never changes: hotplug makes a new memory
/// ([`insert_region`](Self::insert_region)), which shares the regions. An
/// [`AddressSpace`](crate::AddressSpace) publishes it to readers. Cloning it clones references to
/// the regions.
///
/// `Display` prints the regions as a table.
///
/// ```
/// use guest_memory_shm::GuestMemoryShm;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
///
/// type GuestMemory = GuestMemoryShm; // was: vm_memory::GuestMemoryMmap
///
/// let memory = GuestMemory::from_ranges(&[
///     (GuestAddress(0), 1 << 20),
///     (GuestAddress(4 << 30), 1 << 20),
/// ])?;
/// memory.write_obj(42u64, GuestAddress(0x1000)).expect("there is RAM");
/// assert_eq!(memory.last_addr(), GuestAddress((4 << 30) + (1 << 20) - 1));
/// println!("{memory}");
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
///
/// A whole program with options, a report, and accesses: `examples/ram.rs`.
pub struct GuestMemoryShm<B = ()> {
    /// Sorted by address, disjoint.
    regions: Arc<[Arc<GuestRegionShm<B>>]>,
    index: Index<GuestRegionShm<B>>,
}

impl<B> GuestMemoryShm<B> {
    /// Memory without any region.
    pub fn new() -> Self {
        Self::index(Vec::new())
    }

    /// Memory of these regions, which must be sorted by address, as vm-memory's
    /// `GuestRegionCollection` demands.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NoRanges`] without any region; [`MemoryError::Unsorted`], and
    /// [`MemoryError::Range`] if two of them overlap.
    pub fn from_regions(regions: Vec<GuestRegionShm<B>>) -> Result<Self> {
        Self::from_arc_regions(regions.into_iter().map(Arc::new).collect())
    }

    /// Memory of these regions, as [`from_regions`](Self::from_regions), which other memories may
    /// share.
    ///
    /// # Errors
    ///
    /// Those of [`from_regions`](Self::from_regions).
    pub fn from_arc_regions(regions: Vec<Arc<GuestRegionShm<B>>>) -> Result<Self> {
        if regions.is_empty() {
            return Err(MemoryError::NoRanges);
        }
        check_sorted(regions.iter().map(|region| region.range()))?;
        Ok(Self::index(regions))
    }

    /// This memory and one region more, as a new memory.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Range`] if a region is there already.
    pub fn insert_region(&self, region: Arc<GuestRegionShm<B>>) -> Result<Self> {
        self.insert_regions(vec![region])
    }

    /// This memory and these regions, in any order, as a new memory.
    pub(crate) fn insert_regions(&self, added: Vec<Arc<GuestRegionShm<B>>>) -> Result<Self> {
        for region in &added {
            let range = region.range();
            // The last that starts in or before it is the only one to look at: none overlap.
            let starts_before =
                |there: &Arc<GuestRegionShm<B>>| there.range().start_addr() <= range.last_addr();
            let before = self.regions.partition_point(starts_before);
            let there = self.regions[..before].last().map(|there| there.range());
            if let Some(there) = there.filter(|there| there.overlaps(&range)) {
                return Err(InvalidRange::Taken { range, there }.into());
            }
        }
        let mut regions = self.arc_regions();
        regions.extend(added);
        Self::from_unsorted(regions)
    }

    /// Memory of these regions in any order.
    pub(crate) fn from_unsorted(mut regions: Vec<Arc<GuestRegionShm<B>>>) -> Result<Self> {
        regions.sort_unstable_by_key(|region| region.range());
        Self::from_arc_regions(regions)
    }

    /// This memory without the region of `size` bytes at `start`, as a new memory, and the region.
    ///
    /// The region stays mapped until its last user drops it.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NoSuchRegion`] if no region starts there, or it has another size.
    pub fn remove_region(
        &self,
        start: GuestAddress,
        size: GuestUsize,
    ) -> Result<(Self, Arc<GuestRegionShm<B>>)> {
        let mut regions = self.arc_regions();
        let removed = regions.remove(self.place_of_region(start, size)?);
        Ok((Self::index(regions), removed))
    }

    /// This memory without these regions, as a new memory, and the regions, in this order.
    pub(crate) fn remove_regions(
        &self,
        ranges: &[GuestRange],
    ) -> Result<(Self, Vec<Arc<GuestRegionShm<B>>>)> {
        let mut left: Vec<_> = self.regions.iter().map(Some).collect();
        let mut removed = Vec::with_capacity(ranges.len());
        for range in ranges {
            let (start, size) = (range.start_addr(), range.size());
            let region = left[self.place_of_region(start, size)?].take();
            // It was named before.
            let found = None;
            let region = region.ok_or(MemoryError::NoSuchRegion { start, size, found })?;
            removed.push(region.clone());
        }
        Ok((
            Self::index(left.into_iter().flatten().cloned().collect()),
            removed,
        ))
    }

    fn place_of_region(&self, start: GuestAddress, size: u64) -> Result<usize> {
        let at = place_of(&self.regions, start).ok();
        let found = at.map(|at| self.regions[at].range().size());
        let at = at.filter(|_| found == Some(size));
        at.ok_or(MemoryError::NoSuchRegion { start, size, found })
    }

    /// The regions, sorted by address, to make other memories of.
    pub fn arc_regions(&self) -> Vec<Arc<GuestRegionShm<B>>> {
        self.regions.to_vec()
    }

    /// Whether both are the same memory, rather than equal ones.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.regions, &other.regions)
    }

    /// The regions must be sorted and disjoint.
    fn index(regions: Vec<Arc<GuestRegionShm<B>>>) -> Self {
        Self {
            index: Index::new(&regions),
            regions: regions.into(),
        }
    }

    /// The region that holds `addr`, and the offset of `addr` in it.
    #[inline]
    pub(crate) fn find(&self, addr: GuestAddress) -> Option<(&GuestRegionShm<B>, u64)> {
        let region = self.index.get(addr.0)?;
        match region.offset_of(addr) {
            Some(offset) => Some((region, offset)),
            None => self.search(addr),
        }
    }

    /// Looks for `addr` in all regions: the one that the index names does not hold it.
    ///
    /// Kept out of line, so that `find` is small enough to be inlined into vm-memory's iterator
    /// of slices, and that into `Bytes`: otherwise the iterator goes through memory at each step,
    /// which costs more than the look-up.
    #[cold]
    #[inline(never)]
    fn search(&self, addr: GuestAddress) -> Option<(&GuestRegionShm<B>, u64)> {
        let region = holder(&self.regions, addr)?;
        Some((region, region.offset_of(addr)?))
    }
}

impl<B: Bitmap> GuestMemoryShm<B> {
    /// The same RAM as vm-memory's own type, for code that is pinned to it.
    ///
    /// Each region is mapped once more, shared, at another host address: both memories see the
    /// same bytes, and each lives as long as it is used. The bitmaps are separate: writes through
    /// one are not marked in the other. Its host addresses are not those of
    /// `memory_table`.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Remap`] if a region cannot be mapped.
    pub fn to_guest_memory_mmap<C: NewBitmap>(&self) -> Result<GuestMemoryMmap<C>> {
        let regions: Vec<_> = self.iter().map(remap).collect::<Result<_, _>>()?;
        let (Some(first), Some(last)) = (self.regions.first(), self.regions.last()) else {
            return Ok(GuestMemoryMmap::new());
        };
        let start = first.range().start_addr();
        let range = GuestRange::new(start, last.range().last_addr().0 - start.0 + 1)?;
        // They are sorted and disjoint, as here.
        GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Remap {
            range,
            source: error.into(),
        })
    }
}

/// Checks that ranges are sorted and have no address in common, in vm-memory's order.
fn check_sorted(mut ranges: impl Iterator<Item = GuestRange>) -> Result<()> {
    let Some(mut first) = ranges.next() else {
        return Ok(());
    };
    for second in ranges {
        if first.start_addr() > second.start_addr() {
            return Err(MemoryError::Unsorted { first, second });
        }
        if first.overlaps(&second) {
            return Err(InvalidRange::overlap(first, second).into());
        }
        first = second;
    }
    Ok(())
}

fn remap<B: Bitmap, C: NewBitmap>(region: &GuestRegionShm<B>) -> Result<GuestRegionMmap<C>> {
    let range = region.range();
    let file_offset = GuestMemoryRegion::file_offset(region).cloned();
    // `MmapRegion::from_file` is not there with vm-memory's feature `xen`.
    GuestRegionMmap::from_range(range.start_addr(), to_usize(range.size()), file_offset).map_err(
        |error| MemoryError::Remap {
            range,
            source: error.into(),
        },
    )
}

impl<B: Bitmap> GuestMemoryBackend for GuestMemoryShm<B> {
    type R = GuestRegionShm<B>;

    #[inline]
    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.find(addr).map(|(region, _)| region)
    }

    #[inline]
    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.regions.iter().map(Arc::as_ref)
    }

    #[inline]
    fn last_addr(&self) -> GuestAddress {
        let last = self.regions.last();
        last.map_or(GuestAddress(0), |region| region.range().last_addr())
    }

    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Self::R, MemoryRegionAddress)> {
        self.find(addr)
            .map(|(region, offset)| (region, MemoryRegionAddress(offset)))
    }

    #[inline]
    fn get_host_address(&self, addr: GuestAddress) -> AccessResult<*mut u8> {
        match self.find(addr) {
            Some((region, offset)) => Ok(region.as_ptr().wrapping_add(to_usize(offset))),
            None => Err(AccessError::InvalidGuestAddress(addr)),
        }
    }

    #[inline]
    fn get_slice(
        &self,
        addr: GuestAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, MS<'_, Self>>> {
        match self.find(addr) {
            Some((region, offset)) => region.get_slice(MemoryRegionAddress(offset), count),
            None => Err(AccessError::InvalidGuestAddress(addr)),
        }
    }
}

impl<B> Default for GuestMemoryShm<B> {
    /// Memory without any region.
    fn default() -> Self {
        Self::new()
    }
}

impl<B> Clone for GuestMemoryShm<B> {
    /// The same regions: no memory is copied or mapped.
    fn clone(&self) -> Self {
        Self {
            regions: self.regions.clone(),
            index: self.index.clone(),
        }
    }
}

impl<B> fmt::Debug for GuestMemoryShm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestMemoryShm ")?;
        f.debug_list()
            .entries(self.regions.iter().map(|region| region.range()))
            .finish()
    }
}
