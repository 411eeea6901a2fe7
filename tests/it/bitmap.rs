//! Dirty bitmaps that a function makes: of any type, for each region its own.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use guest_memory_shm::{
    AddressSpace, BackingSource, GuestMemoryShm, GuestRange, GuestRegionShm, InvalidRange,
    MemoryError, RamOptions, RangePart, ShmBacking,
};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::isolation::in_own_process;
use crate::proc::leaves_nothing;
use crate::support::ToldAll;

const MIB: u64 = 1 << 20;
const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// As Firecracker has it: no bitmap unless dirty pages are wanted. It is no `NewBitmap`.
type Tracked = Option<AtomicBitmap>;

fn tracked(range: GuestRange) -> Tracked {
    Some(AtomicBitmap::new(range.size() as usize, PAGE))
}

fn dirty(region: &GuestRegionShm<Tracked>) -> Option<Vec<u64>> {
    let bitmap = region.dirty_bitmap().as_ref()?;
    let pages = (0u64..).take(bitmap.len());
    Some(
        pages
            .filter(|page| bitmap.is_bit_set(*page as usize))
            .collect(),
    )
}

#[test]
fn each_region_has_the_bitmap_that_the_function_made_for_it() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&asked);
    let memory: GuestMemoryShm<Tracked> = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new(),
            [(GuestAddress(8 * MIB), MIB), (GuestAddress(0), 2 * MIB)],
        )
        .with_bitmap(move |range| {
            told.lock().unwrap().push(range);
            // The lower region is tracked, the upper is not.
            (range.start_addr().0 == 0)
                .then(|| tracked(range))
                .flatten()
        })
        .add_ram(RamOptions::new(), [(GuestAddress(4 * MIB), MIB)])
        .build()
        .unwrap();
    let starts: Vec<_> = asked
        .lock()
        .unwrap()
        .iter()
        .map(|range| (range.start_addr().0 / MIB, range.size() / MIB))
        .collect();
    assert_eq!(starts, [(8, 1), (0, 2), (4, 1)]);

    for start in [0, 4, 8] {
        let at = GuestAddress(start * MIB + 5 * 4096);
        memory.write_obj(7u8, at).unwrap();
        assert_eq!(memory.read_obj::<u8>(at).unwrap(), 7);
    }
    let of = |start: u64| dirty(memory.find_region(GuestAddress(start * MIB)).unwrap());
    assert_eq!((of(0), of(4), of(8)), (Some(vec![5]), None, None));
}

#[test]
fn regions_with_such_bitmaps_are_plugged_like_any_other() {
    let boot = GuestMemoryShm::<()>::builder()
        .with_bitmap(tracked)
        .add_ram(RamOptions::new(), [(GuestAddress(0), MIB)])
        .build()
        .unwrap();
    let space = AddressSpace::new(boot);
    let start = GuestAddress(4 * MIB);
    let new = GuestRegionShm::new_with_bitmap((start, MIB), &RamOptions::new(), tracked);
    space.insert(new.unwrap()).told_all();
    let backing = ShmBacking::create(&RamOptions::new(), 2 * MIB).unwrap();
    let start = GuestAddress(8 * MIB);
    let part = GuestRegionShm::from_backing_with_bitmap(&backing, MIB, (start, MIB), tracked);
    space.insert(part.unwrap()).told_all();

    let memory = space.published().memory();
    for start in [0, 4, 8] {
        let at = GuestAddress(start * MIB + start * 4096);
        memory.write_obj(7u8, at).unwrap();
        let region = memory.find_region(at).unwrap();
        assert_eq!(dirty(region), Some(vec![start]));
    }
}

#[test]
fn the_function_is_not_called_before_all_is_checked() {
    let uncalled = |_: GuestRange| -> Tracked { panic!("called") };
    let overlapping = GuestMemoryShm::<()>::builder()
        .with_bitmap(uncalled)
        .add_ram(RamOptions::new(), [(GuestAddress(0), 2 * MIB)])
        .add_ram(RamOptions::new(), [(GuestAddress(MIB), MIB)])
        .build();
    assert!(matches!(
        overlapping,
        Err(MemoryError::Range(InvalidRange::Overlap { .. }))
    ));
    let unaligned =
        GuestRegionShm::new_with_bitmap((GuestAddress(1), MIB), &RamOptions::new(), uncalled);
    assert!(matches!(
        unaligned,
        Err(MemoryError::Range(InvalidRange::Unaligned {
            part: RangePart::Address,
            ..
        }))
    ));
}

#[test]
fn a_function_that_panics_leaves_nothing() {
    in_own_process(|| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ram");
        // What the machinery of panics keeps, it has from now on.
        catch_unwind(|| panic!("the first")).unwrap_err();
        let names = || std::fs::read_dir("/dev/shm").unwrap().count();
        for backing in [
            BackingSource::Memfd,
            BackingSource::PosixShm,
            BackingSource::File(file.clone()),
        ] {
            let options = RamOptions::new().with_backing(backing);
            let before = names();
            leaves_nothing(|| {
                let second = |range: GuestRange| {
                    assert_eq!(range.start_addr().0, 0, "a bitmap's bug");
                    tracked(range)
                };
                let ranges = [(GuestAddress(0), MIB), (GuestAddress(4 * MIB), MIB)];
                let builder = GuestMemoryShm::<()>::builder().with_bitmap(second);
                let builder = builder.add_ram(options.clone(), ranges);
                catch_unwind(AssertUnwindSafe(|| builder.build())).unwrap_err();

                let bug = |_| -> Tracked { panic!("a bitmap's bug") };
                let new =
                    || GuestRegionShm::new_with_bitmap((GuestAddress(0), MIB), &options, bug);
                catch_unwind(AssertUnwindSafe(new)).unwrap_err();
            });
            assert_eq!(names(), before);
            assert!(!file.exists(), "{options:?}");
        }
    });
}
