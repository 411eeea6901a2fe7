//! KVM_CLEAR_DIRTY_LOG, where asking for the log does not clear it.

use guest_memory_shm::{LogBuffer, SlotMapping};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};

use super::*;
use crate::support::skip;

/// 130 pages: two words of the log, and two pages.
const PAGES: u64 = 130;

/// Has KVM clear only what it is told to. `false`: it cannot, and the test is to be skipped.
fn protects_by_hand(vm: &VmFd) -> bool {
    let cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(), 0, 0, 0],
        ..Default::default()
    };
    let enabled = vm.enable_cap(&cap);
    if let Err(error) = enabled {
        skip(&format!(
            "KVM has no manual protection of dirty logs: {error}"
        ));
    }
    enabled.is_ok()
}

fn log_of(vm: &VmFd, slot: &SlotMapping) -> Vec<u64> {
    let mut log = LogBuffer::new(PAGES).unwrap();
    vm.dirty_log(slot, &mut log).unwrap();
    log.words().to_vec()
}

#[test]
fn what_is_cleared_is_noted_again_and_nothing_else_is() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let vm = machine.vm.clone();
    if !protects_by_hand(&vm) {
        return;
    }
    machine.space.insert(region(PLUG, PAGES * PAGE)).told_all();
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    let slot = machine.slots(|slots| slots.slots().nth(1).unwrap().mapping());
    let write = |machine: &mut Machine, pages: &[u64]| {
        for page in pages {
            assert!(machine.guest.writes(PLUG + page * PAGE, 1));
        }
    };
    write(&mut machine, &[0, 1, 63, 64, 127, 128, 129]);
    let all = [1 << 63 | 3, 1 << 63 | 1, 3];
    assert_eq!(log_of(&vm, &slot), all);
    assert_eq!(log_of(&vm, &slot), all, "it was asked only");

    // One page of the first word, then the end of the slot, which is no whole word.
    vm.clear_dirty_log(&slot, 0, &[2]).unwrap();
    assert_eq!(log_of(&vm, &slot), [1 << 63 | 1, 1 << 63 | 1, 3]);
    vm.clear_dirty_log(&slot, 64, &[1 << 63, u64::MAX]).unwrap();
    assert_eq!(log_of(&vm, &slot), [1 << 63 | 1, 1, 0]);
    // What was cleared is noted when it is written again.
    write(&mut machine, &[1, 129]);
    assert_eq!(log_of(&vm, &slot), [1 << 63 | 3, 1, 2]);
    vm.clear_dirty_log(&slot, 0, &[u64::MAX; 3]).unwrap();
    assert_eq!(log_of(&vm, &slot), [0; 3]);
    write(&mut machine, &[70]);
    assert_eq!(log_of(&vm, &slot), [0, 1 << 6, 0]);
}

#[test]
fn words_that_are_not_of_the_log_are_refused() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let vm = machine.vm.clone();
    if !protects_by_hand(&vm) {
        return;
    }
    machine.space.insert(region(PLUG, PAGES * PAGE)).told_all();
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    let slot = machine.slots(|slots| slots.slots().nth(1).unwrap().mapping());
    for (first, words) in [(1, 1), (0, 4), (128, 2), (192, 1)] {
        let error = vm
            .clear_dirty_log(&slot, first, &vec![0; words])
            .unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    }
    // No slot of this number is there.
    let other = SlotMapping::new(
        9,
        slot.range(),
        std::ptr::NonNull::new(slot.host_addr()).unwrap(),
        slot.flags(),
    );
    let error = vm.clear_dirty_log(&other, 0, &[1]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::ENOENT));
}

#[test]
fn without_manual_protection_what_was_not_asked_for_can_be_cleared() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    let vm = machine.vm.clone();
    let slot = machine.slots(|slots| slots.slots().next().unwrap().mapping());
    assert!(machine.guest.writes(0x8000, 1));
    assert!(machine.guest.writes(0x9000, 1));
    vm.clear_dirty_log(&slot, 0, &[1 << 8]).unwrap();
    let dirty = machine.slots(KvmSlots::dirty_log).unwrap();
    assert_eq!(dirty[0].ranges().collect::<Vec<_>>(), [range(0x9000, PAGE)]);
}
