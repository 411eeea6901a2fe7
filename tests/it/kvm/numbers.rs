//! Slot numbers: each is given once, the lowest first.

use std::collections::BTreeMap;
use std::iter::from_fn;
use std::ops::Range;

use guest_memory_shm::{SlotNumber, SlotNumbers};

use super::fake::Fake;

fn numbers(range: Range<u32>) -> SlotNumbers {
    SlotNumbers::new(Fake::new(u32::MAX), range).unwrap()
}

fn take(numbers: &SlotNumbers) -> Option<SlotNumber> {
    numbers.take().ok()
}

#[test]
fn the_lowest_free_number_is_next_and_no_other_is_ever_given() {
    let numbers = numbers(3..6);
    assert_eq!(numbers.free(), 3);
    let mut taken: Vec<_> = from_fn(|| take(&numbers)).collect();
    let given: Vec<_> = taken.iter().map(SlotNumber::number).collect();
    assert_eq!((given, numbers.free()), (vec![3, 4, 5], 0));
    drop((taken.pop(), taken.remove(0)));
    assert_eq!(numbers.free(), 2);
    let again: Vec<_> = from_fn(|| take(&numbers)).collect();
    let given: Vec<_> = again.iter().map(SlotNumber::number).collect();
    assert_eq!(given, [3, 5]);
}

#[test]
fn each_number_can_be_taken_by_name_once() {
    let numbers = numbers(10..20);
    let held = [14, 10, 19, 11].map(|number| {
        let taken = numbers.take_number(number).unwrap();
        numbers.take_number(number).unwrap_err();
        taken
    });
    let rest: Vec<_> = from_fn(|| take(&numbers)).collect();
    let given: Vec<_> = rest.iter().map(SlotNumber::number).collect();
    assert_eq!(given, [12, 13, 15, 16, 17, 18]);
    drop(held);
    assert_eq!(numbers.free(), 4);
}

#[test]
fn a_number_among_billions_is_as_good_as_any() {
    let numbers = numbers(0..u32::MAX);
    let last = numbers.take_number(u32::MAX - 1).unwrap();
    let middle = numbers.take_number(1 << 31).unwrap();
    assert_eq!(numbers.free(), u32::MAX - 2);
    drop((middle, last));
    assert_eq!(numbers.free(), u32::MAX);
}

#[test]
fn numbers_come_and_go_in_any_order() {
    let numbers = numbers(7..71);
    let mut taken = BTreeMap::new();
    let mut random = 1_u64;
    for _ in 0..5000 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let number = 7 + (random >> 40) as u32 % 64;
        match taken.remove(&number) {
            Some(held) => drop::<SlotNumber>(held),
            None => {
                taken.insert(number, numbers.take_number(number).unwrap());
                numbers.take_number(number).unwrap_err();
            }
        }
        assert_eq!(numbers.free() as usize + taken.len(), 64);
        let lowest = (7..71).find(|number| !taken.contains_key(number));
        assert_eq!(take(&numbers).map(|number| number.number()), lowest);
    }
}

/// Also by pointers to different tables of functions.
#[test]
fn a_vm_is_the_same_by_any_pointer_to_it() {
    let vm = Fake::new(32);
    let here = SlotNumbers::new(vm.clone(), 0..3).unwrap();
    SlotNumbers::new(vm.clone(), 2..4).unwrap_err();
    SlotNumbers::new(vm, 3..4).unwrap();
    let other = SlotNumbers::new(Fake::new(32), 0..3).unwrap();
    assert_eq!((here.free(), other.free()), (3, 3));
}
