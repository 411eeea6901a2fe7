//! Slots that others change: other `KvmSlots` of the same VM, and all that have its descriptor.
#![expect(
    unsafe_code,
    reason = "a second VmFd of one VM is made from a descriptor, which kvm-ioctls calls unsafe"
)]

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};

use guest_memory_shm::GuestRegionShm;
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::Kvm;

use super::*;
use crate::isolation::in_own_process;
use crate::proc::maps_in;

/// The same VM once more, as a part of the VMM makes it that has only the descriptor. Nothing
/// tells `KvmSlots` that it is the same.
fn once_more(vm: &VmFd) -> Arc<VmFd> {
    let kvm = Kvm::new().unwrap();
    // SAFETY: the descriptor is open as long as `vm` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    let fd = fd.try_clone_to_owned().unwrap().into_raw_fd();
    // SAFETY: it is a descriptor of a VM, and nothing else uses this copy of it.
    Arc::new(unsafe { kvm.create_vmfd_from_rawfd(fd) }.unwrap())
}

/// Slots that hold this region.
fn holding(vm: &Arc<VmFd>, region: GuestRegionShm) -> KvmSlots {
    let memory = GuestMemoryShm::from_regions(vec![region]).unwrap();
    let mut slots = KvmSlots::new(vm.clone()).unwrap();
    slots.update(&memory).unwrap();
    slots
}

#[test]
fn numbers_that_living_slots_of_the_vm_have_are_refused() {
    let Some(vm) = new_vm() else { return };
    let limit = vm.max_slots();
    let page = region(PLUG, PAGE);
    let mut first = holding(&vm, page.clone());
    first.start_dirty_logging().unwrap();
    // The others would take slot 0 away from it, and put 64 GiB into it.
    for numbers in [0..limit, 0..1, limit - 1..limit] {
        let error = SlotNumbers::new(vm.clone(), numbers.clone()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("KvmSlots::with_numbers"), "{text}");
        assert!(text.contains(&format!("0..{limit} belong to")), "{text}");
        assert!(
            matches!(error, KvmError::SlotsInUse { numbers: wanted, held, .. }
                if wanted == numbers && held == (0..limit)),
            "{text}"
        );
    }
    assert_eq!(first.dirty_log().unwrap(), []);

    // They have them until all that shares them is gone, slots and numbers alike.
    let numbers = first.numbers().clone();
    let device = numbers.take().unwrap();
    drop(first);
    KvmSlots::new(vm.clone()).unwrap_err();
    drop(numbers);
    KvmSlots::new(vm.clone()).unwrap_err();
    drop(device);
    drop(holding(&vm, page));
    // Another VM has numbers of its own.
    let other = new_vm().unwrap();
    let slots = (KvmSlots::new(vm).unwrap(), KvmSlots::new(other).unwrap());
    assert_eq!(
        (slots.0.numbers().range(), slots.1.numbers().range()),
        (0..limit, 0..limit)
    );
}

#[test]
fn slots_of_other_numbers_serve_the_same_guest() {
    let Some(vm) = new_vm() else { return };
    let mut others = KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), 8..16).unwrap());
    let memory = GuestMemoryShm::from_regions(vec![region(2 * PLUG, MIB)]).unwrap();
    others.update(&memory).unwrap();
    let slots = KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), 0..8).unwrap());
    let error = SlotNumbers::new(vm.clone(), 7..9).unwrap_err();
    assert!(matches!(error, KvmError::SlotsInUse { .. }), "{error}");
    let mut machine = Machine::with(vm, slots);
    machine.space.insert(region(PLUG, MIB)).told_all();
    machine.reaches(PLUG);
    assert!(machine.guest.writes(2 * PLUG, 3));
    drop(others);
    machine.misses(2 * PLUG);
    machine.reaches(PLUG);
}

#[test]
fn a_foreign_slot_that_is_larger_reaches_no_memory_of_the_harvest() {
    in_own_process(|| {
        // One word more than the log has, and 2 MiB.
        for size in [128 * PAGE, 64 << 30] {
            let Some(vm) = new_vm() else { return };
            let page = region(PLUG, PAGE);
            let mut first = holding(&vm, page.clone());
            first.start_dirty_logging().unwrap();
            // Another takes the slot away, and a third puts its own there.
            let copy = once_more(&vm);
            drop(holding(&copy, page.clone()));
            let mut third = holding(&copy, region(PLUG, size));
            third.start_dirty_logging().unwrap();
            misses_its_log_and_survives(&mut first);
            // Nor does the third suffer.
            assert_eq!(third.dirty_log().unwrap(), []);

            // When the slot is what it was, all of it counts as written.
            drop(third);
            set_by_hand(&vm, 0, &page, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
            let dirty = first.dirty_log().unwrap();
            assert_eq!(dirty[0].ranges().collect::<Vec<_>>(), [range(PLUG, PAGE)]);
        }
    });
}

/// Asks for the log of a slot that has been replaced by a larger one.
fn misses_its_log_and_survives(slots: &mut KvmSlots) {
    let mut heap: Vec<Box<[u64]>> = (0..64).map(|word| vec![word; 64].into()).collect();
    for _ in 0..3 {
        let error = slots.dirty_log().unwrap_err();
        let text = error.to_string();
        let KvmError::NoDirtyLog {
            slot: 0, source, ..
        } = error
        else {
            panic!("{text}")
        };
        assert_eq!(source.raw_os_error(), Some(nix::libc::EFAULT));
        assert!(text.contains("larger than this region"), "{text}");
        // A heap that was written to does not survive this.
        heap.extend((0..64).map(|word| vec![word; 64].into()));
        heap.drain(..64);
        let mut kept = (0..).zip(&heap);
        assert!(kept.all(|(at, words)| words.iter().all(|word| *word == at)));
    }
}

#[test]
fn a_foreign_slot_that_is_smaller_is_read_as_far_as_it_goes() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let plugged = region(PLUG, 16 * MIB);
    machine.space.insert(plugged.clone()).told_all();
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    remove_by_hand(&machine.vm, 1, &plugged).unwrap();
    let smaller = region(PLUG, MIB);
    set_by_hand(&machine.vm, 1, &smaller, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    // What the slots read before is not taken for what is past its end.
    assert!(machine.guest.writes(0x8000, 1));
    assert!(machine.guest.writes(PLUG, 1));
    let dirty = machine.slots(KvmSlots::dirty_log).unwrap();
    let ranges: Vec<_> = dirty.iter().flat_map(|region| region.ranges()).collect();
    assert_eq!(ranges, [range(0x8000, PAGE), range(PLUG, PAGE)]);
}

#[test]
fn a_slot_that_was_taken_over_keeps_its_memory_and_number() {
    let Some(vm) = new_vm() else { return };
    let (ours, theirs) = (region(PLUG, MIB), region(2 * PLUG, MIB));
    let host = theirs.as_ptr().addr() as u64;
    let first = holding(&vm, ours.clone());
    let copy = once_more(&vm);
    remove_by_hand(&vm, 0, &ours).unwrap();
    let second = holding(&copy, theirs);
    // KVM knows slots by number: this takes away the other's.
    drop(first);
    // The other cannot know: KVM says no, so its memory stays, and nothing gets its number.
    drop(second);
    let maps = maps_in(host..host + MIB);
    assert!(
        maps.iter().any(|line| line.path.contains("memfd")),
        "{maps:?}"
    );
    let numbers = SlotNumbers::new(copy, 0..3).unwrap();
    assert_eq!(numbers.free(), 2);
    let error = numbers.take_number(0).unwrap_err();
    assert!(
        matches!(error, KvmError::NumberTaken { number: 0, .. }),
        "{error}"
    );
    assert_eq!(numbers.take().unwrap().number(), 1);
}

#[test]
fn starting_the_log_puts_back_a_slot_that_another_removed() {
    let Some(mut machine) = Machine::new() else {
        return;
    };
    let plugged = region(PLUG, MIB);
    machine.space.insert(plugged.clone()).told_all();
    remove_by_hand(&machine.vm, 1, &plugged).unwrap();
    machine.misses(PLUG);
    // For KVM the change of a slot that is not there makes it.
    machine.slots(KvmSlots::start_dirty_logging).unwrap();
    machine.reaches(PLUG);
    let dirty = machine.slots(KvmSlots::dirty_log).unwrap();
    assert_eq!(dirty[0].region(), range(PLUG, MIB));
    machine.space.remove((GuestAddress(PLUG), MIB)).told_all();
    machine.misses(PLUG);
}

#[test]
fn of_many_that_want_all_numbers_at_once_one_gets_them() {
    let Some(vm) = new_vm() else { return };
    let barrier = std::sync::Barrier::new(8);
    let won = std::thread::scope(|threads| {
        let wants = || {
            barrier.wait();
            let slots = KvmSlots::new(vm.clone());
            barrier.wait();
            slots.is_ok()
        };
        let threads: Vec<_> = (0..8).map(|_| threads.spawn(wants)).collect();
        let won = threads.into_iter().map(|thread| thread.join().unwrap());
        won.filter(|won| *won).count()
    });
    assert_eq!(won, 1);
}
