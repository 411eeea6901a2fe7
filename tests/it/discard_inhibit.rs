//! Forbidding discards: who is stopped, from when on, and until when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_memory_shm::{DiscardError, GuestMemoryShm, GuestRegionShm, RamOptions, ShmBacking};
use vm_memory::GuestAddress;

use crate::isolation::{PAGE, assert_refused};

const SIZE: u64 = 16 * PAGE;

fn region(start: u64, backing: &ShmBacking, offset: u64) -> Arc<GuestRegionShm> {
    let region = GuestRegionShm::from_backing(backing, offset, (GuestAddress(start), SIZE));
    Arc::new(region.unwrap())
}

fn new_backing() -> ShmBacking {
    ShmBacking::create(&RamOptions::new(), 2 * SIZE).unwrap()
}

fn inhibited_by(memory: &GuestMemoryShm, addr: u64) -> usize {
    match memory.discard((GuestAddress(addr), PAGE)) {
        Ok(_) => 0,
        Err(DiscardError::Inhibited { by, .. }) => by,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn inhibited_discards_free_nothing_until_the_last_holder_lets_go() {
    let backing = new_backing();
    let memory = GuestMemoryShm::from_arc_regions(vec![region(0, &backing, 0)]).unwrap();
    memory.write_obj(7u8, GuestAddress(0)).unwrap();
    let (one, other) = (memory.inhibit_discards(), memory.inhibit_discards());
    assert_refused!(
        memory.discard((GuestAddress(0), SIZE)),
        DiscardError::Inhibited { .. },
        "cannot discard 0x0..=0xffff (64 KiB): discards are inhibited by 2 (DiscardInhibitor), \
         whose devices have the pages pinned; try again when they have let go"
    );
    drop(one);
    assert_eq!(inhibited_by(&memory, 0), 1);
    assert_eq!(backing.allocated().unwrap(), PAGE);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
    drop(other);
    memory.discard((GuestAddress(0), SIZE)).unwrap();
    assert_eq!(backing.allocated().unwrap(), 0);
}

#[test]
fn hotplugged_memory_on_the_same_backings_obeys() {
    let (old, new) = (new_backing(), new_backing());
    let memory = GuestMemoryShm::from_arc_regions(vec![region(0, &old, 0)]).unwrap();
    let before = memory.insert_region(region(SIZE, &old, SIZE)).unwrap();
    let inhibitor = memory.inhibit_discards();
    let after = memory.insert_region(region(SIZE, &new, 0)).unwrap();
    assert_eq!(
        (inhibited_by(&before, 0), inhibited_by(&before, SIZE)),
        (1, 1)
    );
    assert_eq!(inhibited_by(&after, 0), 1);
    // A backing that was added later is not covered, and a range that has some of both is not
    // discarded at all.
    assert_eq!(inhibited_by(&after, SIZE), 0);
    after.write_obj(7u8, GuestAddress(SIZE)).unwrap();
    assert!(after.discard((GuestAddress(0), 2 * SIZE)).is_err());
    assert_eq!(new.allocated().unwrap(), PAGE);
    // It holds for the backings, whatever becomes of the memory.
    drop(memory);
    assert_eq!(inhibited_by(&after, 0), 1);
    drop(inhibitor);
    assert_eq!(
        (inhibited_by(&after, 0), inhibited_by(&before, SIZE)),
        (0, 0)
    );
}

#[test]
fn no_discard_is_running_once_discards_are_inhibited() {
    const ROUNDS: u64 = 300;
    let (one, other) = (new_backing(), new_backing());
    // The same backings in both orders: discards that took their gates in the order of the regions
    // would wait for each other as soon as a third thread waits to inhibit them.
    let memories = [(&one, &other), (&other, &one)].map(|(first, second)| {
        GuestMemoryShm::from_arc_regions(vec![region(0, first, 0), region(SIZE, second, 0)])
            .unwrap()
    });
    let done = AtomicBool::new(false);
    let discards = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for memory in &memories {
            let (done, discards) = (&done, &discards);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    match memory.discard((GuestAddress(0), 2 * SIZE)) {
                        Ok(discarded) => assert_eq!(discarded.freed, 2 * SIZE),
                        Err(DiscardError::Inhibited { .. }) => continue,
                        Err(error) => panic!("{error}"),
                    }
                    discards.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Also when an assertion fails, or else the threads never end.
        let _stop = Stop(&done);
        let memory = &memories[0];
        for round in 0..ROUNDS {
            let inhibitor = memory.inhibit_discards();
            let before = discards.load(Ordering::Relaxed);
            let addresses = || (0..2 * SIZE).step_by(PAGE as usize).map(GuestAddress);
            for addr in addresses() {
                memory.write_obj(round + 1, addr).unwrap();
            }
            for addr in addresses().chain(addresses()) {
                assert_eq!(memory.read_obj::<u64>(addr).unwrap(), round + 1);
            }
            drop(inhibitor);
            // Between two rounds some discard gets through.
            while discards.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
        }
    });
    assert!(discards.load(Ordering::Relaxed) >= ROUNDS - 1);
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
