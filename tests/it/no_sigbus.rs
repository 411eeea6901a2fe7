//! What RAM was promised can be touched: there is a typed error, or there is no signal.

use std::fs;

use guest_memory_shm::{
    BackingSource, Error, GuestMemoryShm, PageSize, Populate, RamOptions, Reserve,
};
use nix::mount::{MsFlags, umount};
use nix::sys::signal::Signal;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::fork::dies_of;
use crate::isolation::{HugePool, PAGE, in_own_process, mount_tmpfs, own_mounts};
use crate::proc::leaves_nothing;
use crate::support::{huge_pages_short, room_short};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

fn build(options: &RamOptions, size: u64) -> Result<GuestMemoryShm, Error> {
    let ranges = [(GuestAddress(0), size)];
    GuestMemoryShm::builder()
        .add_ram(options.clone(), ranges)
        .build()
        .map_err(Error::from)
}

fn shm(populate: Populate) -> RamOptions {
    RamOptions::new()
        .with_backing(BackingSource::PosixShm)
        .with_populate(populate)
}

/// The signal that a child dies of when it writes every page.
fn dies_of_touching_all(memory: &GuestMemoryShm) -> Option<Signal> {
    dies_of(|| {
        for region in memory.iter() {
            for at in (0..region.range().size()).step_by(PAGE as usize) {
                let addr = GuestAddress(region.range().start_addr().0 + at);
                memory.write_obj(1u8, addr).unwrap();
            }
        }
    })
}

/// Leaves nothing of /dev/shm free.
fn fill_dev_shm() {
    let full = fs::write("/dev/shm/ballast", vec![1; 16 * MIB as usize]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
}

#[test]
fn populated_posix_shm_survives_a_full_file_system_and_lazy_does_not() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m");
        for populate in [Populate::Allocate, Populate::Prefault] {
            let memory = build(&shm(populate), 4 * MIB).unwrap();
            fill_dev_shm();
            assert_eq!(dies_of_touching_all(&memory), None, "{populate:?}");
            fs::remove_file("/dev/shm/ballast").unwrap();
        }
        // The control: without populating there is a signal.
        let memory = build(&shm(Populate::Lazy), 4 * MIB).unwrap();
        fill_dev_shm();
        assert_eq!(dies_of_touching_all(&memory), Some(Signal::SIGBUS));
        fs::remove_file("/dev/shm/ballast").unwrap();
        drop(memory);
        umount("/dev/shm").unwrap();
    });
}

#[test]
fn posix_shm_that_does_not_fit_now_is_refused_if_it_is_to_be_populated() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m");
        fs::write("/dev/shm/ballast", vec![1; 5 * MIB as usize]).unwrap();
        leaves_nothing(|| {
            for populate in [Populate::Allocate, Populate::Prefault] {
                let refused = build(&shm(populate), 4 * MIB).unwrap_err();
                assert_eq!(room_short(&refused), Some((4 * MIB, 3 * MIB)), "{refused}");
            }
            // Two that fit only one by one are refused together.
            let two = GuestMemoryShm::<()>::builder()
                .add_ram(shm(Populate::Allocate), [(GuestAddress(0), 2 * MIB)])
                .add_ram(shm(Populate::Allocate), [(GuestAddress(1 << 30), 2 * MIB)])
                .build();
            assert_eq!(
                room_short(&two.unwrap_err().into()),
                Some((4 * MIB, 3 * MIB))
            );
        });
        // What is populated later is reported, not refused.
        let lazy = GuestMemoryShm::<()>::builder()
            .add_ram(shm(Populate::Lazy), [(GuestAddress(0), 4 * MIB)])
            .build_with_report();
        let report = lazy.unwrap().1.to_string();
        assert_eq!(
            report,
            "posix-shm: touching all of the RAM would be SIGBUS: 4 MiB more are needed, and the \
             file system that backs the RAM holds 8 MiB and has 3 MiB free: remove files from it, \
             remount it with a larger size, or use a memfd backing; populate it to be told in time"
        );
        fs::remove_file("/dev/shm/ballast").unwrap();
        umount("/dev/shm").unwrap();
    });
}

#[test]
fn more_posix_shm_than_the_file_system_can_ever_hold_needs_reserve_off() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m");
        for reserve in [None, Some(Reserve::On)] {
            let mut options = shm(Populate::Lazy);
            if let Some(reserve) = reserve {
                options = options.with_reserve(reserve);
            }
            let refused = build(&options, 16 * MIB).unwrap_err();
            assert_eq!(room_short(&refused), Some((16 * MIB, 8 * MIB)), "{refused}");
        }
        let options = shm(Populate::Lazy).with_reserve(Reserve::Off);
        let sparse = build(&options, 1 << 40).unwrap();
        sparse.write_obj(7u8, GuestAddress((1 << 40) - 1)).unwrap();
        drop(sparse);
        umount("/dev/shm").unwrap();
    });
}

#[test]
fn huge_pages_that_were_promised_can_be_touched_and_others_are_refused() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let huge = RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)));
        leaves_nothing(|| {
            let refused = build(&huge, 3 * HUGE).unwrap_err();
            assert_eq!(huge_pages_short(&refused), Some((3, 2)), "{refused}");
        });
        for populate in [Populate::Lazy, Populate::Allocate, Populate::Prefault] {
            let memory = build(&huge.clone().with_populate(populate), 2 * HUGE).unwrap();
            // All are promised or taken: there is none for another process.
            let next = build(&huge, HUGE).unwrap_err();
            assert_eq!(huge_pages_short(&next), Some((1, 0)), "{next}");
            assert_eq!(dies_of_touching_all(&memory), None, "{populate:?}");
        }
        assert_eq!(pool.free(), 2);
    });
}

#[test]
fn huge_pages_without_a_promise_are_sigbus_where_there_are_none() {
    in_own_process(|| {
        let Some(_pool) = HugePool::with_available(HUGE, 1) else {
            return;
        };
        let promised = RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)));
        let unreserved = promised.clone().with_reserve(Reserve::Off);
        let memory = build(&unreserved, HUGE).unwrap();
        // It took nothing, so another process can have it.
        let other = build(&promised, HUGE).unwrap();
        assert_eq!(dies_of_touching_all(&memory), Some(Signal::SIGBUS));
        assert_eq!(dies_of_touching_all(&other), None);
    });
}
