//! Discards on base pages: what is freed, what is kept, who sees it, and what is refused.
#![allow(
    unsafe_code,
    reason = "advice and locks are given to guest RAM by its address, to compare"
)]

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use guest_memory_shm::{
    AdoptPolicy, BackingSource, DiscardError, Discarded, GuestMemoryShm, InvalidRange, RamOptions,
    Seals, ShmBacking,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::mman::{MmapAdvise, madvise, mlock};
use nix::sys::stat::fstat;
use nix::unistd::geteuid;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::fork::Peer;
use crate::isolation::{PAGE, assert_refused, in_own_process};
use crate::support::skip;

const SIZE: u64 = 64 * PAGE;

/// RAM at 0 of one kind, all of it written.
fn filled(options: RamOptions, size: u64) -> GuestMemoryShm {
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(options, [(GuestAddress(0), size)])
        .build()
        .unwrap();
    fill(&memory, 0..size);
    memory
}

/// Writes to each page of a range.
fn fill(memory: &GuestMemoryShm, range: std::ops::Range<u64>) {
    for addr in range.step_by(PAGE as usize) {
        memory.write_obj(0xa5u8, GuestAddress(addr)).unwrap();
    }
}

/// What the kernel says is allocated for the file, in pages.
fn pages(backing: &impl AsFd) -> u64 {
    fstat(backing).unwrap().st_blocks as u64 * 512 / PAGE
}

fn backing(memory: &GuestMemoryShm, addr: u64) -> &ShmBacking {
    memory.find_region(GuestAddress(addr)).unwrap().backing()
}

fn byte(memory: &GuestMemoryShm, addr: u64) -> u8 {
    memory.read_obj(GuestAddress(addr)).unwrap()
}

fn parts(discarded: Discarded) -> (u64, u64, u64) {
    (discarded.freed, discarded.kept_head, discarded.kept_tail)
}

#[test]
fn discard_frees_pages_and_every_process_reads_zero() {
    in_own_process(|| {
        for (options, seals) in [
            (RamOptions::new(), Seals::RESIZE | Seals::SEAL),
            (
                RamOptions::new().with_backing(BackingSource::PosixShm),
                Seals::empty(),
            ),
        ] {
            let memory = filled(options, SIZE);
            let backing = backing(&memory, 0);
            assert_eq!(backing.seals() & Seals::RESIZE, seals & Seals::RESIZE);
            let mut peer = Peer::mapping(backing, SIZE as usize);
            assert_eq!(peer.read(5 * PAGE), 0xa5);
            peer.write(6 * PAGE, 0x77);
            assert_eq!(byte(&memory, 6 * PAGE), 0x77);
            assert_eq!(pages(backing), 64);

            let discarded = memory.discard((GuestAddress(5 * PAGE), 2 * PAGE)).unwrap();
            assert_eq!(parts(discarded), (2 * PAGE, 0, 0));
            assert_eq!(pages(backing), 62);
            assert_eq!((peer.read(5 * PAGE), peer.read(6 * PAGE)), (0, 0));
            assert_eq!((byte(&memory, 5 * PAGE), byte(&memory, 6 * PAGE)), (0, 0));
            // The pages beside it are as they were, for both.
            for addr in [4 * PAGE, 7 * PAGE] {
                assert_eq!((peer.read(addr), byte(&memory, addr)), (0xa5, 0xa5));
            }
        }
    });
}

#[test]
fn a_peers_mere_read_allocates_a_page_again() {
    in_own_process(|| {
        let memory = filled(RamOptions::new(), SIZE);
        let mut peer = Peer::mapping(backing(&memory, 0), SIZE as usize);
        let discarded = memory.discard((GuestAddress(0), SIZE)).unwrap();
        assert_eq!(parts(discarded), (SIZE, 0, 0));
        assert_eq!(pages(backing(&memory, 0)), 0);
        assert_eq!(peer.read(3 * PAGE), 0);
        assert_eq!(pages(backing(&memory, 0)), 1);
    });
}

/// The control of the tests above: what other crates use frees nothing.
#[test]
fn dontneed_frees_nothing() {
    let memory = filled(RamOptions::new(), SIZE);
    let start = NonNull::new(memory.get_host_address(GuestAddress(0)).unwrap()).unwrap();
    // SAFETY: the range is mapped and shared: no byte of it changes.
    let advice = unsafe {
        madvise(
            start.cast::<c_void>(),
            SIZE as usize,
            MmapAdvise::MADV_DONTNEED,
        )
    };
    assert_eq!(advice, Ok(()));
    assert_eq!(pages(backing(&memory, 0)), 64);
    assert_eq!(byte(&memory, 0), 0xa5);
    memory.discard((GuestAddress(0), SIZE)).unwrap();
    assert_eq!(pages(backing(&memory, 0)), 0);
}

#[test]
fn parts_of_pages_are_kept_with_their_contents() {
    let memory = filled(RamOptions::new(), SIZE);
    memory.write_obj(0x11u8, GuestAddress(PAGE - 1)).unwrap();
    for (addr, len, expected) in [
        (PAGE - 1, PAGE + 2, (PAGE, 1, 1)),
        (4 * PAGE + 1, PAGE - 2, (0, PAGE - 2, 0)),
        (6 * PAGE + 7, PAGE, (0, PAGE - 7, 7)),
        (8 * PAGE, 100, (0, 0, 100)),
        (9 * PAGE + 100, PAGE - 100, (0, PAGE - 100, 0)),
        (SIZE - PAGE, PAGE, (PAGE, 0, 0)),
    ] {
        let before = pages(backing(&memory, 0));
        let discarded = memory.discard((GuestAddress(addr), len)).unwrap();
        assert_eq!(parts(discarded), expected, "{addr:#x} {len:#x}");
        assert_eq!(discarded.len(), len);
        let freed = before - pages(backing(&memory, 0));
        assert_eq!(freed * PAGE, discarded.freed);
    }
    assert_eq!(byte(&memory, PAGE - 1), 0x11);
    assert_eq!(byte(&memory, 4 * PAGE), 0xa5);
    assert_eq!(byte(&memory, PAGE), 0);
}

/// Three regions without a gap: two on one backing, in reverse order, and one on another.
fn three_regions() -> GuestMemoryShm {
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new(),
            [(GuestAddress(SIZE), SIZE), (GuestAddress(0), SIZE)],
        )
        .add_ram(
            RamOptions::new().with_backing(BackingSource::PosixShm),
            [(GuestAddress(2 * SIZE), SIZE)],
        )
        .build()
        .unwrap();
    fill(&memory, 0..3 * SIZE);
    memory
}

#[test]
fn a_range_may_span_regions_and_backings() {
    let memory = three_regions();
    let (one, other) = (backing(&memory, 0), backing(&memory, 2 * SIZE));
    let (addr, len) = (SIZE - 2 * PAGE - 5, SIZE + 5 * PAGE);
    let discarded = memory.discard((GuestAddress(addr), len)).unwrap();
    assert_eq!(parts(discarded), (SIZE + 4 * PAGE, 5, PAGE - 5));
    assert_eq!((pages(one), pages(other)), (62, 62));
    let freed = SIZE - 2 * PAGE..2 * SIZE + 2 * PAGE;
    for addr in (0..3 * SIZE).step_by(PAGE as usize) {
        let expected = if freed.contains(&addr) { 0 } else { 0xa5 };
        assert_eq!(byte(&memory, addr), expected, "{addr:#x}");
    }
}

#[test]
fn what_is_not_all_ram_is_refused_as_a_whole() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[
        (GuestAddress(SIZE), SIZE as usize),
        (GuestAddress(3 * SIZE), SIZE as usize),
    ])
    .unwrap();
    fill(&memory, SIZE..2 * SIZE);
    fill(&memory, 3 * SIZE..4 * SIZE);
    for (addr, len, hole) in [
        (0, PAGE, 0),
        (SIZE - 1, 2, SIZE - 1),
        (SIZE, 3 * SIZE, 2 * SIZE),
        (3 * SIZE, SIZE + 1, 4 * SIZE),
        (u64::MAX - 1, 1, u64::MAX - 1),
    ] {
        match memory.discard((GuestAddress(addr), len)) {
            Err(DiscardError::NotRam { first, .. }) => assert_eq!(first.0, hole),
            other => panic!("{other:?}"),
        }
    }
    assert_refused!(
        memory.discard((GuestAddress(SIZE), 2 * SIZE)),
        DiscardError::NotRam { .. },
        "cannot discard 0x40000..=0xbffff (512 KiB): there is no RAM at guest address 0x80000, \
         discard what is before and after the gap apart"
    );
    let empty = memory.discard((GuestAddress(SIZE), 0));
    assert!(matches!(
        empty,
        Err(DiscardError::Range(InvalidRange::Empty { .. }))
    ));
    let endless = memory.discard((GuestAddress(SIZE), u64::MAX));
    assert!(matches!(
        endless,
        Err(DiscardError::Range(InvalidRange::Overflow { .. }))
    ));
    assert_eq!(pages(backing(&memory, SIZE)), 128);
}

#[test]
fn locked_memory_is_refused_before_anything_is_discarded() {
    let memory = three_regions();
    let last = memory
        .get_host_address(GuestAddress(3 * SIZE - PAGE))
        .unwrap();
    let last = NonNull::new(last).unwrap().cast::<c_void>();
    // SAFETY: the page is mapped.
    let locked = unsafe { mlock(last, PAGE as usize) };
    if locked.is_err() {
        return skip("this process may lock no memory");
    }
    assert_refused!(
        memory.discard((GuestAddress(0), 3 * SIZE)),
        DiscardError::Locked { .. },
        "cannot discard 0x80000..=0xbffff (256 KiB): pages of it are locked (mlock or mlockall), \
         which the kernel does not give back: munlock them first"
    );
    let of_each = |memory| (pages(backing(memory, 0)), pages(backing(memory, 2 * SIZE)));
    assert_eq!(of_each(&memory), (128, 64));
    // The pages beside the locked one can be given back.
    memory.discard((GuestAddress(0), 3 * SIZE - PAGE)).unwrap();
    assert_eq!(of_each(&memory), (0, 1));
}

#[test]
fn a_file_system_without_holes_is_refused_before_anything_is_discarded() {
    in_own_process(|| {
        if !geteuid().is_root() {
            return skip("only root may mount a file system");
        }
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(
            Some("ramfs"),
            dir.path(),
            Some("ramfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("ram"))
            .unwrap();
        file.set_len(SIZE).unwrap();
        let policy = AdoptPolicy::new().with_disk_files();
        let ramfs = ShmBacking::adopt(file.into(), &policy).unwrap();
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(RamOptions::new(), [(GuestAddress(0), SIZE)])
            .add_backing(&ramfs, 0, [(GuestAddress(SIZE), SIZE)])
            .build()
            .unwrap();
        fill(&memory, 0..2 * SIZE);
        assert_refused!(
            memory.discard((GuestAddress(0), 2 * SIZE)),
            DiscardError::NoHoles { .. },
            "cannot discard 0x40000..=0x7ffff (256 KiB): the file system of its adopted file \
             cannot punch holes into files, use a memfd, or a file on a tmpfs, ext4, xfs or btrfs"
        );
        assert_eq!(pages(backing(&memory, 0)), 64);
        assert_eq!(byte(&memory, SIZE), 0xa5);
        memory.discard((GuestAddress(0), SIZE)).unwrap();
        drop((memory, ramfs));
        nix::mount::umount(dir.path()).unwrap();
    });
}

#[test]
fn a_file_on_a_disk_gets_holes() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let policy = AdoptPolicy::new().with_disk_files();
    let disk = ShmBacking::adopt(file.into(), &policy).unwrap();
    let memory = GuestMemoryShm::<()>::builder()
        .add_backing(&disk, 0, [(GuestAddress(0), SIZE)])
        .build()
        .unwrap();
    fill(&memory, 0..SIZE);
    match memory.discard((GuestAddress(PAGE), SIZE - 2 * PAGE)) {
        Ok(discarded) => assert_eq!(discarded.freed, SIZE - 2 * PAGE),
        Err(DiscardError::NoHoles { .. }) => {
            return skip("the file system for temporary files has no holes");
        }
        Err(error) => panic!("{error}"),
    }
    assert_eq!(disk.size(), SIZE);
    std::fs::File::from(disk.as_fd().try_clone_to_owned().unwrap())
        .sync_all()
        .unwrap();
    assert!(pages(&disk) < 64, "{}", pages(&disk));
    assert_eq!((byte(&memory, 0), byte(&memory, PAGE)), (0xa5, 0));
    assert_eq!(byte(&memory, SIZE - PAGE), 0xa5);
}
