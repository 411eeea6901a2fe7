//! vhost inside the kernel: whole tables, host addresses, refusals that change nothing.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vhost::vhost_kern::vsock::Vsock;
use vhost::{
    VHOST_MAX_MEMORY_REGIONS, VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo,
    VringConfigData,
};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::*;

/// A backend that notes what it is told of; clones are the same one.
#[derive(Clone, Default)]
struct Backend {
    refuses: Arc<AtomicBool>,
    /// The table: guest address, size, user address.
    held: Arc<Mutex<Vec<(u64, u64, u64)>>>,
    calls: Arc<AtomicUsize>,
}

impl VhostBackend for Backend {
    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegionInfo],
    ) -> vhost::Result<Option<Vec<u64>>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.refuses.load(Ordering::Relaxed) {
            return Err(vhost::Error::InvalidGuestMemory);
        }
        let regions = regions.iter();
        *self.held.lock().unwrap() = regions
            .map(|r| (r.guest_phys_addr, r.memory_size, r.userspace_addr))
            .collect();
        Ok(None)
    }
    fn get_features(&self) -> vhost::Result<u64> {
        panic!("memory has no use for it");
    }
    fn set_features(&self, _: u64) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_owner(&self) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn reset_owner(&self) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_log_base(&self, _: u64, _: Option<VhostUserDirtyLogRegion>) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_log_fd(&self, _: i32) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_vring_num(&self, _: usize, _: u16) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_vring_addr(&self, _: usize, _: &VringConfigData) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_vring_base(&self, _: usize, _: u16) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn get_vring_base(&self, _: usize) -> vhost::Result<u32> {
        panic!("memory has no use for it");
    }
    fn set_vring_call(&self, _: usize, _: &EventFd) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_vring_kick(&self, _: usize, _: &EventFd) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
    fn set_vring_err(&self, _: usize, _: &EventFd) -> vhost::Result<()> {
        panic!("memory has no use for it");
    }
}

fn share(backend: &Backend) -> KernelVhost<Backend> {
    KernelVhost::new(backend.clone())
}

impl Backend {
    fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::Relaxed);
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// Asserts that it was told of the regions of `memory` where they are mapped.
    #[track_caller]
    fn holds(&self, memory: &GuestMemoryShm) {
        let table = memory.memory_table();
        let regions = table.regions().iter();
        let expected: Vec<_> = regions
            .map(|r| (r.range().start_addr().0, r.range().size(), r.user_addr()))
            .collect();
        assert_eq!(*self.held.lock().unwrap(), expected);
        for (start, _, user) in expected {
            let host = memory.get_host_address(GuestAddress(start)).unwrap();
            assert_eq!(host as u64, user);
        }
    }
}

#[test]
fn the_kernel_is_told_whole_tables_and_a_refusal_changes_nothing() {
    let backend = Backend::default();
    let mut share = share(&backend);
    // More than vhost-user's message carries.
    let starts: Vec<u64> = (0..20).collect();
    let first = memory(&starts);
    share.update_memory(&first).unwrap();
    backend.holds(&first);
    assert_eq!(share.backend().held.lock().unwrap().len(), 20);

    let second = without(&with(&first, &[30]), &[3]);
    backend.refuse(true);
    let refused = share.update_memory(&second).unwrap_err();
    assert!(
        matches!(refused.failure(), Some(DaemonFailure::Refused(_))),
        "{refused}"
    );
    assert_eq!(share.table(), &first.memory_table());
    backend.refuse(false);
    share.update_memory(&second).unwrap();
    backend.holds(&second);

    let calls = backend.calls();
    share.update_memory(&second).unwrap();
    assert_eq!(backend.calls(), calls, "nothing changed");
}

#[test]
fn the_kernel_follows_an_address_space_and_its_refusal_undoes_a_change() {
    let peer = Peer::start(MockDaemon::builder());
    let backend = Backend::default();
    let space = AddressSpace::new(memory(&[0, 10]));
    space.attach("blk", peer.share().0).unwrap();
    space.attach("net", share(&backend)).unwrap();
    let both_hold = |space: &AddressSpace| {
        let memory = space.published().memory();
        backend.holds(&memory);
        peer.holds(&memory.memory_table());
        memory.num_regions()
    };
    assert_eq!(both_hold(&space), 2);
    space.insert(regions(&[20]).remove(0)).told_all();
    assert_eq!(both_hold(&space), 3);
    backend.refuse(true);
    space.insert(regions(&[30]).remove(0)).unwrap_err();
    assert_eq!(both_hold(&space), 3);
    space.remove((GuestAddress(20 * MIB), MIB)).unwrap_err();
    assert_eq!(both_hold(&space), 3);
    backend.refuse(false);
    space.remove((GuestAddress(20 * MIB), MIB)).told_all();
    assert_eq!(both_hold(&space), 2);
    assert!(
        space
            .listeners()
            .unwrap()
            .iter()
            .all(|listener| listener.stale().is_none())
    );
}

/// Whether something of this process is mapped at the address.
fn is_mapped(address: u64) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let range = line.split_whitespace().next().unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        (parse(start)..parse(end)).contains(&address) && line.contains("memfd:guest-memory-shm")
    })
}

#[test]
fn what_the_kernel_was_told_of_stays_mapped_until_it_is_told_otherwise() {
    in_own_process(|| {
        let backend = Backend::default();
        let mut share = share(&backend);
        let first = memory(&[0, 1]);
        share.update_memory(&first).unwrap();
        let second = without(&first, &[1]);
        let [kept, gone] =
            [0, 1].map(|start| first.get_host_address(GuestAddress(start * MIB)).unwrap() as u64);
        drop(first);
        assert!(is_mapped(gone), "the kernel still uses it");
        backend.refuse(true);
        share.update_memory(&second).unwrap_err();
        assert!(is_mapped(gone), "and after a refusal, too");
        backend.refuse(false);
        share.update_memory(&second).unwrap();
        assert!(is_mapped(kept) && !is_mapped(gone));
        drop(second);
        assert!(is_mapped(kept));
        drop(share);
        assert!(!is_mapped(kept));
    });
}

#[test]
fn tables_that_the_kernel_cannot_take_are_refused_before_it_is_asked() {
    let backend = Backend::default();
    let mut share = share(&backend);
    // What vhost's bindings carry; the kernel may take less.
    let starts: Vec<u64> = (0..=VHOST_MAX_MEMORY_REGIONS as u64).collect();
    let most = memory(&starts);
    let refused = share.update_memory(&most).unwrap_err();
    let ShareError::Table(TableError::TooManyRegions {
        limit,
        slots: SlotLimit::Kernel,
        ..
    }) = refused
    else {
        panic!("{refused}");
    };
    assert!((1..=VHOST_MAX_MEMORY_REGIONS as u64).contains(&limit));
    let fits = |regions: u64| {
        let memory = without(&most, &starts[regions as usize..]);
        share.check_table(&memory.memory_table())
    };
    fits(limit).unwrap();
    fits(limit + 1).unwrap_err();
    assert_eq!(backend.calls(), 0);

    let memory = memory(&[0, 5]);
    let view = TableView::default().with_opaque_addresses(1 << 40);
    let mut share = share.with_view(view);
    let refused = share.update_memory(&memory).unwrap_err();
    assert!(
        matches!(refused, ShareError::Table(TableError::NoHostAddress { .. })),
        "{refused}"
    );
    assert_eq!(backend.calls(), 0);

    let mut share = share.with_view(TableView::default());
    share.update_memory(&memory).unwrap();
    let empty = share.update_table(&MemoryTable::default()).unwrap_err();
    assert!(
        matches!(empty, ShareError::Table(TableError::Empty)),
        "{empty}"
    );
    assert_eq!(backend.calls(), 1);
    let other = super::memory(&[7]);
    let gone = other.memory_table();
    // Its descriptors live on in the table, its mappings do not.
    drop(other);
    let refused = share.update_table(&gone).unwrap_err();
    assert!(
        matches!(refused, ShareError::Table(TableError::NoHostAddress { .. })),
        "{refused}"
    );
    assert_eq!(backend.calls(), 1);
    // It goes on.
    share.update_memory(&with(&memory, &[6])).unwrap();
}

/// Whether this machine has it depends on a kernel module, which no package brings into a
/// container: lacking it is never a failure.
#[test]
fn vhost_vsock_of_the_kernel_takes_our_tables() {
    // Vsock::new() asks its memory for addresses of rings only, which are not used here.
    let memory = memory(&[0, 1, 2]);
    let vsock = match Vsock::new(&memory) {
        Ok(vsock) => vsock,
        Err(error) => {
            println!("skipped: /dev/vhost-vsock cannot be opened here: {error}");
            return;
        }
    };
    if let Err(error) = vsock.set_owner() {
        println!("skipped: vhost-vsock of this kernel has no owner for us: {error}");
        return;
    }
    let mut share = KernelVhost::new(vsock);
    share.update_memory(&memory).unwrap();
    share
        .update_memory(&with(&memory, &[2, 3, 4, 5, 6, 7, 8, 9, 10]))
        .unwrap();
    share.update_memory(&without(&memory, &[1])).unwrap();
    assert_eq!(share.table().regions().len(), 2);
    let starts: Vec<u64> = (0..=VHOST_MAX_MEMORY_REGIONS as u64).collect();
    assert!(share.update_memory(&super::memory(&starts)).is_err());
}
