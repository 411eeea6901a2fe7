//! Numbers that make no sense: refused before anything is created, by an error that names the
//! value, the limit and the way out.

use std::sync::Arc;

use guest_memory_shm::{
    BackingError, BackingSource, Error, GuestMemoryShm, GuestRange, GuestRegionShm, InvalidRange,
    MemoryError, PageSize, RamOptions, RangePart, ShmBacking, ram_around_hole,
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::isolation::{PAGE, assert_refused, in_own_process_leaving_nothing};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
/// The last page that a range can have: one that ends at 2^64 cannot be expressed.
const LAST_PAGE: u64 = u64::MAX - 2 * PAGE + 1;

fn kind(kind: BackingSource) -> RamOptions {
    RamOptions::new().with_backing(kind)
}

pub(crate) fn huge(size: u64) -> RamOptions {
    RamOptions::new().with_page_size(PageSize::Huge(Some(size)))
}

/// A memory of a good range on a memfd, and of `ranges` with `options` after it.
pub(crate) fn build(options: RamOptions, ranges: &[(u64, u64)]) -> Result<GuestMemoryShm, Error> {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(addr, size)| (GuestAddress(*addr), *size))
        .collect();
    GuestMemoryShm::builder()
        .add_ram(RamOptions::new(), [(GuestAddress(1 << 50), PAGE)])
        .add_ram(options, ranges)
        .build()
        .map_err(Error::from)
}

#[test]
fn what_is_accepted_here_is_what_the_refusals_are_measured_by() {
    let memory = build(
        kind(BackingSource::PosixShm),
        &[(0, PAGE), (LAST_PAGE, PAGE)],
    )
    .unwrap();
    assert_eq!(memory.num_regions(), 3);
    assert_eq!(memory.last_addr(), GuestAddress(u64::MAX - PAGE));
}

#[test]
fn size_0_is_refused() {
    in_own_process_leaving_nothing!(|| {
        for options in [
            kind(BackingSource::Memfd),
            kind(BackingSource::PosixShm),
            huge(HUGE),
        ] {
            assert_refused!(
                build(options.clone(), &[(0, HUGE), (0x1000_0000, 0)]),
                Error::Range(InvalidRange::Empty {
                    start: GuestAddress(0x1000_0000),
                    ..
                }),
                "the range at guest address 0x10000000 has size 0: give it at least one page",
            );
            assert_refused!(
                ShmBacking::create(&options, 0),
                BackingError::Length { len: 0, .. },
                "a backing of 0 bytes cannot exist: it must have at least one page and at most \
                 7.9 EiB (9223372036854775807 bytes)",
            );
        }
        assert_refused!(
            GuestRegionShm::<()>::new((GuestAddress(PAGE), 0), &RamOptions::new()),
            MemoryError::Range(InvalidRange::Empty { .. }),
            "the range at guest address 0x1000 has size 0: give it at least one page",
        );
        let hole = GuestRange::new(GuestAddress(3 << 30), 1 << 30).unwrap();
        assert_refused!(
            ram_around_hole(0, hole),
            InvalidRange::Empty { .. },
            "the range at guest address 0x0 has size 0: give it at least one page",
        );
    });
}

#[test]
fn a_size_that_is_not_whole_pages_is_refused() {
    in_own_process_leaving_nothing!(|| {
        for options in [kind(BackingSource::Memfd), kind(BackingSource::PosixShm)] {
            let text = "size 4.8 KiB (5000 bytes) is not a multiple of the page size 4 KiB: \
                        the nearest larger is 8 KiB";
            assert_refused!(
                build(options.clone(), &[(0, PAGE), (1 << 30, 5000)]),
                Error::Range(InvalidRange::Unaligned {
                    part: RangePart::Size,
                    value: 5000,
                    page_size: PAGE,
                    ..
                }),
                text,
            );
            assert_refused!(
                ShmBacking::create(&options, 5000),
                BackingError::Range(InvalidRange::Unaligned {
                    part: RangePart::Size,
                    value: 5000,
                    page_size: PAGE,
                    ..
                }),
                text,
            );
        }
        assert_refused!(
            build(huge(HUGE), &[(0, 3 * MIB)]),
            Error::Range(InvalidRange::Unaligned {
                part: RangePart::Size,
                page_size: HUGE,
                ..
            }),
            "size 3 MiB is not a multiple of the page size 2 MiB: the nearest larger is 4 MiB",
        );
        // Transparent huge pages are base pages that the kernel gathers.
        let transparent = RamOptions::new().with_page_size(PageSize::Transparent);
        assert!(build(transparent, &[(0, 3 * MIB + PAGE)]).is_ok());
    });
}

#[test]
fn an_address_that_is_not_on_a_page_is_refused() {
    in_own_process_leaving_nothing!(|| {
        for options in [kind(BackingSource::Memfd), kind(BackingSource::PosixShm)] {
            assert_refused!(
                build(options, &[(0x1800, PAGE)]),
                Error::Range(InvalidRange::Unaligned {
                    part: RangePart::Address,
                    page_size: PAGE,
                    ..
                }),
                "guest address 0x1800 is not a multiple of the page size 4 KiB: the nearest is \
                 0x1000",
            );
        }
        assert_refused!(
            build(huge(HUGE), &[(3 * MIB, HUGE)]),
            Error::Range(InvalidRange::Unaligned {
                part: RangePart::Address,
                page_size: HUGE,
                ..
            }),
            "guest address 0x300000 is not a multiple of the page size 2 MiB: the nearest is \
             0x200000",
        );
    });
}

#[test]
fn ranges_that_overlap_are_refused_on_one_backing_and_on_two() {
    in_own_process_leaving_nothing!(|| {
        let text = "guest ranges 0x0..=0x1fff (8 KiB) and 0x1000..=0x1fff (4 KiB) overlap: move \
                    or shorten one of them";
        assert_refused!(
            build(RamOptions::new(), &[(PAGE, PAGE), (0, 2 * PAGE)]),
            Error::Range(InvalidRange::Overlap { .. }),
            text,
        );
        let two = GuestMemoryShm::<()>::builder()
            .add_ram(kind(BackingSource::PosixShm), [(GuestAddress(PAGE), PAGE)])
            .add_ram(RamOptions::new(), [(GuestAddress(0), 2 * PAGE)]);
        assert_refused!(
            two.build(),
            MemoryError::Range(InvalidRange::Overlap { .. }),
            text
        );

        let region = |addr, size| {
            Arc::new(
                GuestRegionShm::<()>::new((GuestAddress(addr), size), &RamOptions::new()).unwrap(),
            )
        };
        let memory = GuestMemoryShm::from_arc_regions(vec![region(0, 2 * PAGE)]).unwrap();
        assert_refused!(
            memory.insert_region(region(PAGE, PAGE)),
            MemoryError::Range(InvalidRange::Taken { .. }),
            "guest range 0x1000..=0x1fff (4 KiB) overlaps 0x0..=0x1fff (8 KiB), which is there \
             already: move or shorten it, or remove what is there first",
        );
        // The control: right after it there is no overlap.
        assert!(memory.insert_region(region(2 * PAGE, PAGE)).is_ok());
    });
}

#[test]
fn unsorted_ranges_are_sorted() {
    let sorted = [
        (0, PAGE),
        (PAGE, 3 * PAGE),
        (1 << 40, PAGE),
        (1 << 50, PAGE),
    ];
    let starts = |memory: &GuestMemoryShm| -> Vec<_> {
        memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect()
    };
    let unsorted = build(RamOptions::new(), &[sorted[2], sorted[0], sorted[1]]).unwrap();
    assert_eq!(starts(&unsorted), sorted);
    // In the file they are in the order that was given; the last is on another one.
    let offsets: Vec<u64> = unsorted.iter().map(GuestRegionShm::offset).collect();
    assert_eq!(offsets, [PAGE, 2 * PAGE, 0, 0]);
}

#[test]
fn a_range_past_the_address_space_is_refused() {
    in_own_process_leaving_nothing!(|| {
        assert_refused!(
            build(RamOptions::new(), &[(u64::MAX - PAGE + 1, 2 * PAGE)]),
            Error::Range(InvalidRange::Overflow { .. }),
            "the range of 8 KiB at guest address 0xfffffffffffff000 has no 64-bit address after \
             it: lower its address or its size",
        );
        // Its last byte has an address, but the byte after it has not: vhost-user and vm-memory
        // refuse that too.
        assert!(matches!(
            build(RamOptions::new(), &[(u64::MAX - PAGE + 1, PAGE)]),
            Err(Error::Range(InvalidRange::Overflow { .. }))
        ));
    });
}

#[test]
fn ram_that_no_file_can_hold_is_refused() {
    in_own_process_leaving_nothing!(|| {
        let text = "a backing of 8 EiB cannot exist: it must have at least one page and at most \
                    7.9 EiB (9223372036854775807 bytes)";
        for options in [kind(BackingSource::Memfd), kind(BackingSource::PosixShm)] {
            assert_refused!(
                ShmBacking::create(&options, 1 << 63),
                BackingError::Length { .. },
                text,
            );
            assert!(matches!(
                build(options, &[(0, 1 << 62), (1 << 62, 1 << 62)]),
                Err(Error::Backing(BackingError::Length { .. }))
            ));
        }
    });
}

#[test]
fn regions_that_are_not_sorted_are_refused() {
    in_own_process_leaving_nothing!(|| {
        let region = |addr| {
            let addr = GuestAddress(addr);
            GuestRegionShm::<()>::new((addr, PAGE), &RamOptions::new()).unwrap()
        };
        assert_refused!(
            GuestMemoryShm::from_regions(vec![region(0), region(8 * PAGE), region(PAGE)]),
            MemoryError::Unsorted { .. },
            "the guest range 0x1000..=0x1fff (4 KiB) was given after 0x8000..=0x8fff (4 KiB): \
             sort them by address, or use GuestMemoryShm::builder, which takes any order",
        );
        assert!(GuestMemoryShm::from_regions(vec![region(0), region(PAGE)]).is_ok());
    });
}

#[test]
fn no_ranges_are_refused() {
    in_own_process_leaving_nothing!(|| {
        let text = "no range of guest RAM was given: give at least one";
        assert_refused!(
            GuestMemoryShm::<()>::from_ranges(&[]),
            MemoryError::NoRanges,
            text
        );
        assert_refused!(build(RamOptions::new(), &[]), Error::Memory(_), text);
        let none = GuestMemoryShm::<()>::builder();
        assert_refused!(none.build(), MemoryError::NoRanges, text);
        assert_refused!(
            GuestMemoryShm::<()>::from_regions(Vec::new()),
            MemoryError::NoRanges,
            text,
        );
    });
}

#[test]
fn a_region_that_its_backing_does_not_have_is_refused() {
    in_own_process_leaving_nothing!(|| {
        let backing = ShmBacking::create(&RamOptions::new(), 4 * PAGE).unwrap();
        let place = |offset, size| {
            let start = GuestAddress(0);
            GuestRegionShm::<()>::from_backing(&backing, offset, (start, size))
        };
        assert!(place(3 * PAGE, PAGE).is_ok());
        assert_refused!(
            place(3 * PAGE, 2 * PAGE),
            MemoryError::Backing(BackingError::Outside { .. }),
            "a region of 8 KiB at offset 0x3000 runs past the end of its backing at 0x4000: \
             touching it there would be SIGBUS",
        );
        assert!(matches!(
            place(u64::MAX - PAGE + 1, PAGE),
            Err(MemoryError::Backing(BackingError::Outside { .. }))
        ));
        assert_refused!(
            place(100, PAGE),
            MemoryError::Range(InvalidRange::Unaligned {
                part: RangePart::Offset,
                value: 100,
                page_size: PAGE,
                ..
            }),
            "offset 0x64 is not a multiple of the page size 4 KiB: the nearest is 0x0",
        );
        let twice = GuestMemoryShm::<()>::builder().add_backing(
            &backing,
            PAGE,
            [
                (GuestAddress(0), 2 * PAGE),
                (GuestAddress(1 << 30), 2 * PAGE),
            ],
        );
        assert!(matches!(
            twice.build(),
            Err(MemoryError::Backing(BackingError::Outside { .. }))
        ));
    });
}

#[test]
fn removing_a_region_that_is_not_there_is_refused() {
    let memory = build(RamOptions::new(), &[(0, 2 * PAGE)]).unwrap();
    for (addr, size, text) in [
        (
            0,
            PAGE,
            "no region of 4 KiB starts at guest address 0x0, where one of 8 KiB does",
        ),
        (
            PAGE,
            PAGE,
            "no region of 4 KiB starts at guest address 0x1000, where none does",
        ),
        (
            1 << 40,
            0,
            "no region of 0 bytes starts at guest address 0x10000000000, where none does",
        ),
    ] {
        let removed = memory.remove_region(GuestAddress(addr), size);
        assert_refused!(removed, MemoryError::NoSuchRegion { .. }, text);
    }
    assert_eq!(memory.num_regions(), 2);
}
