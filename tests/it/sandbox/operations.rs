//! The operations of the table: what each has ready before the filter, and what it does under it.

use std::any::Any;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use guest_memory_shm::mock::{MockDaemon, MockDaemonBuilder};
use guest_memory_shm::receive::{ReceivePolicy, ReceivedRegion, ReceivedTable};
use guest_memory_shm::{
    AddressSpace, AdoptPolicy, BackingSource, CoreDump, GuestMemoryShm, GuestRange,
    GuestRegionShm, KvmSlots, ListenerId, NumaPolicy, PageSize, Populate, PopulateOptions,
    RamOptions, SessionOptions, SessionRing, ShmBacking, VhostUserSession, VhostUserShare,
};
use kvm_ioctls::VmFd;
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::frontend::agree;
use crate::kvm::new_vm;
use crate::numa::nodes;
use crate::support::ToldAll;

pub(super) const SIZE: u64 = 4 << 20;
/// The size of the huge pages.
pub(super) const HUGE: u64 = 2 << 20;
const PATIENCE: Duration = Duration::from_secs(10);
const PLUGGED: GuestAddress = GuestAddress(4 << 30);

/// What an operation leaves, to be dropped after the filter looked, which is never.
type Left = Box<dyn Any>;
/// What is done under the filter.
pub(super) type Work = Box<dyn FnOnce() -> Left>;

fn work<T: 'static>(work: impl FnOnce() -> T + 'static) -> Work {
    Box::new(|| Box::new(work()))
}

fn create(options: RamOptions) -> Work {
    work(move || ShmBacking::create(&options, SIZE).unwrap())
}

pub(super) fn memfd() -> Work {
    create(RamOptions::new())
}

fn huge() -> RamOptions {
    RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)))
}

pub(super) fn huge_memfd() -> Work {
    create(huge())
}

pub(super) fn posix_shm() -> Work {
    create(RamOptions::new().with_backing(BackingSource::PosixShm))
}

pub(super) fn nameless_file() -> Work {
    create(RamOptions::new().with_backing(BackingSource::File("/dev/shm".into())))
}

pub(super) fn named_file() -> Work {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ram");
    let create = create(RamOptions::new().with_backing(BackingSource::File(path)));
    // The process is killed or leaves at once: its parent removes the directory.
    let _ = directory.keep();
    create
}

fn descriptor(options: RamOptions) -> OwnedFd {
    let created = ShmBacking::create(&options, SIZE).unwrap();
    created.as_fd().try_clone_to_owned().unwrap()
}

fn adopted(options: RamOptions) -> ShmBacking {
    ShmBacking::adopt(descriptor(options), &AdoptPolicy::new()).unwrap()
}

pub(super) fn adopt() -> Work {
    let fd = descriptor(RamOptions::new());
    work(move || ShmBacking::adopt(fd, &AdoptPolicy::new()).unwrap())
}

fn build(options: RamOptions) -> Work {
    build_on(ShmBacking::create(&options, SIZE).unwrap())
}

fn build_on(backing: ShmBacking) -> Work {
    work(move || {
        let builder = GuestMemoryShm::<()>::builder();
        let builder = builder.add_backing(&backing, 0, [(GuestAddress(0), SIZE)]);
        (builder.build().unwrap(), backing)
    })
}

pub(super) fn map() -> Work {
    build(RamOptions::new())
}

fn on_nodes() -> RamOptions {
    RamOptions::new().with_numa(NumaPolicy::Bind(nodes(&[0])))
}

pub(super) fn map_on_nodes() -> Work {
    build(on_nodes())
}

/// Of which some has pages already.
pub(super) fn map_adopted_on_nodes() -> Work {
    let memory = partly_allocated(RamOptions::new());
    let region = memory.iter().next().unwrap();
    let fd = region.backing().as_fd().try_clone_to_owned().unwrap();
    let policy = AdoptPolicy::new().with_options(on_nodes());
    build_on(ShmBacking::adopt(fd, &policy).unwrap())
}

pub(super) fn map_adopted() -> Work {
    build_on(adopted(RamOptions::new()))
}

pub(super) fn map_adopted_file() -> Work {
    build_on(adopted(
        RamOptions::new().with_backing(BackingSource::PosixShm),
    ))
}

pub(super) fn map_huge() -> Work {
    build(huge())
}

/// What a frontend tells of its memory.
pub(super) fn receive() -> Work {
    let fd = descriptor(RamOptions::new());
    work(move || {
        let region = ReceivedRegion {
            guest_addr: GuestAddress(0),
            size: SIZE,
            user_addr: SIZE,
            mmap_offset: 0,
        };
        let table = ReceivedTable::<()>::new(ReceivePolicy::new());
        let table = table.add(region, vec![fd]).unwrap();
        table.remove(region).unwrap()
    })
}

pub(super) fn map_dumped() -> Work {
    build(RamOptions::new().with_core_dump(CoreDump::Include))
}

pub(super) fn map_transparent() -> Work {
    build(RamOptions::new().with_page_size(PageSize::Transparent))
}

fn memory() -> GuestMemoryShm {
    let builder = GuestMemoryShm::builder();
    let builder = builder.add_ram(RamOptions::new(), [(GuestAddress(0), SIZE)]);
    builder.build().unwrap()
}

/// Two regions on one backing, of which only some pages are allocated.
fn partly_allocated(options: RamOptions) -> GuestMemoryShm {
    let builder = GuestMemoryShm::builder();
    let memory = builder.add_ram(options, [(GuestAddress(0), SIZE), (PLUGGED, SIZE)]);
    let memory = memory.build().unwrap();
    let some = GuestRange::try_from((GuestAddress(0), SIZE / 2)).unwrap();
    let options = PopulateOptions::new(Populate::Prefault).with_range(some);
    memory.populate(options).unwrap();
    memory
}

fn populate(mode: Populate, options: RamOptions) -> Work {
    populate_by(2, mode, options)
}

fn populate_by(threads: u32, mode: Populate, options: RamOptions) -> Work {
    let memory = GuestMemoryShm::<()>::builder().add_ram(options, [(GuestAddress(0), SIZE)]);
    let memory = memory.build().unwrap();
    work(move || {
        let options = PopulateOptions::new(mode).with_threads(NonZeroU32::new(threads).unwrap());
        memory.populate(options).unwrap();
        memory
    })
}

pub(super) fn allocate() -> Work {
    populate(Populate::Allocate, RamOptions::new())
}

pub(super) fn prefault() -> Work {
    populate(Populate::Prefault, RamOptions::new())
}

pub(super) fn prefault_by_one() -> Work {
    populate_by(1, Populate::Prefault, RamOptions::new())
}

pub(super) fn prefault_on_nodes() -> Work {
    populate(Populate::Prefault, on_nodes())
}

pub(super) fn prefault_huge() -> Work {
    populate(Populate::Prefault, huge())
}

pub(super) fn prefault_in_background() -> Work {
    let memory = memory();
    work(move || {
        let options = PopulateOptions::new(Populate::Prefault);
        let handle = memory.populate_in_background(options).unwrap();
        (handle.wait().unwrap(), memory)
    })
}

/// How a daemon is set up.
type Kind = fn() -> MockDaemonBuilder;

fn able() -> MockDaemonBuilder {
    MockDaemon::builder()
}

fn without_mem_slots() -> MockDaemonBuilder {
    MockDaemon::builder().without_mem_slots()
}

fn without_acks() -> MockDaemonBuilder {
    MockDaemon::builder().without_reply_ack()
}

/// A daemon on threads of its own, which no filter is for, and the VMM's end of it.
struct Disk {
    daemon: MockDaemon,
    frontend: Option<Frontend>,
    features: Features,
}

impl Disk {
    fn start(kind: Kind) -> Self {
        let mut disk = Self {
            daemon: kind().start_unnamed().unwrap(),
            frontend: None,
            features: Features::empty(),
        };
        disk.connect();
        disk
    }

    fn connect(&mut self) {
        let (frontend, features) = agree(self.daemon.connect().unwrap(), Features::all()).unwrap();
        self.features = features;
        self.frontend = Some(frontend);
    }

    fn share(&self) -> VhostUserShare {
        let frontend = self.frontend.as_ref().unwrap();
        let share = VhostUserShare::new(frontend, self.features).unwrap();
        share.with_deadline(PATIENCE)
    }
}

/// Two daemons that are told of each change.
struct Machine {
    space: AddressSpace,
    disks: Vec<(Disk, ListenerId<VhostUserShare>)>,
}

impl Machine {
    fn start(kind: Kind) -> Self {
        let space = AddressSpace::new(memory());
        let attach = |name| {
            let disk = Disk::start(kind);
            let id = space.attach_required(name, disk.share()).unwrap();
            (disk, id)
        };
        let disks = ["disk0", "disk1"].map(attach).into();
        Self { space, disks }
    }

    fn logging() -> Self {
        let machine = Self::start(able);
        for (_, id) in &machine.disks {
            let started = machine.space.with_listener(id, VhostUserShare::start_log);
            started.unwrap().unwrap();
        }
        machine
    }
}

fn region() -> GuestRegionShm {
    GuestRegionShm::new((PLUGGED, SIZE), &RamOptions::new()).unwrap()
}

pub(super) fn share() -> Work {
    share_with(able)
}

pub(super) fn share_whole_tables() -> Work {
    share_with(without_mem_slots)
}

pub(super) fn share_without_acks() -> Work {
    share_with(without_acks)
}

fn share_with(kind: Kind) -> Work {
    let (disk, space) = (Disk::start(kind), AddressSpace::new(memory()));
    work(move || {
        let id = space.attach_required("disk", disk.share()).unwrap();
        (space, disk, id)
    })
}

fn change_of<T: 'static>(space: AddressSpace, listeners: T) -> Work {
    let region = Arc::new(region());
    work(move || {
        space.insert(region.clone()).told_all();
        space.remove((PLUGGED, SIZE)).told_all();
        (space, listeners, region)
    })
}

fn change_with(kind: Kind) -> Work {
    let Machine { space, disks } = Machine::start(kind);
    change_of(space, disks)
}

pub(super) fn change() -> Work {
    change_with(able)
}

pub(super) fn change_of_whole_tables() -> Work {
    change_with(without_mem_slots)
}

pub(super) fn change_without_acks() -> Work {
    change_with(without_acks)
}

pub(super) fn change_under_log() -> Work {
    let Machine { space, disks } = Machine::logging();
    change_of(space, disks)
}

pub(super) fn reconnect() -> Work {
    let mut disk = Disk::start(able);
    let space = AddressSpace::new(memory());
    let id = space.attach("disk", disk.share()).unwrap();
    disk.daemon.hang_up();
    disk.frontend = None;
    // It is found to be gone.
    let report = space.insert(region()).unwrap();
    assert!(report.stale()[0].is(&id));
    disk.daemon.wait_disconnected(PATIENCE).unwrap();
    disk.connect();
    work(move || {
        let frontend = disk.frontend.as_ref().unwrap();
        space.reconnect(&id, frontend, disk.features).unwrap();
        (space, disk, id)
    })
}

pub(super) fn start_log() -> Work {
    let machine = Machine::start(able);
    work(move || {
        let (_, id) = &machine.disks[0];
        let started = machine.space.with_listener(id, VhostUserShare::start_log);
        started.unwrap().unwrap();
        machine
    })
}

pub(super) fn harvest() -> Work {
    let machine = Machine::logging();
    work(move || {
        let (_, id) = &machine.disks[0];
        let harvested = machine.space.with_listener(id, VhostUserShare::drain_dirty);
        harvested.unwrap();
        machine
    })
}

/// Where one has hung up: whether it is dead is looked at.
pub(super) fn harvest_after_hang_up() -> Work {
    let (mut disk, space) = (Disk::start(able), AddressSpace::new(memory()));
    let id = space.attach("disk", disk.share()).unwrap();
    let log = |share: &mut VhostUserShare| share.start_log();
    space.with_listener(&id, log).unwrap().unwrap();
    disk.daemon.hang_up();
    disk.frontend = None;
    let report = space.insert(region()).unwrap();
    assert!(report.stale()[0].is(&id));
    work(move || {
        let harvested = space.with_listener(&id, VhostUserShare::drain_dirty);
        (harvested.unwrap(), space, id)
    })
}

pub(super) fn stop_log() -> Work {
    let machine = Machine::logging();
    work(move || {
        let (_, id) = &machine.disks[0];
        let stopped = machine.space.with_listener(id, VhostUserShare::stop_log);
        drop(stopped.unwrap());
        machine
    })
}

/// A daemon at a path, and what a session with it needs.
struct Service {
    daemon: MockDaemon,
    path: PathBuf,
    options: SessionOptions,
}

impl Service {
    fn start() -> Self {
        Self::of(able)
    }

    fn of(kind: Kind) -> Self {
        // As above: the parent of the process removes it.
        let path = tempfile::tempdir().unwrap().keep().join("socket");
        Self {
            daemon: kind().start(&path).unwrap(),
            path,
            options: SessionOptions::new(0).with_deadline(PATIENCE),
        }
    }

    fn session(&self) -> VhostUserSession {
        VhostUserSession::connect(&self.path, self.options.clone()).unwrap()
    }
}

/// A daemon that a session is with, which is a listener.
struct Joined {
    space: AddressSpace,
    disk: ListenerId<VhostUserSession>,
    service: Service,
}

impl Joined {
    fn start() -> Self {
        Self::with_service(Service::start())
    }

    fn with_service(service: Service) -> Self {
        let space = AddressSpace::new(memory());
        let disk = space.attach_required("disk", service.session()).unwrap();
        Self {
            space,
            disk,
            service,
        }
    }

    fn logging() -> Self {
        let joined = Self::start();
        joined.with(VhostUserSession::start_log).unwrap();
        joined
    }

    fn with<T>(&self, work: impl FnOnce(&mut VhostUserSession) -> T) -> T {
        self.space.with_listener(&self.disk, work).unwrap()
    }

    /// Does something with the session.
    fn work<T: 'static>(self, work: impl FnOnce(&mut VhostUserSession) -> T + 'static) -> Work {
        self::work(move || (self.with(work), self))
    }
}

fn ring() -> SessionRing {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let parts = [0x1000, 0x2000, 0x3000].map(GuestAddress);
    SessionRing::new(16, parts, &event(), &event()).unwrap()
}

pub(super) fn connect() -> Work {
    let service = Service::start();
    work(move || (service.session(), service))
}

fn with_channel() -> MockDaemonBuilder {
    MockDaemon::builder().with_backend_channel()
}

fn with_inflight() -> MockDaemonBuilder {
    MockDaemon::builder().with_inflight()
}

pub(super) fn connect_with_channel() -> Work {
    let mut service = Service::of(with_channel);
    service.options = service.options.with_backend_channel();
    work(move || (service.session(), service))
}

pub(super) fn start_ring_with_inflight() -> Work {
    let (joined, ring) = (Joined::with_service(Service::of(with_inflight)), ring());
    joined.work(|session| session.start_ring(0, ring).unwrap())
}

pub(super) fn attach_session() -> Work {
    let service = Service::start();
    let (session, space) = (service.session(), AddressSpace::new(memory()));
    work(move || {
        let disk = space.attach_required("disk", session).unwrap();
        (space, disk, service)
    })
}

pub(super) fn change_under_session() -> Work {
    let Joined {
        space,
        disk,
        service,
    } = Joined::start();
    change_of(space, (disk, service))
}

pub(super) fn start_ring() -> Work {
    let (joined, ring) = (Joined::start(), ring());
    joined.work(|session| session.start_ring(0, ring).unwrap())
}

pub(super) fn stop_ring() -> Work {
    let joined = Joined::start();
    joined
        .with(|session| session.start_ring(0, ring()))
        .unwrap();
    joined.work(|session| session.stop_ring(0).unwrap())
}

pub(super) fn config() -> Work {
    Joined::start().work(|session| session.config(0, 8).unwrap())
}

pub(super) fn start_session_log() -> Work {
    Joined::start().work(|session| session.start_log().unwrap())
}

pub(super) fn harvest_session() -> Work {
    Joined::logging().work(VhostUserSession::drain_dirty)
}

pub(super) fn stop_session_log() -> Work {
    Joined::logging().work(VhostUserSession::stop_log)
}

pub(super) fn reconnect_session() -> Work {
    let joined = Joined::start();
    joined.service.daemon.hang_up();
    joined.service.daemon.wait_disconnected(PATIENCE).unwrap();
    work(move || {
        joined.space.reconnect_session(&joined.disk).unwrap();
        joined
    })
}

pub(super) fn drop_session() -> Work {
    let Joined {
        space,
        disk,
        service,
    } = Joined::start();
    work(move || {
        drop(space.detach(disk).unwrap());
        (space, service)
    })
}

/// A virtual machine, which lives as long as its listener and longer.
fn virtual_machine() -> (Arc<VmFd>, AddressSpace, ListenerId<KvmSlots>) {
    let (vm, space) = (new_vm().unwrap(), AddressSpace::new(memory()));
    let slots = KvmSlots::new(vm.clone()).unwrap();
    let kvm = space.attach_required("kvm", slots).unwrap();
    (vm, space, kvm)
}

pub(super) fn change_under_kvm() -> Work {
    let (vm, space, kvm) = virtual_machine();
    change_of(space, (vm, kvm))
}

pub(super) fn harvest_kvm() -> Work {
    let (vm, space, kvm) = virtual_machine();
    work(move || {
        let harvested = space.with_listener(&kvm, |slots| {
            slots.start_dirty_logging().unwrap();
            let harvested = slots.dirty_log().unwrap();
            slots.stop_dirty_logging().unwrap();
            harvested
        });
        (harvested.unwrap(), vm, space, kvm)
    })
}

pub(super) fn drop_slots() -> Work {
    let (vm, space, kvm) = virtual_machine();
    work(move || {
        drop(space.detach(kvm).unwrap());
        (vm, space)
    })
}

pub(super) fn discard_huge() -> Work {
    discard_of(huge())
}

pub(super) fn discard() -> Work {
    discard_of(RamOptions::new())
}

fn discard_of(options: RamOptions) -> Work {
    let memory = partly_allocated(options);
    work(move || {
        let discarded = memory.discard((GuestAddress(0), SIZE)).unwrap();
        assert_eq!(discarded.freed, SIZE);
        memory
    })
}

pub(super) fn stats() -> Work {
    let memory = partly_allocated(RamOptions::new());
    work(move || {
        assert_eq!(memory.stats().unwrap().allocated(), SIZE / 2);
        memory
    })
}

pub(super) fn extents() -> Work {
    let memory = partly_allocated(RamOptions::new());
    work(move || {
        assert_eq!(memory.extents(4096).unwrap().ranges.len(), 1);
        memory
    })
}

pub(super) fn drop_memory() -> Work {
    let memory = partly_allocated(RamOptions::new());
    work(move || drop(memory))
}

pub(super) fn drop_share() -> Work {
    let machine = Machine::start(able);
    work(move || {
        let mut left = Vec::new();
        for (disk, id) in machine.disks {
            drop(machine.space.detach(id).unwrap());
            left.push(disk);
        }
        (machine.space, left)
    })
}
