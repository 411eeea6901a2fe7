//! Populating adopted RAM: what is missing is allocated, what others made is never lost.

use std::fs::File;
use std::os::unix::fs::FileExt;

use guest_memory_shm::receive::{ReceiveError, ReceivePolicy, ReceivedRegion, ReceivedTable};
use guest_memory_shm::{
    AdoptPolicy, Error, GuestMemoryShm, GuestRegionShm, NodeSet, NumaPolicy, Populate,
    PopulateError, RamOptions, ResourceLimit, ShmBacking,
};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, umount};
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use super::{MIB, SIZE, START, WAYS, adopt, fd_of, files, memfd};
use crate::isolation::{PAGE, in_own_process, mount_tmpfs, own_mounts};
use crate::populate::{is_mapped, range, threads};
use crate::proc::leaves_nothing_but_heaps;

const MODES: [Populate; 2] = [Populate::Allocate, Populate::Prefault];

/// What is allocated of a file, in bytes.
fn allocated(file: &File) -> u64 {
    adopt(file, &RamOptions::new())
        .unwrap()
        .allocated()
        .unwrap()
}

/// A file system on a disk counts blocks of its own, too, by which it finds the others.
fn assert_allocated(found: u64, expected: u64, in_memory: bool, what: &str) {
    let own = if in_memory { 0 } else { 16 * PAGE };
    let allowed = expected..=expected + own;
    assert!(allowed.contains(&found), "{found} of {allowed:?}: {what}");
}

#[test]
fn adopted_ram_has_what_the_mode_says_and_no_more() {
    for (mode, there, mapped) in [
        (Populate::Lazy, 0, false),
        (Populate::Allocate, SIZE, false),
        (Populate::Prefault, SIZE, true),
    ] {
        let options = RamOptions::new().with_populate(mode);
        for (name, way) in WAYS {
            for (file, in_memory) in files(SIZE) {
                let memory = way(&file, SIZE, &options).unwrap();
                let what = format!("{name} {mode:?} {file:?}");
                assert_allocated(allocated(&file), there, in_memory, &what);
                // A file system on a disk wants to know of the first write to each page.
                if in_memory {
                    let found = is_mapped(&memory, range(START.0, SIZE));
                    assert_eq!(found, mapped, "{name} {mode:?} {file:?}");
                }
            }
        }
    }
}

#[test]
fn ranges_of_one_descriptor_are_populated_each_as_its_options_say() {
    for (file, in_memory) in files(4 * MIB) {
        let backing = adopt(&file, &RamOptions::new()).unwrap();
        let with = |mode| {
            let options = RamOptions::new()
                .with_populate(mode)
                .with_populate_threads(threads(2));
            backing.with_options(&options).unwrap()
        };
        let at = |number: u64| [(GuestAddress(number << 30), MIB)];
        let memory = GuestMemoryShm::<()>::builder()
            .add_backing(&with(Populate::Allocate), 3 * MIB, at(0))
            .add_backing(&with(Populate::Lazy), 2 * MIB, at(1))
            .add_backing(&with(Populate::Prefault), MIB, at(2))
            .add_backing(&backing, 0, at(3))
            .build()
            .unwrap();
        let found = backing.allocated().unwrap();
        assert_allocated(found, 2 * MIB, in_memory, &format!("{file:?}"));
        if in_memory {
            let found = memory.extents(PAGE).unwrap().ranges;
            assert_eq!(found, [range(0, MIB), range(2 << 30, MIB)]);
            assert!(is_mapped(&memory, range(2 << 30, MIB)));
            assert!(!is_mapped(&memory, range(0, MIB)));
        }
    }
}

#[test]
fn each_region_on_a_backing_is_populated_when_it_is_made_and_what_is_there_stays() {
    for mode in MODES {
        let options = RamOptions::new().with_populate(mode);
        // A backing that this crate creates is no other.
        let created = ShmBacking::create(&options, SIZE).unwrap();
        let [(memfd, _), (shm, _), _] = files(SIZE);
        let adopted = [memfd, shm].map(|file| adopt(&file, &options).unwrap());
        for backing in adopted.into_iter().chain([created]) {
            assert_eq!(backing.allocated().unwrap(), 0);
            let part =
                |at| GuestRegionShm::<()>::from_backing(&backing, at, (START, MIB)).unwrap();
            let first = part(0);
            assert_eq!(backing.allocated().unwrap(), MIB);
            first.write_obj(7u8, MemoryRegionAddress(PAGE)).unwrap();
            let _second = part(8 * MIB);
            assert_eq!(backing.allocated().unwrap(), 2 * MIB);
            let again = part(0);
            assert_eq!(again.read_obj::<u8>(MemoryRegionAddress(PAGE)).unwrap(), 7);
            assert_eq!(backing.allocated().unwrap(), 2 * MIB);
        }
    }
}

#[test]
fn a_shortage_of_memory_is_told_before_the_first_page() {
    // More than any machine has.
    let endless = 1 << 46;
    for mode in MODES {
        let options = RamOptions::new().with_populate(mode);
        for (name, way) in WAYS {
            let memfd = memfd(endless);
            let refused = way(&memfd, endless, &options).unwrap_err();
            let Error::Populate(PopulateError::Shortage { shortage, .. }) = &refused else {
                panic!("{name}: {refused:?}");
            };
            assert!(matches!(shortage.limit, ResourceLimit::Machine { .. }));
            assert_eq!(allocated(&memfd), 0);
        }
    }
}

/// A file in a full file system: of its 32 MiB the last 20 are allocated, 4 MiB are free, and in
/// the rest another process has made some pages. What is missing of the first 22 MiB seems to fit.
struct Full {
    file: File,
}

impl Full {
    const PART: u64 = 22 * MIB;
    /// Where the other process wrote what, some of it zeros.
    const WRITTEN: [(u64, u8); 3] = [(0, 1), (5 * PAGE, 0), (MIB + PAGE, 7)];

    fn new() -> Self {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(32 * MIB).unwrap();
        let (start, len) = (12 * MIB as i64, 20 * MIB as i64);
        fallocate(&file, FallocateFlags::empty(), start, len).unwrap();
        for (at, byte) in Self::WRITTEN {
            file.write_all_at(&[byte; PAGE as usize], at).unwrap();
        }
        Self { file }
    }

    #[track_caller]
    fn is_as_it_was(&self) {
        let pages = Self::WRITTEN.len() as u64;
        assert_eq!(allocated(&self.file), 20 * MIB + pages * PAGE);
        for (at, byte) in Self::WRITTEN {
            let mut page = [9; PAGE as usize];
            self.file.read_exact_at(&mut page, at).unwrap();
            assert_eq!(page, [byte; PAGE as usize], "{at:#x}");
        }
        assert_eq!(allocated(&self.file), 20 * MIB + pages * PAGE);
    }
}

#[test]
fn a_failure_gives_back_what_was_allocated_and_no_page_that_others_made() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=24m");
        for mode in MODES {
            let options = RamOptions::new()
                .with_populate(mode)
                .with_populate_threads(threads(2));
            for (name, way) in WAYS {
                let full = Full::new();
                full.is_as_it_was();
                let refused = leaves_nothing_but_heaps(|| way(&full.file, Full::PART, &options));
                let error = refused.unwrap_err();
                let Error::Populate(PopulateError::Shortage {
                    range, shortage, ..
                }) = &error
                else {
                    panic!("{name}: {error:?}");
                };
                assert!(range.start_addr() >= START, "{error}");
                assert!(matches!(shortage.limit, ResourceLimit::FileSystem { .. }));
                assert!(error.to_string().contains("holds 24 MiB"), "{error}");
                full.is_as_it_was();
            }
            // New RAM that is built with it is undone, too.
            let full = Full::new();
            let failed = leaves_nothing_but_heaps(|| {
                let backing = adopt(&full.file, &options).unwrap();
                GuestMemoryShm::<()>::builder()
                    .add_ram(options.clone(), [(GuestAddress(0), MIB)])
                    .add_backing(&backing, 0, [(START, Full::PART)])
                    .build()
            });
            assert!(failed.is_err());
            full.is_as_it_was();
        }
        umount("/dev/shm").unwrap();
    });
}

/// A region of a table, at the number's GiB.
fn received(number: u64, size: u64) -> ReceivedRegion {
    ReceivedRegion {
        guest_addr: GuestAddress(number << 30),
        size,
        user_addr: (1 << 40) + (number << 30),
        mmap_offset: 0,
    }
}

#[test]
fn a_daemon_can_have_what_it_is_sent_populated() {
    let node = NodeSet::from_nodes([0]).unwrap();
    let options = RamOptions::new()
        .with_populate(Populate::Prefault)
        .with_numa(NumaPolicy::Preferred(node));
    let policy = ReceivePolicy::new().with_descriptors(AdoptPolicy::new().with_options(options));
    let [(memfd, _), (shm, _), _] = files(MIB);
    let table = ReceivedTable::<()>::new(policy)
        .set([received(0, MIB)], [fd_of(&memfd)])
        .unwrap();
    assert_eq!((allocated(&memfd), allocated(&shm)), (MIB, 0));
    let table = table.add(received(1, MIB), [fd_of(&shm)]).unwrap();
    assert_eq!(allocated(&shm), MIB);
    assert!(is_mapped(table.memory(), range(0, MIB)));
    assert!(is_mapped(table.memory(), range(1 << 30, MIB)));
}

#[test]
fn a_daemon_is_told_which_region_could_not_be_populated_and_takes_nothing_back() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=24m");
        let options = RamOptions::new().with_populate(Populate::Allocate);
        let policy = AdoptPolicy::new().with_options(options);
        let policy = ReceivePolicy::new().with_descriptors(policy);
        let memfd = memfd(MIB);
        let full = Full::new();
        let refused = ReceivedTable::<()>::new(policy)
            .set(
                [received(0, MIB), received(1, Full::PART)],
                [fd_of(&memfd), fd_of(&full.file)],
            )
            .unwrap_err();
        assert!(
            matches!(refused, ReceiveError::Region { index: 1, .. }),
            "{refused:?}"
        );
        assert!(
            refused
                .to_string()
                .starts_with("region 0x40000000..=0x415fffff (22 MiB): cannot populate"),
            "{refused}"
        );
        // A guest may be writing there. (The control of what is given back elsewhere.)
        assert_eq!(allocated(&memfd), MIB);
        assert!(allocated(&full.file) > 22 * MIB);
        for (at, byte) in Full::WRITTEN {
            let mut page = [9; PAGE as usize];
            full.file.read_exact_at(&mut page, at).unwrap();
            assert_eq!(page, [byte; PAGE as usize]);
        }
        drop(full);
        umount("/dev/shm").unwrap();
    });
}
