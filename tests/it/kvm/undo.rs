//! What KVM refuses is undone for all, and what others refuse is undone in KVM.

use guest_memory_shm::mock::MockDaemon;
use guest_memory_shm::{SessionOptions, VhostUserSession};

use super::*;
use crate::support::chain;

/// Notes what it is told.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<String>>>);

impl RegionListener for Recorder {
    fn region_add(&mut self, region: &guest_memory_shm::GuestRegionShm) -> Told {
        self.note("add", region)
    }

    fn region_remove(&mut self, region: &guest_memory_shm::GuestRegionShm) -> Told {
        self.note("remove", region)
    }
}

type Told = Result<(), ListenerError>;

impl Recorder {
    fn note(&self, what: &str, region: &guest_memory_shm::GuestRegionShm) -> Told {
        let start = region.range().start_addr().0 / MIB;
        self.0.lock().unwrap().push(format!("{what} {start}"));
        Ok(())
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Refuses every memory with more than so many regions, when it is told and not when it is asked.
struct Refuses(usize);

impl MemoryListener for Refuses {
    fn check(&mut self, _memory: &GuestMemoryShm) -> Told {
        Ok(())
    }

    fn update(&mut self, memory: &GuestMemoryShm) -> Told {
        match memory.arc_regions().len() > self.0 {
            true => Err(ListenerError::refused("it has had enough")),
            false => Ok(()),
        }
    }
}

/// A recorder and a daemon, told before KVM.
struct Others {
    recorder: Recorder,
    daemon: MockDaemon,
}

/// A machine with these slots, after a recorder and a daemon.
fn machine_after_others(vm: Arc<VmFd>, slots: KvmSlots) -> (Machine, Others) {
    let memory = GuestMemoryShm::from_regions(vec![boot()]).unwrap();
    let space = AddressSpace::new(memory);
    let recorder = Recorder::default();
    let notes = RegionAdapter::new(recorder.clone());
    space.attach("recorder", notes).unwrap();
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let socket = daemon.connect().unwrap();
    let session = VhostUserSession::on_socket(socket, SessionOptions::new(0)).unwrap();
    space.attach("disk", session).unwrap();
    let kvm = space.attach("kvm", slots).unwrap();
    recorder.take();
    daemon.clear_requests();
    let guest = Guest::new(&vm);
    let machine = Machine {
        vm,
        space,
        kvm,
        guest,
    };
    (machine, Others { recorder, daemon })
}

impl Others {
    /// The regions that the daemon holds, in MiB.
    fn table(&self) -> Vec<u64> {
        let table = self.daemon.table();
        table
            .iter()
            .map(|region| region.guest_addr.0 / MIB)
            .collect()
    }
}

#[test]
fn out_of_slots_is_reported_before_any_listener_is_told() {
    let Some(vm) = new_vm() else { return };
    let slots = KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), 4..6).unwrap());
    let (mut machine, others) = machine_after_others(vm, slots);
    machine.space.insert(region(PLUG, MIB)).told_all();
    assert_eq!(others.recorder.take(), ["add 1024"]);

    let error = machine.space.insert(region(2 * PLUG, MIB)).unwrap_err();
    let text = chain(&error);
    for part in [
        "\"kvm\"",
        "0x80000000..=",
        "3 regions",
        "2 of KVM's",
        "use fewer",
    ] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    let (listener, at, refused) = refusal(error);
    assert_eq!((listener.as_str(), at), ("kvm", Some(range(2 * PLUG, MIB))));
    assert!(
        matches!(cause(&refused),
            KvmError::OutOfSlots { regions: 3, roms: 0, slots: 2, limit, .. } if *limit > 2
        ),
        "{refused:?}"
    );
    assert_eq!(others.recorder.take(), [""; 0]);
    assert_eq!(others.table(), [0, 1024]);
    machine.misses(2 * PLUG);
    machine.reaches(PLUG);

    // As many as there are slots: one goes and one comes.
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), MIB));
    change.insert(region(2 * PLUG, MIB)).commit().told_all();
    assert_eq!(others.table(), [0, 2048]);
    machine.misses(PLUG);
    machine.reaches(2 * PLUG);
    assert_eq!(machine.numbers(), [(4, 0), (5, 2 * PLUG)]);
}

#[test]
fn a_foreign_slot_in_the_way_is_named_and_all_is_put_back() {
    let Some(vm) = new_vm() else { return };
    let slots = KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), 0..8).unwrap());
    let (mut machine, others) = machine_after_others(vm.clone(), slots);
    machine.space.insert(region(PLUG, MIB)).told_all();
    assert!(machine.guest.writes(PLUG, 0x77));
    others.recorder.take();
    // A part of the VMM that does not know of KvmSlots has a slot past the second region.
    let foreign = region(2 * PLUG + MIB, MIB);
    set_by_hand(&vm, 100, &foreign, 0).unwrap();

    // The region of 1 GiB goes, one comes, and the next is refused.
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), MIB));
    let change = change.insert(region(PLUG, 2 * MIB));
    let change = change.insert(region(2 * PLUG, 2 * MIB));
    let error = change.commit().unwrap_err();
    let text = chain(&error);
    for part in [
        "\"kvm\"",
        "slot 3",
        "another slot of the VM overlaps",
        "place the RAM elsewhere",
    ] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    let (listener, at, refused) = refusal(error);
    assert_eq!(listener, "kvm");
    assert_eq!(at, Some(range(2 * PLUG, 2 * MIB)));
    let KvmError::Refused {
        slot,
        range: of,
        source,
        ..
    } = cause(&refused)
    else {
        panic!("{refused:?}")
    };
    assert_eq!((*slot, *of), (3, range(2 * PLUG, 2 * MIB)));
    assert_eq!(source.raw_os_error(), Some(nix::libc::EEXIST));

    // All have what was there: the very region, with its contents.
    assert_eq!(machine.guest.reads(PLUG), Some(0x77));
    machine.reaches(PLUG + MIB - 1);
    machine.misses(PLUG + MIB);
    machine.misses(2 * PLUG);
    assert_eq!(machine.numbers(), [(0, 0), (1, PLUG)]);
    assert_eq!(others.table(), [0, 1024]);
    let told = ["remove 1024", "add 1024", "add 2048"];
    let undone = ["remove 2048", "remove 1024", "add 1024"];
    assert_eq!(others.recorder.take(), [told, undone].concat());
    // And the foreign slot is no different.
    assert!(machine.guest.writes(2 * PLUG + MIB, 5));
    assert_eq!(crate::fork::byte_at(foreign.as_ptr()), 5);

    // When it is gone, the same change works.
    remove_by_hand(&vm, 100, &foreign).unwrap();
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), MIB));
    let change = change.insert(region(PLUG, 2 * MIB));
    let change = change.insert(region(2 * PLUG, 2 * MIB));
    change.commit().told_all();
    machine.reaches(PLUG + MIB);
    machine.reaches(2 * PLUG + MIB);
    assert_eq!(others.table(), [0, 1024, 2048]);
    // With the numbers that undoing would not need.
    let numbers = [(0, 0), (2, PLUG), (3, 2 * PLUG)];
    assert_eq!(machine.numbers(), numbers);
}

#[test]
fn what_another_listener_refuses_is_undone_in_kvm() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let vm = machine.vm.clone();
    machine.space.attach("last", Refuses(2)).unwrap();
    machine.space.insert(region(PLUG, MIB)).told_all();
    assert!(machine.guest.writes(PLUG, 0x77));

    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), MIB));
    let change = change.insert(region(PLUG, 2 * MIB));
    let change = change.insert(region(2 * PLUG, MIB));
    let error = change.commit().unwrap_err();
    assert!(error.to_string().contains("\"last\""), "{error}");
    assert_eq!(machine.guest.reads(PLUG), Some(0x77));
    machine.misses(PLUG + MIB);
    machine.misses(2 * PLUG);
    // KVM has nothing else there either.
    let free = region(2 * PLUG, MIB);
    set_by_hand(&vm, 100, &free, 0).unwrap();
    remove_by_hand(&vm, 100, &free).unwrap();
    assert_eq!(machine.numbers(), [(0, 0), (1, PLUG)]);
}

#[test]
fn slots_that_cannot_be_attached_are_taken_back() {
    let Some(vm) = new_vm() else { return };
    let regions = vec![boot(), region(PLUG, MIB), region(2 * PLUG, MIB)];
    let memory = GuestMemoryShm::from_regions(regions.clone()).unwrap();
    let space = AddressSpace::new(memory);
    set_by_hand(&vm, 100, &regions[2], 0).unwrap();
    let slots = KvmSlots::new(vm.clone()).unwrap();
    let error = space.attach("kvm", slots).unwrap_err();
    assert_eq!(error.into_listener().slots().count(), 0);
    // What was made before the third was refused is gone.
    for (at, region) in (101..).zip(&regions[..2]) {
        set_by_hand(&vm, at, region, 0).unwrap();
        remove_by_hand(&vm, at, region).unwrap();
    }
    remove_by_hand(&vm, 100, &regions[2]).unwrap();
    let slots = KvmSlots::new(vm.clone()).unwrap();
    assert!(space.attach("kvm", slots).is_ok());
    assert_eq!(Guest::new(&vm).reads(2 * PLUG), Some(0));
}

#[test]
fn an_address_that_the_cpu_has_not_is_refused_with_a_remedy() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let error = machine.space.insert(region(1 << 58, MIB)).unwrap_err();
    let text = chain(&error);
    for part in ["0x400000000000000..=", "slot 1", "place the RAM lower"] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    let (_, at, _) = refusal(error);
    assert_eq!(at, Some(range(1 << 58, MIB)));
    assert_eq!(machine.numbers(), [(0, 0)]);
}

#[test]
fn a_region_too_large_for_a_slot_is_refused_before_any_listener_is_told() {
    let Some(vm) = new_vm() else { return };
    let slots = KvmSlots::new(vm.clone()).unwrap();
    let (machine, others) = machine_after_others(vm, slots);
    // 2^31 pages, none of them there.
    let error = machine.space.insert(region(1 << 44, 1 << 43)).unwrap_err();
    assert!(chain(&error).contains("split it"), "{error}");
    let (_, at, refused) = refusal(error);
    assert_eq!(at, Some(range(1 << 44, 1 << 43)));
    assert!(
        matches!(cause(&refused), KvmError::TooLarge { .. }),
        "{refused:?}"
    );
    assert_eq!(others.recorder.take(), [""; 0]);
}
