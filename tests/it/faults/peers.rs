//! Operations with daemons and the hypervisor.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use guest_memory_shm::mock::{BlkDevice, MockDaemon, MockDaemonBuilder};
use guest_memory_shm::{
    AddressSpace, Error, GuestMemoryShm, GuestRegionShm, KvmSlots, ListenerId, MemoryTable,
    RamOptions, VhostUserShare,
};
use kvm_ioctls::{Kvm, VmFd};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{Operation, Outcome, Stage, says_something};
use crate::support::ToldAll;

const MIB: u64 = 1 << 20;
/// For an answer that comes at once, unless a call fails for which the daemon falls silent.
const LIMIT: Duration = Duration::from_secs(2);

type Share = VhostUserShare<Frontend>;

pub(super) const SHARES: &[Operation] = &[
    Operation::new("negotiate", negotiate),
    Operation::new("share by slots", |stage| {
        share(stage, MockDaemon::builder())
    }),
    Operation::new("share by tables", |stage| {
        share(stage, MockDaemon::builder().without_mem_slots())
    }),
    Operation::new("share without acknowledgements", |stage| {
        share(stage, MockDaemon::builder().without_reply_ack())
    }),
    Operation::new("change a share", |stage| {
        change(stage, MockDaemon::builder(), false)
    }),
    Operation::new("change a share by tables", |stage| {
        change(stage, MockDaemon::builder().without_mem_slots(), false)
    }),
    Operation::new("change a share that logs", |stage| {
        change(stage, MockDaemon::builder(), true)
    }),
    Operation::new("start a log", start_log),
    Operation::new("reconnect", reconnect),
    Operation::new("drop a share", drop_share),
];

pub(super) const SPACES: &[Operation] = &[
    Operation::new("plug", |stage| plug(stage, Who::Frontend)),
    Operation::new("unplug", |stage| unplug(stage, Who::Frontend)),
    Operation::new("replace", |stage| replace(stage, Who::Frontend)),
    Operation::new("attach", |stage| attach(stage, Who::Frontend)),
    Operation::new("reconnect in a space", reconnect_in_space),
    Operation::new("log what KVM writes", log_kvm),
];

pub(super) const DAEMONS: &[Operation] = &[
    Operation::new("daemon's end of a share", share_of_daemon),
    Operation::new("daemon's end of a plug", |stage| plug(stage, Who::Daemon)),
    Operation::new("daemon's end of an unplug", |stage| {
        unplug(stage, Who::Daemon)
    }),
    Operation::new("daemon's end of a replacement", |stage| {
        replace(stage, Who::Daemon)
    }),
    Operation::new("daemon's end of an attachment", |stage| {
        attach(stage, Who::Daemon)
    }),
];

/// Whose calls fail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Frontend,
    /// The threads of the mock daemons.
    Daemon,
}

impl Who {
    fn start(self, stage: &Stage) -> MockDaemon {
        let start = || MockDaemon::builder().start_unnamed().unwrap();
        match self {
            Self::Frontend => start(),
            Self::Daemon => stage.watched(start),
        }
    }

    fn attack<T: Send>(self, stage: &Stage, work: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Frontend => stage.attacked(work),
            Self::Daemon => stage.armed(work),
        }
    }
}

fn wanted() -> Features {
    Features::CONFIG
        | Features::REPLY_ACK
        | Features::CONFIGURE_MEM_SLOTS
        | Features::LOG_SHMFD
        | Features::MQ
}

fn connect(daemon: &MockDaemon) -> (Frontend, Features) {
    let mut frontend = Frontend::from_stream(daemon.connect().unwrap(), 1);
    let device = BlkDevice::negotiate(&mut frontend, wanted()).unwrap();
    (frontend, device.protocol_features())
}

fn new_share(daemon: &MockDaemon) -> Share {
    let (frontend, features) = connect(daemon);
    VhostUserShare::new(frontend, features).with_time_limit(LIMIT)
}

fn region(start: u64) -> Arc<GuestRegionShm> {
    let region = GuestRegionShm::new(GuestAddress(start * MIB), MIB, &RamOptions::new());
    Arc::new(region.unwrap())
}

fn memory(starts: &[u64]) -> GuestMemoryShm {
    let regions = starts.iter().copied().map(region);
    GuestMemoryShm::from_arc_regions(regions.collect()).unwrap()
}

/// A memory with the regions of `memory` from 2 MiB on, and one more.
fn changed(memory: &GuestMemoryShm) -> GuestMemoryShm {
    let without = memory.remove_region(GuestAddress(0), MIB).unwrap().0;
    without.insert_region(region(20)).unwrap()
}

/// Whether the daemon maps exactly what is in `table`.
fn holds(daemon: &MockDaemon, table: &MemoryTable) -> bool {
    let held = daemon.table();
    let held = held
        .iter()
        .map(|r| (r.guest_addr, r.size, r.mmap_offset, r.identity));
    held.eq(table.regions().iter().map(|region| {
        let (range, offset) = (region.range(), region.mmap_offset());
        let identity = region.backing().identity();
        (range.start_addr(), range.size(), offset, identity)
    }))
}

fn negotiate(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut frontend = Frontend::from_stream(daemon.connect().unwrap(), 1);
    match stage.attacked(|| BlkDevice::negotiate(&mut frontend, wanted())) {
        Ok(device) => {
            assert!(device.protocol_features().contains(Features::REPLY_ACK));
            Outcome::Done
        }
        Err(error) => says_something(&error),
    }
}

/// Looks at a share after an update, and brings it to where the update should have.
fn look(
    daemon: &MockDaemon,
    mut share: Share,
    updated: Result<(), Error>,
    memory: &GuestMemoryShm,
) -> Outcome {
    let table = memory.memory_table();
    let outcome = match &updated {
        Ok(()) => {
            assert!(share.broken().is_none());
            assert_eq!(*share.table(), table);
            Outcome::Done
        }
        Err(error) => says_something(error),
    };
    match share.broken() {
        None => assert!(holds(daemon, share.table()), "{:?}", daemon.table()),
        Some(reason) => {
            assert!(!reason.is_empty());
            drop(share);
            share = new_share(daemon);
        }
    }
    if let Err(Error::NoTimeLimit { .. }) = updated {
        // Nobody watches the time: until it is set anew.
        share = share.with_time_limit(LIMIT);
    }
    share.update_table(&table).unwrap();
    assert!(holds(daemon, &table));
    outcome
}

fn share(stage: &Stage, builder: MockDaemonBuilder) -> Outcome {
    let daemon = builder.start_unnamed().unwrap();
    let (frontend, features) = connect(&daemon);
    let memory = memory(&[0, 2, 4]);
    let table = memory.memory_table();
    let (share, updated) = stage.attacked(|| {
        let mut share = VhostUserShare::new(frontend, features).with_time_limit(LIMIT);
        let updated = share.update_table(&table).map(drop);
        (share, updated)
    });
    look(&daemon, share, updated, &memory)
}

fn share_of_daemon(stage: &Stage) -> Outcome {
    let daemon = Who::Daemon.start(stage);
    let mut share = new_share(&daemon);
    let memory = memory(&[0, 2, 4]);
    let updated = stage.armed(|| share.update_table(&memory.memory_table()).map(drop));
    // It may be able to do nothing any more.
    let other = MockDaemon::builder().start_unnamed().unwrap();
    if updated.is_err() {
        assert!(share.broken().is_some() || holds(&daemon, share.table()));
        drop(share);
        share = new_share(&other);
        share.update_table(&memory.memory_table()).unwrap();
        return look(&other, share, updated, &memory);
    }
    look(&daemon, share, updated, &memory)
}

fn change(stage: &Stage, builder: MockDaemonBuilder, logs: bool) -> Outcome {
    let daemon = builder.start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    let before = memory(&[0, 2, 4]);
    share.update_table(&before.memory_table()).unwrap();
    if logs {
        share.start_log().unwrap();
    }
    let after = changed(&before);
    let table = after.memory_table();
    let updated = stage.attacked(|| share.update_table(&table).map(drop));
    assert_eq!(share.is_logging(), logs);
    let _ = share.drain_dirty();
    look(&daemon, share, updated, &after)
}

fn start_log(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    let memory = memory(&[0, 2, 4]);
    share.update_table(&memory.memory_table()).unwrap();
    let started = stage.attacked(|| share.start_log());
    assert_eq!(share.is_logging(), started.is_ok());
    look(&daemon, share, started, &memory)
}

fn reconnect(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    let memory = memory(&[0, 2, 4]);
    let table = memory.memory_table();
    share.update_table(&table).unwrap();
    daemon.hang_up();
    daemon.wait_disconnected(LIMIT).unwrap();
    let (frontend, features) = connect(&daemon);
    let updated = stage.attacked(|| {
        drop(share.reconnect(frontend, features));
        share.update_table(&table).map(drop)
    });
    look(&daemon, share, updated, &memory)
}

fn drop_share(stage: &Stage) -> Outcome {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut share = new_share(&daemon);
    share.update_table(&memory(&[0]).memory_table()).unwrap();
    stage.attacked(move || drop(share));
    daemon.wait_disconnected(LIMIT).unwrap();
    Outcome::Done
}

/// An address space with KVM, where there is one, and two daemons.
struct World {
    space: AddressSpace,
    daemons: Vec<(MockDaemon, ListenerId<Share>)>,
    kvm: Option<ListenerId<KvmSlots>>,
}

/// One virtual machine for all cases of a process: it takes long to make one.
fn vm() -> Option<Arc<VmFd>> {
    static VM: OnceLock<Option<Arc<VmFd>>> = OnceLock::new();
    let new = || {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
        vm.map(Arc::new).ok()
    };
    VM.get_or_init(new).clone()
}

impl World {
    fn new(stage: &Stage, who: Who, count: usize) -> Self {
        let space = AddressSpace::new(memory(&[0, 2]));
        let slots = vm().map(|vm| KvmSlots::new(vm).unwrap());
        let kvm = slots.map(|slots| space.attach("kvm", slots).unwrap());
        let attach = |number| {
            let daemon = who.start(stage);
            let id = space.attach(format!("disk{number}"), new_share(&daemon));
            (daemon, id.unwrap())
        };
        let daemons = (0..count).map(attach).collect();
        Self {
            space,
            daemons,
            kvm,
        }
    }

    fn published(&self) -> GuestMemoryShm {
        GuestMemoryShm::clone(&self.space.memory().memory())
    }

    /// Asserts that each listener holds what is published, or is called stale. Says whether one is.
    fn is_consistent(&self) -> bool {
        let memory = self.published();
        for region in memory.arc_regions() {
            let start = region.range().start_addr();
            memory.write_obj(start.0 ^ 0x5a5a, start).unwrap();
        }
        let table = memory.memory_table();
        let mut stale = false;
        for status in self.space.listeners().unwrap() {
            if let Some(reason) = status.stale() {
                assert!(!reason.is_empty());
                stale = true;
                continue;
            }
            let daemon = self.daemons.iter().find(|(_, id)| status.is(id));
            if let Some((daemon, id)) = daemon {
                assert!(
                    holds(daemon, &table),
                    "{}: {:?}",
                    status.name(),
                    daemon.table()
                );
                let same = |share: &mut Share| *share.table() == table;
                assert!(self.space.with_listener(id, same).unwrap());
            }
        }
        if let Some(kvm) = &self.kvm {
            let slots = |kvm: &mut KvmSlots| kvm.slots().map(|slot| slot.range()).collect();
            let slots: Vec<_> = self.space.with_listener(kvm, slots).unwrap();
            let is_stale = self.space.listeners().unwrap()[0].stale().is_some();
            let ranges = memory.arc_regions();
            let ranges: Vec<_> = ranges.iter().map(|region| region.range()).collect();
            assert!(is_stale || slots == ranges, "{slots:?}");
        }
        stale
    }

    /// Brings all up to date, with new daemons where there were stale ones, and plugs once more.
    fn heal(&mut self) {
        for _ in 0..self.daemons.len() {
            self.replace_stale();
            let changed = self.space.insert(region(40));
            let is_stale = self.is_consistent();
            match changed {
                Ok(_) if !is_stale => return,
                // A daemon was lost to the fault, which shows only now.
                Ok(_) => drop(self.space.remove(GuestAddress(40 * MIB), MIB).unwrap()),
                Err(error) => assert!(is_stale, "{error}"),
            }
        }
        self.replace_stale();
        self.space.insert(region(40)).told_all();
        assert!(!self.is_consistent());
    }

    fn replace_stale(&mut self) {
        for status in self.space.listeners().unwrap() {
            if status.stale().is_none() {
                continue;
            }
            if let Some(kvm) = self.kvm.as_ref().filter(|kvm| status.is(kvm)) {
                self.space.refresh(kvm).unwrap();
            }
            let at = self.daemons.iter().position(|(_, id)| status.is(id));
            if let Some(at) = at {
                let (daemon, id) = self.daemons.remove(at);
                drop(self.space.detach(id).unwrap());
                drop(daemon);
                let daemon = MockDaemon::builder().start_unnamed().unwrap();
                let id = self.space.attach("new", new_share(&daemon)).unwrap();
                self.daemons.push((daemon, id));
            }
        }
    }
}

/// What came of a change; then all are healed.
fn after(mut world: World, changed: Result<bool, Error>) -> Outcome {
    let stale = world.is_consistent();
    let outcome = match changed {
        Ok(lagging) => {
            assert_eq!(
                lagging, stale,
                "a listener is stale, and the report does not say so"
            );
            match stale {
                false => Outcome::Done,
                true => Outcome::Refused(format!("{:?}", world.space.listeners().unwrap())),
            }
        }
        Err(error) => says_something(&error),
    };
    world.heal();
    outcome
}

fn plug(stage: &Stage, who: Who) -> Outcome {
    let world = World::new(stage, who, 2);
    let region = region(10);
    let plugged = who.attack(stage, || world.space.insert(region));
    let there = world.published().memory_table().regions().len() == 3;
    assert_eq!(plugged.is_ok(), there);
    after(world, plugged.map(|report| !report.stale().is_empty()))
}

fn unplug(stage: &Stage, who: Who) -> Outcome {
    let world = World::new(stage, who, 2);
    let unplugged = who.attack(stage, || world.space.remove(GuestAddress(2 * MIB), MIB));
    let gone = world.published().memory_table().regions().len() == 1;
    assert_eq!(unplugged.is_ok(), gone);
    after(world, unplugged.map(|report| !report.stale().is_empty()))
}

fn replace(stage: &Stage, who: Who) -> Outcome {
    let world = World::new(stage, who, 2);
    let (old, new) = (world.published().memory_table(), region(2));
    let replaced = who.attack(stage, || {
        let removed = world.space.transaction().remove(GuestAddress(2 * MIB), MIB);
        removed.insert(new).commit()
    });
    assert_eq!(replaced.is_err(), world.published().memory_table() == old);
    after(world, replaced.map(|report| !report.stale().is_empty()))
}

fn attach(stage: &Stage, who: Who) -> Outcome {
    let mut world = World::new(stage, Who::Frontend, 1);
    let daemon = who.start(stage);
    let share = new_share(&daemon);
    let attached = who.attack(stage, || {
        let attached = world.space.attach("new", share);
        attached.map_err(Box::new)
    });
    let attached = match attached {
        Ok(id) => {
            world.daemons.push((daemon, id));
            Ok(false)
        }
        Err(error) => {
            let (error, share) = error.into_parts();
            assert!(share.broken().is_some() || holds(&daemon, share.table()));
            Err(error)
        }
    };
    after(world, attached)
}

fn reconnect_in_space(stage: &Stage) -> Outcome {
    let world = World::new(stage, Who::Frontend, 1);
    let (daemon, id) = &world.daemons[0];
    daemon.hang_up();
    daemon.wait_disconnected(LIMIT).unwrap();
    let (frontend, features) = connect(daemon);
    let reconnected = stage.attacked(|| world.space.reconnect(id, frontend, features).map(drop));
    after(world, reconnected.map(|()| false))
}

fn log_kvm(stage: &Stage) -> Outcome {
    let world = World::new(stage, Who::Frontend, 0);
    let Some(kvm) = &world.kvm else {
        crate::support::skip("/dev/kvm cannot be used");
        return Outcome::Done;
    };
    let logged = stage.attacked(|| {
        let log = |slots: &mut KvmSlots| {
            slots.start_dirty_logging()?;
            slots.dirty_log()?;
            slots.stop_dirty_logging()
        };
        world.space.with_listener(kvm, log).unwrap()
    });
    let outcome = match logged {
        Ok(()) => Outcome::Done,
        Err(error) => says_something(&error),
    };
    let again = |slots: &mut KvmSlots| {
        slots.stop_dirty_logging()?;
        slots.start_dirty_logging()?;
        assert!(slots.slots().all(|slot| slot.is_logging()));
        slots.dirty_log()
    };
    // No guest runs that could write.
    assert!(
        world
            .space
            .with_listener(kvm, again)
            .unwrap()
            .unwrap()
            .is_empty()
    );
    assert!(!world.is_consistent());
    outcome
}
