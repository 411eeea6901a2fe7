//! The vhost backends inside the kernel (vhost-net, vhost-scsi, vhost-vsock).

use std::sync::Arc;

use vhost::{VHOST_MAX_MEMORY_REGIONS, VhostBackend, VhostUserMemoryRegionInfo};

use vm_memory::bitmap::Bitmap;

use super::share::ShareError;
use super::table::{MemoryTable, SlotLimit, TableError, TableRegion, TableView};
use super::wire::{DaemonFailure, DaemonRequest};
use crate::host::vhost::max_regions;
use crate::listener::{ListenerError, MemoryListener};
use crate::mapping::Mapping;
use crate::memory::GuestMemoryShm;

/// The limit of the kernel module vhost, unless its parameter says otherwise.
const DEFAULT_MAX_REGIONS: usize = 64;

/// A vhost backend inside the kernel, told of memory tables by `VHOST_SET_MEM_TABLE`.
///
/// It keeps the kernel's table equal to a memory, by itself or as a listener of an
/// [`AddressSpace`](crate::AddressSpace), as [`VhostUserShare`](crate::VhostUserShare) does with a
/// daemon. There are differences. The whole table is sent each time, of at most `max_mem_regions`
/// regions (a parameter of the kernel module vhost, 64 unless set). A call never waits, and needs
/// no deadline. A table that is refused leaves the old one in place.
///
/// The kernel reads and writes at the user addresses, in this process: they must be host addresses
/// (no [`TableView::with_opaque_addresses`](crate::TableView::with_opaque_addresses)), and what
/// the kernel was told of stays mapped until it was told otherwise or this is dropped, which drops
/// the backend first.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, KernelVhost, ShareError};
/// use vhost::VhostBackend;
///
/// fn share(
///     net: impl VhostBackend, // vhost::net::Net, say, after set_owner() and set_features()
///     memory: &GuestMemoryShm,
/// ) -> Result<(), ShareError> {
///     KernelVhost::new(net).update_memory(memory)
/// }
/// ```
#[derive(Debug)]
pub struct KernelVhost<V> {
    /// Before the mappings: dropped, it must not use them any more.
    backend: V,
    /// What the kernel was told of.
    mapped: Vec<Arc<Mapping>>,
    held: MemoryTable,
    view: TableView,
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
            held: MemoryTable::default(),
            view: TableView::default(),
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

impl<V: VhostBackend> KernelVhost<V> {
    /// Sets what the kernel gets to see of a memory; everything unless set.
    #[must_use]
    pub fn with_view(mut self, view: TableView) -> Self {
        self.view = view;
        self
    }

    /// What the kernel was told last.
    pub fn table(&self) -> &MemoryTable {
        &self.held
    }

    /// Whether the kernel could take `table`, as far as limits say; nothing is changed.
    ///
    /// # Errors
    ///
    /// [`TableError::Range`] for a region that is not whole pages; [`TableError::TooManyRegions`];
    /// [`TableError::Empty`]; [`TableError::NoHostAddress`].
    pub fn check_table(&self, table: &MemoryTable) -> Result<(), TableError> {
        if *table == self.held {
            return Ok(());
        }
        table.check_pages()?;
        let regions = table.regions();
        if regions.is_empty() {
            // vhost's bindings do not pass one on.
            return Err(TableError::Empty);
        }
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

    /// Makes the kernel's table equal to `table`.
    ///
    /// # Errors
    ///
    /// [`ShareError::Table`], as for [`check_table`](Self::check_table); [`ShareError::Daemon`] if
    /// the kernel refuses. It has the table that it had.
    pub fn update_table(&mut self, table: &MemoryTable) -> Result<(), ShareError> {
        if *table == self.held {
            return Ok(());
        }
        self.check_table(table)?;
        let regions = table.regions();
        // All have mappings, which the table does not keep.
        let mapped: Vec<_> = regions.iter().filter_map(TableRegion::mapping).collect();
        let infos: Vec<VhostUserMemoryRegionInfo> = regions.iter().map(Into::into).collect();
        let answer = self.backend.set_mem_table(&infos);
        answer.map_err(|error| ShareError::Daemon {
            request: DaemonRequest::SetTable(regions.len()),
            failure: DaemonFailure::refused(error),
        })?;
        // Not before: until now the kernel used the old ones.
        self.mapped = mapped;
        self.held = table.clone();
        Ok(())
    }

    /// [`update_table`](Self::update_table), to what the kernel gets to see of `memory`.
    ///
    /// # Errors
    ///
    /// Those of [`update_table`](Self::update_table), and [`TableError::OpaqueConstant`].
    pub fn update_memory<B: Bitmap>(
        &mut self,
        memory: &GuestMemoryShm<B>,
    ) -> Result<(), ShareError> {
        let table = memory.memory_table_as(&self.view)?;
        self.update_table(&table)
    }
}

/// The kernel, which answers at once, and is never away.
impl<V, B> MemoryListener<B> for KernelVhost<V>
where
    V: VhostBackend + Send + 'static,
    B: Bitmap + Send + Sync + 'static,
{
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let table = memory.memory_table_as(&self.view);
        let checked = table.and_then(|table| self.check_table(&table));
        checked.map_err(|error| ShareError::from(error).into())
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        Ok(self.update_memory(memory)?)
    }
}
