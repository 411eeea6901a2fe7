//! Memory that the guest may only read.

use std::fs;

use guest_memory_shm::{Access, BackingSource, GuestRom, InvalidRange, RamOptions};
use tempfile::TempDir;

use super::*;
use crate::support::chain;

/// A ROM of 4 pages at `start`; its first byte is 0xea.
fn rom(start: u64) -> (TempDir, GuestRom) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rom");
    let mut contents = vec![0x90; 4 * PAGE as usize];
    contents[0] = 0xea;
    fs::write(&path, contents).unwrap();
    let options = RamOptions::new()
        .with_backing(BackingSource::File(path))
        .with_access(Access::ReadOnly);
    let rom = GuestRom::new((GuestAddress(start), 4 * PAGE), &options).unwrap();
    (dir, rom)
}

#[test]
fn the_guest_reads_a_read_only_region_and_its_writes_exit() {
    let Some(vm) = new_vm() else { return };
    let mut slots = KvmSlots::new(vm.clone()).unwrap();
    slots.add_read_only(range(PLUG, 4 * MIB)).unwrap();
    let mut machine = Machine::with(vm, slots);
    for start in [PLUG, PLUG + 2 * MIB, PLUG + 4 * MIB] {
        machine.space.insert(region(start, MIB)).told_all();
    }
    for start in [PLUG, PLUG + 2 * MIB] {
        let memory = machine.space.published().memory().clone();
        memory.write_obj(0x42u8, GuestAddress(start)).unwrap();
        assert_eq!(machine.guest.reads(start), Some(0x42));
        assert!(!machine.guest.writes(start, 7));
        assert_eq!(byte_of(&machine.space, start), 0x42);
        assert_eq!(machine.guest.reads(start), Some(0x42));
    }
    // Others are as ever.
    machine.reaches(PLUG + 4 * MIB);
    let read_only: Vec<_> =
        machine.slots(|slots| slots.slots().map(KvmSlot::is_read_only).collect());
    assert_eq!(read_only, [false, true, true, false]);
}

#[test]
fn a_region_that_is_read_only_in_part_is_refused() {
    let Some(vm) = new_vm() else { return };
    let mut slots = KvmSlots::new(vm.clone()).unwrap();
    slots.add_read_only(range(PLUG, 2 * MIB)).unwrap();
    let mut machine = Machine::with(vm, slots);
    for (start, size) in [(PLUG - MIB, 2), (PLUG + MIB, 2), (PLUG - MIB, 4)] {
        let error = machine.space.insert(region(start, size * MIB)).unwrap_err();
        assert!(chain(&error).contains("begin and end"), "{error}");
        let (_, at, refused) = refusal(error);
        assert_eq!(at, Some(range(start, size * MIB)));
        assert!(
            matches!(cause(&refused), KvmError::PartlyReadOnly { .. }),
            "{refused:?}"
        );
        machine.misses(start);
    }
}

#[test]
fn what_is_there_cannot_become_read_only_and_stays_there() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let late = range(0x8000, PAGE);
    let error = machine
        .slots(|slots| slots.add_read_only(late))
        .unwrap_err();
    assert!(
        matches!(error, KvmError::TooLate { region, .. } if region == range(0, MIB)),
        "{error}"
    );
    machine.reaches(0x8000);

    // Detached, they are not dropped by the refusal either: the guest has its RAM as before.
    let mut slots = machine.space.detach(machine.kvm).unwrap();
    slots.add_read_only(late).unwrap_err();
    assert_eq!(slots.slots().count(), 1);
    assert!(machine.guest.writes(0x8000, 7));
    assert_eq!(machine.guest.reads(0x8000), Some(7));
    // Elsewhere it is not too late, and the slots have it when they are back.
    slots.add_read_only(range(PLUG, MIB)).unwrap();
    machine.kvm = machine.space.attach("kvm", slots).unwrap();
    machine.space.insert(region(PLUG, MIB)).told_all();
    assert_eq!(machine.guest.reads(PLUG), Some(0));
    assert!(!machine.guest.writes(PLUG, 7));
    machine.reaches(0x8000);
}

#[test]
fn a_rom_is_a_slot_that_the_guest_only_reads() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let (_dir, rom) = rom(PLUG);
    machine.slots(|slots| slots.add_rom(rom)).unwrap();
    assert_eq!(machine.numbers(), [(0, 0), (1, PLUG)]);
    assert_eq!(machine.guest.reads(PLUG), Some(0xea));
    assert!(!machine.guest.writes(PLUG, 7));
    assert_eq!(machine.guest.reads(PLUG), Some(0xea));

    // Changes of the memory leave it alone, and it is not in their way.
    machine.space.insert(region(2 * PLUG, MIB)).told_all();
    machine
        .space
        .remove((GuestAddress(2 * PLUG), MIB))
        .told_all();
    assert_eq!(machine.guest.reads(PLUG + 1), Some(0x90));
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    assert!(!machine.guest.writes(PLUG, 7));
    assert!(machine.guest.writes(0x8000, 7));
    let dirty = machine.slots(KvmSlots::dirty_log).unwrap();
    assert_eq!(dirty.len(), 1);

    let rom = machine.slots(|slots| slots.remove_rom(GuestAddress(PLUG)));
    assert_eq!(rom.unwrap().range(), range(PLUG, 4 * PAGE));
    machine.misses(PLUG);
    let again = machine.slots(|slots| slots.remove_rom(GuestAddress(PLUG)));
    let ram = machine.slots(|slots| slots.remove_rom(GuestAddress(0)));
    for (answer, at) in [(again, PLUG), (ram, 0)] {
        let error = answer.unwrap_err();
        assert!(
            matches!(error, KvmError::NoSuchRom { start, .. } if start.0 == at),
            "{error}"
        );
    }
    machine.space.insert(region(PLUG, MIB)).told_all();
    machine.reaches(PLUG);
}

#[test]
fn roms_and_regions_do_not_overlap_and_share_the_slots() {
    let Some(vm) = new_vm() else { return };
    let slots = KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), 0..3).unwrap());
    let mut machine = Machine::with(vm, slots);
    machine.space.insert(region(PLUG, MIB)).told_all();
    for start in [PLUG, PLUG + MIB - PAGE, PLUG - 3 * PAGE] {
        let (_dir, rom) = rom(start);
        let error = machine.slots(|slots| slots.add_rom(rom)).unwrap_err();
        assert!(
            matches!(error, KvmError::Range(InvalidRange::Taken { .. })),
            "{error}"
        );
    }
    let (_dir, rom_behind) = rom(PLUG + MIB);
    machine.slots(|slots| slots.add_rom(rom_behind)).unwrap();

    // All three are in use.
    let (_dir, another) = rom(3 * PLUG);
    let error = machine.slots(|slots| slots.add_rom(another)).unwrap_err();
    let text = chain(&error);
    assert!(text.starts_with("2 regions and 2 ROMs"), "{text}");
    let error = machine.space.insert(region(2 * PLUG, MIB)).unwrap_err();
    let (_, _, refused) = refusal(error);
    let text = refused.reason();
    assert!(text.starts_with("3 regions and 1 ROMs"), "{text}");

    // A region where the ROM is.
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), MIB));
    let error = change.insert(region(PLUG, 2 * MIB)).commit().unwrap_err();
    let (listener, at, refused) = refusal(error);
    assert_eq!((listener.as_str(), at), ("kvm", Some(range(PLUG, 2 * MIB))));
    assert!(
        matches!(cause(&refused), KvmError::Range(InvalidRange::Taken { .. })),
        "{refused:?}"
    );
    machine.reaches(PLUG);
    assert_eq!(machine.guest.reads(PLUG + MIB), Some(0xea));
}
