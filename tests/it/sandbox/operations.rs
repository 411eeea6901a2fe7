//! The operations of the table: what each has ready before the filter, and what it does under it.

use std::any::Any;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use guest_memory_shm::mock::{BlkDevice, MockDaemon};
use guest_memory_shm::{
    AddressSpace, AdoptPolicy, BackingSource, CoreDump, GuestMemoryShm, GuestRange,
    GuestRegionShm, ListenerId, NumaPolicy, PageSize, Populate, PopulateOptions, RamOptions,
    ShmBacking, VhostUserShare,
};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::GuestAddress;

use crate::numa::nodes;
use crate::support::ToldAll;

pub(super) const SIZE: u64 = 4 << 20;
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

fn descriptor() -> OwnedFd {
    let created = ShmBacking::create(&RamOptions::new(), SIZE).unwrap();
    created.as_fd().try_clone_to_owned().unwrap()
}

pub(super) fn adopt() -> Work {
    let fd = descriptor();
    work(move || ShmBacking::adopt(fd, &AdoptPolicy::new()).unwrap())
}

fn build(options: RamOptions) -> Work {
    let backing = ShmBacking::create(&options, SIZE).unwrap();
    work(move || {
        let builder = GuestMemoryShm::<()>::builder();
        let builder = builder.add_backing(&backing, 0, [(GuestAddress(0), SIZE)]);
        (builder.build().unwrap(), backing)
    })
}

pub(super) fn map() -> Work {
    build(RamOptions::new())
}

pub(super) fn map_on_nodes() -> Work {
    build(RamOptions::new().with_numa(NumaPolicy::Bind(nodes(&[0]))))
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
    let memory = GuestMemoryShm::<()>::builder().add_ram(options, [(GuestAddress(0), SIZE)]);
    let memory = memory.build().unwrap();
    work(move || {
        let options = PopulateOptions::new(mode).with_threads(NonZeroU32::new(2).unwrap());
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

pub(super) fn prefault_on_nodes() -> Work {
    let options = RamOptions::new().with_numa(NumaPolicy::Bind(nodes(&[0])));
    populate(Populate::Prefault, options)
}

/// A daemon on threads of its own, which no filter is for, and the VMM's end of it.
struct Disk {
    daemon: MockDaemon,
    frontend: Option<Frontend>,
    features: Features,
}

impl Disk {
    fn start() -> Self {
        let mut disk = Self {
            daemon: MockDaemon::builder().start_unnamed().unwrap(),
            frontend: None,
            features: Features::empty(),
        };
        disk.connect();
        disk
    }

    fn connect(&mut self) {
        let mut frontend = Frontend::from_stream(self.daemon.connect().unwrap(), 1);
        let device = BlkDevice::negotiate(&mut frontend, Features::all()).unwrap();
        self.features = device.protocol_features();
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
    fn start() -> Self {
        let space = AddressSpace::new(memory());
        let attach = |name| {
            let disk = Disk::start();
            let id = space.attach_required(name, disk.share()).unwrap();
            (disk, id)
        };
        let disks = ["disk0", "disk1"].map(attach).into();
        Self { space, disks }
    }

    fn logging() -> Self {
        let machine = Self::start();
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
    let (disk, space) = (Disk::start(), AddressSpace::new(memory()));
    work(move || {
        let id = space.attach_required("disk", disk.share()).unwrap();
        (space, disk, id)
    })
}

fn change_of(machine: Machine) -> Work {
    let region = Arc::new(region());
    work(move || {
        machine.space.insert(region.clone()).told_all();
        machine.space.remove((PLUGGED, SIZE)).told_all();
        (machine, region)
    })
}

pub(super) fn change() -> Work {
    change_of(Machine::start())
}

pub(super) fn change_under_log() -> Work {
    change_of(Machine::logging())
}

pub(super) fn reconnect() -> Work {
    let mut disk = Disk::start();
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
    let machine = Machine::start();
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

pub(super) fn stop_log() -> Work {
    let machine = Machine::logging();
    work(move || {
        let (_, id) = &machine.disks[0];
        let stopped = machine.space.with_listener(id, VhostUserShare::stop_log);
        drop(stopped.unwrap());
        machine
    })
}

pub(super) fn discard() -> Work {
    let memory = partly_allocated(RamOptions::new());
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
    let machine = Machine::start();
    work(move || {
        let mut left = Vec::new();
        for (disk, id) in machine.disks {
            drop(machine.space.detach(id).unwrap());
            left.push(disk);
        }
        (machine.space, left)
    })
}
