//! Which parts of the RAM are allocated, against a naive model of touched pages.

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom};

use guest_memory_shm::{AdoptPolicy, BackingSource, GuestMemoryShm, RamOptions, ShmBacking};
use nix::fcntl::{FallocateFlags, fallocate, posix_fallocate};
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::isolation::{PAGE, shm_dir};
use crate::support::skip;

const MIB: u64 = 1 << 20;
/// Two regions on one backing, without a gap between them; after a gap, one on another.
const REGIONS: [(u64, u64); 3] = [(0, 300), (300, 500), (2000, 450)];

fn memory() -> GuestMemoryShm {
    let ranges = REGIONS.map(|(start, pages)| (GuestAddress(start * PAGE), pages * PAGE));
    GuestMemoryShm::<()>::builder()
        .add_ram(RamOptions::new(), ranges[..2].to_vec())
        .add_ram(
            RamOptions::new().with_backing(BackingSource::PosixShm),
            ranges[2..].to_vec(),
        )
        .build()
        .unwrap()
}

/// The extents in pages: start, number.
fn extents(memory: &GuestMemoryShm, resolution: u64) -> Vec<(u64, u64)> {
    let extents = memory.extents(resolution).unwrap();
    assert_eq!(extents.unlocated, 0);
    let in_pages = |range: &guest_memory_shm::GuestRange| {
        assert!(range.start_addr().0.is_multiple_of(PAGE) && range.size().is_multiple_of(PAGE));
        (range.start_addr().0 / PAGE, range.size() / PAGE)
    };
    extents.ranges.iter().map(in_pages).collect()
}

/// What they are to be for these pages.
fn expected(pages: &BTreeSet<u64>, resolution: u64) -> Vec<(u64, u64)> {
    let step = resolution.div_ceil(PAGE).max(1);
    let mut all = BTreeSet::new();
    for (start, size) in REGIONS {
        for page in pages.range(start..start + size) {
            let first = start + (page - start) / step * step;
            all.extend(first..first.saturating_add(step).min(start + size));
        }
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in all {
        match runs.last_mut() {
            Some((start, len)) if *start + *len == page => *len += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn extents_are_the_pages_that_exist(
        touched in prop::collection::vec((0usize..3, 0..500u64, 1..60u64), 0..12),
        allocated in prop::collection::vec((0usize..3, 0..500u64, 1..200u64), 0..4),
        discarded in prop::collection::vec((0usize..3, 0..500u64, 1..60u64), 0..4),
        all in (any::<bool>(), 0usize..8),
    ) {
        let memory = memory();
        let mut pages = BTreeSet::new();
        let place = |(region, from, len): (usize, u64, u64)| {
            let (start, size) = REGIONS[region];
            let from = from.min(size - 1);
            start + from..start + (from + len).min(size)
        };
        for part in touched {
            for page in place(part) {
                memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
                pages.insert(page);
            }
        }
        // Allocated and not touched, as populating without page tables does.
        for part in allocated {
            let part = place(part);
            let (region, at) = memory.to_region_addr(GuestAddress(part.start * PAGE)).unwrap();
            let offset = (region.offset() + at.0) as i64;
            let len = ((part.end - part.start) * PAGE) as i64;
            posix_fallocate(region.backing(), offset, len).unwrap();
            pages.extend(part);
        }
        for part in discarded {
            let part = place(part);
            let len = (part.end - part.start) * PAGE;
            memory.discard((GuestAddress(part.start * PAGE), len)).unwrap();
            pages.retain(|page| !part.contains(page));
        }
        // Full backings are told without a look at them.
        if let (true, of @ 0..3) = all {
            let backing = memory.iter().nth(of).unwrap().backing();
            fallocate(backing, FallocateFlags::empty(), 0, backing.size() as i64).unwrap();
            let on_it = if of < 2 { &REGIONS[..2] } else { &REGIONS[2..] };
            pages.extend(on_it.iter().flat_map(|(start, size)| *start..start + size));
        }
        for resolution in [0, PAGE, PAGE + 1, 7 * PAGE, 8 * PAGE, 64 * PAGE, 2 * MIB, u64::MAX] {
            prop_assert_eq!(
                extents(&memory, resolution), expected(&pages, resolution), "{:#x}", resolution
            );
        }
        let stats = memory.stats().unwrap();
        for (region, (start, size)) in stats.regions.iter().zip(REGIONS) {
            let count = pages.range(start..start + size).count() as u64;
            prop_assert_eq!(region.allocated, count * PAGE);
        }
    }
}

#[test]
fn extents_of_a_disk_file_are_found_and_its_position_is_left_alone() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB).unwrap();
    // A daemon's copy of the descriptor has the same position.
    let mut copy = file.try_clone().unwrap();
    let policy = AdoptPolicy::new().with_disk_files();
    let disk = ShmBacking::adopt(file.into(), &policy).unwrap();
    let memory = GuestMemoryShm::<()>::builder()
        .add_backing(&disk, 0, [(GuestAddress(0), MIB)])
        .build()
        .unwrap();
    for page in [9, 10, 200] {
        memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
    }
    copy.sync_all().unwrap();
    copy.seek(SeekFrom::Start(123)).unwrap();
    let found = extents(&memory, 0);
    if found == [(0, 256)] {
        return skip("the file system for temporary files does not tell holes");
    }
    assert_eq!(found, [(9, 2), (200, 1)]);
    assert_eq!(extents(&memory, 16 * PAGE), [(0, 16), (192, 16)]);
    assert_eq!(copy.stream_position().unwrap(), 123);
}

#[test]
fn untouched_pages_are_found_wherever_they_are() {
    const SIZE: u64 = 1 << 30;
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap();
    let backing = memory.iter().next().unwrap().backing();
    // Also where the kernel's answers for one part and the next meet.
    let allocated = [
        (128 * MIB - 3 * PAGE, 5 * PAGE),
        (255 * MIB, MIB),
        (700 * MIB + 5 * PAGE, PAGE),
        (SIZE - PAGE, PAGE),
    ];
    for (at, len) in allocated {
        posix_fallocate(backing, at as i64, len as i64).unwrap();
    }
    memory.write_obj(1u8, GuestAddress(300 * MIB)).unwrap();
    for step in [1, 3, 64, 512, 10_000, 100_000] {
        let mut steps: BTreeSet<u64> = allocated
            .iter()
            .flat_map(|(at, len)| *at / PAGE..(at + len) / PAGE)
            .map(|page| page / step)
            .collect();
        steps.insert(300 * MIB / PAGE / step);
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for at in steps {
            let len = step.min(SIZE / PAGE - at * step);
            match runs.last_mut() {
                Some((start, all)) if *start + *all == at * step => *all += len,
                _ => runs.push((at * step, len)),
            }
        }
        assert_eq!(extents(&memory, step * PAGE), runs, "{step}");
    }
}

#[test]
fn a_part_of_a_larger_file_is_told_from_the_rest() {
    let dir = shm_dir();
    let path = dir.path().join("ram");
    let file = std::fs::File::create_new(&path).unwrap();
    file.set_len(4 * MIB).unwrap();
    // All but the second MiB, which is the RAM.
    posix_fallocate(&file, 0, MIB as i64).unwrap();
    posix_fallocate(&file, 2 * MIB as i64, 2 * MIB as i64).unwrap();
    let options = RamOptions::new()
        .with_backing(BackingSource::File(path))
        .with_offset(MIB);
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(options, [(GuestAddress(0), MIB)])
        .build()
        .unwrap();
    assert_eq!(extents(&memory, 0), []);
    assert_eq!(memory.stats().unwrap().allocated(), 0);
    memory.write_obj(1u8, GuestAddress(5 * PAGE)).unwrap();
    assert_eq!(extents(&memory, 0), [(5, 1)]);
    assert_eq!(memory.stats().unwrap().allocated(), PAGE);
    let discarded = memory.discard((GuestAddress(0), MIB)).unwrap();
    assert_eq!(discarded.freed, MIB);
    assert_eq!(extents(&memory, 0), []);
    let rest = nix::sys::stat::fstat(&file).unwrap().st_blocks as u64 * 512;
    assert_eq!(rest, 3 * MIB);
}
