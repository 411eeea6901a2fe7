//! Operations on an address space, with daemons and the hypervisor.

use std::sync::{Arc, OnceLock};

use guest_memory_shm::mock::MockDaemon;
use guest_memory_shm::{AddressSpace, AddressSpaceError, GuestMemoryShm, KvmSlots, ListenerId};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::peers::{LIMIT, MIB, Share, Who, connect, holds, memory, new_share, region};
use super::{Operation, Outcome, Stage, says_something};
use crate::support::ToldAll;

pub(super) const SPACES: &[Operation] = &[
    Operation::new("plug", |stage| plug(stage, Who::Frontend)),
    Operation::new("unplug", |stage| unplug(stage, Who::Frontend)),
    Operation::new("replace", |stage| replace(stage, Who::Frontend)),
    Operation::new("attach", |stage| attach(stage, Who::Frontend)),
    Operation::new("reconnect in a space", reconnect_in_space),
    Operation::new("log what KVM writes", log_kvm),
];

pub(super) const DAEMONS: &[Operation] = &[
    Operation::new("daemon's end of a plug", |stage| plug(stage, Who::Daemon)).of_others(),
    Operation::new("daemon's end of an unplug", |stage| {
        unplug(stage, Who::Daemon)
    })
    .of_others(),
    Operation::new("daemon's end of a replacement", |stage| {
        replace(stage, Who::Daemon)
    })
    .of_others(),
    Operation::new("daemon's end of an attachment", |stage| {
        attach(stage, Who::Daemon)
    })
    .of_others(),
];

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
        GuestMemoryShm::clone(&self.space.published().memory())
    }

    /// Asserts that each listener holds what is published, or is called stale. Says whether one
    /// is.
    fn is_consistent(&self) -> bool {
        let memory = self.published();
        for region in memory.arc_regions() {
            let start = region.range().start_addr();
            memory.write_obj(start.0 ^ 0x5a5a, start).unwrap();
        }
        let table = memory.memory_table();
        let mut stale = false;
        for status in self.space.listeners().unwrap() {
            if let Some(error) = status.stale() {
                assert!(!error.reason().is_empty());
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
                Ok(_) => drop(self.space.remove((GuestAddress(40 * MIB), MIB)).unwrap()),
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
fn after(mut world: World, changed: Result<bool, AddressSpaceError>) -> Outcome {
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
    let unplugged = who.attack(stage, || world.space.remove((GuestAddress(2 * MIB), MIB)));
    let gone = world.published().memory_table().regions().len() == 1;
    assert_eq!(unplugged.is_ok(), gone);
    after(world, unplugged.map(|report| !report.stale().is_empty()))
}

fn replace(stage: &Stage, who: Who) -> Outcome {
    let world = World::new(stage, who, 2);
    let (old, new) = (world.published().memory_table(), region(2));
    let replaced = who.attack(stage, || {
        let removed = world
            .space
            .transaction()
            .remove((GuestAddress(2 * MIB), MIB));
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
    let reconnected = stage.attacked(|| world.space.reconnect(id, &frontend, features));
    drop(frontend);
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
