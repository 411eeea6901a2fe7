//! Slot numbers that the slots share with the VMM, and numbers that must be what they were.

use guest_memory_shm::SlotNumber;

use super::fake::{Call, Fake, Fault};
use super::*;

/// A device of the VMM with a slot of its own.
struct Window {
    vm: Arc<VmFd>,
    number: SlotNumber,
    memory: guest_memory_shm::GuestRegionShm,
}

impl Window {
    fn new(vm: &Arc<VmFd>, numbers: &SlotNumbers, start: u64) -> Self {
        let (number, memory) = (numbers.take().unwrap(), region(start, MIB));
        set_by_hand(vm, number.number(), &memory, 0).unwrap();
        let vm = vm.clone();
        Self { vm, number, memory }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        remove_by_hand(&self.vm, self.number.number(), &self.memory).unwrap();
    }
}

#[test]
fn devices_of_the_vmm_and_the_slots_take_numbers_from_one_place() {
    let Some(vm) = new_vm() else { return };
    let numbers = SlotNumbers::new(vm.clone(), 0..4).unwrap();
    let first = Window::new(&vm, &numbers, 4 * PLUG);
    let mut machine = Machine::with(vm.clone(), KvmSlots::with_numbers(numbers.clone()));
    let second = Window::new(&vm, &numbers, 5 * PLUG);
    machine.space.insert(region(PLUG, MIB)).told_all();
    assert_eq!(machine.numbers(), [(1, 0), (3, PLUG)]);
    assert_eq!((first.number.number(), second.number.number()), (0, 2));

    // All are taken, which is said before any listener is told, and to the VMM, too.
    let error = machine.space.insert(region(2 * PLUG, MIB)).unwrap_err();
    let (_, _, refused) = refusal(error);
    assert!(
        matches!(
            cause(&refused),
            KvmError::OutOfSlots {
                regions: 3,
                slots: 2,
                ..
            }
        ),
        "{refused:?}"
    );
    let error = numbers.take().unwrap_err();
    assert!(
        matches!(&error, KvmError::NoFreeNumber { numbers, .. } if *numbers == (0..4)),
        "{error}"
    );
    assert!(error.to_string().contains("use fewer slots"), "{error}");

    // What one gives back, another gets.
    drop(first);
    machine.space.insert(region(2 * PLUG, MIB)).told_all();
    assert_eq!(machine.numbers()[2], (0, 2 * PLUG));
    machine.space.remove((GuestAddress(PLUG), MIB)).told_all();
    let third = Window::new(&vm, &numbers, 4 * PLUG);
    assert_eq!(third.number.number(), 3);
    machine.reaches(2 * PLUG);
    machine.misses(PLUG);
}

#[test]
fn regions_get_the_numbers_that_they_had_before_a_restore() {
    let Some(vm) = new_vm() else { return };
    let mut slots = KvmSlots::new(vm.clone()).unwrap();
    let saved = [(7, 0, MIB), (300, PLUG, 2 * MIB), (2, 2 * PLUG, MIB)];
    for (number, start, size) in saved {
        slots.assign_number(range(start, size), number).unwrap();
        // Once more is no different.
        slots.assign_number(range(start, size), number).unwrap();
    }
    let mut machine = Machine::with(vm, slots);
    machine.space.insert(region(PLUG, 2 * MIB)).told_all();
    // Others get others, also before it is there.
    machine.space.insert(region(3 * PLUG, MIB)).told_all();
    machine.space.insert(region(4 * PLUG, MIB)).told_all();
    machine.space.insert(region(5 * PLUG, MIB)).told_all();
    machine.space.insert(region(2 * PLUG, MIB)).told_all();
    let numbers = [
        (7, 0),
        (300, PLUG),
        (2, 2 * PLUG),
        (0, 3 * PLUG),
        (1, 4 * PLUG),
        (3, 5 * PLUG),
    ];
    assert_eq!(machine.numbers(), numbers);
    machine.reaches(PLUG);
    machine.reaches(2 * PLUG);

    // It was what it was; what comes there after an unplug is like all others.
    machine
        .space
        .remove((GuestAddress(PLUG), 2 * MIB))
        .told_all();
    machine.space.insert(region(PLUG + MIB, 2 * MIB)).told_all();
    assert_eq!(machine.numbers()[1], (4, PLUG + MIB));
}

#[test]
fn a_number_that_cannot_be_assigned_is_refused_at_once() {
    let Some(vm) = new_vm() else { return };
    let numbers = SlotNumbers::new(vm.clone(), 2..9).unwrap();
    let device = numbers.take_number(5).unwrap();
    let mut slots = KvmSlots::with_numbers(numbers.clone());
    slots.assign_number(range(PLUG, 2 * MIB), 4).unwrap();

    let refused = |slots: &mut KvmSlots, start, size, number, part: &str| {
        let error = slots.assign_number(range(start, size), number).unwrap_err();
        assert!(
            error.to_string().contains(part),
            "{part} is missing: {error}"
        );
        error
    };
    let error = refused(&mut slots, 0, MIB, 5, "device of the VMM");
    assert!(matches!(error, KvmError::NumberTaken { number: 5, .. }));
    let error = refused(&mut slots, 0, MIB, 4, "slot number 4 is taken");
    assert!(matches!(error, KvmError::NumberTaken { number: 4, .. }));
    for number in [0, 9, u32::MAX] {
        let error = refused(&mut slots, 0, MIB, number, "the numbers are 2..9");
        assert!(matches!(error, KvmError::NoSuchNumber { .. }));
    }
    for (start, size, number) in [
        (PLUG, 2 * MIB, 6),
        (PLUG + MIB, MIB, 4),
        (PLUG - MIB, 2 * MIB, 6),
    ] {
        let error = refused(&mut slots, start, size, number, "has number 4 already");
        assert!(matches!(
            error,
            KvmError::NumberTooLate {
                other_number: 4,
                ..
            }
        ));
    }

    let machine = Machine::with(vm, slots);
    let error = machine.slots(|slots| refused(slots, 0, MIB, 8, "has number 2 already"));
    assert!(matches!(error, KvmError::NumberTooLate { other, .. } if other == range(0, MIB)));
    machine
        .slots(|slots| slots.assign_number(range(0, MIB), 2))
        .unwrap();

    // A region that is not what had the number is refused before any listener is told.
    let error = machine.space.insert(region(PLUG + MIB, MIB)).unwrap_err();
    let (_, at, refused) = refusal(error);
    assert_eq!(at, Some(range(PLUG + MIB, MIB)));
    assert!(
        matches!(cause(&refused), KvmError::PartlyAssigned { number: 4, assigned, .. }
            if *assigned == range(PLUG, 2 * MIB)),
        "{refused:?}"
    );
    assert_eq!(machine.numbers(), [(2, 0)]);
    // Nothing that was refused has taken anything: 2, 4 and 5 are taken.
    assert_eq!(numbers.free(), 4);
    drop(device);
    assert_eq!(numbers.free(), 5);
}

/// Refuses each change, after it has taken all numbers but `left`.
struct Thief {
    numbers: SlotNumbers,
    left: u32,
    taken: Vec<SlotNumber>,
}

impl MemoryListener for Thief {
    fn check(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        Ok(())
    }

    fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        if memory.arc_regions().len() == 2 {
            return Ok(());
        }
        while self.numbers.free() > self.left {
            self.taken.push(self.numbers.take().unwrap());
        }
        Err(ListenerError::refused("a change"))
    }
}

#[test]
fn a_change_that_is_undone_gives_each_region_its_number_back() {
    let fake = Fake::new(16);
    let numbers = SlotNumbers::all(fake.clone()).unwrap();
    let mut slots = KvmSlots::with_numbers(numbers.clone());
    slots.assign_number(range(3 * PLUG, MIB), 9).unwrap();
    slots.assign_number(range(PLUG, MIB), 5).unwrap();
    let boot = vec![boot(), region(PLUG, MIB)];
    let space = AddressSpace::new(GuestMemoryShm::from_regions(boot).unwrap());
    space.attach("slots", slots).unwrap();
    let thief = Thief {
        numbers: numbers.clone(),
        left: 2,
        taken: Vec::new(),
    };
    let thief = space.attach("thief", thief).unwrap();
    assert_eq!(fake.slots(), [(0, 0), (5, PLUG)]);

    // Both that are there go, and three come, one to the number that is kept for it.
    let anew = || {
        let change = space.transaction().remove((GuestAddress(0), MIB));
        let change = change.remove((GuestAddress(PLUG), MIB));
        let change = change.insert(region(PLUG, 2 * MIB));
        let change = change.insert(region(2 * PLUG, MIB));
        change.insert(region(3 * PLUG, MIB)).commit()
    };
    for _ in 0..2 {
        anew().unwrap_err();
        assert_eq!(fake.slots(), [(0, 0), (5, PLUG)]);
    }
    let taken = space.with_listener(&thief, |thief| std::mem::take(&mut thief.taken));
    let taken: Vec<_> = taken.unwrap().iter().map(SlotNumber::number).collect();
    assert!(taken.len() > 5, "{taken:?}");
    assert!(
        !taken.iter().any(|number| [0, 5, 9].contains(number)),
        "{taken:?}"
    );
    space.detach(thief).unwrap();
    anew().told_all();
    let mut slots = fake.slots();
    slots.sort_by_key(|(_, start)| *start);
    assert_eq!(slots[2], (9, 3 * PLUG));
}

#[test]
fn a_refused_region_keeps_the_number_that_is_assigned_to_it() {
    let fake = Fake::new(8);
    let mut slots = KvmSlots::new(fake.clone()).unwrap();
    slots.assign_number(range(PLUG, MIB), 5).unwrap();
    let plugged = vec![region(PLUG, MIB)];
    let plugged = GuestMemoryShm::from_regions(plugged).unwrap();
    for _ in 0..2 {
        fake.fail(Call::Set, Fault::Errno(nix::libc::ENOMEM));
        slots.check(&plugged).unwrap();
        slots.update(&plugged).unwrap_err();
        // Nothing else gets it meanwhile.
        slots.numbers().take_number(5).unwrap_err();
    }
    slots.check(&plugged).unwrap();
    slots.update(&plugged).unwrap();
    assert_eq!(fake.slots(), [(5, PLUG)]);
}

#[test]
fn no_number_is_given_to_two_at_once() {
    const THREADS: usize = 8;
    let fake = Fake::new(5);
    let numbers = SlotNumbers::all(fake).unwrap();
    let owners: [Mutex<()>; 5] = Default::default();
    let taken = std::thread::scope(|threads| {
        let takes = || {
            let mut taken = 0;
            for _ in 0..2000 {
                let Ok(number) = numbers.take() else { continue };
                let owner = &owners[number.number() as usize];
                drop(owner.try_lock().expect("another has it, too"));
                taken += 1;
                drop(number);
            }
            taken
        };
        let threads: Vec<_> = (0..THREADS).map(|_| threads.spawn(takes)).collect();
        let taken = threads.into_iter().map(|thread| thread.join().unwrap());
        taken.sum::<usize>()
    });
    assert!(taken > 2000);
    assert_eq!(numbers.free(), 5);
}
