//! Memory tables: what a vhost-user daemon is told of guest RAM, as plain data.
//!
//! A table keeps the backings of its regions alive, so the descriptors in it stay valid however
//! the guest's memory changes meanwhile. Two tables have a difference, in the order in which
//! daemons take it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Weak};

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::backing::ShmBacking;
use crate::mapping::Mapping;
use crate::memory::GuestMemoryShm;
use crate::range::{Difference, GuestRange, Placed, holder, place_of};
use crate::region::GuestRegionShm;

mod error;
mod view;

pub use error::{SlotLimit, TableError};
pub use view::TableView;

/// The regions that a daemon is told of, sorted by guest address.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, MemoryTable};
/// use vm_memory::{GuestAddress, GuestMemoryBackend};
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[
///     (GuestAddress(0), 1 << 20),
///     (GuestAddress(1 << 32), 1 << 20),
/// ])?;
/// let table = memory.memory_table();
/// assert_eq!(table.regions().len(), 2);
///
/// // SET_VRING_ADDR carries user addresses, in terms of the table that was sent.
/// let ring = GuestAddress((1 << 32) + 0x1000);
/// let host = memory.get_host_address(ring).expect("there is RAM");
/// assert_eq!(table.user_addr(ring), Some(host as u64));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryTable {
    regions: Vec<TableRegion>,
}

/// A region as a daemon is told of it.
///
/// Equal regions are the same part of the same file at the same guest and user address: a daemon
/// that holds one need not be told of the other.
#[derive(Clone, Debug)]
pub struct TableRegion {
    range: GuestRange,
    user_addr: u64,
    mmap_offset: u64,
    backing: ShmBacking,
    /// The mapping at the user address, if that is a host address. A table does not keep it:
    /// daemons have mappings of their own.
    mapping: Option<Weak<Mapping>>,
}

impl<B: Bitmap> GuestMemoryShm<B> {
    /// The table that tells a daemon of all regions; user addresses are host addresses.
    pub fn memory_table(&self) -> MemoryTable {
        MemoryTable {
            regions: self.iter().map(TableRegion::from).collect(),
        }
    }
}

impl<B> From<&GuestRegionShm<B>> for TableRegion {
    fn from(region: &GuestRegionShm<B>) -> Self {
        Self {
            range: region.range(),
            user_addr: region.as_ptr().addr() as u64,
            mmap_offset: region.offset(),
            backing: region.backing().clone(),
            mapping: Some(Arc::downgrade(&region.ram().mapping)),
        }
    }
}

impl PartialEq for TableRegion {
    fn eq(&self, other: &Self) -> bool {
        self.range == other.range
            && self.user_addr == other.user_addr
            && self.mmap_offset == other.mmap_offset
            && self.backing == other.backing
    }
}

impl Eq for TableRegion {}

impl Placed for TableRegion {
    fn range(&self) -> GuestRange {
        self.range
    }
}

impl MemoryTable {
    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[TableRegion] {
        &self.regions
    }

    /// How many regions there are.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The user address of a guest address, in terms of this table; `None` if the address is not
    /// in the table.
    ///
    /// The addresses of rings in SET_VRING_ADDR are user addresses: translate them by the table
    /// that the daemon was sent.
    pub fn user_addr(&self, addr: GuestAddress) -> Option<u64> {
        self.ring(addr, 1)
    }

    /// The user address of a ring of `len` bytes at a guest address; `None` unless all of it is in
    /// one region of this table, because user addresses of neighbouring regions need not be
    /// neighbours.
    pub fn ring(&self, addr: GuestAddress, len: u64) -> Option<u64> {
        let region = self.holder(addr)?;
        let offset = addr.0 - region.range.start_addr().0;
        let left = region.range.size() - offset;
        (len <= left).then(|| region.user_addr + offset)
    }

    /// The region that holds a guest address.
    pub(crate) fn holder(&self, addr: GuestAddress) -> Option<&TableRegion> {
        holder(&self.regions, addr)
    }

    /// What turns this table into `next`.
    pub(crate) fn change_to(&self, next: &Self) -> Difference<TableRegion, TableRegion> {
        let (held, wanted) = (self.regions.iter(), next.regions.iter());
        Difference::between(held.cloned(), wanted.cloned(), |held, wanted| {
            held == wanted
        })
    }

    /// Refuses regions that are not whole pages: daemons map pages.
    pub(crate) fn check_pages(&self) -> Result<(), TableError> {
        let whole = |region: &TableRegion| region.range.check_pages(region.backing.page_size());
        Ok(self.regions.iter().try_for_each(whole)?)
    }

    /// Whether this very region is in the table.
    pub(crate) fn contains(&self, region: &TableRegion) -> bool {
        let place = self.place_of(region);
        place.is_ok_and(|at| self.regions[at] == *region)
    }

    fn place_of(&self, region: &TableRegion) -> std::result::Result<usize, usize> {
        place_of(&self.regions, region.range.start_addr())
    }

    /// Puts a region in its place; one that starts there already is replaced.
    pub(crate) fn insert(&mut self, region: &TableRegion) {
        match self.place_of(region) {
            Ok(at) => self.regions[at] = region.clone(),
            Err(at) => self.regions.insert(at, region.clone()),
        }
    }

    /// Takes a region out, if it is there.
    pub(crate) fn remove(&mut self, region: &TableRegion) {
        if let Ok(at) = self.place_of(region) {
            self.regions.remove(at);
        }
    }
}

impl TableRegion {
    /// The guest addresses.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// The user address of the first byte: how ring addresses are told apart on the wire.
    pub fn user_addr(&self) -> u64 {
        self.user_addr
    }

    /// Where the region starts in its file, in bytes.
    pub fn mmap_offset(&self) -> u64 {
        self.mmap_offset
    }

    /// The file that the daemon maps.
    pub fn backing(&self) -> &ShmBacking {
        &self.backing
    }

    /// The mapping at the user address, if there is one in this process.
    pub(crate) fn mapping(&self) -> Option<Arc<Mapping>> {
        self.mapping.as_ref()?.upgrade()
    }
}

impl From<&TableRegion> for VhostUserMemoryRegionInfo {
    /// The region in vhost's terms. The descriptor in it is valid as long as the region lives.
    #[allow(
        clippy::needless_update,
        reason = "with vhost's feature `xen`, which any crate may turn on, there are more fields"
    )]
    fn from(region: &TableRegion) -> Self {
        Self {
            guest_phys_addr: region.range().start_addr().0,
            memory_size: region.range().size(),
            userspace_addr: region.user_addr(),
            mmap_offset: region.mmap_offset(),
            mmap_handle: region.as_fd().as_raw_fd(),
            ..Self::default()
        }
    }
}

impl AsFd for TableRegion {
    /// The descriptor that is sent, valid as long as the region is.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.backing.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::Arc;

    use super::*;
    use crate::options::RamOptions;

    const MIB: u64 = 1 << 20;

    fn memory(starts: &[u64]) -> GuestMemoryShm {
        let ranges: Vec<_> = starts
            .iter()
            .map(|start| (GuestAddress(start * MIB), 1 << 20))
            .collect();
        GuestMemoryShm::from_ranges(&ranges).unwrap()
    }

    fn starts(regions: &[TableRegion]) -> Vec<u64> {
        regions
            .iter()
            .map(|region| region.range().start_addr().0 / MIB)
            .collect()
    }

    #[test]
    fn the_difference_is_removals_from_above_then_additions_from_below() {
        let old = memory(&[0, 2, 4, 6]);
        let (keep, _) = old.remove_region(GuestAddress(2 * MIB), MIB).unwrap();
        let (keep, _) = keep.remove_region(GuestAddress(6 * MIB), MIB).unwrap();
        let mut new = keep;
        for start in [9, 1, 6] {
            let region =
                GuestRegionShm::new((GuestAddress(start * MIB), MIB), &RamOptions::new()).unwrap();
            new = new.insert_region(Arc::new(region)).unwrap();
        }
        let (old, new) = (old.memory_table(), new.memory_table());

        let change = old.change_to(&new);
        assert_eq!(starts(&change.removals), [6, 2]);
        // 6 is there again, but on another file.
        assert_eq!(starts(&change.additions), [1, 6, 9]);
        let none = old.change_to(&old);
        assert_eq!((none.removals, none.additions), (vec![], vec![]));
    }

    #[test]
    fn a_table_keeps_its_descriptors_alive() {
        let memory = memory(&[0]);
        let table = memory.memory_table();
        let fd = table.regions()[0].as_fd().as_raw_fd();
        drop(memory);
        assert_eq!(
            nix::sys::stat::fstat(table.regions()[0].as_fd())
                .unwrap()
                .st_size,
            1 << 20
        );
        assert_eq!(table.regions()[0].as_fd().as_raw_fd(), fd);
    }

    #[test]
    fn user_addresses_are_host_addresses_and_holes_have_none() {
        let memory = memory(&[1, 4]);
        let table = memory.memory_table();
        for addr in [MIB, 2 * MIB - 1, 4 * MIB, 5 * MIB - 1] {
            let host = memory.get_host_address(GuestAddress(addr)).unwrap();
            assert_eq!(
                table.user_addr(GuestAddress(addr)),
                Some(host.addr() as u64)
            );
        }
        for addr in [0, MIB - 1, 2 * MIB, 4 * MIB - 1, 5 * MIB, u64::MAX] {
            assert_eq!(table.user_addr(GuestAddress(addr)), None);
        }
        assert_eq!(MemoryTable::default().user_addr(GuestAddress(0)), None);
    }

    #[test]
    fn a_ring_is_translated_only_if_all_of_it_is_in_one_region() {
        // Neighbours in the guest, wherever they are here.
        let table = memory(&[1, 2]).memory_table();
        let last = GuestAddress(2 * MIB - 16);
        assert_eq!(table.ring(last, 16), table.user_addr(last));
        assert_eq!(table.ring(last, 17), None);
        assert_eq!(table.ring(last, u64::MAX), None);
        assert_eq!(table.ring(last, 0), table.user_addr(last));
        assert_eq!(table.ring(GuestAddress(3 * MIB), 0), None);
        assert_eq!(table.ring(GuestAddress(0), 1), None);
        let whole = table.ring(GuestAddress(2 * MIB), MIB);
        assert_eq!(whole, Some(table.regions()[1].user_addr()));
    }

    #[test]
    fn a_table_that_is_patched_step_by_step_becomes_the_other() {
        let (old, new) = (
            memory(&[0, 2, 4]).memory_table(),
            memory(&[1, 2, 8]).memory_table(),
        );
        let mut held = old.clone();
        let change = old.change_to(&new);
        change
            .removals
            .iter()
            .for_each(|region| held.remove(region));
        change
            .additions
            .iter()
            .for_each(|region| held.insert(region));
        assert_eq!(held, new);
    }
}
