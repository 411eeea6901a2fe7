//! KVM's dirty log.

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;

use super::*;

impl Machine {
    /// What the guest wrote, as (first page, pages) from the start of the address space.
    fn dirty(&self) -> Vec<(u64, u64)> {
        let dirty = self.slots(KvmSlots::dirty_log).unwrap();
        let ranges = dirty.iter().flat_map(|region| {
            assert_eq!(region.page_size(), PAGE);
            assert!(region.count() > 0);
            region.ranges()
        });
        ranges
            .map(|range| (range.start_addr().0 / PAGE, range.size() / PAGE))
            .collect()
    }

    #[track_caller]
    fn write(&mut self, addr: u64) {
        assert!(self.guest.writes(addr, 1), "{addr:#x}");
    }
}

const PLUG_PAGE: u64 = PLUG / PAGE;

#[test]
fn the_log_names_exactly_the_pages_that_the_guest_wrote() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    machine.space.insert(region(PLUG, MIB)).told_all();
    machine.write(PLUG);
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    assert!(machine.slots(|slots| slots.is_dirty_logging()));
    assert_eq!(machine.dirty(), []);

    for page in [
        0x10,
        0x11,
        0x13,
        PLUG_PAGE + 63,
        PLUG_PAGE + 64,
        PLUG_PAGE + 255,
    ] {
        machine.write(page * PAGE + page % PAGE);
    }
    assert_eq!(machine.guest.reads(0x20 * PAGE), Some(0));
    // What the VMM writes is not KVM's to know.
    let memory = machine.space.published().memory().clone();
    memory.write_obj(1u8, GuestAddress(0x30 * PAGE)).unwrap();
    let written = [
        (0x10, 2),
        (0x13, 1),
        (PLUG_PAGE + 63, 2),
        (PLUG_PAGE + 255, 1),
    ];
    assert_eq!(machine.dirty(), written);
    // It was cleared, and goes on.
    assert_eq!(machine.dirty(), []);
    machine.write(0x13 * PAGE);
    assert_eq!(machine.dirty(), [(0x13, 1)]);

    machine.slots(KvmSlots::stop_dirty_logging).unwrap();
    machine.write(0x14 * PAGE);
    let error = machine.slots(KvmSlots::dirty_log).unwrap_err();
    assert!(matches!(error, KvmError::NotLogging), "{error}");
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    assert_eq!(machine.dirty(), []);
}

#[test]
fn logging_stays_on_for_regions_that_come_later() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    machine.write(0x10 * PAGE);
    machine.space.insert(region(PLUG, MIB)).told_all();
    machine.write(PLUG + PAGE);
    assert_eq!(machine.dirty(), [(0x10, 1), (PLUG_PAGE + 1, 1)]);

    // Another in its place, of another size.
    machine.write(PLUG + 2 * PAGE);
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), MIB));
    change.insert(region(PLUG, 2 * MIB)).commit().told_all();
    assert_eq!(machine.dirty(), []);
    machine.write(PLUG + 2 * MIB - 1);
    assert_eq!(machine.dirty(), [(PLUG_PAGE + 511, 1)]);

    // A change that is undone makes a new slot of the old region. What was written before that
    // must not be lost, and only KVM knew what it was.
    machine.write(PLUG);
    let foreign = region(2 * PLUG, MIB);
    set_by_hand(&machine.vm, 100, &foreign, 0).unwrap();
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), 2 * MIB));
    change.insert(region(2 * PLUG, MIB)).commit().unwrap_err();
    machine.write(PLUG + 3 * PAGE);
    assert_eq!(machine.dirty(), [(PLUG_PAGE, 512)]);
    machine.write(PLUG + 3 * PAGE);
    assert_eq!(machine.dirty(), [(PLUG_PAGE + 3, 1)]);
}

/// Takes the slot of `region` away unnoticed, and puts another there, so that KVM
/// refuses what is asked of the first.
fn usurp(machine: &Machine, number: u32, region: &guest_memory_shm::GuestRegionShm) {
    remove_by_hand(&machine.vm, number, region).unwrap();
    set_by_hand(&machine.vm, 100, region, 0).unwrap();
}

fn give_back(machine: &Machine, number: u32, region: &guest_memory_shm::GuestRegionShm) {
    remove_by_hand(&machine.vm, 100, region).unwrap();
    set_by_hand(&machine.vm, number, region, 0).unwrap();
}

#[test]
fn a_log_that_cannot_be_started_everywhere_is_started_nowhere() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let plugged = region(PLUG, MIB);
    machine.space.insert(plugged.clone()).told_all();
    usurp(&machine, 1, &plugged);
    let error = machine.slots(KvmSlots::start_dirty_logging).unwrap_err();
    let text = error.to_string();
    for part in ["slot 1", "dirty logging", "another slot of the VM overlaps"] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    assert!(matches!(error, KvmError::Refused { slot: 1, .. }), "{text}");
    assert!(machine.slots(|slots| !slots.is_dirty_logging()));
    assert!(machine.slots(|slots| slots.slots().all(|slot| !slot.is_logging())));
    // KVM says so too: it has no log of the first slot.
    let errno = machine.vm.get_dirty_log(0, MIB as usize).unwrap_err();
    assert_eq!(errno.errno(), nix::libc::ENOENT);

    give_back(&machine, 1, &plugged);
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    assert!(machine.vm.get_dirty_log(0, MIB as usize).is_ok());
    machine.write(PLUG);
    assert_eq!(machine.dirty(), [(PLUG_PAGE, 1)]);
}

#[test]
fn a_harvest_that_fails_half_way_loses_nothing() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let plugged = region(PLUG, MIB);
    machine.space.insert(plugged.clone()).told_all();
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    machine.write(0x10 * PAGE);
    // Other code switches the log of the second slot off.
    set_by_hand(&machine.vm, 1, &plugged, 0).unwrap();
    for page in [0x12, 0x13] {
        let error = machine.slots(KvmSlots::dirty_log).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, KvmError::NoDirtyLog { slot: 1, range: of, .. }
                if of == range(PLUG, MIB)),
            "{text}"
        );
        assert!(text.contains("another part of the VMM"), "{text}");
        machine.write(page * PAGE);
        machine.write(PLUG + page * PAGE);
    }
    set_by_hand(&machine.vm, 1, &plugged, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    machine.write(PLUG);
    // What the guest wrote to the second while nothing logged it is not known, so all counts.
    let written = [(0x10, 1), (0x12, 2), (PLUG_PAGE, MIB / PAGE)];
    assert_eq!(machine.dirty(), written);
    assert_eq!(machine.dirty(), []);
    machine.write(PLUG);
    assert_eq!(machine.dirty(), [(PLUG_PAGE, 1)]);
}

#[test]
fn a_log_that_cannot_be_stopped_everywhere_can_be_stopped_later() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let memory = machine.space.published().memory().arc_regions();
    machine.space.insert(region(PLUG, MIB)).told_all();
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    usurp(&machine, 0, &memory[0]);
    let error = machine.slots(KvmSlots::stop_dirty_logging).unwrap_err();
    assert!(
        matches!(error, KvmError::Refused { slot: 0, .. }),
        "{error}"
    );
    let logging = |machine: &Machine| {
        let logging = |slots: &mut KvmSlots| slots.slots().map(KvmSlot::is_logging).collect();
        machine.slots::<Vec<_>>(logging)
    };
    assert_eq!(logging(&machine), [true, false]);
    // Regions that come now are not logged.
    machine.space.insert(region(2 * PLUG, MIB)).told_all();
    assert_eq!(logging(&machine), [true, false, false]);
    give_back(&machine, 0, &memory[0]);
    machine.slots(KvmSlots::stop_dirty_logging).unwrap();
    assert_eq!(logging(&machine), [false; 3]);
    machine.reaches(0x8000);
}
