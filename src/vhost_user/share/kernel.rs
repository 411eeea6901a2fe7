//! The vhost backends inside the kernel (vhost-net, vhost-scsi, vhost-vsock) as a connection.

use std::sync::Arc;

use vhost::{VHOST_MAX_MEMORY_REGIONS, VhostBackend, VhostUserMemoryRegionInfo};

use super::connection::{Answer, DaemonConnection};
use super::disconnector::Disconnector;
use super::error::DaemonFailure;
use crate::host::vhost::max_regions;
use crate::mapping::Mapping;
use crate::vhost_user::table::{MemoryTable, SlotLimit, TableError, TableRegion};

/// The limit of the kernel module vhost, unless its parameter says otherwise.
const DEFAULT_MAX_REGIONS: usize = 64;

/// A vhost backend inside the kernel, told of memory tables by `VHOST_SET_MEM_TABLE`.
///
/// Give it to a [`VhostUserShare`](crate::VhostUserShare) with no protocol features, and that
/// keeps the kernel's table equal to a memory as it does with daemons. There are differences. The
/// whole table is sent each time, of at most `max_mem_regions` regions (a parameter of the kernel
/// module vhost, 64 unless set). A call never waits, and needs no deadline. A table that is
/// refused leaves the old one in place, so a refusal never breaks the share.
///
/// The kernel reads and writes at the user addresses, in this process: they must be host addresses
/// (no [`TableView::with_opaque_addresses`](crate::TableView::with_opaque_addresses)), and what
/// the kernel was told of stays mapped until it was told otherwise or this is dropped, which drops
/// the backend first.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, KernelVhost, VhostUserShare};
/// use vhost::VhostBackend;
/// use vhost::vhost_user::VhostUserProtocolFeatures;
/// use vm_memory::GuestAddress;
///
/// fn share(
///     net: impl VhostBackend, // vhost::net::Net, say, after set_owner() and set_features()
///     memory: &GuestMemoryShm,
/// ) -> Result<(), Box<dyn std::error::Error>> {
///     let net = KernelVhost::new(net);
///     let mut share = VhostUserShare::new(net, VhostUserProtocolFeatures::empty());
///     share.update_memory(memory)?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct KernelVhost<V> {
    /// Before the mappings: dropped, it must not use them any more.
    backend: V,
    /// What the kernel was told of.
    mapped: Vec<Arc<Mapping>>,
    max_regions: usize,
}

impl<V: VhostBackend> KernelVhost<V> {
    /// A connection for a backend that this process owns (`VHOST_SET_OWNER`) and that has no table
    /// yet.
    ///
    /// The limit on regions is read from `/sys/module/vhost/parameters/max_mem_regions`; where
    /// that says nothing it is 64.
    pub fn new(backend: V) -> Self {
        Self {
            backend,
            mapped: Vec::new(),
            // vhost's bindings take no more than that, whatever the kernel says.
            max_regions: max_regions()
                .unwrap_or(DEFAULT_MAX_REGIONS)
                .min(VHOST_MAX_MEMORY_REGIONS),
        }
    }

    /// The backend.
    pub fn backend(&self) -> &V {
        &self.backend
    }
}

impl<V: VhostBackend> DaemonConnection for KernelVhost<V> {
    fn request_acks(&mut self) {
        // Every call is answered as it is.
    }

    fn set_mem_table(&mut self, regions: &[TableRegion]) -> Answer<Option<Vec<u64>>> {
        let mapped: Option<Vec<_>> = regions.iter().map(TableRegion::mapping).collect();
        let mapped = mapped.ok_or_else(|| DaemonFailure::refused("a region is not mapped"))?;
        let infos: Vec<VhostUserMemoryRegionInfo> = regions.iter().map(Into::into).collect();
        let answer = self.backend.set_mem_table(&infos);
        let bases = answer.map_err(DaemonFailure::refused)?;
        // Not before: until now the kernel used the old ones.
        self.mapped = mapped;
        Ok(bases)
    }

    fn add_mem_region(&mut self, _: &TableRegion) -> Answer<Option<u64>> {
        Err(no_slots())
    }

    fn remove_mem_region(&mut self, _: &TableRegion) -> Answer<()> {
        Err(no_slots())
    }

    fn max_mem_slots(&mut self) -> Answer<u64> {
        Err(no_slots())
    }

    fn barrier(&mut self) -> Answer<()> {
        Ok(())
    }

    fn check_table(&self, table: &MemoryTable) -> Result<(), TableError> {
        let regions = table.regions();
        if regions.len() > self.max_regions {
            return Err(TableError::TooManyRegions {
                regions: regions.len(),
                limit: self.max_regions as u64,
                slots: SlotLimit::Kernel,
            });
        }
        match regions.iter().find(|region| region.mapping().is_none()) {
            Some(region) => Err(TableError::NoHostAddress {
                range: region.range(),
            }),
            None => Ok(()),
        }
    }

    fn max_table_regions(&self) -> usize {
        self.max_regions
    }

    fn refusal_keeps_table(&self) -> bool {
        true
    }

    fn disconnector(&self) -> Option<Disconnector> {
        None
    }
}

fn no_slots() -> DaemonFailure {
    DaemonFailure::protocol(
        "in-kernel vhost has no memory slots: CONFIGURE_MEM_SLOTS is vhost-user's",
    )
}
