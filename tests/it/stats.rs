//! Facts about running RAM: equal to what the kernel says elsewhere.
#![allow(
    unsafe_code,
    reason = "guest RAM is locked by its address, to see that it is reported"
)]

use std::ptr::NonNull;

use guest_memory_shm::{
    BackingKind, BackingSource, BuildNote, GuestMemoryShm, GuestRegionShm, PageSize, RamOptions,
    Reserve, Seals, ShmBacking,
};
use nix::fcntl::posix_fallocate;
use nix::sys::mman::mlock;
use serde_json::json;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::fork::Peer;
use crate::isolation::{HugePool, PAGE, ShmemHuge, in_own_process};
use crate::proc::{smaps_at, smaps_value};
use crate::support::skip;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

fn touch(memory: &GuestMemoryShm, addr: u64, pages: u64) {
    for page in 0..pages {
        memory
            .write_obj(1u8, GuestAddress(addr + page * PAGE))
            .unwrap();
    }
}

fn allocated(memory: &GuestMemoryShm) -> Vec<u64> {
    let stats = memory.stats().unwrap();
    stats
        .regions
        .iter()
        .map(|region| region.allocated)
        .collect()
}

fn from_smaps(region: &GuestRegionShm, name: &str) -> u64 {
    let value = smaps_value(&smaps_at(region.as_ptr()), name);
    value.trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn regions_are_described_as_they_are() {
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new().with_reserve(Reserve::On),
            [(GuestAddress(0), MIB)],
        )
        .add_ram(
            RamOptions::new().with_backing(BackingSource::PosixShm),
            [(GuestAddress(4 * MIB), 2 * MIB)],
        )
        .build()
        .unwrap();
    touch(&memory, 4 * MIB, 5);
    let stats = memory.stats().unwrap();
    let [memfd, shm] = &stats.regions[..] else {
        panic!("{stats:?}");
    };
    assert_eq!(
        (memfd.kind, shm.kind),
        (BackingKind::Memfd, BackingKind::PosixShm)
    );
    assert_eq!((memfd.page_size, shm.page_size), (PAGE, PAGE));
    assert_eq!((memfd.allocated, shm.allocated), (0, 5 * PAGE));
    assert_eq!((memfd.size(), shm.size()), (MIB, 2 * MIB));
    assert!(memfd.seals.contains(Seals::RESIZE) && !shm.seals.contains(Seals::SHRINK));
    assert!(shm.name.starts_with("/dev/shm/gms-"), "{}", shm.name);
    assert!(!memfd.name.is_empty());
    let notes: Vec<_> = stats.notes.notes().map(|(_, note)| note).collect();
    assert_eq!(notes, [&BuildNote::Reserve]);
    assert_eq!((stats.size(), stats.allocated()), (3 * MIB, 5 * PAGE));
    let on_nodes: u64 = stats.nodes.values().sum();
    assert_eq!(on_nodes, 5 * PAGE);
    let data = serde_json::to_value(&stats).unwrap();
    let region = json!({
        "range": { "start": 4 * MIB, "size": 2 * MIB },
        "kind": "posix-shm",
        "name": shm.name,
        "page_size": PAGE,
        "allocated": 5 * PAGE,
        "huge": shm.huge,
        "seals": shm.seals.to_string(),
    });
    assert_eq!(data["regions"][1], region);
    let text = BuildNote::Reserve.to_string();
    let note = json!({ "property": "reserve", "text": text });
    assert_eq!(data["notes"], json!([{ "backing": "memfd", "note": note }]));
    let table = stats.to_string();
    assert!(
        table.contains("20 KiB") && table.contains("reserve=on reserves nothing"),
        "{table}"
    );
    assert_eq!(GuestMemoryShm::<()>::new().stats().unwrap().size(), 0);
}

#[test]
fn regions_that_share_a_backing_are_counted_apart() {
    let place = |addr: u64, size: u64| (GuestAddress(addr), size);
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new().with_reserve(Reserve::On),
            [place(0, 4 * MIB), place(8 * MIB, MIB), place(16 * MIB, MIB)],
        )
        .build()
        .unwrap();
    assert_eq!(allocated(&memory), [0, 0, 0]);
    let notes = memory.stats().unwrap().notes;
    assert_eq!(notes.notes().count(), 1, "it is one backing: {notes}");
    touch(&memory, 0, 3);
    touch(&memory, 8 * MIB, 5);
    assert_eq!(allocated(&memory), [3 * PAGE, 5 * PAGE, 0]);
    touch(&memory, 17 * MIB - PAGE, 1);
    assert_eq!(allocated(&memory), [3 * PAGE, 5 * PAGE, PAGE]);
    // Allocated, and never touched: neither mincore(2) nor lseek(2) sees it.
    let backing = memory.iter().next().unwrap().backing();
    posix_fallocate(backing, 5 * MIB as i64, PAGE as i64 * 2).unwrap();
    assert_eq!(allocated(&memory), [3 * PAGE, 5 * PAGE, 3 * PAGE]);
    posix_fallocate(backing, 0, 6 * MIB as i64).unwrap();
    assert_eq!(allocated(&memory), [4 * MIB, MIB, MIB]);
}

#[test]
fn parts_of_a_backing_that_are_no_region_are_not_counted() {
    let backing = ShmBacking::create(&RamOptions::new(), 8 * MIB).unwrap();
    let memory = GuestMemoryShm::<()>::builder()
        .add_backing(&backing, 2 * MIB, [(GuestAddress(0), MIB)])
        .build()
        .unwrap();
    posix_fallocate(&backing, MIB as i64, PAGE as i64).unwrap();
    touch(&memory, 0, 2);
    assert_eq!(allocated(&memory), [2 * PAGE]);
    assert_eq!(backing.allocated().unwrap(), 3 * PAGE);
    // The same part twice, at different guest addresses.
    let alias = GuestRegionShm::from_backing(&backing, 2 * MIB, (GuestAddress(MIB), MIB)).unwrap();
    let memory = memory.insert_region(std::sync::Arc::new(alias)).unwrap();
    assert_eq!(allocated(&memory), [2 * PAGE, 2 * PAGE]);
}

#[test]
fn locked_memory_is_that_of_the_process() {
    in_own_process(|| {
        let memory =
            GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), MIB as usize)]).unwrap();
        let before = memory.stats().unwrap().locked;
        let start = NonNull::new(memory.get_host_address(GuestAddress(0)).unwrap()).unwrap();
        // SAFETY: the range is mapped.
        if unsafe { mlock(start.cast(), 3 * PAGE as usize) }.is_err() {
            return skip("this process may lock no memory");
        }
        let stats = memory.stats().unwrap();
        assert_eq!(stats.locked, before + 3 * PAGE);
        // mlock(2) brings the pages in.
        assert_eq!(stats.allocated(), 3 * PAGE);
    });
}

#[test]
fn huge_pages_are_those_of_smaps() {
    in_own_process(|| {
        let Some(_switch) = ShmemHuge::set("advise") else {
            return;
        };
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(
                RamOptions::new().with_page_size(PageSize::Transparent),
                [(GuestAddress(0), 3 * HUGE)],
            )
            .add_ram(RamOptions::new(), [(GuestAddress(4 * HUGE), 2 * HUGE)])
            .build()
            .unwrap();
        let regions: Vec<_> = memory.iter().collect();
        let huge = || -> Vec<_> {
            let stats = memory.stats().unwrap();
            stats.regions.iter().map(|region| region.huge).collect()
        };
        assert!(matches!(huge()[..], [Some(0), Some(0)] | [None, None]));
        touch(&memory, 0, 1);
        touch(&memory, 2 * HUGE, 512);
        touch(&memory, 4 * HUGE, 512);
        let expected = from_smaps(regions[0], "ShmemPmdMapped");
        if expected == 0 {
            return skip("the kernel has no huge pages to give now");
        }
        assert_eq!(from_smaps(regions[1], "ShmemPmdMapped"), 0);
        match huge()[..] {
            [Some(first), Some(second)] => assert_eq!((first, second), (expected, 0)),
            _ => return skip("the kernel has no PAGEMAP_SCAN"),
        }
        // One that is split is none any more, though nearly all of it is there.
        memory.discard((GuestAddress(0), PAGE)).unwrap();
        let after = from_smaps(regions[0], "ShmemPmdMapped");
        assert_eq!((after, huge()[0]), (expected - HUGE, Some(after)));
    });
}

#[test]
fn hugetlb_is_counted_and_what_only_a_peer_touched_is_not_made_up() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 6) else {
            return;
        };
        let huge = RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)));
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(
                huge.clone(),
                [
                    (GuestAddress(0), 2 * HUGE),
                    (GuestAddress(8 * HUGE), 2 * HUGE),
                ],
            )
            .add_ram(huge, [(GuestAddress(16 * HUGE), 2 * HUGE)])
            .build()
            .unwrap();
        let alone = memory.find_region(GuestAddress(16 * HUGE)).unwrap();
        let shared = memory.find_region(GuestAddress(0)).unwrap();
        touch(&memory, HUGE, 1);
        let stats = memory.stats().unwrap();
        assert_eq!(stats.regions[0].huge, Some(HUGE));
        assert_eq!(
            stats.regions[0].allocated,
            from_smaps(shared, "Shared_Hugetlb") + from_smaps(shared, "Private_Hugetlb")
        );

        let mut peer = Peer::mapping(alone.backing(), 2 * HUGE as usize);
        peer.write(0, 1);
        let mut other = Peer::mapping(shared.backing(), 4 * HUGE as usize);
        other.write(3 * HUGE, 1);
        let stats = memory.stats().unwrap();
        // A region that has a backing of its own has what the backing has.
        assert_eq!(allocated(&memory), [HUGE, 0, HUGE]);
        assert_eq!((stats.unlocated, stats.allocated()), (HUGE, 3 * HUGE));
        assert_eq!(pool.free(), 3);
        assert!(
            stats.to_string().contains("cannot be told: 2 MiB"),
            "{stats}"
        );

        let extents = memory.extents(0).unwrap();
        let starts: Vec<_> = extents
            .ranges
            .iter()
            .map(|range| range.start_addr().0)
            .collect();
        assert_eq!((starts, extents.unlocated), (vec![HUGE], 2 * HUGE));
        // When this process maps them, they can be told; a full backing needs no telling.
        touch(&memory, 9 * HUGE, 1);
        touch(&memory, 16 * HUGE, 1);
        touch(&memory, 17 * HUGE, 1);
        let extents = memory.extents(0).unwrap();
        let found: Vec<_> = extents
            .ranges
            .iter()
            .map(|range| (range.start_addr().0 / HUGE, range.size() / HUGE))
            .collect();
        assert_eq!(
            (found, extents.unlocated),
            (vec![(1, 1), (9, 1), (16, 2)], 0)
        );
        let coarse = memory.extents(HUGE + 1).unwrap();
        assert_eq!(coarse.ranges[0].size(), 2 * HUGE);
        assert_eq!(memory.stats().unwrap().unlocated, 0);
        drop((peer, other, memory));
        drop(pool);
    });
}
