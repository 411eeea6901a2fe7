//! Files that the system or a later step stops: told beforehand, or undone.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use guest_memory_shm::{
    BuildNote, DiscardData, Error, FileError, GuestMemoryShm, MemoryError, Populate, RamOptions,
    Reserve, ShmBacking,
};
use nix::mount::{MsFlags, umount};
use nix::sys::resource::Resource;
use nix::sys::signal::Signal;
use nix::unistd::pipe;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::bad_system::with_limit;
use crate::files::{file_options, pattern};
use crate::files_bad::{memory, names, refused, region};
use crate::fork::dies_of_writing;
use crate::isolation::{PAGE, assert_refused, in_own_process, mount_tmpfs, own_mounts, shm_dir};
use crate::proc::leaves_nothing;
use crate::support::{chain, room_short};

const MIB: u64 = 1 << 20;
/// More than the address space of a process, less than a file on a tmpfs may have.
const UNMAPPABLE: u64 = 1 << 49;

#[test]
fn ram_that_its_file_system_can_never_hold_is_refused_unless_that_is_meant() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        mount_tmpfs(dir.path().to_str().unwrap(), MsFlags::empty(), "size=8m");
        let path = dir.path().join("ram");
        let sparse = dir.path().join("sparse");
        File::create(&sparse).unwrap().set_len(64 * MIB).unwrap();
        for path in [&path, dir.path(), &sparse] {
            let text = format!(
                "9 MiB more are needed, and the file system of {} holds 8 MiB and has 8 MiB free: \
                 remove files from it, remount it with a larger size, or use a memfd backing; RAM \
                 that stays sparse is allowed by reserve=off",
                path.display()
            );
            refused(&file_options(path), 9 * MIB, &text);
        }
        assert_eq!(names(dir.path()), ["sparse"]);
        // The RAM counts, not what is before it: that is a hole.
        let behind = file_options(&path).with_offset(32 * MIB);
        let ram = region(&behind, 8 * MIB).unwrap();
        let all = vec![1; 8 * MIB as usize];
        ram.write_slice(&all, MemoryRegionAddress(0)).unwrap();
        drop(ram);
        fs::remove_file(&path).unwrap();
        // What fits only when others leave room is said, and refused if it is to be populated.
        fs::write(dir.path().join("ballast"), &all[..2 * MIB as usize]).unwrap();
        let backing = ShmBacking::create(&file_options(&path), 8 * MIB).unwrap();
        assert!(matches!(
            backing.notes(),
            [BuildNote::Shortage(short)] if (short.needed, short.left) == (8 * MIB, 6 * MIB)
        ));
        drop(backing);
        fs::remove_file(&path).unwrap();
        let populated = file_options(&path).with_populate(Populate::Allocate);
        let refused = ShmBacking::create(&populated, 8 * MIB).unwrap_err();
        assert_eq!(room_short(&refused.into()), Some((8 * MIB, 6 * MIB)));
        assert!(!path.exists());
        fs::remove_file(dir.path().join("ballast")).unwrap();

        // The control: what would come of it.
        let meant = file_options(&path).with_reserve(Reserve::Off);
        let ram = region(&meant, 9 * MIB).unwrap();
        ram.write_slice(&all[PAGE as usize..], MemoryRegionAddress(0))
            .unwrap();
        ram.write_obj(1u8, MemoryRegionAddress(8 * MIB - 1))
            .unwrap();
        let one_more = ram.as_ptr().wrapping_add(8 * MIB as usize);
        assert_eq!(dies_of_writing(one_more), Some(Signal::SIGBUS));
        drop(ram);
        umount(dir.path()).unwrap();
    });
}

#[test]
fn the_limit_on_file_sizes_concerns_files_that_are_made_longer() {
    in_own_process(|| {
        let dir = shm_dir();
        let path = dir.path().join("ram");
        let long = dir.path().join("long");
        File::create(&long).unwrap().set_len(4 * MIB).unwrap();
        with_limit(Resource::RLIMIT_FSIZE, MIB, || {
            for (path, offset, size, total) in [
                (path.as_path(), 0, 2 * MIB, "2 MiB"),
                (&path, MIB, MIB, "2 MiB"),
                (dir.path(), 0, 2 * MIB, "2 MiB"),
            ] {
                let text = format!(
                    "a file of {total} exceeds RLIMIT_FSIZE, which is 1 MiB: raise it (ulimit \
                     -f)"
                );
                refused(&file_options(path).with_offset(offset), size, &text);
            }
            let ram = region(&file_options(&long), 4 * MIB).unwrap();
            ram.write_obj(1u8, MemoryRegionAddress(4 * MIB - 1))
                .unwrap();
        });
        assert_eq!(names(dir.path()), ["long"]);
    });
}

#[test]
fn without_a_descriptor_no_file_is_created() {
    in_own_process(|| {
        let dir = shm_dir();
        let (reader, writer) = pipe().unwrap();
        let next = reader.as_raw_fd().min(writer.as_raw_fd()) as u64;
        drop((reader, writer));
        for path in [dir.path().join("ram"), dir.path().to_owned()] {
            with_limit(Resource::RLIMIT_NOFILE, next, || {
                assert_refused!(
                    region(&file_options(&path), MIB),
                    Error::Shortage(_),
                    format!(
                        "no file descriptor is left of the {next} that this process may have: \
                         raise RLIMIT_NOFILE (ulimit -n)"
                    ),
                );
            });
            assert_eq!(names(dir.path()), [""; 0]);
            with_limit(Resource::RLIMIT_NOFILE, next + 1, || {
                assert!(region(&file_options(dir.path()), MIB).is_ok());
            });
        }
    });
}

#[test]
fn when_a_later_step_fails_a_new_file_is_removed_and_an_empty_one_is_empty_again() {
    in_own_process(|| {
        let dir = shm_dir();
        let (new, empty) = (dir.path().join("new"), dir.path().join("empty"));
        File::create(&empty).unwrap();
        let old = dir.path().join("old");
        File::create(&old).unwrap().set_len(UNMAPPABLE).unwrap();
        let inode = fs::metadata(&empty).unwrap().ino();
        leaves_nothing(|| {
            for path in [&new, &empty, &old, dir.path()] {
                let options = file_options(path).with_reserve(Reserve::Off);
                for result in [
                    region(&options, UNMAPPABLE).map(drop),
                    memory(&options, UNMAPPABLE).map(drop),
                    // The file is mapped, what comes behind it is not.
                    GuestMemoryShm::<()>::builder()
                        .add_ram(
                            options.clone().with_discard_data(DiscardData::OnDrop),
                            [(GuestAddress(0), MIB)],
                        )
                        .add_ram(RamOptions::new(), [(GuestAddress(1 << 50), UNMAPPABLE)])
                        .build()
                        .map_err(Error::from)
                        .map(drop),
                ] {
                    assert!(matches!(result, Err(Error::Map(_))), "{result:?}");
                    let metadata = fs::metadata(&empty).unwrap();
                    assert_eq!((metadata.len(), metadata.ino()), (0, inode));
                    assert_eq!(fs::metadata(&old).unwrap().len(), UNMAPPABLE);
                    assert!(!new.exists());
                }
            }
        });
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, ["empty", "old"]);
        // The control: the file is there once the region is.
        assert!(region(&file_options(&new), MIB).is_ok());
        assert!(new.exists());
    });
}

#[test]
fn contents_that_were_there_survive_a_failure_although_they_were_to_be_discarded_at_the_end() {
    in_own_process(|| {
        let dir = shm_dir();
        let path = dir.path().join("ram");
        fs::write(&path, pattern(MIB)).unwrap();
        let options = file_options(&path).with_discard_data(DiscardData::OnDrop);
        let failed = GuestMemoryShm::<()>::builder()
            .add_ram(options.clone(), [(GuestAddress(0), MIB)])
            .add_ram(RamOptions::new(), [(GuestAddress(1 << 50), UNMAPPABLE)])
            .build();
        assert!(matches!(failed, Err(MemoryError::Map(_))));
        assert!(fs::read(&path).unwrap() == pattern(MIB));
        drop(region(&options, MIB).unwrap());
        assert!(fs::read(&path).unwrap() == vec![0; MIB as usize]);
    });
}

#[test]
fn a_length_that_the_file_system_does_not_have_leaves_no_file() {
    in_own_process(|| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("ram");
        let options = file_options(&path).with_reserve(Reserve::Off);
        leaves_nothing(|| match region(&options, 1 << 62) {
            Err(error @ Error::File(FileError::Resize { .. })) => {
                let text = format!("cannot set the length of {} to 4 EiB", path.display());
                assert_eq!(error.to_string(), text);
                assert!(chain(&error).contains("os error 27"), "{}", chain(&error));
            }
            // Some file systems have files of any length.
            other => assert!(matches!(other, Err(Error::Map(_))), "{other:?}"),
        });
        assert_eq!(names(dir.path()), [""; 0]);
    });
}
