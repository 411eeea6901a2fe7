//! Discards where RAM has huge pages: of a hugetlb pool, or transparent ones.
//!
//! Each test has a process of its own, as in `mapping_huge`.
#![allow(
    unsafe_code,
    reason = "a page of guest RAM is pinned by its address, as a device would do it"
)]

use std::io::IoSlice;
use std::os::fd::AsFd;

use guest_memory_shm::{
    AdoptPolicy, DiscardAccumulator, Discarded, GuestMemoryShm, PageSize, RamOptions, Seals,
    ShmBacking,
};
use nix::fcntl::{SpliceFFlags, vmsplice};
use nix::sys::stat::fstat;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::fork::Peer;
use crate::isolation::{HugePool, PAGE, ShmemHuge, in_own_process};
use crate::proc::{smaps_at, smaps_value};
use crate::support::skip;

const HUGE: u64 = 2 << 20;

fn ram(page_size: PageSize, size: u64) -> GuestMemoryShm {
    let options = RamOptions::new().with_page_size(page_size);
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(options, [(GuestAddress(0), size)])
        .build()
        .unwrap();
    for addr in (0..size).step_by(PAGE as usize) {
        memory.write_obj(0xa5u8, GuestAddress(addr)).unwrap();
    }
    memory
}

fn backing(memory: &GuestMemoryShm) -> &ShmBacking {
    memory.find_region(GuestAddress(0)).unwrap().backing()
}

/// What the kernel says is allocated for the file, in bytes.
fn allocated(file: &impl AsFd) -> u64 {
    fstat(file).unwrap().st_blocks as u64 * 512
}

fn byte(memory: &GuestMemoryShm, addr: u64) -> u8 {
    memory.read_obj(GuestAddress(addr)).unwrap()
}

fn parts(discarded: Discarded) -> (u64, u64, u64) {
    (discarded.freed, discarded.kept_head, discarded.kept_tail)
}

fn discard(memory: &GuestMemoryShm, addr: u64, len: u64) -> (u64, u64, u64) {
    let discarded = memory.discard((GuestAddress(addr), len)).unwrap();
    assert_eq!(discarded.len(), len);
    parts(discarded)
}

#[test]
fn whole_huge_pages_go_back_to_the_pool_and_parts_are_kept() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 4) else {
            return;
        };
        let memory = ram(PageSize::Huge(Some(HUGE)), 4 * HUGE);
        let backing = backing(&memory);
        assert!(backing.seals().contains(Seals::RESIZE));
        let free = pool.free();
        let mut peer = Peer::mapping(backing, 4 * HUGE as usize);
        assert_eq!(peer.read(HUGE), 0xa5);

        // From the middle of the first to the middle of the third.
        let freed = discard(&memory, HUGE / 2, 2 * HUGE);
        assert_eq!(freed, (HUGE, HUGE / 2, HUGE / 2));
        assert_eq!(pool.free(), free + 1);
        assert_eq!(allocated(backing), 3 * HUGE);
        assert_eq!((peer.read(HUGE), byte(&memory, HUGE)), (0, 0));
        for addr in [HUGE - PAGE, 2 * HUGE] {
            assert_eq!((peer.read(addr), byte(&memory, addr)), (0xa5, 0xa5));
        }
        // The reads took it from the pool again.
        assert_eq!(pool.free(), free);

        // What the kernel would accept, and do nothing.
        assert_eq!(discard(&memory, 3 * HUGE, PAGE), (0, 0, PAGE));
        assert_eq!(discard(&memory, 3 * HUGE + PAGE, PAGE), (0, PAGE, 0));
        assert_eq!(discard(&memory, 3 * HUGE - PAGE, 2 * PAGE), (0, PAGE, PAGE));
        assert_eq!(pool.free(), free);
        assert_eq!(byte(&memory, 3 * HUGE), 0xa5);
        drop((peer, memory));
        drop(pool);
    });
}

#[test]
fn a_range_may_span_huge_and_base_pages() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let huge = RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)));
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(RamOptions::new(), [(GuestAddress(0), 2 * HUGE)])
            .add_ram(huge, [(GuestAddress(2 * HUGE), 2 * HUGE)])
            .build()
            .unwrap();
        for addr in (0..4 * HUGE).step_by(PAGE as usize) {
            memory.write_obj(0xa5u8, GuestAddress(addr)).unwrap();
        }
        let freed = discard(&memory, PAGE / 2, 3 * HUGE);
        assert_eq!(freed, (3 * HUGE - PAGE, PAGE / 2, PAGE / 2));
        assert_eq!(allocated(backing(&memory)), PAGE);
        assert_eq!(pool.free(), 1);
        drop(memory);
        drop(pool);
    });
}

#[test]
fn the_512th_report_frees_the_huge_page() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 3) else {
            return;
        };
        let memory = ram(PageSize::Huge(Some(HUGE)), 3 * HUGE);
        let mut balloon = DiscardAccumulator::new();
        let free = pool.free();
        // In an order as a balloon may have it: 7 and 512 have no common divisor.
        for n in 0..512 {
            let addr = GuestAddress(HUGE + n * 7 % 512 * PAGE);
            assert_eq!((pool.free(), balloon.pending()), (free, n * PAGE));
            let discarded = balloon.add(&memory, (addr, PAGE)).unwrap();
            let expected = if n == 511 { HUGE } else { 0 };
            assert_eq!((discarded.freed, discarded.kept()), (expected, 0));
        }
        assert_eq!((pool.free(), balloon.pending()), (free + 1, 0));
        assert_eq!(byte(&memory, HUGE - 1), byte(&memory, 2 * HUGE + 1));
        // Parts stay noted, also when all that can be is to be given back.
        balloon
            .add(&memory, (GuestAddress(0), HUGE - PAGE))
            .unwrap();
        let flushed = balloon.flush(&memory).unwrap();
        assert_eq!((flushed.freed, balloon.pending()), (0, HUGE - PAGE));
        assert_eq!(byte(&memory, 0), 0xa5);
        // What the guest took back in between does not count.
        balloon.remove((GuestAddress(PAGE), 1)).unwrap();
        balloon
            .add(&memory, (GuestAddress(HUGE - PAGE), PAGE))
            .unwrap();
        assert_eq!((pool.free(), balloon.pending()), (free + 1, HUGE - PAGE));
        let discarded = balloon.add(&memory, (GuestAddress(PAGE), PAGE)).unwrap();
        assert_eq!((discarded.freed, pool.free()), (HUGE, free + 2));
        drop(memory);
        drop(pool);
    });
}

/// How many bytes of the RAM are mapped by transparent huge pages.
fn huge_mapped(memory: &GuestMemoryShm) -> u64 {
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let value = smaps_value(&smaps_at(region.as_ptr()), "ShmemPmdMapped");
    value.trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// RAM of transparent huge pages, if the machine has them to give.
fn transparent(size: u64) -> Option<(ShmemHuge, GuestMemoryShm)> {
    let switch = ShmemHuge::set("advise")?;
    let memory = ram(PageSize::Transparent, size);
    if huge_mapped(&memory) != size {
        skip("the kernel has no huge pages to give now");
        return None;
    }
    Some((switch, memory))
}

#[test]
fn a_transparent_huge_page_that_is_discarded_in_part_is_split() {
    in_own_process(|| {
        let Some((_switch, memory)) = transparent(4 * HUGE) else {
            return;
        };
        // All of the second, and parts of the first and the third.
        let freed = discard(&memory, HUGE - 3 * PAGE - 1, HUGE + 5 * PAGE + 2);
        assert_eq!(freed, (HUGE + 5 * PAGE, 1, 1));
        assert_eq!(allocated(backing(&memory)), 3 * HUGE - 5 * PAGE);
        assert_eq!(huge_mapped(&memory), HUGE);
        assert_eq!(byte(&memory, HUGE - 3 * PAGE - 1), 0);
        assert_eq!(byte(&memory, HUGE - 4 * PAGE), 0xa5);
        assert_eq!(byte(&memory, 2 * HUGE), 0);
        assert_eq!(byte(&memory, 2 * HUGE + 2 * PAGE), 0xa5);
        // Inside one huge page.
        assert_eq!(discard(&memory, 3 * HUGE + PAGE, PAGE), (PAGE, 0, 0));
        assert_eq!(byte(&memory, 3 * HUGE + 2 * PAGE), 0xa5);
    });
}

#[test]
fn what_is_left_of_a_pinned_huge_page_is_reported_as_kept() {
    in_own_process(|| {
        let Some((_switch, memory)) = transparent(3 * HUGE) else {
            return;
        };
        let (out, into) = nix::unistd::pipe().unwrap();
        let pin = |addr| {
            let page = memory.get_host_address(GuestAddress(addr)).unwrap();
            // SAFETY: the page is mapped. Nothing is read from the slice but by the kernel, which
            // takes a reference to the page and keeps it as long as it is in the pipe.
            let page = unsafe { std::slice::from_raw_parts(page, PAGE as usize) };
            let done = vmsplice(&into, &[IoSlice::new(page)], SpliceFFlags::empty());
            assert_eq!(done, Ok(PAGE as usize));
        };
        pin(0);
        pin(2 * HUGE);
        let (head, tail) = (100 * PAGE, 7 * PAGE);
        let (addr, len) = (HUGE - head, head + HUGE + tail);
        let kept = discard(&memory, addr, len);
        assert_eq!(kept, (HUGE, head, tail));
        assert_eq!(allocated(backing(&memory)), 2 * HUGE);
        // They are zeroed all the same, and only they.
        assert_eq!((byte(&memory, addr), byte(&memory, addr - PAGE)), (0, 0xa5));
        assert_eq!(byte(&memory, 2 * HUGE + tail), 0xa5);
        assert_eq!(byte(&memory, 2 * HUGE), 0);

        // When no device has them pinned any more, the same discard frees them.
        drop((out, into));
        let freed = discard(&memory, addr, len);
        assert_eq!(freed, (len, 0, 0));
        assert_eq!(allocated(backing(&memory)), 2 * HUGE - head - tail);
    });
}

#[test]
fn reports_of_a_balloon_do_not_split_transparent_huge_pages() {
    in_own_process(|| {
        let Some((_switch, memory)) = transparent(2 * HUGE) else {
            return;
        };
        let mut balloon = DiscardAccumulator::new();
        for page in 0..511 {
            balloon
                .add(&memory, (GuestAddress(page * PAGE), PAGE))
                .unwrap();
        }
        assert_eq!(huge_mapped(&memory), 2 * HUGE);
        assert_eq!(allocated(backing(&memory)), 2 * HUGE);
        balloon
            .add(&memory, (GuestAddress(511 * PAGE), PAGE))
            .unwrap();
        assert_eq!(huge_mapped(&memory), HUGE);
        assert_eq!(allocated(backing(&memory)), HUGE);
        // Unless that is asked for.
        balloon
            .add(&memory, (GuestAddress(HUGE + PAGE), 3 * PAGE))
            .unwrap();
        let flushed = balloon.flush(&memory).unwrap();
        assert_eq!((flushed.freed, balloon.pending()), (3 * PAGE, 0));
        assert_eq!(allocated(backing(&memory)), HUGE - 3 * PAGE);
    });
}

#[test]
fn an_adopted_hugetlb_file_is_discarded_by_whole_pages() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let memory = ram(PageSize::Huge(Some(HUGE)), 2 * HUGE);
        let fd = backing(&memory).as_fd().try_clone_to_owned().unwrap();
        let adopted = ShmBacking::adopt(fd, &AdoptPolicy::new()).unwrap();
        let second = GuestMemoryShm::<()>::builder()
            .add_backing(&adopted, HUGE, [(GuestAddress(0), HUGE)])
            .build()
            .unwrap();
        assert_eq!(discard(&second, PAGE, HUGE - PAGE), (0, HUGE - PAGE, 0));
        assert_eq!(pool.free(), 0);
        assert_eq!(discard(&second, 0, HUGE), (HUGE, 0, 0));
        assert_eq!(pool.free(), 1);
        assert_eq!((byte(&memory, 0), byte(&memory, HUGE)), (0xa5, 0));
        drop((memory, second, adopted));
        drop(pool);
    });
}
