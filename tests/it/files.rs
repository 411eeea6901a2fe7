//! Files as RAM: found, created, nameless, at an offset, aligned, discarded at the end.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use guest_memory_shm::{
    AdoptPolicy, BackingKind, BackingSource, DiscardData, GuestMemoryShm, GuestRegionShm,
    RamOptions, Reserve, Seals, ShmBacking,
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::isolation::{PAGE, in_own_process, in_own_process_leaving_nothing, shm_dir};
use crate::proc::{leaves_nothing, maps_in};

const MIB: u64 = 1 << 20;

/// Options for a file, or a nameless one in a directory.
pub(crate) fn file_options(path: impl AsRef<Path>) -> RamOptions {
    RamOptions::new().with_backing(BackingSource::File(path.as_ref().to_owned()))
}

/// A directory in memory, and one that is not.
fn dirs() -> [(TempDir, BackingKind); 2] {
    [
        (shm_dir(), BackingKind::ShmFile),
        // Next to the crate, because /tmp may be a tmpfs.
        (
            tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
            BackingKind::File,
        ),
    ]
}

fn region(options: &RamOptions, size: u64) -> GuestRegionShm {
    GuestRegionShm::new((GuestAddress(0), size), options).expect("mapped")
}

/// A file with `len` bytes of a pattern.
pub(crate) fn pattern(len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| (at / 256) as u8 ^ (at as u8) ^ 0x5a)
        .collect()
}

fn names(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_file_that_has_contents_becomes_ram_with_them_and_keeps_its_length() {
    for (dir, kind) in dirs() {
        let path = dir.path().join("ram");
        // Longer than the RAM, and not even whole pages.
        let contents = pattern(3 * MIB + 1000);
        fs::write(&path, &contents).unwrap();

        let ram = region(&file_options(&path), 2 * MIB);
        let mut found = vec![0; 2 * MIB as usize];
        ram.read_slice(&mut found, MemoryRegionAddress(0)).unwrap();
        assert!(found == contents[..2 * MIB as usize]);
        assert_eq!(ram.backing().kind(), kind);
        assert_eq!(ram.is_hugetlbfs(), Some(false));
        assert_eq!(
            (ram.backing().start(), ram.backing().end()),
            (0, 2 * MIB),
            "what may be used ends with the RAM"
        );
        let beside = file_options(&path).with_offset(MIB);
        let beside = ShmBacking::create(&beside, MIB).unwrap();
        assert_eq!((beside.start(), beside.end()), (MIB, 2 * MIB));
        assert_eq!(beside.size(), MIB, "the size is not where it ends");
        assert!(!ram.backing().seals().intersects(Seals::RESIZE));

        // What is written is in the file, for all that read it.
        ram.write_obj(0xfeed_u16, MemoryRegionAddress(2 * MIB - 2))
            .unwrap();
        drop(ram);
        let after = fs::read(&path).unwrap();
        assert_eq!(after.len(), contents.len());
        assert_eq!(
            after[2 * MIB as usize - 2..][..2],
            0xfeed_u16.to_ne_bytes(),
            "written back"
        );
        let rest = |bytes: &[u8]| bytes[2 * MIB as usize..].to_vec();
        assert!(rest(&after) == rest(&contents));
    }
}

#[test]
fn a_file_that_does_not_exist_is_created_for_its_owner_only() {
    in_own_process_leaving_nothing!(|| {
        for (dir, kind) in dirs() {
            let path = dir.path().join("new");
            let backing = ShmBacking::create(&file_options(&path), 2 * MIB).unwrap();
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!((metadata.len(), metadata.blocks()), (2 * MIB, 0));
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
            let identity = backing.identity();
            assert_eq!(
                (identity.dev, identity.ino),
                (metadata.dev(), metadata.ino())
            );
            assert_eq!((backing.kind(), backing.allocated().unwrap()), (kind, 0));
            drop(backing);
            // It stays, and is found the next time.
            let again = region(&file_options(&path), 2 * MIB);
            assert_eq!(again.backing().identity(), identity);
        }
    });
}

#[test]
fn an_empty_file_is_made_as_long_as_the_offset_and_the_ram() {
    in_own_process_leaving_nothing!(|| {
        for (dir, _) in dirs() {
            let path = dir.path().join("empty");
            File::create(&path).unwrap();
            let inode = fs::metadata(&path).unwrap().ino();
            let mode = fs::metadata(&path).unwrap().mode();
            let ram = region(&file_options(&path).with_offset(16 * PAGE), MIB);
            assert_eq!(ram.offset(), 16 * PAGE);
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.len(), 16 * PAGE + MIB);
            assert_eq!((metadata.ino(), metadata.mode()), (inode, mode));
        }
    });
}

#[test]
fn a_file_in_a_directory_has_no_name_and_goes_away_with_its_last_user() {
    in_own_process(|| {
        for (dir, kind) in dirs() {
            leaves_nothing(|| {
                let ram = region(&file_options(dir.path()), MIB);
                assert_eq!(names(dir.path()), 0);
                assert_eq!(ram.backing().kind(), kind);
                let file = ram.file_offset().unwrap().file();
                let metadata = file.metadata().unwrap();
                assert_eq!((metadata.nlink(), metadata.len()), (0, MIB));
                assert_eq!(metadata.mode() & 0o777, 0o600);
                let place = fs::metadata(dir.path()).unwrap().dev();
                assert_eq!(metadata.dev(), place);
                // Each is a file of its own.
                let other = region(&file_options(dir.path()), MIB);
                assert_ne!(ram.backing(), other.backing());
            });
        }
    });
}

#[test]
fn paths_lead_through_symbolic_links_and_may_be_relative() {
    in_own_process(|| {
        let dir = shm_dir();
        fs::write(dir.path().join("file"), pattern(MIB)).unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        std::env::set_current_dir(dir.path()).unwrap();
        let through = region(&file_options("link"), MIB);
        let inode = fs::metadata("file").unwrap().ino();
        assert_eq!(through.backing().identity().ino, inode);
        let new = region(&file_options("new"), MIB);
        assert_eq!(
            new.backing().identity().ino,
            fs::metadata(dir.path().join("new")).unwrap().ino()
        );
        assert_eq!(
            region(&file_options("."), MIB).backing().kind(),
            BackingKind::ShmFile
        );
        std::env::set_current_dir("/").unwrap();
    });
}

#[test]
fn ram_starts_at_the_offset_for_every_mapper_and_in_the_memory_table() {
    for (dir, _) in dirs() {
        // From file, offset, the sizes of the ranges: the mmap offsets that a daemon is told.
        let cases: [(u64, &[u64], &[u64]); 4] = [
            (0, &[MIB], &[0]),
            (PAGE, &[MIB], &[PAGE]),
            (2 * MIB, &[MIB, 2 * MIB], &[2 * MIB, 3 * MIB]),
            (
                3 * PAGE,
                &[PAGE, MIB, PAGE],
                &[3 * PAGE, 4 * PAGE, 4 * PAGE + MIB],
            ),
        ];
        for (at, (offset, sizes, expected)) in cases.into_iter().enumerate() {
            let path = dir.path().join(at.to_string());
            let ranges: Vec<_> = (1_u64..)
                .map(|place| GuestAddress(place << 32))
                .zip(sizes.iter().copied())
                .collect();
            let memory = GuestMemoryShm::<()>::builder()
                .add_ram(file_options(&path).with_offset(offset), ranges.clone())
                .build()
                .unwrap();
            let total: u64 = sizes.iter().sum();
            assert_eq!(fs::metadata(&path).unwrap().len(), offset + total);

            let table = memory.memory_table();
            let told: Vec<_> = table.regions().iter().map(|r| r.mmap_offset()).collect();
            assert_eq!(told, expected);
            let mapped: Vec<_> = memory
                .iter()
                .map(|region| {
                    let start = region.as_ptr().addr() as u64;
                    let lines = maps_in(start..start + region.len());
                    assert_eq!(lines.len(), 1);
                    lines[0].offset
                })
                .collect();
            assert_eq!(mapped, expected);
            let offsets: Vec<_> = memory
                .iter()
                .map(|region| region.file_offset().unwrap().start())
                .collect();
            assert_eq!(offsets, expected);

            // Another one who maps the file as it was told finds what is written here.
            let fd = memory.iter().next().unwrap().backing().as_fd();
            let policy = AdoptPolicy::new().with_disk_files();
            let theirs = ShmBacking::adopt(fd.try_clone_to_owned().unwrap(), &policy).unwrap();
            for ((guest, size), told) in ranges.iter().zip(&told) {
                memory.write_obj(guest.0 | *told, *guest).unwrap();
                let view = GuestRegionShm::<()>::from_backing(&theirs, *told, (*guest, *size));
                let seen: u64 = view.unwrap().read_obj(MemoryRegionAddress(0)).unwrap();
                assert_eq!(seen, guest.0 | told);
                let mut bytes = [0; 8];
                let file = File::open(&path).unwrap();
                file.read_exact_at(&mut bytes, *told).unwrap();
                assert_eq!(u64::from_ne_bytes(bytes), guest.0 | told);
            }
        }
    }
}

#[test]
fn what_is_before_the_offset_and_after_the_ram_is_left_alone() {
    for (dir, _) in dirs() {
        let path = dir.path().join("ram");
        let contents = pattern(MIB);
        fs::write(&path, &contents).unwrap();
        let ram = region(&file_options(&path).with_offset(4 * PAGE), 2 * PAGE);
        let zeros = vec![0; 2 * PAGE as usize];
        ram.write_slice(&zeros, MemoryRegionAddress(0)).unwrap();
        let after = fs::read(&path).unwrap();
        let (start, end) = (4 * PAGE as usize, 6 * PAGE as usize);
        assert!(after[..start] == contents[..start]);
        assert!(after[start..end] == zeros);
        assert!(after[end..] == contents[end..]);
    }
}

#[test]
fn the_host_address_is_a_multiple_of_align() {
    for (dir, _) in dirs() {
        let host = |region: &GuestRegionShm| region.as_ptr().addr() as u64;
        for align in [PAGE, 64 << 10, 2 * MIB, 64 * MIB, 1 << 30, 1 << 36] {
            for offset in [0, PAGE, 2 * MIB + PAGE] {
                let options = file_options(dir.path()).with_offset(offset);
                let aligned = region(&options.with_align(align), MIB);
                assert_eq!(host(&aligned) % align, 0, "{align:#x} {offset:#x}");
                // Where the two do not exclude each other, huge pages stay possible.
                if offset % align == 0 {
                    assert_eq!(host(&aligned) % (2 * MIB), offset % (2 * MIB));
                }
            }
        }
        // The control: without being asked for it does not come.
        let options = file_options(dir.path());
        for options in [options.clone(), options.with_align(0)] {
            let several = [(); 3].map(|()| region(&options, MIB));
            assert!(several.iter().any(|region| host(region) % (1 << 30) != 0));
            assert!(several.iter().all(|region| host(region) % (2 * MIB) == 0));
        }
    }
}

#[test]
fn discard_data_frees_the_ram_when_its_last_user_goes_and_nothing_else() {
    for (dir, _) in dirs() {
        let path = dir.path().join("ram");
        let allocated = || fs::metadata(&path).unwrap().blocks() * 512;
        for (discard, kept) in [(DiscardData::Keep, true), (DiscardData::OnDrop, false)] {
            let contents = pattern(4 * MIB);
            fs::write(&path, &contents).unwrap();
            let before = allocated();
            assert!(before >= 4 * MIB);
            let options = file_options(&path)
                .with_offset(MIB)
                .with_discard_data(discard);
            let ram = region(&options, 2 * MIB);
            ram.write_obj(7u64, MemoryRegionAddress(0)).unwrap();
            let table = GuestMemoryShm::from_regions(vec![ram])
                .unwrap()
                .memory_table();
            // The memory is gone, a table that may be sent again is not.
            assert!(allocated() >= 4 * MIB);
            drop(table);

            let after = fs::read(&path).unwrap();
            let (start, end) = (MIB as usize, 3 * MIB as usize);
            assert_eq!(after.len(), contents.len(), "the length stays");
            assert!(after[..start] == contents[..start]);
            assert!(after[end..] == contents[end..]);
            if kept {
                assert!(allocated() >= before);
                assert_eq!(after[start..][..8], 7u64.to_ne_bytes());
            } else {
                assert_eq!(before - allocated(), 2 * MIB);
                assert!(after[start..end].iter().all(|byte| *byte == 0));
            }
        }
    }
}

#[test]
fn a_backing_that_was_created_stays_when_it_is_dropped_without_ever_being_mapped() {
    let dir = shm_dir();
    let path = dir.path().join("ram");
    drop(ShmBacking::create(&file_options(&path), MIB).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
}

#[test]
fn a_file_larger_than_its_file_system_is_ram_where_nothing_is_to_be_reserved() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("ram");
    // 8 TiB: less than an ext4 file may have.
    let options = file_options(&path).with_reserve(Reserve::Off);
    let ram = region(&options, 8 << 40);
    ram.write_obj(1u8, MemoryRegionAddress((8 << 40) - 1))
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 40);
}
