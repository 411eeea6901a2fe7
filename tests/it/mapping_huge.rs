//! Regions of huge pages from a pool: what is mapped, promised and given back.
//!
//! Each test has a process of its own: a child that another test forks holds the same pages for
//! as long as it lives.

use guest_memory_shm::{
    AdoptPolicy, BackingKind, DiscardError, GuestMemoryShm, GuestRange, GuestRegionShm,
    InvalidRange, PageSize, RamOptions, Seals, ShmBacking,
};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::{dup, ftruncate};
use std::os::fd::AsFd;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::fork::dies_of_reading;
use crate::isolation::{HugePool, PAGE, in_own_process};
use crate::proc::{has_vm_flag, leaves_nothing, maps_in, smaps_at, smaps_value};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

fn huge() -> RamOptions {
    RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)))
}

fn addr(region: &GuestRegionShm) -> u64 {
    region.as_ptr().addr() as u64
}

#[test]
fn a_region_of_huge_pages_is_mapped_with_them() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 4) else {
            return;
        };
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(
                huge(),
                [(GuestAddress(0), HUGE), (GuestAddress(1 << 30), 3 * HUGE)],
            )
            .build()
            .unwrap();
        for region in memory.iter() {
            assert_eq!(region.is_hugetlbfs(), Some(true));
            assert_eq!(region.backing().kind(), BackingKind::HugetlbMemfd);
            assert_eq!(region.backing().page_size(), HUGE);
            assert_eq!(addr(region) % HUGE, 0);
            let smaps = smaps_at(region.as_ptr());
            assert_eq!(smaps_value(&smaps, "KernelPageSize"), "2048 kB");
            assert_eq!(
                smaps_value(&smaps, "Size"),
                format!("{} kB", region.len() / 1024)
            );
            assert!(has_vm_flag(&smaps, "ht") && has_vm_flag(&smaps, "dd"));
        }
        // The control: other memory has base pages.
        let base = GuestRegionShm::<()>::new((GuestAddress(0), HUGE), &RamOptions::new()).unwrap();
        assert_eq!(
            smaps_value(&smaps_at(base.as_ptr()), "KernelPageSize"),
            "4 kB"
        );
        drop(memory);
        drop(pool);
    });
}

#[test]
fn huge_pages_are_promised_at_mapping_taken_at_touch_and_given_back_at_drop() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 4) else {
            return;
        };
        let (free, reserved) = (pool.free(), pool.reserved());
        let state = |pool: &HugePool| (free - pool.free(), pool.reserved() - reserved);
        leaves_nothing(|| {
            let region = GuestRegionShm::<()>::new((GuestAddress(0), 4 * HUGE), &huge()).unwrap();
            assert_eq!(state(&pool), (0, 4));
            assert_eq!(region.backing().allocated().unwrap(), 0);
            region.write_obj(1u8, MemoryRegionAddress(HUGE)).unwrap();
            assert_eq!(state(&pool), (1, 3));
            assert_eq!(region.backing().allocated().unwrap(), HUGE);
            let span = addr(&region) - PAGE..addr(&region) + 4 * HUGE + PAGE;
            assert_eq!(maps_in(span.clone()).len(), 3);
            drop(region);
            assert_eq!(maps_in(span), []);
        });
        assert_eq!(state(&pool), (0, 0));
    });
}

#[test]
fn an_access_that_runs_off_huge_pages_faults() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 1) else {
            return;
        };
        let region = GuestRegionShm::<()>::new((GuestAddress(0), HUGE), &huge()).unwrap();
        let (first, last) = (
            region.as_ptr(),
            region.as_ptr().wrapping_add(HUGE as usize - 1),
        );
        assert_eq!(dies_of_reading(first), None);
        assert_eq!(dies_of_reading(last), None);
        assert_eq!(
            dies_of_reading(first.wrapping_sub(1)),
            Some(Signal::SIGSEGV)
        );
        assert_eq!(dies_of_reading(last.wrapping_add(1)), Some(Signal::SIGSEGV));
        drop(region);
        drop(pool);
    });
}

#[test]
fn a_memfd_of_huge_pages_is_sealed_and_can_be_adopted() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let theirs = ShmBacking::create(&huge(), 2 * HUGE).unwrap();
        assert!(theirs.seals().contains(Seals::RESIZE | Seals::SEAL));
        let fd = dup(theirs.as_fd()).unwrap();
        assert_eq!(ftruncate(&fd, HUGE as i64), Err(Errno::EPERM));

        let ours = ShmBacking::adopt(fd, &AdoptPolicy::new()).unwrap();
        assert_eq!(ours.kind(), BackingKind::AdoptedHugetlb);
        assert_eq!((ours.size(), ours.page_size()), (2 * HUGE, HUGE));
        let place =
            |backing| GuestRegionShm::<()>::from_backing(backing, HUGE, (GuestAddress(0), HUGE));
        let (one, other) = (place(&theirs).unwrap(), place(&ours).unwrap());
        one.write_obj(0xabcd_u16, MemoryRegionAddress(7)).unwrap();
        assert_eq!(
            other.read_obj::<u16>(MemoryRegionAddress(7)).unwrap(),
            0xabcd
        );
        drop((one, other, theirs, ours));
        drop(pool);
    });
}

#[test]
fn the_default_huge_page_size_is_that_of_the_system() {
    in_own_process(|| {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Hugepagesize:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        let size = kib.parse::<u64>().unwrap() * 1024;
        let Some(pool) = HugePool::with_available(size, 1) else {
            return;
        };
        let options = RamOptions::new().with_page_size(PageSize::Huge(None));
        let region = GuestRegionShm::<()>::new((GuestAddress(0), size), &options).unwrap();
        assert_eq!(region.backing().page_size(), size);
        drop(region);
        drop(pool);
    });
}

#[test]
fn a_region_of_a_1_gib_page_is_mapped_with_it() {
    in_own_process(|| {
        const GIANT: u64 = 1 << 30;
        // Not `skip`: memory in one piece of this size is luck, in CI too.
        let can = std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-1048576kB").is_dir();
        let Some(pool) = can
            .then(|| HugePool::try_with_available(GIANT, 1).ok())
            .flatten()
        else {
            return;
        };
        let options = RamOptions::new().with_page_size(PageSize::Huge(Some(GIANT)));
        let region = GuestRegionShm::<()>::new((GuestAddress(GIANT), GIANT), &options).unwrap();
        let smaps = smaps_at(region.as_ptr());
        assert_eq!(smaps_value(&smaps, "KernelPageSize"), "1048576 kB");
        assert_eq!(addr(&region) % GIANT, 0);
        assert_eq!(pool.reserved(), 1);
        region
            .write_obj(1u8, MemoryRegionAddress(GIANT - 1))
            .unwrap();
        assert_eq!(pool.free(), 0);
        drop(region);
        assert_eq!((pool.free(), pool.reserved()), (1, 0));
    });
}

#[test]
fn a_part_of_a_huge_page_is_a_region_as_vm_memory_makes_them() {
    in_own_process(|| {
        let Some(_pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let backing = ShmBacking::create(&huge(), 2 * HUGE).unwrap();
        let file = |at| {
            let fd = backing.as_fd().try_clone_to_owned().unwrap();
            Some(FileOffset::new(fd.into(), at))
        };
        let range = (GuestAddress(MIB), (HUGE + 300) as usize, file(0));
        let memory = GuestMemoryShm::<()>::from_ranges_with_files([range]).unwrap();
        let region = memory.find_region(GuestAddress(MIB)).unwrap();
        assert_eq!((region.len(), addr(region) % HUGE), (HUGE + 300, 0));
        let mapped = maps_in(addr(region)..addr(region) + 2 * HUGE);
        assert_eq!(mapped.len(), 1);
        assert_eq!(mapped[0].range, addr(region)..addr(region) + 2 * HUGE);

        let last = GuestAddress(MIB + HUGE + 299);
        memory.write_obj(7u8, last).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(last.0 + 1)).is_err());
        assert_eq!(memory.stats().unwrap().allocated(), HUGE);
        let extents = memory.extents(1).unwrap().ranges;
        let part = GuestRange::new(GuestAddress(MIB + HUGE), 300).unwrap();
        assert_eq!(extents, [part]);
        // Whole base pages are no whole huge pages.
        let refused = memory.discard((GuestAddress(MIB), HUGE)).unwrap_err();
        let DiscardError::Range(InvalidRange::PartialPages { page_size, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(page_size, HUGE);
        let odd = GuestRegionShm::<()>::from_range(GuestAddress(0), 4096, file(4096));
        assert!(odd.unwrap_err().to_string().contains("page size 2 MiB"));
    });
}
