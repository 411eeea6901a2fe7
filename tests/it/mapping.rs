//! What a memory's mappings are to the kernel, and that nothing of them stays.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use guest_memory_shm::{
    AdoptPolicy, BackingSource, CoreDump, GuestMemoryShm, GuestRange, GuestRegionShm, PageSize,
    RamOptions, ShmBacking, ram_around_hole,
};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::{dup, ftruncate};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory,
};

use crate::fork::{dies_of_reading, dies_of_writing};
use crate::isolation::{PAGE, in_own_process};
use crate::proc::{has_vm_flag, leaves_nothing, maps_in, smaps_at};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const KINDS: [BackingSource; 2] = [BackingSource::Memfd, BackingSource::PosixShm];

fn options(kind: BackingSource) -> RamOptions {
    RamOptions::new().with_backing(kind)
}

fn region(options: &RamOptions, size: u64) -> GuestRegionShm {
    GuestRegionShm::new((GuestAddress(0), size), options).expect("mapped")
}

fn host(region: &GuestRegionShm) -> u64 {
    region.as_ptr().addr() as u64
}

fn file_of(backing: &ShmBacking) -> std::fs::File {
    dup(backing.as_fd()).expect("a descriptor is free").into()
}

#[test]
fn a_region_is_mapped_shared_for_reading_and_writing() {
    for (kind, path) in [
        (BackingSource::Memfd, "/memfd:guest-memory-shm (deleted)"),
        (BackingSource::PosixShm, "/dev/shm/gms-"),
    ] {
        let region = region(&options(kind), 4 * MIB);
        let start = host(&region);
        let lines = maps_in(start..start + 4 * MIB);
        let [line] = lines.as_slice() else {
            panic!("one mapping was to be there: {lines:?}");
        };
        assert_eq!(line.range, start..start + 4 * MIB);
        assert_eq!(line.permissions, "rw-s");
        assert!(line.path.starts_with(path), "{line:?}");
    }
}

#[test]
fn core_dumps_leave_guest_ram_out_unless_it_is_to_be_included() {
    for kind in KINDS {
        let default = region(&options(kind.clone()), MIB);
        assert!(has_vm_flag(&smaps_at(default.as_ptr()), "dd"));
        let included = region(
            &options(kind.clone()).with_core_dump(CoreDump::Include),
            MIB,
        );
        assert!(!has_vm_flag(&smaps_at(included.as_ptr()), "dd"));
    }
}

#[test]
fn a_region_on_a_backing_that_existed_is_left_out_of_core_dumps_too() {
    let backing = ShmBacking::create(&RamOptions::new(), MIB).unwrap();
    let region = GuestRegionShm::<()>::from_backing(&backing, 0, (GuestAddress(0), MIB)).unwrap();
    assert!(has_vm_flag(&smaps_at(region.as_ptr()), "dd"));
}

#[test]
fn transparent_huge_pages_are_asked_for_only_where_they_are_wanted() {
    for kind in KINDS {
        let base = region(&options(kind.clone()), 4 * MIB);
        assert!(!has_vm_flag(&smaps_at(base.as_ptr()), "hg"));
        let huge = options(kind.clone()).with_page_size(PageSize::Transparent);
        let huge = region(&huge, 4 * MIB);
        assert!(has_vm_flag(&smaps_at(huge.as_ptr()), "hg"));
    }
}

#[test]
fn options_hold_for_every_region_on_a_backing_however_it_is_placed() {
    let flags = |backing: &ShmBacking| {
        let region = GuestRegionShm::<()>::from_backing(backing, 0, (GuestAddress(0), 4 * MIB));
        let smaps = smaps_at(region.unwrap().as_ptr());
        (has_vm_flag(&smaps, "hg"), has_vm_flag(&smaps, "dd"))
    };
    let options = RamOptions::new()
        .with_page_size(PageSize::Transparent)
        .with_core_dump(CoreDump::Include);
    let created = ShmBacking::create(&options, 4 * MIB).unwrap();
    assert_eq!(flags(&created), (true, false));
    let fd = || created.as_fd().try_clone_to_owned().unwrap();
    // The options are not the file's, but those of the process that maps it.
    let plain = ShmBacking::adopt(fd(), &AdoptPolicy::new()).unwrap();
    assert_eq!(flags(&plain), (false, true));
    let policy = AdoptPolicy::new().with_options(options);
    assert_eq!(
        flags(&ShmBacking::adopt(fd(), &policy).unwrap()),
        (true, false)
    );
}

#[test]
fn an_access_that_runs_off_either_end_faults() {
    for kind in KINDS {
        let region = region(&options(kind), 4 * MIB);
        let first = region.as_ptr();
        let last = first.wrapping_add(4 * MIB as usize - 1);
        for inside in [first, last] {
            assert_eq!(dies_of_reading(inside), None);
            assert_eq!(dies_of_writing(inside), None);
        }
        // The children wrote to shared memory.
        assert_eq!(
            region
                .read_obj::<u8>(vm_memory::MemoryRegionAddress(4 * MIB - 1))
                .unwrap(),
            1
        );
        for outside in [first.wrapping_sub(1), last.wrapping_add(1)] {
            assert_eq!(dies_of_reading(outside), Some(Signal::SIGSEGV));
            assert_eq!(dies_of_writing(outside), Some(Signal::SIGSEGV));
        }
    }
}

#[test]
fn the_guards_are_one_inaccessible_page_on_either_side() {
    let region = region(&RamOptions::new(), 4 * MIB);
    let (start, end) = (host(&region), host(&region) + 4 * MIB);
    for guard in [start - PAGE..start, end..end + PAGE] {
        let lines = maps_in(guard.clone());
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(lines[0].permissions, "---p");
        assert_eq!(lines[0].path, "");
        assert!(lines[0].range.start <= guard.start && guard.end <= lines[0].range.end);
    }
}

#[test]
fn the_ranges_of_one_backing_lie_one_after_the_other_in_one_file() {
    let ranges = [
        (GuestAddress(4 * GIB), 2 * MIB),
        (GuestAddress(0), PAGE),
        (GuestAddress(GIB), 3 * PAGE),
    ];
    for kind in KINDS {
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(options(kind), ranges)
            .build()
            .unwrap();
        let at = |addr| memory.find_region(GuestAddress(addr)).unwrap();
        let offsets = [4 * GIB, 0, GIB].map(|addr| at(addr).offset());
        assert_eq!(offsets, [0, 2 * MIB, 2 * MIB + PAGE]);
        for addr in [4 * GIB, 0, GIB] {
            let line = &maps_in(host(at(addr))..host(at(addr)) + 1)[0];
            assert_eq!(line.offset, at(addr).offset());
        }

        let backing = at(0).backing();
        assert_eq!(backing, at(4 * GIB).backing());
        assert_eq!(backing.size(), 2 * MIB + 4 * PAGE);
        // One more mapping of the whole file, as a daemon has it.
        let whole = FileOffset::new(file_of(backing), 0);
        let whole = MmapRegion::<()>::from_file(whole, backing.size() as usize).unwrap();
        for (number, (addr, size)) in (1..).zip(ranges) {
            let last = GuestAddress(addr.0 + size - 8);
            memory.write_obj::<u64>(number, last).unwrap();
            let offset = at(addr.0).offset() + size - 8;
            let seen = whole.as_volatile_slice().read_obj::<u64>(offset as usize);
            assert_eq!(seen.unwrap(), number);
        }
    }
}

#[test]
fn two_regions_on_one_part_of_a_backing_are_the_same_ram() {
    let backing = ShmBacking::create(&RamOptions::new(), MIB).unwrap();
    let place = |addr| {
        let region =
            GuestRegionShm::<()>::from_backing(&backing, PAGE, (GuestAddress(addr), PAGE));
        Arc::new(region.unwrap())
    };
    let memory = GuestMemoryShm::from_arc_regions(vec![place(0), place(GIB)]).unwrap();
    memory.write_obj(0x1234_u16, GuestAddress(5)).unwrap();
    let alias: u16 = memory.read_obj(GuestAddress(GIB + 5)).unwrap();
    assert_eq!(alias, 0x1234);
}

#[test]
fn host_addresses_suit_huge_pages() {
    let hole = GuestRange::new(GuestAddress(3 * GIB), GIB).unwrap();
    let ram = ram_around_hole(8 * GIB, hole).unwrap();
    let odd = [
        (GuestAddress(0), 640 * 1024),
        (GuestAddress(MIB), 7 * MIB),
        (GuestAddress(16 * GIB), 2 * GIB + 2 * MIB),
    ];
    let odd = odd.map(|place| place.try_into().unwrap());
    for ranges in [ram, odd.to_vec()] {
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(RamOptions::new(), ranges)
            .build()
            .unwrap();
        for region in memory.iter() {
            let modulus = if region.len() >= GIB { GIB } else { 2 * MIB };
            let host = host(region) % modulus;
            assert_eq!(host, region.offset() % modulus, "{memory}");
            let guest = region.start_addr().0 % modulus;
            if guest == region.offset() % modulus {
                assert_eq!(host, guest, "{memory}");
            }
        }
    }
}

#[test]
fn ram_around_a_hole_on_a_large_boundary_is_congruent_with_the_guest() {
    // The premise of the test above is met where it matters.
    let hole = GuestRange::new(GuestAddress(3 * GIB), GIB).unwrap();
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(RamOptions::new(), ram_around_hole(8 * GIB, hole).unwrap())
        .build()
        .unwrap();
    let congruent = |region: &&GuestRegionShm| region.start_addr().0 % GIB == host(region) % GIB;
    assert_eq!(memory.iter().filter(congruent).count(), 2);
}

#[test]
fn dropping_a_memory_unmaps_and_closes_all_of_it() {
    in_own_process(|| {
        for kind in KINDS {
            let spans = leaves_nothing(|| {
                let memory = GuestMemoryShm::<()>::builder()
                    .add_ram(
                        options(kind.clone()),
                        [(GuestAddress(0), MIB), (GuestAddress(GIB), PAGE)],
                    )
                    .add_ram(options(kind), [(GuestAddress(2 * GIB), 4 * MIB)])
                    .build()
                    .unwrap();
                memory.write_obj(1u8, GuestAddress(GIB)).unwrap();
                let span = |region: &GuestRegionShm| {
                    host(region) - PAGE..host(region) + region.len() + PAGE
                };
                let spans: Vec<_> = memory.iter().map(span).collect();
                // The control: as long as the memory lives, they are there.
                assert!(spans.iter().all(|span| maps_in(span.clone()).len() == 3));
                spans
            });
            assert_eq!(spans.len(), 3);
            for span in spans {
                assert_eq!(maps_in(span), []);
            }
        }
    });
}

#[test]
fn a_region_outlives_the_memory_it_was_in_and_its_backing_outlives_both() {
    in_own_process(|| {
        leaves_nothing(|| {
            let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
            memory.write_obj(77u8, GuestAddress(9)).unwrap();
            let region = memory.arc_regions().remove(0);
            drop(memory);
            let at = vm_memory::MemoryRegionAddress(9);
            assert_eq!(region.read_obj::<u8>(at).unwrap(), 77);
            let (backing, start) = (region.backing().clone(), host(&region));
            drop(region);
            assert_eq!(maps_in(start..start + PAGE), []);
            let again = GuestRegionShm::<()>::from_backing(&backing, 0, (GuestAddress(0), PAGE));
            assert_eq!(again.unwrap().read_obj::<u8>(at).unwrap(), 77);
        });
    });
}

#[test]
fn creating_and_mapping_allocates_no_page_and_touching_does() {
    for kind in KINDS {
        let region = region(&options(kind), 64 * MIB);
        assert_eq!(file_of(region.backing()).metadata().unwrap().blocks(), 0);
        let at = vm_memory::MemoryRegionAddress(5 * MIB);
        region.write_obj(1u8, at).unwrap();
        // One page, or one huge page where the system gathers them for all of shared memory.
        let allocated = region.backing().allocated().unwrap();
        assert!([PAGE, 2 * MIB].contains(&allocated), "{allocated}");
    }
}

#[test]
fn a_memory_of_1_tib_costs_nothing_until_it_is_touched() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 40)]).unwrap();
    let region = memory.find_region(GuestAddress((1 << 40) - 1)).unwrap();
    let metadata = file_of(region.backing()).metadata().unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (1 << 40, 0));
    memory.write_obj(1u8, GuestAddress((1 << 40) - 1)).unwrap();
    assert!(region.backing().allocated().unwrap() <= 2 * MIB);
    assert_ne!(region.backing().allocated().unwrap(), 0);
}

#[test]
fn posix_shm_has_no_name_and_mode_0() {
    in_own_process(|| {
        leaves_nothing(|| {
            let backing = ShmBacking::create(&options(BackingSource::PosixShm), MIB).unwrap();
            let metadata = file_of(&backing).metadata().unwrap();
            assert_eq!((metadata.nlink(), metadata.mode() & 0o7777), (0, 0));
            let own = format!("gms-{}-", std::process::id());
            let names = std::fs::read_dir("/dev/shm").unwrap().flatten();
            let mine = names.filter(|name| name.file_name().to_string_lossy().starts_with(&own));
            assert_eq!(mine.count(), 0);
        });
    });
}

#[test]
fn another_holder_can_truncate_posix_shm_but_not_a_memfd() {
    let memfd = ShmBacking::create(&options(BackingSource::Memfd), MIB).unwrap();
    let daemons = dup(memfd.as_fd()).unwrap();
    for len in [0, PAGE, 2 * MIB] {
        assert_eq!(ftruncate(&daemons, len as i64), Err(Errno::EPERM), "{len}");
    }
    assert_eq!(file_of(&memfd).metadata().unwrap().len(), MIB);

    let shm = region(&options(BackingSource::PosixShm), MIB);
    let daemons = dup(shm.backing().as_fd()).unwrap();
    assert_eq!(dies_of_reading(shm.as_ptr()), None);
    ftruncate(&daemons, 0).unwrap();
    assert_eq!(file_of(shm.backing()).metadata().unwrap().len(), 0);
    // That is why untrusted daemons must not get it.
    assert_eq!(dies_of_reading(shm.as_ptr()), Some(Signal::SIGBUS));
}
