//! vm-memory's own `GuestMemoryMmap` as the model: the same calls, the same answers.

use std::cell::Cell;
use std::fmt::Debug;
use std::io::{Read, Seek, Write};
use std::sync::atomic::Ordering;

use guest_memory_shm::GuestMemoryShm;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::guest_memory::Error as AccessError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use crate::answers::{ask, read_and_write};
use crate::isolation::PAGE;

type Ours = GuestMemoryShm<AtomicBitmap>;
type Model = GuestMemoryMmap<AtomicBitmap>;

/// The same cases each time.
pub(crate) fn runner(cases: u32) -> TestRunner {
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

/// Ranges of RAM, sorted and disjoint: few or many, next to each other or apart, also so far apart
/// that many share a bucket of the index.
fn layout() -> impl Strategy<Value = Vec<(GuestAddress, usize)>> {
    const LAST_PAGE: u64 = u64::MAX / PAGE;
    // Pages, or fewer bytes, from an address that is not a multiple of them.
    let unit = prop_oneof![3 => Just((PAGE, 0)), 1 => (1..300u64, 0..PAGE)];
    let base = prop_oneof![Just(0), 0..16u64, 0..1u64 << 51, Just(LAST_PAGE - 70)];
    let gap = prop_oneof![
        8 => Just(0),
        4 => 1..4u64,
        2 => 1..1u64 << 20,
        1 => 1..1u64 << 46,
        1 => 1..1u64 << 51,
    ];
    let size = prop_oneof![8 => 1..4u64, 1 => 4..64u64];
    let count = prop_oneof![1..4usize, 4..40usize];
    let parts = count
        .prop_flat_map(move |count| prop::collection::vec((gap.clone(), size.clone()), count));
    (base, parts, unit).prop_map(|(mut at, parts, (unit, shift))| {
        let mut ranges = Vec::new();
        for (number, (gap, size)) in parts.into_iter().enumerate() {
            let start = if number == 0 { at } else { at + gap };
            if start + size > LAST_PAGE {
                break;
            }
            at = start + size;
            let start = GuestAddress(start * unit + shift);
            ranges.push((start, (size * unit) as usize));
        }
        ranges
    })
}

/// A place to access: near an edge of a region more often than not.
#[derive(Clone, Debug)]
struct Access {
    edge: prop::sample::Index,
    delta: i64,
    count: usize,
}

fn access() -> impl Strategy<Value = Access> {
    let delta = prop_oneof![
        6 => -20..20i64,
        2 => -3 * 4096..3 * 4096i64,
        1 => any::<i64>(),
    ];
    let count = prop_oneof![
        1 => Just(0),
        2 => 1..40usize,
        2 => 4090..4100usize,
        2 => 1..40_000usize,
        2 => Just(usize::MAX),
        1 => any::<usize>(),
    ];
    (any::<prop::sample::Index>(), delta, count).prop_map(|(edge, delta, count)| Access {
        edge,
        delta,
        count,
    })
}

impl Access {
    fn addr(&self, ranges: &[(GuestAddress, usize)]) -> GuestAddress {
        let edges: Vec<u64> = ranges
            .iter()
            .flat_map(|(start, size)| [start.0, start.0 + *size as u64])
            .chain([0])
            .collect();
        GuestAddress(self.edge.get(&edges).wrapping_add_signed(self.delta))
    }
}

/// Every byte of a memory, by region.
fn bytes_of<M: GuestMemoryBackend>(memory: &M) -> Vec<(GuestAddress, Vec<u8>)> {
    let read = |region: &M::R| {
        let mut bytes = vec![0; region.len() as usize];
        region
            .read_slice(&mut bytes, MemoryRegionAddress(0))
            .expect("all of it is there");
        (region.start_addr(), bytes)
    };
    memory.iter().map(read).collect()
}

/// The guest addresses of all pages that are marked dirty.
fn dirty_pages<M: GuestMemoryBackend>(memory: &M) -> Vec<u64> {
    let pages = memory.iter().flat_map(|region| {
        let offsets = (0..region.len()).step_by(PAGE as usize);
        let dirty = offsets.filter(|offset| region.bitmap().dirty_at(*offset as usize));
        dirty
            .map(|offset| region.start_addr().0 + offset)
            .collect::<Vec<_>>()
    });
    pages.collect()
}

fn pair(ranges: &[(GuestAddress, usize)]) -> (Ours, Model) {
    let ours = Ours::from_ranges(ranges).expect("a good layout");
    (ours, Model::from_ranges(ranges).expect("a good layout"))
}

#[test]
fn it_answers_as_the_model_does_and_marks_the_same_pages() {
    let accesses = prop::collection::vec(access(), 1..30);
    let result = runner(120).run(&(layout(), accesses), |(ranges, accesses)| {
        let (ours, model) = pair(&ranges);
        for access in accesses {
            let (addr, count) = (access.addr(&ranges), access.count);
            prop_assert_eq!(ask(&ours, addr, count), ask(&model, addr, count));
            let (from_ours, from_model) = (
                read_and_write(&ours, addr, count),
                read_and_write(&model, addr, count),
            );
            prop_assert!(from_ours == from_model, "{:#x} {}", addr.0, count);
            prop_assert_eq!(dirty_pages(&ours), dirty_pages(&model));
        }
        prop_assert!(bytes_of(&ours) == bytes_of(&model));
        // What cannot be seen from one memory of our own is seen from the model's other mapping.
        let view = ours.to_guest_memory_mmap::<()>().expect("mapped once more");
        prop_assert!(bytes_of(&view) == bytes_of(&model));
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn the_random_accesses_hit_ram_and_holes_and_cross_from_region_to_region() {
    // The control of the test above: it would pass if all its accesses missed.
    let (hits, misses, crossings) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let result = runner(400).run(&(layout(), access()), |(ranges, access)| {
        let (_, model) = pair(&ranges);
        let (addr, count) = (access.addr(&ranges), access.count);
        let counter = if model.address_in_range(addr) {
            &hits
        } else {
            &misses
        };
        counter.set(counter.get() + 1);
        if GuestMemoryBackend::get_slices(&model, addr, count)
            .flatten()
            .count()
            > 1
        {
            crossings.set(crossings.get() + 1);
        }
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    let counts = [hits.get(), misses.get(), crossings.get()];
    assert!(counts.iter().all(|count| *count >= 40), "{counts:?}");
}

#[test]
fn it_answers_as_the_model_does_at_every_edge() {
    let page = PAGE as usize;
    let near_end = u64::MAX - 2 * PAGE + 1;
    let ranges = [
        (GuestAddress(PAGE), page),
        (GuestAddress(2 * PAGE), 2 * page),
        // A hole of one page.
        (GuestAddress(5 * PAGE), page),
        (GuestAddress(1 << 62), page),
        (GuestAddress(near_end), page),
    ];
    let (ours, model) = pair(&ranges);
    let edges = ranges
        .iter()
        .flat_map(|(start, size)| [start.0, start.0 + *size as u64]);
    let edges = edges.chain([0, near_end - PAGE, u64::MAX]);
    for edge in edges.collect::<Vec<_>>() {
        for delta in [-9, -8, -7, -1, 0, 1, 7, 8] {
            for count in [0, 1, 8, 9, page, page + 1, 4 * page, usize::MAX] {
                let addr = GuestAddress(edge.wrapping_add_signed(delta));
                assert_eq!(ask(&ours, addr, count), ask(&model, addr, count));
                let (from_ours, from_model) = (
                    read_and_write(&ours, addr, count),
                    read_and_write(&model, addr, count),
                );
                assert_eq!(from_ours, from_model, "{addr:?} {count}");
            }
        }
    }
    assert!(bytes_of(&ours) == bytes_of(&model));
    assert_eq!(dirty_pages(&ours), dirty_pages(&model));
}

#[test]
fn an_access_that_crosses_regions_is_whole_and_one_into_a_hole_is_cut() {
    // Said in numbers once, so that it does not hang on the model alone.
    let ranges = [(GuestAddress(0), 4096), (GuestAddress(4096), 4096)];
    let (ours, _) = pair(&ranges);
    ours.write_slice(b"across", GuestAddress(4093)).unwrap();
    assert_eq!(dirty_pages(&ours), [0, 4096]);
    let mut bytes = [0; 6];
    ours.read_slice(&mut bytes, GuestAddress(4093)).unwrap();
    assert_eq!(&bytes, b"across");
    assert_eq!(ours.write(b"cut off", GuestAddress(8188)).unwrap(), 4);
    let refused = ours
        .write_slice(b"cut off", GuestAddress(8188))
        .unwrap_err();
    assert!(
        matches!(
            refused,
            AccessError::PartialBuffer {
                expected: 7,
                completed: 4
            }
        ),
        "{refused:?}"
    );
    assert!(ours.check_range(GuestAddress(0), 8192));
    assert!(!ours.check_range(GuestAddress(0), 8193));
}

#[test]
fn what_was_not_written_is_not_dirty() {
    let (ours, model) = pair(&[
        (GuestAddress(0), 64 << 12),
        (GuestAddress(1 << 40), 1 << 12),
    ]);
    assert_eq!(touch(&ours), [3 << 12, 1 << 40]);
    assert_eq!(touch(&model), [3 << 12, 1 << 40]);
}

/// Reads everywhere, writes in two places, and gives the dirty pages.
fn touch<M: GuestMemoryBackend>(memory: &M) -> Vec<u64> {
    let _ = bytes_of(memory);
    let written = memory.write_obj(1u8, GuestAddress((3 << 12) + 5));
    written.expect("there is RAM");
    let stored = memory.store(1u32, GuestAddress(1 << 40), Ordering::Relaxed);
    stored.expect("there is RAM");
    dirty_pages(memory)
}

#[test]
fn a_file_is_read_into_ram_and_written_from_it_as_by_the_model() {
    let ranges = [(GuestAddress(0), 4096), (GuestAddress(4096), 8192)];
    let (ours, model) = pair(&ranges);
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..10_000u32).map(|n| (n * 7) as u8).collect();
    file.write_all(&bytes).unwrap();
    for (addr, count) in [
        (0, 10_000),
        (100, 9_000),
        (4095, 2),
        (12_000, 1_000),
        (20_000, 1),
    ] {
        let addr = GuestAddress(addr);
        let mut both = Vec::new();
        file.rewind().unwrap();
        both.push(outcome(
            ours.read_exact_volatile_from(addr, &mut file, count),
        ));
        file.rewind().unwrap();
        both.push(outcome(
            model.read_exact_volatile_from(addr, &mut file, count),
        ));
        assert_eq!(both[0], both[1]);
        let mut copies = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let [first, second] = &mut copies;
        let from_ours = outcome(ours.write_all_volatile_to(addr, first, count));
        assert_eq!(
            from_ours,
            outcome(model.write_all_volatile_to(addr, second, count))
        );
        let [first, second] = copies.map(|mut copy| {
            copy.rewind().unwrap();
            let mut bytes = Vec::new();
            copy.read_to_end(&mut bytes).unwrap();
            bytes
        });
        assert!(first == second, "{addr:?} {count}");
    }
    assert_eq!(bytes_of(&ours)[0].1[..100], bytes[..100]);
    assert!(bytes_of(&ours) == bytes_of(&model));
    assert_eq!(dirty_pages(&ours), dirty_pages(&model));
}

fn outcome<T: Debug>(result: Result<T, AccessError>) -> String {
    format!("{result:?}")
}

#[test]
fn memory_without_regions_answers_as_the_models() {
    let (ours, model) = (Ours::new(), Model::new());
    for addr in [0, 1, PAGE, u64::MAX] {
        for count in [0, 1, usize::MAX] {
            let addr = GuestAddress(addr);
            assert_eq!(ask(&ours, addr, count), ask(&model, addr, count));
            assert_eq!(
                read_and_write(&ours, addr, count),
                read_and_write(&model, addr, count)
            );
        }
    }
}
