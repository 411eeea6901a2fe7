//! The end of slots and of what they map.

use super::*;
use crate::isolation::{in_own_process, in_own_process_leaving_nothing};
use crate::proc::maps_in;
use crate::support::chain;

/// Whether the RAM that starts at `addr` in this process is mapped. Another thread may have mapped
/// something else there: for a process of its own.
fn is_mapped(addr: u64) -> bool {
    !maps_in(addr..addr + MIB).is_empty()
}

#[test]
fn dropped_slots_are_gone_from_kvm() {
    let Some(vm) = new_vm() else { return };
    let regions = vec![boot(), region(PLUG, MIB)];
    let memory = GuestMemoryShm::from_regions(regions.clone()).unwrap();
    let space = AddressSpace::new(memory);
    let slots = KvmSlots::new(vm.clone()).unwrap();
    let id = space.attach("kvm", slots).unwrap();
    for region in &regions {
        let taken = set_by_hand(&vm, 100, region, 0);
        assert_eq!(taken, Err(nix::libc::EEXIST));
    }
    // Detached it goes on holding them.
    let slots = space.detach(id).unwrap();
    assert_eq!(slots.slots().count(), 2);
    let taken = set_by_hand(&vm, 100, &regions[1], 0);
    assert_eq!(taken, Err(nix::libc::EEXIST));
    drop(slots);
    for (slot, region) in (100..).zip(&regions) {
        set_by_hand(&vm, slot, region, 0).unwrap();
    }
    assert_eq!(Guest::new(&vm).reads(PLUG), Some(0));
}

#[test]
fn what_a_slot_maps_stays_mapped_until_the_slot_is_gone() {
    in_own_process(|| {
        stays_until_the_slot_is_gone();
    });
}

fn stays_until_the_slot_is_gone() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let plugged = region(PLUG, MIB);
    let host = plugged.as_ptr().addr() as u64;
    machine.space.insert(plugged).told_all();
    let Machine {
        space,
        kvm,
        mut guest,
        ..
    } = machine;
    // Only the slots are left of the memory.
    let slots = space.detach(kvm).unwrap();
    drop(space);
    assert!(guest.writes(PLUG, 3));
    assert_eq!(guest.reads(PLUG), Some(3));
    assert!(is_mapped(host));
    drop(slots);
    assert!(!is_mapped(host));
}

#[test]
fn what_kvm_does_not_let_go_stays_mapped() {
    in_own_process(|| {
        stays_mapped();
    });
}

fn stays_mapped() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let plugged = region(PLUG, MIB);
    let host = plugged.as_ptr().addr() as u64;
    machine.space.insert(plugged.clone()).told_all();
    let first = machine.space.published().memory().arc_regions().remove(0);
    let first_host = first.as_ptr().addr() as u64;
    drop(first);
    // KVM says no to the removal of a slot that has been removed already.
    remove_by_hand(&machine.vm, 1, &plugged).unwrap();
    drop(plugged);
    let error = machine.space.remove((GuestAddress(PLUG), MIB)).unwrap_err();
    assert!(chain(&error).contains("remove memory slot 1"), "{error}");
    let (_, at, _) = refusal(error);
    assert_eq!(at, Some(range(PLUG, MIB)));
    assert_eq!(machine.numbers(), [(0, 0), (1, PLUG)]);

    drop(machine);
    assert!(is_mapped(host));
    assert!(!is_mapped(first_host));
}

#[test]
fn a_machine_leaves_nothing_however_its_changes_end() {
    in_own_process_leaving_nothing!(|| {
        let Some(mut machine) = Machine::new() else {
            return;
        };
        let foreign = region(2 * PLUG, MIB);
        set_by_hand(&machine.vm, 100, &foreign, 0).unwrap();
        for _ in 0..3 {
            let change = machine.space.transaction();
            let change = change.insert(region(PLUG, MIB));
            change.insert(region(2 * PLUG, MIB)).commit().unwrap_err();
            machine.misses(PLUG);
        }
        machine.space.insert(region(PLUG, MIB)).told_all();
        machine.reaches(PLUG);
        remove_by_hand(&machine.vm, 100, &foreign).unwrap();
    });
}
