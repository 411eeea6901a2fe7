//! Slots of a hypervisor that is none of KVM's.

use std::panic::{AssertUnwindSafe, catch_unwind};

use guest_memory_shm::InvalidRange;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::fake::Call::{Log, Remove, Set};
use super::fake::{Fake, Fault};
use super::*;
use crate::isolation::in_own_process;
use crate::support::chain;

fn memory(starts: &[u64]) -> GuestMemoryShm {
    let regions = starts.iter().map(|start| region(*start, MIB)).collect();
    GuestMemoryShm::from_regions(regions).unwrap()
}

/// Slots that hold regions of 1 MiB at these addresses.
fn holding(fake: &Arc<Fake>, starts: &[u64]) -> KvmSlots {
    let mut slots = KvmSlots::new(fake.clone()).unwrap();
    slots.update(&memory(starts)).unwrap();
    fake.calls();
    slots
}

/// The pages of all harvested regions, as (first page, pages) from the start of the address space.
fn harvest(slots: &mut KvmSlots) -> Vec<(u64, u64)> {
    let dirty = slots.dirty_log().unwrap();
    let ranges = dirty.iter().flat_map(|region| region.ranges());
    let pages = |range: GuestRange| (range.start_addr().0 / PAGE, range.size() / PAGE);
    ranges.map(pages).collect()
}

#[test]
fn each_change_is_a_call_of_the_hypervisor() {
    let fake = Fake::new(8);
    let space = AddressSpace::new(memory(&[0]));
    let kvm = space
        .attach("slots", KvmSlots::new(fake.clone()).unwrap())
        .unwrap();
    space.insert(region(PLUG, MIB)).told_all();
    assert_eq!(fake.slots(), [(0, 0), (1, PLUG)]);
    assert_eq!(fake.calls(), [(Set, 0), (Set, 1)]);

    let slots =
        |work: fn(&mut KvmSlots) -> Result<(), KvmError>| space.with_listener(&kvm, work).unwrap();
    slots(KvmSlots::start_dirty_logging).unwrap();
    assert_eq!(fake.calls(), [(Set, 0), (Set, 1)]);
    fake.guest_writes(1, 0b110);
    let dirty = space.with_listener(&kvm, harvest).unwrap();
    assert_eq!(dirty, [(PLUG / PAGE + 1, 2)]);
    assert_eq!(fake.calls(), [(Log, 0), (Log, 1)]);

    space.remove((GuestAddress(PLUG), MIB)).told_all();
    assert_eq!(fake.calls(), [(Remove, 1)]);
    drop(space);
    assert_eq!(fake.calls(), [(Remove, 0)]);
    assert_eq!(fake.slots(), []);
}

#[test]
fn what_a_hypervisor_has_not_is_refused_by_its_limits() {
    let fake = Fake::new(2);
    let mut slots = KvmSlots::new(fake.clone()).unwrap();
    assert_eq!(slots.numbers().range().len(), 2);
    // It says nothing of read-only slots.
    let error = slots.add_read_only(range(0, MIB)).unwrap_err();
    assert!(matches!(error, KvmError::NoReadOnly { .. }), "{error}");
    let error = slots.check(&memory(&[0, PLUG, 2 * PLUG])).unwrap_err();
    assert!(
        matches!(
            cause(&error),
            KvmError::OutOfSlots {
                regions: 3,
                slots: 2,
                limit: 2,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(fake.calls(), []);
}

#[test]
fn its_own_errors_are_passed_on() {
    let fake = Fake::new(8);
    let mut slots = holding(&fake, &[0]);
    fake.fail(Set, Fault::Errno(libc::ENOTTY));
    let error = slots.start_dirty_logging().unwrap_err();
    let KvmError::Refused {
        slot: 0, source, ..
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!(source.raw_os_error(), Some(libc::ENOTTY));
}

#[test]
fn a_log_in_another_buffer_than_was_asked_for_counts_as_one_with_all_pages() {
    let fake = Fake::new(8);
    let mut slots = holding(&fake, &[0]);
    slots.start_dirty_logging().unwrap();
    // Shorter and longer than the 256 pages of the region.
    for pages in [64, 64 << 10] {
        fake.exchange_buffer(pages);
        assert_eq!(harvest(&mut slots), [(0, MIB / PAGE)]);
        fake.guest_writes(0, 0b100);
        assert_eq!(harvest(&mut slots), [(2, 1)]);
    }
}

#[test]
fn numbers_without_a_limit_take_no_room() {
    let fake = Fake::new(u32::MAX);
    let mut slots = KvmSlots::new(fake.clone()).unwrap();
    slots.assign_number(range(0, MIB), u32::MAX - 1).unwrap();
    slots.update(&memory(&[0, PLUG])).unwrap();
    assert_eq!(fake.slots(), [(0, PLUG), (u32::MAX - 1, 0)]);
    assert_eq!(slots.numbers().free(), u32::MAX - 2);
}

#[test]
fn a_hypervisor_that_panics_when_it_is_told_has_no_slot_afterwards() {
    for fault in [Fault::Panics, Fault::PanicsAfterwards] {
        let fake = Fake::new(8);
        let mut slots = KvmSlots::new(fake.clone()).unwrap();
        let boot = region(0, MIB);
        let before = GuestMemoryShm::from_regions(vec![boot.clone()]).unwrap();
        let after = GuestMemoryShm::from_regions(vec![boot, region(PLUG, MIB)]).unwrap();
        slots.update(&before).unwrap();
        fake.calls();
        fake.fail(Set, fault);
        let told = catch_unwind(AssertUnwindSafe(|| slots.update(&after)));
        std::mem::forget(told.unwrap_err());
        // It was asked to remove what it may have, and what it had not is refused: then the number
        // stays taken, to be on the safe side.
        assert_eq!(fake.calls(), [(Set, 1), (Remove, 1)]);
        assert_eq!(fake.slots(), [(0, 0)]);
        let lost = matches!(fault, Fault::Panics);
        let answer = slots.numbers().take_number(1);
        assert_eq!(answer.is_err(), lost, "{fault:?} {answer:?}");
        drop(answer);
        // It goes on with another number, or the same.
        slots.check(&after).unwrap();
        slots.update(&after).unwrap();
        assert_eq!(fake.slots(), [(0, 0), (1 + u32::from(lost), PLUG)]);
    }
}

#[test]
fn what_it_does_not_let_go_stays_mapped_and_its_number_taken() {
    for fault in [Fault::Errno(libc::EIO), Fault::Panics] {
        let fake = Fake::new(4);
        let slots = holding(&fake, &[0, PLUG]);
        fake.fail(Remove, fault);
        let number = slots.slots().next().unwrap().number();
        let numbers = slots.numbers().clone();
        // Neither the end of the slots nor a panic on the way unmaps it.
        drop(slots);
        assert_eq!(fake.slots(), [(number, 0)]);
        let error = numbers.take_number(number).unwrap_err();
        assert!(
            matches!(error, KvmError::NumberTaken { number: 0, .. }),
            "{error}"
        );
        assert_eq!(numbers.free(), 3);
        drop(numbers);

        // Those who come later do not get it either.
        let numbers = SlotNumbers::all(fake.clone()).unwrap();
        assert_eq!(numbers.free(), 3);
        let taken = [numbers.take(), numbers.take(), numbers.take()];
        let taken = taken.map(|number| number.unwrap().number());
        assert_eq!(taken, [1, 2, 3]);
        assert!(numbers.take_number(number).is_err());
    }
}

#[test]
fn a_panic_on_the_way_out_ends_there() {
    let fake = Fake::new(4);
    let slots = holding(&fake, &[0, PLUG]);
    fake.fail(Remove, Fault::PanicsAfterwards);
    // While another panic is on its way: a second one would end the process.
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _slots = slots;
        panic!("something else");
    }));
    assert_eq!(unwound.unwrap_err().downcast_ref(), Some(&"something else"));
    assert_eq!(fake.calls(), [(Remove, 0), (Remove, 1)]);
    assert_eq!(fake.slots(), []);
}

#[test]
fn a_log_that_does_not_come_counts_all_pages_as_written() {
    for fault in [Fault::Errno(libc::EFAULT), Fault::Panics] {
        let fake = Fake::new(4);
        let mut slots = holding(&fake, &[0, PLUG]);
        slots.start_dirty_logging().unwrap();
        fake.guest_writes(0, 1);
        fake.guest_writes(1, 1);
        // The first comes, the second does not.
        fake.fail(Log, Fault::Errno(libc::EINTR));
        slots.dirty_log().unwrap_err();
        fake.fail(Log, fault);
        let failed = catch_unwind(AssertUnwindSafe(|| slots.dirty_log().unwrap_err()));
        drop(failed);
        assert_eq!(harvest(&mut slots), [(0, MIB / PAGE), (PLUG / PAGE, 1)]);
        assert_eq!(harvest(&mut slots), []);

        // A log that is started anew has nothing to make up for.
        fake.fail(Log, fault);
        let _ = catch_unwind(AssertUnwindSafe(|| slots.dirty_log().unwrap_err()));
        slots.stop_dirty_logging().unwrap();
        slots.start_dirty_logging().unwrap();
        assert_eq!(harvest(&mut slots), []);
    }
}

#[test]
fn a_log_that_there_is_no_room_to_read_is_not_started() {
    in_own_process(|| {
        let fake = Fake::new(4);
        let mut slots = holding(&fake, &[0]);
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
        // Room for anything but a log.
        setrlimit(Resource::RLIMIT_AS, pages * PAGE + 128 * MIB, hard).unwrap();
        let error = slots.start_dirty_logging().unwrap_err();
        assert!(error.to_string().contains("a log needs 256 MiB"), "{error}");
        assert!(
            matches!(error, KvmError::NoLogBuffer { pages: 256, .. }),
            "{error}"
        );
        assert!(!slots.is_dirty_logging());
        assert_eq!(fake.calls(), []);

        setrlimit(Resource::RLIMIT_AS, hard, hard).unwrap();
        slots.start_dirty_logging().unwrap();
        assert_eq!(harvest(&mut slots), []);
    });
}

#[test]
fn bits_past_the_last_page_are_no_pages() {
    let fake = Fake::new(4);
    let mut slots = KvmSlots::new(fake.clone()).unwrap();
    let regions = vec![region(0, 5 * PAGE)];
    slots
        .update(&GuestMemoryShm::from_regions(regions).unwrap())
        .unwrap();
    slots.start_dirty_logging().unwrap();
    fake.guest_writes(0, 0xff01);
    let dirty = slots.dirty_log().unwrap();
    assert_eq!((dirty[0].count(), dirty[0].words()), (1, &[1][..]));
}

#[test]
fn a_region_that_is_not_whole_pages_has_no_slot() {
    let fake = Fake::new(8);
    let mut slots = KvmSlots::new(fake.clone()).unwrap();
    for odd in [(GuestAddress(PLUG), 300), (GuestAddress(PLUG + 1), 4096)] {
        let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 4096), odd]).unwrap();
        let size = odd.1 as u64;
        let partly = |error: &ListenerError| {
            assert_eq!(error.range(), Some(range(odd.0.0, size)));
            let cause = cause(error);
            let partial = matches!(cause, KvmError::Range(InvalidRange::PartialPages { .. }));
            assert!(partial, "{cause:?}");
        };
        partly(&slots.check(&memory).unwrap_err());
        let space = AddressSpace::new(memory.clone());
        let refused = space.attach("slots", KvmSlots::new(Fake::new(8)).unwrap());
        let refused = chain(&refused.unwrap_err());
        assert!(refused.contains("is not whole pages of 4 KiB"), "{refused}");

        // Told without having been asked, too: what is whole is there then.
        partly(&slots.update(&memory).unwrap_err());
        assert_eq!(fake.slots(), [(0, 0)]);
    }
}
