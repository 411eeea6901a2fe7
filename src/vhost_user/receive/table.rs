//! A memory table as a daemon has it: mapped, and found by user address.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::GuestAddress;
use vm_memory::bitmap::NewBitmap;

use super::check::{check_numbers, check_pages};
use super::error::ReceiveError;
use super::policy::ReceivePolicy;
use super::wire::ReceivedRegion;
use crate::backing::{BackingError, ShmBacking, base_page_size};
use crate::memory::GuestMemoryShm;
use crate::populate::{OnFailure, populate_mapped};
use crate::range::GuestRange;
use crate::region::{GuestRegionShm, MemoryError, new_bitmap};

/// The memory table of a frontend as its daemon has it: guest RAM, and the frontend's addresses of
/// it. `B` is the dirty bitmap of each region, `()` for none.
///
/// It never changes: a message makes a new one of it, which shares the regions that stay, and
/// which takes its place when it is complete. Where the message is refused, the daemon keeps what
/// it has. Threads that serve queues take the new memory from vm-memory's `GuestMemoryAtomic`,
/// into which [`memory`](Self::memory) is put (`lock().replace(..)`).
///
/// ```
/// use std::os::fd::AsFd;
///
/// use guest_memory_shm::receive::{ReceivePolicy, ReceivedRegion, ReceivedTable};
/// use guest_memory_shm::{RamOptions, ShmBacking};
/// use vm_memory::{Bytes, GuestAddress};
///
/// // A frontend's RAM, and what it says about it.
/// let theirs = ShmBacking::create(&RamOptions::new(), 1 << 20)?;
/// let region = ReceivedRegion {
///     guest_addr: GuestAddress(4 << 30),
///     size: 1 << 20,
///     user_addr: 0x7f00_0000_0000,
///     mmap_offset: 0,
/// };
///
/// let empty = ReceivedTable::<()>::new(ReceivePolicy::new());
/// let table = empty.add(region, [theirs.as_fd().try_clone_to_owned()?])?;
/// let ring = table.ring(0x7f00_0000_1000, 4096)?;
/// assert_eq!(ring, GuestAddress((4 << 30) + 0x1000));
/// table.memory().write_obj(42_u16, ring)?;
/// assert!(table.ring(0x7f00_0000_1000, 1 << 20).is_err(), "it runs out of the region");
///
/// let table = table.remove(region)?;
/// assert_eq!(table.guest_addr(0x7f00_0000_1000), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ReceivedTable<B = ()> {
    memory: GuestMemoryShm<B>,
    /// Sorted by guest address, as those of the memory.
    regions: Arc<[ReceivedRegion]>,
    /// The same, sorted by user address.
    by_user: Arc<[ReceivedRegion]>,
    policy: ReceivePolicy,
    bitmap: Arc<MakeBitmap<B>>,
}

/// What makes the bitmap of a region.
type MakeBitmap<B> = dyn Fn(GuestRange) -> B + Send + Sync;

impl<B: NewBitmap + 'static> ReceivedTable<B> {
    /// A table without any region, which the daemon has before the first message.
    pub fn new(policy: ReceivePolicy) -> Self {
        Self::with_bitmap(policy, new_bitmap)
    }
}

impl<B> ReceivedTable<B> {
    /// A table without any region, and a function that makes the dirty bitmap of each region that
    /// is mapped: for bitmaps that are no `NewBitmap`, as `Option<AtomicBitmap>` is none, or that
    /// are set up otherwise. If it panics, so does the call that maps the region, and nothing
    /// changed.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    ///
    /// use guest_memory_shm::receive::{ReceivePolicy, ReceivedTable};
    /// use vm_memory::bitmap::AtomicBitmap;
    ///
    /// let page = NonZeroUsize::new(4096).expect("a page has a size");
    /// let logs = true; // as this daemon offers it
    /// let table = ReceivedTable::with_bitmap(ReceivePolicy::new(), move |range| {
    ///     logs.then(|| AtomicBitmap::new(range.size() as usize, page))
    /// });
    /// assert_eq!(table.regions(), []);
    /// ```
    pub fn with_bitmap(
        policy: ReceivePolicy,
        bitmap: impl Fn(GuestRange) -> B + Send + Sync + 'static,
    ) -> Self {
        Self::index(GuestMemoryShm::new(), Vec::new(), policy, Arc::new(bitmap))
    }

    /// Checks and maps the regions of SET_MEM_TABLE, each on its descriptor, in the same order.
    ///
    /// The new table is complete when this returns; this one stays as it is until its last user
    /// drops it. The descriptors are kept as long as their regions; they are closed if anything is
    /// wrong. No descriptor is looked at before the numbers of all regions are right, and nothing
    /// is mapped before all descriptors are, so that a refused message costs the daemon next to
    /// nothing. With [`AdoptPolicy::with_added_seals`](crate::AdoptPolicy::with_added_seals) the
    /// files that come before the one that is refused may have been sealed.
    ///
    /// Of each region are checked: a size that is not 0, and no wrap of guest addresses, user
    /// addresses or file offsets; no overlap of guest addresses or user addresses with another
    /// region; the descriptor, as [`ShmBacking::adopt`] does; guest address, offset and size at
    /// pages of the file, which are huge on a hugetlbfs; and that the file reaches to its end.
    ///
    /// # Errors
    ///
    /// [`ReceiveError::NoRegions`], [`ReceiveError::Descriptors`],
    /// [`ReceiveError::TooManyRegions`], [`ReceiveError::Wraps`], [`ReceiveError::TooMuchMemory`],
    /// [`ReceiveError::Overlap`], and [`ReceiveError::Region`] for a descriptor or a mapping.
    pub fn set(
        &self,
        regions: impl IntoIterator<Item = impl Into<ReceivedRegion>>,
        files: impl IntoIterator<Item = impl Into<OwnedFd>>,
    ) -> Result<Self, ReceiveError> {
        let regions: Vec<_> = regions.into_iter().map(Into::into).collect();
        self.rebuilt(GuestMemoryShm::new(), Vec::new())
            .extended(&regions, files)
    }

    /// This table and one region more (ADD_MEM_REG), as a new table; the other regions stay mapped
    /// where they are. `files` are the descriptors of the message, of which there must be one.
    ///
    /// # Errors
    ///
    /// Those of [`set`](Self::set); an overlap with a region of this table is one too.
    pub fn add(
        &self,
        region: impl Into<ReceivedRegion>,
        files: impl IntoIterator<Item = impl Into<OwnedFd>>,
    ) -> Result<Self, ReceiveError> {
        self.extended(&[region.into()], files)
    }

    /// This table without a region (REM_MEM_REG), as a new table.
    ///
    /// The region is the one with this guest address, user address and size; the offset in the
    /// message is not looked at. It stays mapped until its last user drops it. A descriptor that
    /// came with the message is not wanted, but older QEMU sends one: close
    /// it, and do nothing else with it (vhost-user specification, VHOST_USER_REM_MEM_REG).
    ///
    /// # Errors
    ///
    /// [`ReceiveError::NoSuchRegion`] if there is no such region.
    pub fn remove(&self, region: impl Into<ReceivedRegion>) -> Result<Self, ReceiveError> {
        let region = region.into();
        let same = |held: &ReceivedRegion| {
            (held.guest_addr, held.user_addr, held.size)
                == (region.guest_addr, region.user_addr, region.size)
        };
        let not_there = || ReceiveError::NoSuchRegion {
            guest_addr: region.guest_addr.0,
            user_addr: region.user_addr,
            size: region.size,
        };
        let mut regions = self.regions.to_vec();
        let place = regions.iter().position(same).ok_or_else(not_there)?;
        regions.remove(place);
        let removed = self.memory.remove_region(region.guest_addr, region.size);
        let (memory, _) = removed.map_err(|_| not_there())?;
        Ok(self.rebuilt(memory, regions))
    }

    /// The RAM, to be read and written by guest address.
    pub fn memory(&self) -> &GuestMemoryShm<B> {
        &self.memory
    }

    /// The regions as the frontend described them, sorted by guest address.
    pub fn regions(&self) -> &[ReceivedRegion] {
        &self.regions
    }

    /// What is demanded of the regions.
    pub fn policy(&self) -> &ReceivePolicy {
        &self.policy
    }

    /// The guest address of what the frontend calls `user_addr`, if that is in a region.
    pub fn guest_addr(&self, user_addr: u64) -> Option<GuestAddress> {
        self.ring(user_addr, 1).ok()
    }

    /// The guest address of a ring of `len` bytes that the frontend calls `user_addr`
    /// (SET_VRING_ADDR): all of it is in one region.
    ///
    /// A split queue of `n` descriptors has three: `16 * n` bytes of descriptors, `6 + 2 * n` of
    /// available ring, `6 + 8 * n` of used ring (virtio specification, "Split Virtqueues").
    ///
    /// # Errors
    ///
    /// [`ReceiveError::NotMapped`] if the address is in no region, [`ReceiveError::RingEnds`] if
    /// the ring runs past the end of its region, whether or not another follows.
    pub fn ring(&self, user_addr: u64, len: u64) -> Result<GuestAddress, ReceiveError> {
        let found = self.find(user_addr);
        let (region, offset) = found.ok_or(ReceiveError::NotMapped { user_addr })?;
        let left = region.size - offset;
        if len > left {
            return Err(ReceiveError::RingEnds {
                user_addr,
                len,
                left,
            });
        }
        Ok(GuestAddress(region.guest_addr.0 + offset))
    }

    /// The region that holds a user address, and the offset in it.
    fn find(&self, user_addr: u64) -> Option<(&ReceivedRegion, u64)> {
        let after = self
            .by_user
            .partition_point(|region| region.user_addr <= user_addr);
        let region = self.by_user.get(after.checked_sub(1)?)?;
        let offset = user_addr - region.user_addr;
        (offset < region.size).then_some((region, offset))
    }

    /// Checks and maps `new` beside what is there.
    fn extended(
        &self,
        new: &[ReceivedRegion],
        files: impl IntoIterator<Item = impl Into<OwnedFd>>,
    ) -> Result<Self, ReceiveError> {
        let files: Vec<OwnedFd> = files.into_iter().map(Into::into).collect();
        check_numbers(&self.regions, new, files.len(), &self.policy)?;
        for (index, region) in new.iter().enumerate() {
            // No page is smaller.
            check_pages(index, region, base_page_size())?;
        }
        let mut backings = Vec::with_capacity(new.len());
        for (index, (region, file)) in new.iter().zip(files).enumerate() {
            backings.push(self.adopt(index, region, file)?);
        }
        let mut added = Vec::with_capacity(new.len());
        let mut rams = Vec::with_capacity(new.len());
        for (index, (region, backing)) in new.iter().zip(&backings).enumerate() {
            let placed = self.place(region, backing);
            let placed = placed.map_err(|error| region.refused(index, error))?;
            rams.push(placed.ram().clone());
            added.push(Arc::new(placed));
        }
        // A guest may run on it: what it writes while pages are given back could be lost.
        populate_mapped(rams, OnFailure::Keep).map_err(|error| {
            let at = error.range().map(|range| range.start_addr());
            let is_there = |region: &ReceivedRegion| {
                at.and_then(|at| at.0.checked_sub(region.guest_addr.0))
                    .is_some_and(|offset| offset < region.size)
            };
            let index = new.iter().position(is_there).unwrap_or(0);
            new[index].refused(index, error)
        })?;
        // The numbers are checked: they are disjoint, and there is at least one.
        let memory = self.memory.insert_regions(added);
        let memory = memory.map_err(|error| new[0].refused(0, error))?;
        let mut regions = self.regions.to_vec();
        regions.extend(new);
        Ok(self.rebuilt(memory, regions))
    }

    fn place(
        &self,
        region: &ReceivedRegion,
        backing: &ShmBacking,
    ) -> Result<GuestRegionShm<B>, MemoryError> {
        let range = GuestRange::new(region.guest_addr, region.size)?;
        let bitmap = (self.bitmap)(range);
        GuestRegionShm::place(backing, region.mmap_offset, range, bitmap)
    }

    fn adopt(
        &self,
        index: usize,
        region: &ReceivedRegion,
        file: OwnedFd,
    ) -> Result<ShmBacking, ReceiveError> {
        // It does not wrap.
        let end = region.mmap_offset + region.size;
        let policy = self.policy.descriptors().clone().with_min_len(end);
        let backing = ShmBacking::adopt(file, &policy).map_err(BackingError::from);
        let backing = backing.map_err(|error| region.refused(index, error))?;
        check_pages(index, region, backing.page_size())?;
        Ok(backing)
    }

    /// Another table of the same daemon.
    fn rebuilt(&self, memory: GuestMemoryShm<B>, regions: Vec<ReceivedRegion>) -> Self {
        let bitmap = Arc::clone(&self.bitmap);
        Self::index(memory, regions, self.policy.clone(), bitmap)
    }

    fn index(
        memory: GuestMemoryShm<B>,
        mut regions: Vec<ReceivedRegion>,
        policy: ReceivePolicy,
        bitmap: Arc<MakeBitmap<B>>,
    ) -> Self {
        regions.sort_unstable_by_key(|region| region.guest_addr);
        let mut by_user = regions.clone();
        by_user.sort_unstable_by_key(|region| region.user_addr);
        Self {
            memory,
            regions: regions.into(),
            by_user: by_user.into(),
            policy,
            bitmap,
        }
    }
}

impl<B: NewBitmap + 'static> Default for ReceivedTable<B> {
    /// A table without any region, and the policy of [`ReceivePolicy::new`].
    fn default() -> Self {
        Self::new(ReceivePolicy::new())
    }
}

impl<B> Clone for ReceivedTable<B> {
    /// The same regions: nothing is mapped or copied.
    fn clone(&self) -> Self {
        Self {
            memory: self.memory.clone(),
            regions: self.regions.clone(),
            by_user: self.by_user.clone(),
            policy: self.policy.clone(),
            bitmap: Arc::clone(&self.bitmap),
        }
    }
}

impl<B> fmt::Debug for ReceivedTable<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivedTable")
            .field("regions", &self.regions)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}
