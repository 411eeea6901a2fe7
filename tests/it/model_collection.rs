//! vm-memory's `GuestRegionCollection` as the model: the same regions put in and taken out; and
//! the same RAM as vm-memory's own `GuestMemoryMmap`.

use std::sync::Arc;

use guest_memory_shm::{
    GuestMemoryShm, GuestRegionShm, InvalidRange, MemoryError, RamOptions, ShmBacking,
};
use proptest::prelude::*;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollection, GuestRegionCollectionError as ModelError,
};

use crate::isolation::{PAGE, in_own_process};
use crate::model::runner;
use crate::proc::{leaves_nothing, maps_in};

type Region = Arc<GuestRegionShm>;
type Model = GuestRegionCollection<GuestRegionShm>;

/// Pages that random regions lie in.
const PAGES: u64 = 48;

/// Makes regions that are cheap: all lie on one backing.
struct Maker(ShmBacking);

impl Maker {
    fn new() -> Self {
        Self(ShmBacking::create(&RamOptions::new(), PAGES * PAGE).expect("created"))
    }

    /// A region of whole pages.
    fn region(&self, (start, size): (u64, u64)) -> Region {
        let start = GuestAddress(start * PAGE);
        let region = GuestRegionShm::from_backing(&self.0, 0, (start, size * PAGE));
        Arc::new(region.expect("mapped"))
    }
}

fn place() -> impl Strategy<Value = (u64, u64)> {
    (0..PAGES, prop_oneof![3 => 1..3u64, 1 => 3..9u64])
}

/// What tells regions apart: each is mapped elsewhere.
fn place_of(region: &GuestRegionShm) -> (usize, GuestAddress, u64) {
    (region.as_ptr().addr(), region.start_addr(), region.len())
}

/// Asserts that the two hold the very same regions, and find them alike.
fn assert_same(ours: &GuestMemoryShm, model: &Model) {
    let regions =
        |memory: Vec<&GuestRegionShm>| -> Vec<_> { memory.into_iter().map(place_of).collect() };
    assert_eq!(
        regions(ours.iter().collect()),
        regions(model.iter().collect())
    );
    assert_eq!(ours.num_regions(), model.num_regions());
    assert_eq!(ours.last_addr(), model.last_addr());
    for page in 0..PAGES + 10 {
        for addr in [page * PAGE, page * PAGE + 4095] {
            let addr = GuestAddress(addr);
            let found = [ours.find_region(addr), model.find_region(addr)];
            let [ours, model] = found.map(|region| region.map(place_of));
            assert_eq!(ours, model, "{addr:?}");
        }
    }
}

#[test]
fn regions_make_the_same_memory_or_are_refused_as_in_the_model() {
    let maker = Maker::new();
    let (mut accepted, mut overlapping, mut unsorted) = (0, 0, 0);
    let counts = std::cell::RefCell::new([&mut accepted, &mut overlapping, &mut unsorted]);
    let places = (prop::collection::vec(place(), 1..8), any::<bool>());
    let result = runner(300).run(&places, |(places, sort)| {
        let mut regions: Vec<Region> = places.iter().map(|place| maker.region(*place)).collect();
        if sort {
            regions.sort_by_key(|region| region.start_addr());
        }
        let model = Model::from_arc_regions(regions.clone());
        let ours = GuestMemoryShm::from_arc_regions(regions);
        let count = match (ours, model) {
            (Ok(ours), Ok(model)) => {
                assert_same(&ours, &model);
                0
            }
            (
                Err(MemoryError::Range(InvalidRange::Overlap { first, second, .. })),
                Err(ModelError::MemoryRegionOverlap),
            ) => {
                assert!(first.overlaps(&second) && first <= second);
                1
            }
            (
                Err(MemoryError::Unsorted { first, second, .. }),
                Err(ModelError::UnsortedMemoryRegions),
            ) => {
                assert!(first.start_addr() > second.start_addr());
                2
            }
            (ours, model) => panic!("{ours:?}, {model:?}"),
        };
        *counts.borrow_mut()[count] += 1;
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    let counts = [accepted, overlapping, unsorted];
    assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
}

#[test]
fn regions_are_inserted_and_removed_as_in_the_model() {
    let maker = Maker::new();
    let steps = prop::collection::vec(
        (any::<bool>(), any::<prop::sample::Index>(), place()),
        1..60,
    );
    let result = runner(60).run(&steps, |steps| {
        let (mut ours, mut model) = (GuestMemoryShm::new(), Model::new());
        for (insert, which, place) in steps {
            if insert {
                let region = maker.region(place);
                match (
                    ours.insert_region(region.clone()),
                    model.insert_region(region),
                ) {
                    (Ok(more), Ok(model_more)) => (ours, model) = (more, model_more),
                    (
                        Err(MemoryError::Range(InvalidRange::Taken { there, .. })),
                        Err(ModelError::MemoryRegionOverlap),
                    ) => assert!(ours.iter().any(|region| region.range() == there)),
                    (ours, model) => panic!("{ours:?}, {model:?}"),
                }
            } else {
                // More often than not a region that is there.
                let there: Vec<_> = model.iter().map(|r| (r.start_addr(), r.len())).collect();
                let random = (GuestAddress(place.0 * PAGE), place.1 * PAGE);
                let (start, size) = match there.is_empty() {
                    true => random,
                    false => *which.get(&[there.as_slice(), &[random]].concat()),
                };
                match (
                    ours.remove_region(start, size),
                    model.remove_region(start, size),
                ) {
                    (Ok((less, removed)), Ok((model_less, model_removed))) => {
                        assert!(Arc::ptr_eq(&removed, &model_removed));
                        (ours, model) = (less, model_less);
                    }
                    (Err(MemoryError::NoSuchRegion { .. }), Err(ModelError::NoMemoryRegion)) => {}
                    (ours, model) => panic!("{ours:?}, {model:?}"),
                }
            }
            assert_same(&ours, &model);
        }
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn no_regions_are_refused_by_both() {
    let model = Model::from_arc_regions(Vec::new());
    assert!(matches!(model, Err(ModelError::NoMemoryRegion)));
    let ours = GuestMemoryShm::<()>::from_arc_regions(Vec::new());
    assert!(matches!(ours, Err(MemoryError::NoRanges)));
    assert!(matches!(
        GuestMemoryShm::<()>::from_regions(Vec::new()),
        Err(MemoryError::NoRanges)
    ));
    let view = GuestMemoryShm::<()>::new().to_guest_memory_mmap::<()>();
    assert_eq!(view.unwrap().num_regions(), 0);
}

#[test]
fn the_last_region_can_be_removed_and_another_one_inserted() {
    let maker = Maker::new();
    let memory = GuestMemoryShm::from_arc_regions(vec![maker.region((1, 1))]).unwrap();
    let (empty, region) = memory.remove_region(GuestAddress(PAGE), PAGE).unwrap();
    assert_eq!(empty.num_regions(), 0);
    assert_eq!(empty.find_region(GuestAddress(PAGE)).map(|_| ()), None);
    let again = empty.insert_region(region).unwrap();
    assert_eq!(again.num_regions(), 1);
    // What changed are new memories: the old one is what it was.
    assert_eq!(memory.num_regions(), 1);
    assert!(memory.find_region(GuestAddress(PAGE)).is_some());
}

#[test]
fn the_removed_region_is_still_mapped_while_it_is_held() {
    let maker = Maker::new();
    let memory =
        GuestMemoryShm::from_arc_regions(vec![maker.region((0, 1)), maker.region((4, 1))]);
    let (less, removed) = memory
        .unwrap()
        .remove_region(GuestAddress(0), PAGE)
        .unwrap();
    assert!(less.write_obj(1u8, GuestAddress(0)).is_err());
    removed
        .write_obj(9u8, vm_memory::MemoryRegionAddress(3))
        .unwrap();
    // It is the same part of the same backing.
    assert_eq!(less.read_obj::<u8>(GuestAddress(4 * PAGE + 3)).unwrap(), 9);
}

#[test]
fn the_view_as_vm_memorys_type_is_the_same_ram_at_other_host_addresses() {
    let ranges = [(GuestAddress(0), 8192), (GuestAddress(1 << 32), 4096)];
    let memory = GuestMemoryShm::<AtomicBitmap>::from_ranges(&ranges).unwrap();
    let view: GuestMemoryMmap<AtomicBitmap> = memory.to_guest_memory_mmap().unwrap();
    assert_eq!(view.num_regions(), 2);
    for (ours, theirs) in memory.iter().zip(view.iter()) {
        assert_eq!(ours.start_addr(), theirs.start_addr());
        assert_eq!(ours.len(), theirs.len());
        assert_ne!(ours.as_ptr(), theirs.as_ptr());
        let file = GuestMemoryRegion::file_offset(theirs).expect("it is shared");
        assert_eq!(file.start(), ours.offset());
    }
    memory
        .write_obj(0x11u8, GuestAddress((1 << 32) + 7))
        .unwrap();
    assert_eq!(
        view.read_obj::<u8>(GuestAddress((1 << 32) + 7)).unwrap(),
        0x11
    );
    view.write_obj(0x22u8, GuestAddress(4096)).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0x22);

    // Each marks its own writes only.
    let dirty = |memory: &GuestMemoryShm<AtomicBitmap>, addr| {
        let (region, at) = memory
            .to_region_addr(GuestAddress(addr))
            .expect("there is RAM");
        region.bitmap().dirty_at(at.0 as usize)
    };
    assert!(dirty(&memory, 1 << 32) && !dirty(&memory, 4096));
    let region = view.find_region(GuestAddress(0)).unwrap();
    assert!(GuestMemoryRegion::bitmap(region).dirty_at(4096));
    let region = view.find_region(GuestAddress(1 << 32)).unwrap();
    assert!(!GuestMemoryRegion::bitmap(region).dirty_at(0));
}

#[test]
fn the_view_lives_on_when_the_memory_is_gone_and_leaves_nothing_in_the_end() {
    in_own_process(|| {
        leaves_nothing(|| {
            let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
            memory.write_obj(0xfeed_u16, GuestAddress(4094)).unwrap();
            let view: GuestMemoryMmap = memory.to_guest_memory_mmap().unwrap();
            let ours = memory.iter().next().unwrap().as_ptr().addr() as u64;
            drop(memory);
            assert_eq!(maps_in(ours..ours + 8192), []);
            assert_eq!(view.read_obj::<u16>(GuestAddress(4094)).unwrap(), 0xfeed);
            view.write_obj(1u8, GuestAddress(8191)).unwrap();
        });
    });
}
