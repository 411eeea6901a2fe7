//! Memory that changes while others use it: immutable memories, published one after the other.

use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64};

use guest_memory_shm::{
    BackingSource, GuestMemoryShm, GuestMemoryShmBuilder, GuestRegionShm, PublishedMemory,
    RamOptions, ShmBacking,
};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryError, GuestMemoryRegion, Permissions,
};

use crate::isolation::{PAGE, in_own_process};
use crate::proc::{Holdings, leaves_nothing, maps};

/// Where the region comes and goes.
const PLUGGED: GuestAddress = GuestAddress(4 << 30);
const ROUNDS: u64 = 3_000;
const READERS: usize = 3;

fn always_there() -> GuestMemoryShm {
    let memory = GuestMemoryShm::from_ranges(&[(GuestAddress(0), 8192)]).expect("mapped");
    memory
        .write_obj(0xabcd_u64, GuestAddress(4096))
        .expect("there is RAM");
    memory
}

/// A region with a backing of its own whose first and last eight bytes are `round`.
fn region_of(round: u64) -> Arc<GuestRegionShm> {
    let region = GuestRegionShm::new((PLUGGED, 2 * PAGE), &RamOptions::new()).expect("mapped");
    let end = vm_memory::MemoryRegionAddress(2 * PAGE - 8);
    region
        .write_obj(round, vm_memory::MemoryRegionAddress(0))
        .expect("there is RAM");
    region.write_obj(round, end).expect("there is RAM");
    Arc::new(region)
}

/// Looks at one memory: gives the round of the region, if it is there.
fn look(memory: &GuestMemoryShm) -> Option<u64> {
    assert_eq!(
        memory
            .read_obj::<u64>(GuestAddress(4096))
            .expect("always there"),
        0xabcd
    );
    let first = memory.read_obj::<u64>(PLUGGED);
    let last = memory.read_obj::<u64>(GuestAddress(PLUGGED.0 + 2 * PAGE - 8));
    match (first, last, memory.num_regions()) {
        (Ok(first), Ok(last), 2) => {
            assert_eq!(first, last, "half of one region and half of another");
            assert_eq!(memory.last_addr().0, PLUGGED.0 + 2 * PAGE - 1);
            Some(first)
        }
        (
            Err(GuestMemoryError::InvalidGuestAddress(_)),
            Err(GuestMemoryError::InvalidGuestAddress(_)),
            1,
        ) => {
            assert_eq!(memory.last_addr().0, 8191);
            None
        }
        inconsistent => panic!("{inconsistent:?}"),
    }
}

fn publish(atomic: &GuestMemoryAtomic<GuestMemoryShm>, memory: GuestMemoryShm) {
    atomic.lock().expect("no thread panicked").replace(memory);
}

#[test]
fn readers_see_a_whole_memory_while_a_region_comes_and_goes() {
    in_own_process(|| {
        // Thread stacks are address space too: only shared mappings are compared.
        let shared = || {
            maps()
                .iter()
                .filter(|line| line.permissions == "rw-s")
                .count()
        };
        let before = shared();
        let atomic = GuestMemoryAtomic::new(always_there());
        let done = AtomicBool::new(false);
        // For each reader: looks that found the region absent, and present.
        let looks: [[AtomicU64; 2]; READERS] = Default::default();
        let all_saw_both = || looks.iter().flatten().all(|looks| looks.load(Relaxed) > 0);
        std::thread::scope(|scope| {
            for looks in &looks {
                let (atomic, done) = (atomic.clone(), &done);
                scope.spawn(move || {
                    let mut newest = 0;
                    while !done.load(Ordering::Acquire) {
                        let seen = look(&atomic.memory());
                        looks[usize::from(seen.is_some())].fetch_add(1, Relaxed);
                        // Publications are seen in their order.
                        let seen = seen.unwrap_or(newest);
                        assert!(seen >= newest, "{seen} after {newest}");
                        newest = seen;
                    }
                });
            }
            let mut round = 0;
            // The bound ends the test where a reader has died.
            while round < ROUNDS || !all_saw_both() && round < 100 * ROUNDS {
                round += 1;
                let more = atomic.memory().insert_region(region_of(round)).unwrap();
                publish(&atomic, more);
                let current = atomic.memory().into_inner();
                assert_eq!(look(&current), Some(round));
                let (less, removed) = current.remove_region(PLUGGED, 2 * PAGE).unwrap();
                publish(&atomic, less);
                assert_eq!(removed.range().start_addr(), PLUGGED);
                assert_eq!(look(&atomic.memory()), None);
            }
            done.store(true, Ordering::Release);
        });
        assert!(all_saw_both(), "{looks:?}");

        // All old memories are gone; what is left is the last one.
        assert_eq!(shared(), before + 1);
        drop(atomic);
        assert_eq!(shared(), before);
        let last = Holdings::now();
        assert!(!format!("{last:?}").contains("memfd:"), "{last:?}");
    });
}

#[test]
fn a_reader_that_holds_an_old_memory_keeps_its_regions_mapped() {
    in_own_process(|| {
        leaves_nothing(|| {
            let base = always_there();
            let atomic = GuestMemoryAtomic::new(base.insert_region(region_of(7)).unwrap());
            let old = atomic.memory();
            publish(&atomic, base);
            assert_eq!(look(&atomic.memory()), None);
            assert_eq!(look(&old), Some(7));
            let mappings = || {
                maps()
                    .iter()
                    .filter(|line| line.permissions == "rw-s")
                    .count()
            };
            let with_old = mappings();
            drop(old);
            // Only now no thread has it.
            assert_eq!(mappings(), with_old - 1);
        });
    });
}

#[test]
fn threads_that_write_next_to_each_other_do_not_disturb_each_other() {
    let memory = GuestMemoryShm::<AtomicBitmap>::from_ranges(&[
        (GuestAddress(0), 64 << 12),
        (GuestAddress(64 << 12), 64 << 12),
    ])
    .unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let memory = &memory;
            scope.spawn(move || {
                for at in (thread..(128 << 12) / 8).step_by(4) {
                    memory
                        .write_obj(thread << 32 | at, GuestAddress(at * 8))
                        .unwrap();
                }
            });
        }
    });
    for at in 0..(128 << 12) / 8 {
        let value: u64 = memory.read_obj(GuestAddress(at * 8)).unwrap();
        assert_eq!(value, (at % 4) << 32 | at);
    }
}

#[test]
fn an_atomic_that_several_threads_raise_is_raised_as_often() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let slices = || GuestMemoryBackend::get_slice(&memory, GuestAddress(64), 8).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let slice = slices();
                let counter: &AtomicU64 =
                    vm_memory::VolatileMemory::get_atomic_ref(&slice, 0).unwrap();
                for _ in 0..10_000 {
                    counter.fetch_add(1, Relaxed);
                }
            });
        }
    });
    assert_eq!(
        memory
            .load::<u64>(GuestAddress(64), Ordering::Acquire)
            .unwrap(),
        40_000
    );
}

#[test]
fn every_way_to_share_a_memory_is_an_address_space() {
    /// A device keeps an address space and takes the memory anew for each access.
    fn device<A: GuestAddressSpace>(space: A) -> u64 {
        let memory = space.memory();
        assert!(memory.check_range(GuestAddress(0), 8192, Permissions::ReadWrite));
        let other = space.clone().memory();
        other.read_obj(GuestAddress(4096)).expect("there is RAM")
    }
    let memory = always_there();
    assert_eq!(device(&memory), 0xabcd);
    assert_eq!(device(std::rc::Rc::new(memory.clone())), 0xabcd);
    assert_eq!(device(Arc::new(memory.clone())), 0xabcd);
    assert_eq!(device(GuestMemoryAtomic::new(memory.clone())), 0xabcd);
    assert_eq!(device(GuestMemoryAtomic::from(Arc::new(memory))), 0xabcd);
}

#[test]
fn a_clone_is_the_same_ram_and_maps_nothing() {
    in_own_process(|| {
        let memory = always_there();
        let before = Holdings::now();
        let clone = memory.clone();
        assert_eq!(Holdings::now(), before);
        clone.write_obj(5u8, GuestAddress(1)).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(1)).unwrap(), 5);
        drop(memory);
        assert_eq!(Holdings::now(), before);
        assert_eq!(clone.read_obj::<u8>(GuestAddress(1)).unwrap(), 5);
        assert_eq!(clone.iter().map(GuestMemoryRegion::len).sum::<u64>(), 8192);
    });
}

#[test]
fn everything_that_is_shared_can_be_shared_between_threads() {
    const fn shareable<T: Send + Sync + 'static>() {}
    const {
        shareable::<GuestMemoryShm>();
        shareable::<GuestMemoryShm<AtomicBitmap>>();
        shareable::<GuestMemoryAtomic<GuestMemoryShm>>();
        shareable::<GuestRegionShm>();
        shareable::<GuestMemoryShmBuilder>();
        shareable::<GuestMemoryShmBuilder<Option<AtomicBitmap>>>();
        shareable::<PublishedMemory>();
        shareable::<ShmBacking>();
        shareable::<RamOptions>();
        shareable::<BackingSource>();
        shareable::<guest_memory_shm::AddressSpaceError>();
        shareable::<guest_memory_shm::AdoptError>();
        shareable::<guest_memory_shm::BackingError>();
        shareable::<guest_memory_shm::DiscardError>();
        shareable::<guest_memory_shm::Error>();
        shareable::<guest_memory_shm::FileError>();
        shareable::<guest_memory_shm::InvalidRange>();
        shareable::<guest_memory_shm::KvmError>();
        shareable::<guest_memory_shm::ListenerError>();
        shareable::<guest_memory_shm::MapError>();
        shareable::<guest_memory_shm::MemoryError>();
        shareable::<guest_memory_shm::OptionsError>();
        shareable::<guest_memory_shm::PopulateError>();
        shareable::<guest_memory_shm::ShareError>();
        shareable::<guest_memory_shm::Shortage>();
        shareable::<guest_memory_shm::StatsError>();
        shareable::<guest_memory_shm::TableError>();
        shareable::<guest_memory_shm::VhostUserShare>();
        shareable::<guest_memory_shm::mock::MockError>();
        shareable::<guest_memory_shm::receive::ReceiveError>();
    };
    // And it is of use: made here, used and dropped there.
    let memory = always_there();
    let value = std::thread::spawn(move || memory.read_obj::<u64>(GuestAddress(4096)));
    assert_eq!(value.join().unwrap().unwrap(), 0xabcd);
}
