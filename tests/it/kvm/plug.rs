//! Regions that come and go under a guest.

use std::collections::BTreeSet;

use super::*;

#[test]
fn the_guest_reaches_a_region_from_plug_to_unplug() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    machine.reaches(0x8000);
    for round in 0..3 {
        machine.misses(PLUG);
        machine.space.insert(region(PLUG, 2 * MIB)).told_all();
        machine.space.insert(region(PLUG + 4 * MIB, MIB)).told_all();
        machine.reaches(PLUG);
        machine.reaches(PLUG + 2 * MIB - 1);
        machine.misses(PLUG + 2 * MIB);
        machine.reaches(PLUG + 4 * MIB);
        let numbers = [(0, 0), (1, PLUG), (2, PLUG + 4 * MIB)];
        assert_eq!(machine.numbers(), numbers, "round {round}");

        // The other stays, with its contents.
        assert!(machine.guest.writes(PLUG + 4 * MIB, round));
        let change = machine.space.remove((GuestAddress(PLUG), 2 * MIB));
        change.told_all();
        machine.misses(PLUG);
        assert_eq!(machine.guest.reads(PLUG + 4 * MIB), Some(round));
        let change = machine.space.remove((GuestAddress(PLUG + 4 * MIB), MIB));
        change.told_all();
        machine.misses(PLUG + 4 * MIB);
    }
    machine.reaches(0x8000);
}

#[test]
fn a_region_is_replaced_by_another_in_its_place() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    machine.space.insert(region(PLUG, 2 * MIB)).told_all();
    assert!(machine.guest.writes(PLUG, 1));
    // The new one is larger, so that both could not be there at once.
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(PLUG), 2 * MIB));
    let change = change.insert(region(PLUG - MIB, 4 * MIB));
    change.insert(region(2 * PLUG, MIB)).commit().told_all();
    assert_eq!(machine.guest.reads(PLUG), Some(0));
    machine.reaches(PLUG - MIB);
    machine.reaches(2 * PLUG);
    // The number of the old one is taken last, for the change might have to be undone.
    let numbers = [(0, 0), (2, PLUG - MIB), (3, 2 * PLUG)];
    assert_eq!(machine.numbers(), numbers);
    // It was not, so the next change may have it.
    machine.space.insert(region(3 * PLUG, MIB)).told_all();
    assert_eq!(machine.numbers()[3], (1, 3 * PLUG));
    // What is replaced by one of its size keeps its number.
    let change = machine.space.transaction();
    let change = change.remove((GuestAddress(2 * PLUG), MIB));
    change.insert(region(2 * PLUG, MIB)).commit().told_all();
    assert_eq!(machine.numbers()[2], (3, 2 * PLUG));
}

#[test]
fn a_part_of_a_backing_is_what_the_guest_sees_of_it() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    // Two regions on one file, the second half first.
    let whole = region(0, 2 * MIB);
    for (start, offset) in [(PLUG, MIB), (PLUG + 8 * MIB, 0)] {
        let start = GuestAddress(start);
        let part = guest_memory_shm::GuestRegionShm::from_backing;
        let part = part(whole.backing(), offset, (start, MIB)).unwrap();
        machine.space.insert(part).told_all();
    }
    assert!(machine.guest.writes(PLUG + 5, 0x11));
    assert!(machine.guest.writes(PLUG + 8 * MIB + 7, 0x22));
    let at = |offset| {
        let addr = vm_memory::MemoryRegionAddress(offset);
        whole.read_obj::<u8>(addr).unwrap()
    };
    assert_eq!((at(MIB + 5), at(7)), (0x11, 0x22));
}

#[test]
fn slot_numbers_are_used_again_over_thousands_of_plugs() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    // At most 8 plugged at a time, at 16 places; a fixed sequence of a small generator.
    let mut plugged = BTreeSet::new();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let (mut plugs, mut unplugs) = (0, 0);
    while plugs + unplugs < 4000 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        let place = PLUG + (state >> 60) * MIB;
        if plugged.remove(&place) {
            machine.space.remove((GuestAddress(place), MIB)).told_all();
            unplugs += 1;
        } else if plugged.len() < 8 {
            machine.space.insert(region(place, MIB)).told_all();
            plugged.insert(place);
            plugs += 1;
        }
        if (plugs + unplugs) % 100 == 0 {
            for place in (0..16).map(|place| PLUG + place * MIB) {
                match plugged.contains(&place) {
                    true => machine.reaches(place),
                    false => machine.misses(place),
                }
            }
        }
    }
    assert!(plugs > 1500 && unplugs > 1500, "{plugs} {unplugs}");
    let numbers = machine.numbers();
    let different: BTreeSet<_> = numbers.iter().map(|(number, _)| number).collect();
    assert_eq!(different.len(), plugged.len() + 1);
    assert!(different.iter().all(|number| **number < 9), "{numbers:?}");
}

#[test]
fn only_the_numbers_that_it_was_given_are_used() {
    let Some(vm) = new_vm() else { return };
    let foreign = region(PLUG, MIB);
    set_by_hand(&vm, 0, &foreign, 0).unwrap();
    let slots = KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), 7..9).unwrap());
    assert_eq!(slots.numbers().range().len(), 2);
    let mut machine = Machine::with(vm.clone(), slots);
    machine.space.insert(region(2 * PLUG, MIB)).told_all();
    assert_eq!(machine.numbers(), [(7, 0), (8, 2 * PLUG)]);
    // The foreign one is there as before.
    assert!(machine.guest.writes(PLUG, 9));
    assert_eq!(crate::fork::byte_at(foreign.as_ptr()), 9);

    let limit = vm.max_slots();
    // What the kernel promises at least, and what it offers nowadays.
    assert!(limit >= 32, "{limit}");
    #[expect(clippy::reversed_empty_ranges, reason = "it is what is refused")]
    let bad = [3..3, 5..4, 0..limit + 1, limit..limit + 1];
    for numbers in bad {
        let error = SlotNumbers::new(vm.clone(), numbers.clone()).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, KvmError::NoSuchSlots { numbers: asked, limit: has, .. }
                if asked == numbers && has == limit),
            "{text}"
        );
        assert!(text.contains(&format!("KVM has 0..{limit}")), "{text}");
    }
    let Some(vm) = new_vm() else { return };
    let last = KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), limit - 1..limit).unwrap());
    let machine = Machine::with(vm, last);
    assert_eq!(machine.numbers(), [(limit - 1, 0)]);
}

#[test]
fn a_guest_that_runs_does_not_notice_what_happens_elsewhere() {
    const TIMES: u32 = 300_000;
    let Some(mut machine) = Machine::new() else {
        return;
    };
    machine.space.insert(region(PLUG, MIB)).told_all();
    let (mut changes, space) = (0, &machine.space);
    std::thread::scope(|threads| {
        // Any exit of its but the last would fail this thread.
        let runs = threads.spawn(|| machine.guest.counts(PLUG, TIMES));
        while !runs.is_finished() || changes < 100 {
            space.insert(region(2 * PLUG, MIB)).told_all();
            space.remove((GuestAddress(2 * PLUG), MIB)).told_all();
            changes += 2;
        }
        runs.join().unwrap();
    });
    let memory = machine.space.published().memory().clone();
    let counted: u32 = memory.read_obj(GuestAddress(PLUG)).unwrap();
    assert_eq!(counted, TIMES, "after {changes} changes");
}
