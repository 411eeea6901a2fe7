//! A driver's end of a queue against a device's end that is written here, by hand.

use std::thread;
use std::time::Duration;

use guest_memory_shm::driver::{Chain, Completion, DriverQueue, QueueError, QueueLayout};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

/// Long enough for a busy machine; no test that passes waits for it.
const LIMIT: Duration = Duration::from_secs(60);

const QUEUE: GuestAddress = GuestAddress(0x1000);

/// A buffer of the chain `number`, told by its address, of `length` bytes.
fn buffer(number: u64, length: u32) -> (GuestAddress, u32) {
    (GuestAddress(0x10_0000 + number * 0x1000), length)
}

/// Adds a chain of one readable and one writable buffer.
fn add(queue: &mut Queue<'_>, number: u64) -> u16 {
    let (readable, writable) = (buffer(number, 16), buffer(number, 512));
    queue.add(&[readable], &[writable]).unwrap()
}

/// The number of a chain that `add` made.
fn number(chain: &Parts) -> u64 {
    (chain.1[0].0.0 - 0x10_0000) / 0x1000
}

fn polled(queue: &mut Queue<'_>) -> Vec<Completion> {
    std::iter::from_fn(|| queue.poll().unwrap()).collect()
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

/// Head, readable and writable buffers.
type Parts = (u16, Vec<(GuestAddress, u32)>, Vec<(GuestAddress, u32)>);

fn parts(chain: &Chain) -> Parts {
    let chain = chain.clone();
    (chain.head, chain.readable, chain.writable)
}

type Queue<'a> = DriverQueue<&'a GuestMemoryMmap>;

/// The device's end.
struct Device<'a> {
    memory: &'a GuestMemoryMmap,
    layout: QueueLayout,
    size: u16,
    /// Of the avail ring, up to where it has taken chains.
    taken: u16,
    /// Of the used ring.
    used: u16,
}

impl<'a> Device<'a> {
    /// One that is told where it begins, and nothing else.
    fn new(queue: &Queue<'a>) -> Self {
        Self {
            memory: queue.memory(),
            layout: queue.layout(),
            size: queue.size(),
            taken: queue.used_index(),
            used: queue.used_index(),
        }
    }

    fn read<T: vm_memory::ByteValued>(&self, base: GuestAddress, offset: u64) -> T {
        self.memory.read_obj(base.unchecked_add(offset)).unwrap()
    }

    /// The next chain of the avail ring.
    fn take(&mut self) -> Option<Parts> {
        if self.read::<u16>(self.layout.avail, 2) == self.taken {
            return None;
        }
        let slot = u64::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        Some(self.chain(self.read(self.layout.avail, 4 + 2 * slot)))
    }

    fn take_all(&mut self) -> Vec<Parts> {
        std::iter::from_fn(|| self.take()).collect()
    }

    /// A chain, read from the descriptor table.
    fn chain(&self, head: u16) -> Parts {
        let mut lists = [Vec::new(), Vec::new()];
        let mut at = head;
        loop {
            let descriptor = 16 * u64::from(at);
            let table = self.layout.descriptors;
            let addr: u64 = self.read(table, descriptor);
            let length: u32 = self.read(table, descriptor + 8);
            let [flags, next]: [u16; 2] = self.read(table, descriptor + 12);
            let is_writable = flags & 2 != 0;
            assert!(
                is_writable || lists[1].is_empty(),
                "readable after writable"
            );
            lists[usize::from(is_writable)].push((GuestAddress(addr), length));
            if flags & 1 == 0 {
                break;
            }
            at = next;
            assert!(lists.iter().map(Vec::len).sum::<usize>() <= usize::from(self.size));
        }
        let [readable, writable] = lists;
        (head, readable, writable)
    }

    fn complete(&mut self, head: u16, written: u32) {
        self.write_entry(self.used, head.into(), written);
        self.used = self.used.wrapping_add(1);
        self.write_index(self.used);
    }

    fn write_entry(&self, index: u16, head: u32, written: u32) {
        let entry = 4 + 8 * u64::from(index % self.size);
        let at = self.layout.used.unchecked_add(entry);
        self.memory.write_obj([head, written], at).unwrap();
    }

    fn write_index(&self, index: u16) {
        let at = self.layout.used.unchecked_add(2);
        self.memory.write_obj(index, at).unwrap();
    }
}

#[test]
fn chains_arrive_as_they_were_added_and_come_back_in_the_device_s_order() {
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, QUEUE, 16).unwrap();
    let mut device = Device::new(&queue);
    let shapes = [(1, 0), (0, 1), (2, 3), (4, 1)];
    let added: Vec<Parts> = shapes
        .iter()
        .map(|(readable, writable)| {
            let list = |count| (0..count).map(|i| buffer(i, 100 + i as u32)).collect();
            let (readable, writable): (Vec<_>, Vec<_>) = (list(*readable), list(*writable));
            let expected = queue.next_head(readable.len() + writable.len()).unwrap();
            let head = queue.add(&readable, &writable).unwrap();
            assert_eq!(head, expected);
            (head, readable, writable)
        })
        .collect();
    assert_eq!((queue.in_flight(), queue.free_descriptors()), (4, 4));
    assert_eq!(device.take_all(), added);
    assert_eq!(queue.poll().unwrap(), None);

    for index in [2, 0, 3, 1] {
        device.complete(added[index].0, 7 + index as u32);
    }
    let done = polled(&mut queue);
    let back: Vec<_> = done.iter().map(|done| parts(&done.chain)).collect();
    assert_eq!(back, [2, 0, 3, 1].map(|index| added[index].clone()));
    let written: Vec<_> = done.iter().map(|done| done.written).collect();
    assert_eq!(written, [9, 7, 10, 8]);
    assert_eq!(done[0].chain.writable_bytes(), 100 + 101 + 102);
    assert_eq!((queue.in_flight(), queue.free_descriptors()), (0, 16));
}

/// More than 65,536 chains, which the device completes in all orders of a batch.
#[test]
fn the_indices_wrap_around_while_chains_overtake_each_other() {
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, QUEUE, 8).unwrap();
    let mut device = Device::new(&queue);
    let (mut added, mut taken, mut back) = (0, 0, 0);
    // The device holds some back: batches overlap.
    let mut held: Vec<Parts> = Vec::new();
    for round in 0_usize.. {
        if added < 70_000 {
            while queue.free_descriptors() >= 2 {
                add(&mut queue, added % 256);
                added += 1;
            }
        }
        let before = held.len();
        held.extend(device.take_all());
        let numbers: Vec<_> = held[before..].iter().map(number).collect();
        let expected: Vec<_> = (taken..added).map(|number| number % 256).collect();
        assert_eq!(numbers, expected);
        taken = added;

        let keep = if added < 70_000 { round % 3 } else { 0 };
        let mut completed = Vec::new();
        while held.len() > keep {
            let chain = held.swap_remove((round * 7 + completed.len()) % held.len());
            device.complete(chain.0, number(&chain) as u32);
            completed.push(chain);
        }
        let done = polled(&mut queue);
        for done in &done {
            assert_eq!(u64::from(done.written), number(&parts(&done.chain)));
        }
        let done: Vec<_> = done.iter().map(|done| parts(&done.chain)).collect();
        assert_eq!(done, completed);
        back += done.len() as u64;
        assert_eq!(u64::from(queue.used_index()), back % 0x1_0000);
        if back >= 70_000 && held.is_empty() {
            break;
        }
    }
    assert_eq!((added, queue.in_flight()), (back, 0));
}

#[test]
fn a_full_ring_and_a_chain_longer_than_it_are_refused_and_change_nothing() {
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, QUEUE, 4).unwrap();
    let mut device = Device::new(&queue);
    let long = [buffer(0, 1); 5];
    let error = queue.add(&long, &[]).unwrap_err();
    let too_long = matches!(
        error,
        QueueError::ChainTooLong {
            needed: 5,
            size: 4,
            ..
        }
    );
    assert!(too_long, "{error}");
    let error = queue.add(&[], &[]).unwrap_err();
    assert!(matches!(error, QueueError::EmptyChain), "{error}");
    let error = queue.add(&[buffer(0, 1)], &[buffer(3, 0)]).unwrap_err();
    let empty = buffer(3, 0).0;
    assert!(
        matches!(error, QueueError::EmptyBuffer(addr) if addr == empty),
        "{error}"
    );

    let first = queue.add(&long[..3], &[]).unwrap();
    let error = queue.add(&long[..1], &long[..1]).unwrap_err();
    let full = matches!(
        error,
        QueueError::Full {
            needed: 2,
            free: 1,
            ..
        }
    );
    assert!(full, "{error}");
    let last = queue.add(&[], &long[..1]).unwrap();
    assert!(queue.next_head(1).is_err());
    let heads: Vec<_> = device.take_all().iter().map(|chain| chain.0).collect();
    assert_eq!(heads, [first, last]);
    device.complete(first, 0);
    assert_eq!(polled(&mut queue).len(), 1);
    queue.add(&long[..3], &[]).unwrap();
    assert_eq!(device.take().unwrap().1.len(), 3);

    // All of the ring in one chain; the smallest ring there is.
    let mut queue = DriverQueue::new(&memory, QUEUE, 1).unwrap();
    let mut device = Device::new(&queue);
    for _ in 0..3 {
        let head = queue.add(&[], &[buffer(1, 1)]).unwrap();
        assert_eq!(device.take().unwrap().0, head);
        device.complete(head, 1);
        assert_eq!(polled(&mut queue).len(), 1);
    }
}

#[test]
fn a_place_or_a_size_that_is_none_is_refused() {
    let memory = memory();
    for size in [0, 3, 0x8001] {
        let error = DriverQueue::new(&memory, QUEUE, size).unwrap_err();
        assert!(
            matches!(error, QueueError::Size(bad) if bad == size),
            "{error}"
        );
    }
    for addr in [8, 0xf_fff0, 1 << 20, u64::MAX - 15] {
        let addr = GuestAddress(addr);
        let error = DriverQueue::new(&memory, addr, 64).unwrap_err();
        assert!(
            matches!(error, QueueError::Place { addr: bad, .. } if bad == addr),
            "{error}"
        );
    }
    // The largest there is takes 851,974 bytes.
    let queue = DriverQueue::new(&memory, QUEUE, 0x8000).unwrap();
    assert_eq!(queue.layout().size, QueueLayout::required_size(0x8000));
}

/// What the device writes is an error that names it, stays, and ends with a reset.
#[test]
fn nonsense_of_a_device_is_an_error_until_the_queue_is_reset() {
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, QUEUE, 8).unwrap();
    // Head and index: heads that are free, in the middle of a chain, beyond the table, far beyond.
    for (wrong, written) in [(7, 1), (0, 1), (8, 1), (0x1_0001, 1), (u32::MAX, 1)] {
        let head = add(&mut queue, 0);
        assert!(u32::from(head) != wrong);
        let device = Device::new(&queue);
        device.write_entry(0, wrong, 0);
        device.write_index(written);
        for _ in 0..3 {
            let error = queue.poll().unwrap_err();
            assert!(
                matches!(error, QueueError::UsedHead { head, index: 0, .. } if head == wrong),
                "{error}"
            );
        }
        assert!(queue.wait(LIMIT).is_err());
        assert_eq!(queue.reset().unwrap().len(), 1);
    }
    // Indices beyond what is in flight, and before what was taken.
    for wrong in [3, 0x8000, 0xffff, 0] {
        let heads = [0, 1].map(|number| add(&mut queue, number));
        let mut device = Device::new(&queue);
        device.complete(heads[0], 0);
        assert_eq!(polled(&mut queue).len(), 1);
        device.write_index(wrong);
        let is_named = |error: QueueError| {
            assert!(
                matches!(
                    error,
                    QueueError::UsedIndex {
                        index,
                        taken: 1,
                        in_flight: 1,
                        ..
                    } if index == wrong
                ),
                "{error}"
            );
        };
        is_named(queue.poll().unwrap_err());
        is_named(queue.wait(LIMIT).unwrap_err());
        is_named(queue.resubmit().unwrap_err());
        assert_eq!(queue.reset().unwrap().len(), 1);
    }
    // The same chain twice.
    let heads = [0, 1].map(|number| add(&mut queue, number));
    let mut device = Device::new(&queue);
    device.complete(heads[1], 0);
    device.complete(heads[1], 0);
    assert!(queue.poll().unwrap().is_some());
    let error = queue.poll().unwrap_err();
    assert!(
        matches!(error, QueueError::UsedHead { index: 1, .. }),
        "{error}"
    );
    queue.reset().unwrap();

    // And it works as at first.
    let mut device = Device::new(&queue);
    let head = add(&mut queue, 5);
    assert_eq!(number(&device.take().unwrap()), 5);
    device.complete(head, 512);
    assert_eq!(queue.poll().unwrap().unwrap().written, 512);
}

#[test]
fn what_a_dead_device_left_is_made_available_to_its_successor() {
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, QUEUE, 16).unwrap();
    let mut next = 0;
    // Each device completes every second chain, newest first, and dies; heads come into use again.
    for round in 0..20_000_u64 {
        while queue.in_flight() < 8 {
            add(&mut queue, next % 256);
            next += 1;
        }
        let mut device = Device::new(&queue);
        let taken = device.take_all();
        let numbers: Vec<_> = taken.iter().map(number).collect();
        let mut in_order = numbers.clone();
        in_order.sort_by_key(|number| (number + 256 - next % 256) % 256);
        assert_eq!(numbers, in_order, "round {round}");
        assert_eq!(numbers.len(), 8);

        for chain in taken.iter().skip(round as usize % 2).step_by(2).rev() {
            device.complete(chain.0, 0);
        }
        let error = queue.resubmit().unwrap_err();
        assert!(matches!(error, QueueError::NotTaken(4)), "{error}");
        assert_eq!(polled(&mut queue).len(), 4);
        let left = taken.iter().skip(1 - round as usize % 2).step_by(2);
        let left: Vec<_> = left.cloned().collect();
        // A negative control: without it the successor would see others.
        assert_ne!(Device::new(&queue).take_all(), left);
        assert_eq!(queue.resubmit().unwrap(), 4);
        assert_eq!(Device::new(&queue).take_all(), left);
    }
    assert!(next > 0x1_0000, "{next}");
}

#[test]
fn a_reset_hands_out_what_is_in_flight_to_be_added_again() {
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, QUEUE, 16).unwrap();
    let mut device = Device::new(&queue);
    for number in 0..6 {
        add(&mut queue, number);
    }
    let taken = device.take_all();
    for index in [4, 0] {
        device.complete(taken[index].0, 0);
    }
    assert_eq!(polled(&mut queue).len(), 2);
    add(&mut queue, 6); // with a head that was in use before

    let left = queue.reset().unwrap();
    let numbers: Vec<_> = left.iter().map(|chain| number(&parts(chain))).collect();
    assert_eq!(numbers, [1, 2, 3, 5, 6]);
    assert_eq!((queue.in_flight(), queue.used_index()), (0, 0));
    let mut device = Device::new(&queue);
    assert_eq!(device.take(), None);
    for chain in &left {
        queue.add(&chain.readable, &chain.writable).unwrap();
    }
    let numbers: Vec<_> = device.take_all().iter().map(number).collect();
    assert_eq!(numbers, [1, 2, 3, 5, 6]);
    assert!(queue.to_string().contains("5 in flight"), "{queue}");
}

#[test]
fn the_two_ends_wake_each_other() {
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, QUEUE, 16).unwrap();
    let error = queue.wait(LIMIT).unwrap_err();
    assert!(matches!(error, QueueError::NothingInFlight), "{error}");

    let head = add(&mut queue, 0);
    assert!(queue.notify().unwrap());
    assert_eq!(queue.kick().read().unwrap(), 1);
    let short = Duration::from_millis(1);
    // A call without a completion is no completion, and not waited on twice.
    queue.call().write(1).unwrap();
    let error = queue.wait(short).unwrap_err();
    let timed_out = matches!(
        error,
        QueueError::TimedOut {
            limit,
            in_flight: 1,
            ..
        } if limit == short
    );
    assert!(timed_out, "{error}");

    let mut device = Device::new(&queue);
    let call = queue.call().try_clone().unwrap();
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            device.take().unwrap();
            device.complete(head, 512);
            call.write(1).unwrap();
        });
        queue.wait(LIMIT).unwrap()
    });
    assert_eq!((done.chain.head, done.written), (head, 512));

    // A device that asks not to be woken is not.
    memory.write_obj(1_u16, queue.layout().used).unwrap();
    add(&mut queue, 1);
    assert!(!queue.notify().unwrap());
    assert!(queue.kick().read().is_err());
}
