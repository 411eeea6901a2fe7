//! Transparent huge pages: RAM is really mapped by them where that is allowed, and the report says
//! who forbids it where it is not.

use guest_memory_shm::{
    BackingSource, BuildNote, BuildReport, GuestMemoryShm, GuestRegionShm, PageSize, Populate,
    RamOptions, ThpObstacle,
};
use nix::mount::{MsFlags, umount};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::isolation::{PAGE, ShmemHuge, in_own_process, mount_tmpfs, own_mounts};
use crate::proc::{smaps_at, smaps_value};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
/// More than one huge page, at guest addresses that suit them.
const RANGES: [(GuestAddress, u64); 2] = [
    (GuestAddress(0), 6 * MIB),
    (GuestAddress(4 << 30), 10 * MIB),
];

fn first(report: &BuildReport) -> &BuildNote {
    let (_, note) = report.notes().next().expect("there is a note");
    note
}

fn options(backing: BackingSource) -> RamOptions {
    RamOptions::new()
        .with_backing(backing)
        .with_page_size(PageSize::Transparent)
}

fn build(options: RamOptions) -> (GuestMemoryShm, BuildReport) {
    let builder = GuestMemoryShm::builder().add_ram(options, RANGES);
    builder.build_with_report().unwrap()
}

/// Writes every page.
fn touch(memory: &GuestMemoryShm) {
    for region in memory.iter() {
        for at in (0..region.range().size()).step_by(PAGE as usize) {
            let addr = GuestAddress(region.range().start_addr().0 + at);
            memory.write_obj(1u8, addr).unwrap();
        }
    }
}

/// How many bytes of a region are mapped by huge pages, says the kernel.
pub(crate) fn mapped_huge(region: &GuestRegionShm) -> u64 {
    let value = smaps_value(&smaps_at(region.as_ptr()), "ShmemPmdMapped");
    let kib: u64 = value.strip_suffix(" kB").unwrap().parse().unwrap();
    kib * 1024
}

fn all_huge(memory: &GuestMemoryShm) -> bool {
    memory
        .iter()
        .all(|region| mapped_huge(region) == region.range().size())
}

fn none_huge(memory: &GuestMemoryShm) -> bool {
    memory.iter().all(|region| mapped_huge(region) == 0)
}

#[test]
fn posix_shm_on_a_mount_that_allows_huge_pages_is_mapped_by_them() {
    in_own_process(|| {
        // The mount's option decides, as long as the switch is not set to deny.
        let Some(_switch) = ShmemHuge::set("never") else {
            return;
        };
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=64m,huge=advise");
        let (memory, report) = build(options(BackingSource::PosixShm));
        assert!(report.is_empty(), "{report}");
        touch(&memory);
        assert!(all_huge(&memory));
        // Not because the mount makes all of its files so.
        let (plain, _) = build(RamOptions::new().with_backing(BackingSource::PosixShm));
        touch(&plain);
        assert!(none_huge(&plain));
        drop((memory, plain));
        umount("/dev/shm").unwrap();
    });
}

#[test]
fn memfds_are_mapped_by_huge_pages_where_the_switch_allows_it() {
    in_own_process(|| {
        let Some(_switch) = ShmemHuge::set("advise") else {
            return;
        };
        for populate in [Populate::Lazy, Populate::Allocate, Populate::Prefault] {
            let (memory, report) = build(options(BackingSource::Memfd).with_populate(populate));
            assert!(report.is_empty(), "{report}");
            // The first touch maps what was only allocated.
            touch(&memory);
            assert!(all_huge(&memory), "{populate:?}");
            assert_eq!(memory.stats().unwrap().huge(), Some(16 * MIB));
        }
        let (plain, _) = build(RamOptions::new().with_populate(Populate::Prefault));
        assert!(none_huge(&plain));
    });
}

#[test]
fn the_switch_that_forbids_huge_pages_is_named() {
    in_own_process(|| {
        for value in ["never", "deny"] {
            let Some(_switch) = ShmemHuge::set(value) else {
                return;
            };
            let (memory, report) =
                build(options(BackingSource::Memfd).with_populate(Populate::Prefault));
            assert!(none_huge(&memory));
            assert_eq!(
                report.to_string().lines().next().unwrap(),
                format!(
                    "memfd: transparent huge pages will not come: \
                     /sys/kernel/mm/transparent_hugepage/shmem_enabled is {value}, set it to \
                     advise"
                )
            );
        }
    });
}

#[test]
fn a_mount_that_forbids_huge_pages_is_named() {
    in_own_process(|| {
        // The mount's option decides, as long as the switch is not set to deny.
        let Some(_switch) = ShmemHuge::set("never") else {
            return;
        };
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=64m");
        let (memory, report) = build(options(BackingSource::PosixShm));
        touch(&memory);
        assert!(none_huge(&memory));
        // Once for both regions.
        assert_eq!(report.notes().count(), 1, "{report}");
        assert!(matches!(
            first(&report),
            BuildNote::NotHuge(ThpObstacle::MountOption { .. })
        ));
        assert_eq!(
            report.to_string().lines().next().unwrap(),
            "posix-shm: transparent huge pages will not come: /dev/shm is mounted with \
             huge=never, remount it with huge=advise"
        );
        drop(memory);
        umount("/dev/shm").unwrap();
    });
}

#[test]
fn a_process_that_switched_them_off_is_told() {
    in_own_process(|| {
        nix::sys::prctl::set_thp_disable(true).unwrap();
        let (_, report) = build(options(BackingSource::Memfd));
        assert!(matches!(
            first(&report),
            BuildNote::NotHuge(ThpObstacle::Process)
        ));
    });
}

#[test]
fn an_uneven_part_is_reported_and_the_rest_is_huge() {
    in_own_process(|| {
        // The mount's option decides, as long as the switch is not set to deny.
        let Some(_switch) = ShmemHuge::set("never") else {
            return;
        };
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=64m,huge=advise");
        let ranges = [(GuestAddress(0), 5 * MIB)];
        let builder = GuestMemoryShm::builder().add_ram(options(BackingSource::PosixShm), ranges);
        let (memory, report) = builder.build_with_report().unwrap();
        touch(&memory);
        let region = memory.iter().next().unwrap();
        assert_eq!(mapped_huge(region), 2 * HUGE);
        assert_eq!(
            report.to_string(),
            "posix-shm: not all of it can be transparent huge pages: 5 MiB at offset 0x0 begin or \
             end inside a huge page of 2 MiB"
        );
        drop(memory);
        umount("/dev/shm").unwrap();
    });
}
