//! Files on a hugetlbfs, in a mount namespace of their own.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use guest_memory_shm::{
    BackingKind, BackingSource, Error, GuestMemoryShm, GuestRegionShm, InvalidRange, OptionsError,
    RamOptions, RangePart, Reserve, ShmBacking,
};
use nix::mount::{MsFlags, mount, umount};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};

use crate::files::file_options;
use crate::isolation::{HugePool, PAGE, assert_refused, in_own_process, own_mounts};
use crate::proc::{leaves_nothing, smaps_at, smaps_value};
use crate::support::huge_pages_short;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

/// Calls `test` with a hugetlbfs whose pool has `pages` to give, if one can be had.
fn with_hugetlbfs(pages: u64, data: &str, test: impl FnOnce(&Path, &HugePool)) {
    /// Its files give their pages back before the pool is put back, also when the test fails.
    struct Mounted(TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let answer = umount(self.0.path());
            assert!(answer.is_ok() || std::thread::panicking(), "{answer:?}");
        }
    }

    let Some(pool) = HugePool::with_available(HUGE, pages) else {
        return;
    };
    if !own_mounts() {
        return;
    }
    let dir = Mounted(tempfile::tempdir().unwrap());
    let (at, kind) = (dir.0.path(), Some("hugetlbfs"));
    let data = format!("pagesize=2M{data}");
    let none = MsFlags::empty();
    mount(kind, at, kind, none, Some(data.as_str())).expect("mounted");
    test(at, &pool);
}

fn region(options: &RamOptions, size: u64) -> Result<GuestRegionShm, Error> {
    Ok(GuestRegionShm::new((GuestAddress(0), size), options)?)
}

fn names(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_file_on_a_hugetlbfs_has_huge_pages_of_its_pool() {
    in_own_process(|| {
        with_hugetlbfs(4, "", |dir, pool| {
            let free = pool.free();
            for path in [dir.join("ram"), dir.to_owned()] {
                leaves_nothing(|| {
                    let ram = region(&file_options(&path), 2 * HUGE).unwrap();
                    let backing = ram.backing();
                    assert_eq!(backing.kind(), BackingKind::HugetlbFile);
                    assert_eq!(backing.page_size(), HUGE);
                    assert!(backing.is_hugetlb());
                    assert_eq!(ram.is_hugetlbfs(), Some(true));
                    let smaps = smaps_at(ram.as_ptr());
                    assert_eq!(smaps_value(&smaps, "KernelPageSize"), "2048 kB");
                    // Promised when mapped, taken when touched.
                    assert_eq!((pool.free(), pool.reserved()), (free, 2));
                    ram.write_obj(7u8, MemoryRegionAddress(2 * HUGE - 1))
                        .unwrap();
                    assert_eq!((pool.free(), pool.reserved()), (free - 1, 1));
                    assert_eq!(backing.allocated().unwrap(), HUGE);
                });
                let named = path != dir;
                assert_eq!(names(dir), usize::from(named));
                if named {
                    // It keeps its contents, and so its page; and what it was promised.
                    assert_eq!((pool.free(), pool.reserved()), (free - 1, 1));
                    assert_eq!(fs::read(&path).unwrap()[2 * HUGE as usize - 1], 7);
                    fs::remove_file(&path).unwrap();
                }
                assert_eq!((pool.free(), pool.reserved()), (free, 0));
            }
        });
    });
}

#[test]
fn a_short_pool_is_told_before_a_file_is_created() {
    in_own_process(|| {
        with_hugetlbfs(3, "", |dir, pool| {
            let before = (pool.free(), pool.reserved());
            let path = dir.join("ram");
            File::create(dir.join("empty")).unwrap();
            leaves_nothing(|| {
                for path in [path.clone(), dir.to_owned(), dir.join("empty")] {
                    let options = file_options(&path);
                    for refused in [
                        region(&options, 4 * HUGE).map(drop),
                        ShmBacking::create(&options, 4 * HUGE)
                            .map(drop)
                            .map_err(Error::from),
                    ] {
                        assert_eq!(huge_pages_short(&refused.unwrap_err()), Some((4, 3)));
                    }
                }
                // Files and memfds draw on the same pool.
                let memfd =
                    RamOptions::new().with_page_size(guest_memory_shm::PageSize::Huge(Some(HUGE)));
                let both = |pages| {
                    GuestMemoryShm::<()>::builder()
                        .add_ram(file_options(dir), [(GuestAddress(0), 2 * HUGE)])
                        .add_ram(memfd.clone(), [(GuestAddress(1 << 40), pages * HUGE)])
                        .build()
                };
                assert_eq!(huge_pages_short(&both(2).unwrap_err().into()), Some((4, 3)));
                assert!(both(1).is_ok());
            });
            assert_eq!(names(dir), 1);
            assert_eq!(fs::metadata(dir.join("empty")).unwrap().len(), 0);
            assert_eq!((pool.free(), pool.reserved()), before);
        });
    });
}

#[test]
fn a_file_that_has_its_pages_already_needs_none_of_the_pool() {
    in_own_process(|| {
        with_hugetlbfs(2, "", |dir, pool| {
            let path = dir.join("ram");
            let options = file_options(&path);
            let first = region(&options, 2 * HUGE).unwrap();
            first.write_obj(1u8, MemoryRegionAddress(0)).unwrap();
            assert_eq!((pool.free() - pool.reserved(), pool.reserved()), (0, 1));
            // The second page is reserved for the file, in whichever process it is mapped.
            let second = region(&options, 2 * HUGE).unwrap();
            second.write_obj(2u8, MemoryRegionAddress(HUGE)).unwrap();
            assert_eq!(first.read_obj::<u8>(MemoryRegionAddress(HUGE)).unwrap(), 2);
            drop((first, second));
            assert_eq!(pool.free(), 0);
            let third = region(&options, 2 * HUGE).unwrap();
            assert_eq!(third.read_obj::<u8>(MemoryRegionAddress(0)).unwrap(), 1);
            drop(third);

            // One that has contents and lacks pages is told when it is mapped.
            let longer = dir.join("longer");
            File::create(&longer).unwrap().set_len(HUGE).unwrap();
            leaves_nothing(|| {
                let refused = region(&file_options(&longer), HUGE).unwrap_err();
                assert_eq!(huge_pages_short(&refused), Some((1, 0)));
            });
            assert_eq!(fs::metadata(&longer).unwrap().len(), HUGE);
            fs::remove_file(path).unwrap();
            fs::remove_file(longer).unwrap();
        });
    });
}

#[test]
fn numbers_that_are_no_multiple_of_the_huge_page_are_refused() {
    in_own_process(|| {
        with_hugetlbfs(3, "", |dir, _| {
            let path = dir.join("ram");
            leaves_nothing(|| {
                assert_refused!(
                    region(&file_options(&path).with_offset(PAGE), HUGE),
                    Error::Range(InvalidRange::Unaligned { .. }),
                    "offset 0x1000 is not a multiple of the page size 2 MiB: the nearest is 0x0",
                );
                assert_refused!(
                    region(&file_options(&path).with_align(MIB), HUGE),
                    Error::Options(OptionsError::Align { .. }),
                    "align=0x100000: expected a power of two that is at least the page size 2 MiB",
                );
                assert!(matches!(
                    region(&file_options(&path), 3 * MIB),
                    Err(Error::Range(InvalidRange::Unaligned {
                        part: RangePart::Size,
                        page_size: HUGE,
                        ..
                    }))
                ));
            });
            assert_eq!(names(dir), 0);
            // The control, with the offset in the file's coordinates.
            let ram = region(
                &file_options(&path).with_offset(HUGE).with_align(1 << 30),
                HUGE,
            )
            .unwrap();
            assert_eq!(ram.as_ptr().addr() % (1 << 30), 0);
            ram.write_obj(5u8, MemoryRegionAddress(0)).unwrap();
            drop(ram);
            assert_eq!(fs::metadata(&path).unwrap().len(), 2 * HUGE);
            let bytes = fs::read(&path).unwrap();
            assert_eq!((bytes[0], bytes[HUGE as usize]), (0, 5));
            fs::remove_file(path).unwrap();
        });
    });
}

#[test]
fn a_hugetlbfs_with_a_size_is_a_limit_as_its_pool_is() {
    in_own_process(|| {
        with_hugetlbfs(4, ",size=4M", |dir, _| {
            leaves_nothing(|| {
                assert_refused!(
                    region(&file_options(dir), 3 * HUGE),
                    Error::Shortage(_),
                    format!(
                        "6 MiB more are needed, and the file system of {} holds 4 MiB and has 4 \
                         MiB free: remove files from it, remount it with a larger size, or use a \
                         memfd backing; RAM that stays sparse is allowed by reserve=off",
                        dir.display()
                    ),
                );
                assert!(region(&file_options(dir), 2 * HUGE).is_ok());
            });
        });
    });
}

#[test]
fn discard_data_gives_huge_pages_back_and_keeps_the_file() {
    in_own_process(|| {
        with_hugetlbfs(2, "", |dir, pool| {
            let path = dir.join("ram");
            let free = pool.free();
            let options =
                file_options(&path).with_discard_data(guest_memory_shm::DiscardData::OnDrop);
            let ram = region(&options, 2 * HUGE).unwrap();
            ram.write_obj(7u8, MemoryRegionAddress(HUGE)).unwrap();
            assert_eq!(pool.free(), free - 1);
            drop(ram);
            // The reservation of the untouched page is the file's, as long as it exists.
            assert_eq!((pool.free(), pool.reserved()), (free, 1));
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!((metadata.len(), metadata.blocks()), (2 * HUGE, 0));
            fs::remove_file(path).unwrap();
        });
    });
}

#[test]
fn without_a_reservation_no_pool_is_asked_before_the_file_is_created() {
    in_own_process(|| {
        with_hugetlbfs(1, "", |dir, _| {
            let options = file_options(dir).with_reserve(Reserve::Off);
            let backing = ShmBacking::create(&options, 8 * HUGE).unwrap();
            assert_eq!(backing.size(), 8 * HUGE);
            assert!(matches!(options.backing(), BackingSource::File(_)));
        });
    });
}
