//! Regions that are not whole pages, as vm-memory's constructors make them: as long as was asked
//! for, and refused by name where pages are needed.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;

use guest_memory_shm::{
    BackingError, DiscardAccumulator, DiscardError, GuestMemoryShm, GuestRange, GuestRegionShm,
    InvalidRange, MemoryError, Populate, PopulateOptions, Populated, RamOptions, RangePart,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use crate::isolation::{PAGE, assert_refused, in_own_process_leaving_nothing};
use crate::proc::maps_in;

/// One byte; next to it less than a page; apart, more than one, at an odd address.
const RANGES: [(u64, u64); 3] = [(0x1001, 1), (0x1002, 300), (0x5ff0, PAGE + 5)];
/// The pages that they take: as much is mapped.
const PAGES: [u64; 3] = [PAGE, PAGE, 2 * PAGE];

fn memory() -> GuestMemoryShm<AtomicBitmap> {
    let ranges = RANGES.map(|(start, size)| (GuestAddress(start), size as usize));
    GuestMemoryShm::from_ranges(&ranges).unwrap()
}

fn range(start: u64, size: u64) -> GuestRange {
    GuestRange::new(GuestAddress(start), size).unwrap()
}

/// What a file has in 512-byte blocks.
fn allocated(memory: &GuestMemoryShm<AtomicBitmap>) -> u64 {
    let region = memory.iter().next().unwrap();
    region.backing().allocated().unwrap()
}

#[test]
fn a_region_is_as_long_as_was_asked_for_and_its_mapping_whole_pages() {
    let memory = memory();
    let mut offset = 0;
    for ((region, (start, size)), pages) in memory.iter().zip(RANGES).zip(PAGES) {
        assert_eq!((region.start_addr().0, region.len()), (start, size));
        assert_eq!(region.last_addr().0, start + size - 1);
        assert_eq!(region.range(), range(start, size));
        // One bit for each page of the region, counted from its start.
        let bits = (size as usize).div_ceil(PAGE as usize);
        assert_eq!(region.dirty_bitmap().len(), bits);

        // The host address is congruent with the offset, a multiple of the page size.
        assert_eq!(region.offset(), offset);
        let host = region.as_ptr().addr() as u64;
        assert_eq!((host - offset) % (2 << 20), 0);
        let mapped: Vec<_> = maps_in(host..host + pages)
            .iter()
            .map(|line| line.range.clone())
            .collect();
        assert_eq!(mapped.len(), 1, "and a guard page on either side");
        assert_eq!(mapped[0], host..host + pages);
        offset += pages;
    }
    let backing = memory.iter().next().unwrap().backing();
    assert_eq!(backing.size(), offset);
    assert_eq!(memory.last_addr(), GuestAddress(0x5ff0 + PAGE + 4));
}

#[test]
fn the_rest_of_the_last_page_is_not_ram() {
    let memory = memory();
    for (start, size) in RANGES {
        let last = GuestAddress(start + size - 1);
        memory.write_obj(0xa5_u8, last).unwrap();
        assert_eq!(Bytes::read_obj::<u8>(&memory, last).unwrap(), 0xa5);
        let region = memory.find_region(last).unwrap();
        assert!(region.dirty_bitmap().dirty_at(size as usize - 1));
        for at in [size, size + 1, PAGE - 1, 2 * PAGE - 1, 4 * PAGE] {
            if at < size {
                continue;
            }
            let at = MemoryRegionAddress(at);
            assert!(region.write_obj(1u8, at).is_err());
            assert!(region.get_host_address(at).is_err());
            assert!(region.get_slice(at, 1).is_err());
        }
    }
    for hole in [0x1000, 0x1002 + 300, 0x1fff, 0x5fef, 0x5ff0 + PAGE + 5] {
        assert!(memory.find_region(GuestAddress(hole)).is_none());
        assert!(memory.write_obj(1u8, GuestAddress(hole)).is_err());
    }
    // From region to region, whose pages are not next to each other here.
    memory.write_slice(b"across", GuestAddress(0x1001)).unwrap();
    let mut bytes = [0; 6];
    memory.read_slice(&mut bytes, GuestAddress(0x1001)).unwrap();
    assert_eq!(&bytes, b"across");
}

#[test]
fn the_view_as_vm_memorys_type_has_the_same_sizes() {
    let memory = memory();
    let view: GuestMemoryMmap = memory.to_guest_memory_mmap().unwrap();
    for (region, (start, size)) in view.iter().zip(RANGES) {
        assert_eq!((region.start_addr().0, region.len()), (start, size));
    }
    memory.write_obj(7u8, GuestAddress(0x1002 + 299)).unwrap();
    assert_eq!(view.read_obj::<u8>(GuestAddress(0x1002 + 299)).unwrap(), 7);
}

#[test]
fn regions_are_inserted_and_removed_by_their_own_size() {
    let memory = memory();
    let refused = memory.remove_region(GuestAddress(0x1002), PAGE).err();
    assert!(matches!(
        refused,
        Some(MemoryError::NoSuchRegion {
            found: Some(300),
            ..
        })
    ));
    let (less, region) = memory.remove_region(GuestAddress(0x1002), 300).unwrap();
    assert_eq!(less.num_regions(), 2);
    // The pages that the others are rounded up to are in no other region's way.
    let more = less.insert_region(region).unwrap();
    assert_eq!(more.num_regions(), 3);
}

#[test]
fn populating_brings_in_the_pages_that_have_a_part_in_the_range() {
    for mode in [Populate::Allocate, Populate::Prefault] {
        let memory = memory();
        let part = range(0x5ff0 + PAGE + 4, 1);
        let populated = memory.populate(PopulateOptions::new(mode).with_range(part));
        let Populated { bytes, .. } = populated.unwrap();
        assert_eq!((bytes, allocated(&memory)), (PAGE, PAGE), "{mode:?}");

        memory.populate(PopulateOptions::new(mode)).unwrap();
        assert_eq!(allocated(&memory), 4 * PAGE, "{mode:?}");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5ff0)).unwrap(), 0);
    }
    let beyond = PopulateOptions::new(Populate::Allocate).with_range(range(0x1002, 301));
    assert!(memory().populate(beyond).is_err());
}

#[test]
fn statistics_count_pages_and_extents_stay_in_the_regions() {
    let memory = memory();
    assert_eq!(memory.stats().unwrap().allocated(), 0);
    for addr in [0x1002, 0x5ff0 + PAGE] {
        memory.write_obj(1u8, GuestAddress(addr)).unwrap();
    }
    let stats = memory.stats().unwrap();
    assert_eq!(
        (stats.size(), stats.allocated()),
        (301 + PAGE + 5, 2 * PAGE)
    );
    let of_each: Vec<_> = stats
        .regions
        .iter()
        .map(|region| region.allocated)
        .collect();
    assert_eq!(of_each, [0, PAGE, PAGE]);

    let extents = memory.extents(1).unwrap();
    let expected = [range(0x1002, 300), range(0x5ff0 + PAGE, 5)];
    assert_eq!(extents.ranges, expected);
    memory
        .populate(PopulateOptions::new(Populate::Allocate))
        .unwrap();
    let all = memory.extents(1).unwrap().ranges;
    // Regions that are neighbours in the guest are one extent.
    assert_eq!(all, [range(0x1001, 301), range(0x5ff0, PAGE + 5)]);
    assert_eq!(memory.stats().unwrap().allocated(), 4 * PAGE);
}

#[test]
fn discards_are_refused_by_the_name_of_the_region() {
    let memory = memory();
    memory.write_obj(1u8, GuestAddress(0x5ff0)).unwrap();
    let text = "the region 0x5ff0..=0x6ff4 (4.0 KiB (4101 bytes)) is not whole pages of 4 KiB, \
                which memory tables, memory slots and discards need: make it of an address and a \
                size that are multiples of that";
    let discard = memory.discard((GuestAddress(0x5ff0), PAGE));
    assert_refused!(
        discard,
        DiscardError::Range(InvalidRange::PartialPages { .. }),
        text
    );
    let noted = DiscardAccumulator::new().add(&memory, (GuestAddress(0x5ff0), PAGE));
    assert_refused!(
        noted,
        DiscardError::Range(InvalidRange::PartialPages { .. }),
        text
    );
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5ff0)).unwrap(), 1);
    // A region of whole pages beside them is discarded.
    let ranges = [(GuestAddress(0), 100), (GuestAddress(PAGE), 4096)];
    let mixed = GuestMemoryShm::<()>::from_ranges(&ranges).unwrap();
    mixed.write_obj(1u8, GuestAddress(PAGE)).unwrap();
    let discarded = mixed.discard((GuestAddress(PAGE), PAGE)).unwrap();
    assert_eq!(discarded.freed, PAGE);
    assert!(mixed.discard((GuestAddress(0), 100)).is_err());
}

#[test]
fn the_builder_and_regions_with_options_take_whole_pages_only() {
    in_own_process_leaving_nothing!(|| {
        let builder = || {
            GuestMemoryShm::<()>::builder().add_ram(RamOptions::new(), [(GuestAddress(0), 300)])
        };
        let text = "size 300 bytes is not a multiple of the page size 4 KiB: the nearest larger \
                    is 4 KiB";
        assert_refused!(
            builder().build(),
            MemoryError::Range(InvalidRange::Unaligned {
                part: RangePart::Size,
                value: 300,
                ..
            }),
            text,
        );
        let region = GuestRegionShm::<()>::new((GuestAddress(0), 300), &RamOptions::new());
        assert_refused!(
            region,
            MemoryError::Range(InvalidRange::Unaligned { .. }),
            text
        );
    });
}

/// A file with these bytes on a disk, or wherever temporary files are.
fn file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

#[test]
fn ranges_with_files_are_parts_of_these_files() {
    let mut shared = file(0x2400);
    let both = FileOffset::new(shared.try_clone().unwrap(), 0);
    let second = FileOffset::from_arc(both.arc().clone(), 0x2000);
    let memory = GuestMemoryShm::<()>::from_ranges_with_files([
        (GuestAddress(0), 0x1000, Some(both)),
        (GuestAddress(0x1000), 0x400, None),
        (GuestAddress(0x1400), 0x400, Some(second)),
    ])
    .unwrap();
    let of_file = |at| {
        let region: &GuestRegionShm = memory.find_region(GuestAddress(at)).unwrap();
        let offset = GuestMemoryRegion::file_offset(region).unwrap();
        assert_eq!(offset.start(), region.offset());
        (region.backing().clone(), region.offset())
    };
    assert_eq!(of_file(0).0, of_file(0x1400).0);
    assert_ne!(of_file(0).0, of_file(0x1000).0);
    assert_eq!([of_file(0).1, of_file(0x1400).1], [0, 0x2000]);

    memory
        .write_slice(&[9; 0xc00], GuestAddress(0xc00))
        .unwrap();
    let mut bytes = Vec::new();
    shared.rewind().unwrap();
    shared.read_to_end(&mut bytes).unwrap();
    let nines = |range: std::ops::Range<usize>| bytes[range].iter().all(|byte| *byte == 9);
    assert!(nines(0xc00..0x1000) && nines(0x2000..0x2400));
    assert!(!nines(0xbff..0x1000));
    assert_eq!(bytes.len(), 0x2400);
    shared.write_all_at(b"from outside", 0x23f0).unwrap();
    let mut bytes = [0; 12];
    memory.read_slice(&mut bytes, GuestAddress(0x17f0)).unwrap();
    assert_eq!(&bytes, b"from outside");
    // What is mapped of the file's last page after its end is not SIGBUS, for populating either.
    memory
        .populate(PopulateOptions::new(Populate::Prefault))
        .unwrap();
}

#[test]
fn a_region_of_a_range_and_a_file_is_one_of_these() {
    let offset = FileOffset::new(file(0x1400), 0x1000);
    let region = GuestRegionShm::<AtomicBitmap>::from_range(
        GuestAddress(0x777),
        0x400,
        Some(offset.clone()),
    )
    .unwrap();
    assert_eq!((region.start_addr().0, region.len()), (0x777, 0x400));
    region.write_obj(3u8, MemoryRegionAddress(0x3ff)).unwrap();
    let mut byte = [0];
    offset.file().read_exact_at(&mut byte, 0x13ff).unwrap();
    assert_eq!(byte, [3]);
    assert!(region.dirty_bitmap().dirty_at(0x3ff));
    let own = GuestRegionShm::<()>::from_range(GuestAddress(0), 8, None).unwrap();
    assert_eq!(own.len(), 8);
}

#[test]
fn files_that_cannot_be_ram_are_refused() {
    in_own_process_leaving_nothing!(|| {
        let with = |file: File, start, size| {
            let offset = FileOffset::new(file, start);
            GuestRegionShm::<()>::from_range(GuestAddress(0), size, Some(offset))
        };
        // vm-memory maps what the file has not, and touching it is SIGBUS, or lost.
        assert!(with(file(0x1400), 0x1000, 0x400).is_ok(), "to its end");
        assert_refused!(
            with(file(0x1400), 0x1000, 0x800),
            MemoryError::Backing(BackingError::EndsInPage { len: 0x1400, .. }),
            "a region of 2 KiB at offset 0x1000 runs past the end of its file at 0x1400, inside a \
             page of 4 KiB: what is written there never reaches the file, make the file longer \
             first",
        );
        for (len, start, size) in [(0x1400, 0, 0x2001), (0x1000, 0x1000, 1), (0x400, 0x1000, 1)] {
            let refused = with(file(len), start, size);
            assert!(
                matches!(
                    refused,
                    Err(MemoryError::Backing(BackingError::Outside { .. }))
                ),
                "{len:#x} {start:#x} {size:#x}: {refused:?}"
            );
        }
        let unaligned = with(file(0x2000), 0x800, 0x400);
        assert!(matches!(
            unaligned,
            Err(MemoryError::Range(InvalidRange::Unaligned {
                part: RangePart::Offset,
                value: 0x800,
                ..
            }))
        ));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("read-only");
        std::fs::write(&path, [0; 4096]).unwrap();
        let read_only = with(File::open(&path).unwrap(), 0, 4096);
        assert!(matches!(
            read_only,
            Err(MemoryError::Backing(BackingError::NotWritable))
        ));
        let (pipe, _) = std::io::pipe().unwrap();
        let pipe = with(std::os::fd::OwnedFd::from(pipe).into(), 0, 4096);
        assert!(matches!(
            pipe,
            Err(MemoryError::Backing(BackingError::NotMemory { .. }))
        ));
    });
}
