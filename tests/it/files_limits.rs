//! Files that the system or a later step stops: told beforehand, or undone.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Barrier;
use std::sync::mpsc::{TryRecvError, channel};

use guest_memory_shm::{
    BuildNote, DiscardData, Error, FileError, GuestMemoryShm, MemoryError, Populate, RamOptions,
    Reserve, ShmBacking,
};
use nix::mount::{MsFlags, umount};
use nix::sys::resource::Resource;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MemoryRegionAddress};

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
        let above = file_options(&path).with_offset(32 * MIB);
        let ram = region(&above, 8 * MIB).unwrap();
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
fn files_of_one_memory_must_fit_together() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        mount_tmpfs(dir.path().to_str().unwrap(), MsFlags::empty(), "size=8m");
        let build = |parts: &[(&Path, u64, u64)], populate| {
            let mut builder = GuestMemoryShm::<()>::builder();
            for (at, (path, offset, size)) in parts.iter().enumerate() {
                let options = file_options(path).with_offset(*offset);
                let range = (GuestAddress((at as u64) << 30), *size);
                builder = builder.add_ram(options.with_populate(populate), [range]);
            }
            builder.build()
        };
        let (one, two) = (&dir.path().join("one"), &dir.path().join("two"));
        let short =
            |built: Result<_, MemoryError>| room_short(&built.map(drop).unwrap_err().into());
        for parts in [
            [(one.as_path(), 0, 5 * MIB), (two, 0, 4 * MIB)],
            [(dir.path(), 0, 5 * MIB), (dir.path(), 0, 4 * MIB)],
        ] {
            let refused = short(build(&parts, Populate::Lazy));
            assert_eq!(refused, Some((9 * MIB, 8 * MIB)));
            assert_eq!(names(dir.path()), <[&str; 0]>::default());
        }
        // Now, if they are to be populated.
        let ballast = dir.path().join("ballast");
        fs::write(&ballast, vec![1; 2 * MIB as usize]).unwrap();
        let both = [(one.as_path(), 0, 4 * MIB), (two, 0, 4 * MIB)];
        let refused = short(build(&both, Populate::Allocate));
        assert_eq!(refused, Some((8 * MIB, 6 * MIB)));
        assert_eq!(names(dir.path()), ["ballast"]);
        drop(build(&both, Populate::Lazy).unwrap());

        // A part of a file that is RAM twice takes its room once.
        let twice = [(one.as_path(), 0, 4 * MIB), (one, MIB, 3 * MIB)];
        let allocated = build(&twice, Populate::Allocate).unwrap();
        let backing = allocated.iter().next().unwrap().backing();
        assert_eq!(backing.allocated().unwrap(), 4 * MIB);
        let thrice = [twice[0], twice[0], twice[0]];
        build(&thrice, Populate::Lazy).unwrap();
        drop(allocated);
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
fn what_a_path_names_may_change_at_any_time() {
    in_own_process(|| {
        let dir = shm_dir();
        let at = |name: &str| dir.path().join(name);
        File::create(at("long")).unwrap().set_len(4 * MIB).unwrap();
        File::create(at("empty")).unwrap();
        mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        fs::create_dir(at("dir")).unwrap();
        let named = ["long", "empty", "fifo", "dir", "nothing", "/dev/null"];
        let path = at("ram");
        std::os::unix::fs::symlink("long", &path).unwrap();
        let (mut outcomes, begin) = (BTreeMap::<_, u32>::new(), Barrier::new(2));
        std::thread::scope(|scope| {
            let (_going_on, ended) = channel::<()>();
            let (path, at, begin) = (&path, &at, &begin);
            scope.spawn(move || {
                begin.wait();
                for target in named.iter().cycle() {
                    if ended.try_recv() != Err(TryRecvError::Empty) {
                        break;
                    }
                    std::os::unix::fs::symlink(target, at("next")).unwrap();
                    fs::rename(at("next"), path).unwrap();
                }
            });
            begin.wait();
            // A file that is made longer than this is SIGXFSZ.
            with_limit(Resource::RLIMIT_FSIZE, MIB, || {
                // Until all of it was met, and RAM so often that other files were met in its
                // place.
                while outcomes.len() < 4 || outcomes["RAM"] < 30 {
                    let outcome = match region(&file_options(path), 4 * MIB) {
                        Ok(ram) => {
                            let last = MemoryRegionAddress(4 * MIB - 1);
                            ram.write_obj(1u8, last).unwrap();
                            "RAM"
                        }
                        Err(Error::Shortage(short)) => {
                            assert_eq!((short.needed, short.left), (4 * MIB, MIB));
                            "too long"
                        }
                        Err(Error::File(FileError::NotAFile { .. })) => "no file",
                        Err(Error::File(FileError::DanglingLink { .. })) => "dangling",
                        // It became that while it was looked at.
                        Err(Error::File(FileError::Open { source, .. }))
                            if source.kind() == ErrorKind::NotFound =>
                        {
                            "dangling"
                        }
                        Err(other) => panic!("{}", chain(&other)),
                    };
                    *outcomes.entry(outcome).or_default() += 1;
                }
            });
        });
        assert_eq!(fs::metadata(at("empty")).unwrap().len(), 0);
        assert_eq!(names(dir.path()).len(), named.len() - 1);
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
                    // The file is mapped, what comes after it is not.
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
