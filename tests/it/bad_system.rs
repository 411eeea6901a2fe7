//! Limits of the process and of the system: met without a signal, and told by name.
//!
//! Each test changes what belongs to a whole process, so each has one of its own.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use guest_memory_shm::{
    BackingError, BackingSource, Error, GuestMemoryShm, MapError, MemoryError, PageSize,
    RamOptions, ShmBacking,
};
use nix::mount::{MsFlags, umount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::pipe;
use vm_memory::GuestAddress;

use crate::fork::dies_of;
use crate::isolation::{PAGE, assert_refused, in_own_process, mount_tmpfs, own_mounts};
use crate::proc::leaves_nothing;
use crate::support::chain;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const KINDS: [BackingSource; 2] = [BackingSource::Memfd, BackingSource::PosixShm];

fn create(kind: &BackingSource, size: u64) -> Result<ShmBacking, Error> {
    let options = RamOptions::new().with_backing(kind.clone());
    Ok(ShmBacking::create(&options, size)?)
}

fn memory(kind: &BackingSource, size: u64) -> Result<GuestMemoryShm, Error> {
    GuestMemoryShm::builder()
        .add_ram(
            RamOptions::new().with_backing(kind.clone()),
            [(GuestAddress(0), size)],
        )
        .build()
        .map_err(Error::from)
}

/// Runs `scenario` with the soft limit at `soft`, and asserts that it leaves nothing.
pub(crate) fn with_limit<R>(resource: Resource, soft: u64, scenario: impl FnOnce() -> R) -> R {
    let (before, hard) = getrlimit(resource).expect("limits can be read");
    leaves_nothing(|| {
        setrlimit(resource, soft, hard).expect("a soft limit can be lowered");
        let result = scenario();
        setrlimit(resource, before, hard).expect("and raised again");
        result
    })
}

#[test]
fn a_file_larger_than_the_limit_is_refused_without_sigxfsz() {
    in_own_process(|| {
        const SIGXFSZ_MASK: u64 = 1 << (Signal::SIGXFSZ as u64 - 1);
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
        assert_eq!(ignored & SIGXFSZ_MASK, 0, "the signal must be deadly here");

        for kind in &KINDS {
            with_limit(Resource::RLIMIT_FSIZE, MIB, || {
                let text = "a file of 2 MiB exceeds RLIMIT_FSIZE, which is 1 MiB: raise it \
                            (ulimit -f)";
                let refused = create(kind, 2 * MIB);
                assert_refused!(refused, Error::Shortage(_), text);
                assert_refused!(memory(kind, 2 * MIB), Error::Shortage(_), text);
                // Up to the limit is allowed.
                assert!(memory(kind, MIB).is_ok());
            });
        }
        // The control: the system call that is not made would be the end.
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let killer = with_limit(Resource::RLIMIT_FSIZE, MIB, || {
            dies_of(|| {
                let _ = nix::unistd::ftruncate(&file, 2 * MIB as i64);
            })
        });
        assert_eq!(killer, Some(Signal::SIGXFSZ));
    });
}

#[test]
fn a_process_without_descriptors_is_told_its_limit() {
    in_own_process(|| {
        // The lowest number that is free: with this limit no other can be had.
        let (reader, writer) = pipe().unwrap();
        let next = reader.as_raw_fd().min(writer.as_raw_fd()) as u64;
        drop((reader, writer));
        let text = format!(
            "no file descriptor is left of the {next} that this process may have: raise \
             RLIMIT_NOFILE (ulimit -n)"
        );
        for kind in &KINDS {
            with_limit(Resource::RLIMIT_NOFILE, next, || {
                assert_refused!(memory(kind, MIB), Error::Shortage(_), text);
                assert_refused!(create(kind, MIB), Error::Shortage(_), text);
            });
            // The control: one more is enough.
            let one = with_limit(Resource::RLIMIT_NOFILE, next + 1, || {
                memory(kind, MIB).is_ok()
            });
            assert!(one);
        }
        // Huge pages are looked up in files first.
        let huge = RamOptions::new().with_page_size(PageSize::Huge(None));
        let refused = with_limit(Resource::RLIMIT_NOFILE, next, || {
            ShmBacking::create(&huge, 1 << 30)
        });
        assert_refused!(refused, BackingError::Shortage(_), text);
    });
}

#[test]
fn a_process_without_address_space_is_told_which_limits_there_are() {
    in_own_process(|| {
        let statm = fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let limit = pages * PAGE + 64 * MIB;
        for kind in &KINDS {
            let error = with_limit(Resource::RLIMIT_AS, limit, || {
                // The backing is no part of the address space, only its mapping is.
                assert!(create(kind, GIB).is_ok());
                assert!(memory(kind, MIB).is_ok());
                memory(kind, GIB).unwrap_err()
            });
            assert_refused!(
                Err::<(), _>(&error),
                Error::Map(MapError::Reserve { size: GIB, .. }),
                "cannot reserve address space for a region of 1 GiB: the address space of this \
                 process is limited, by the CPU, by RLIMIT_AS and by vm.max_map_count",
            );
            assert!(chain(&error).contains("os error 12"), "{}", chain(&error));
        }
    });
}

#[test]
fn a_memory_of_which_only_the_last_region_cannot_be_mapped_leaves_nothing() {
    in_own_process(|| {
        leaves_nothing(|| {
            // x86-64 has 128 TiB of address space for a process.
            let result = GuestMemoryShm::<()>::builder()
                .add_ram(RamOptions::new(), [(GuestAddress(0), MIB)])
                .add_ram(
                    RamOptions::new(),
                    [
                        (GuestAddress(1 << 40), MIB),
                        (GuestAddress(1 << 50), 1 << 49),
                    ],
                )
                .build();
            assert!(matches!(
                result,
                Err(MemoryError::Map(MapError::Reserve { size, .. })) if size == 1 << 49
            ));
        });
    });
}

#[test]
fn posix_shm_that_its_file_system_can_never_hold_is_refused() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m");
        let names = || fs::read_dir("/dev/shm").unwrap().count();
        leaves_nothing(|| {
            assert_refused!(
                memory(&BackingSource::PosixShm, 64 * MIB),
                Error::Shortage(_),
                "64 MiB more are needed, and the file system of /dev/shm holds 8 MiB and has 8 \
                 MiB free: remove files from it, remount it with a larger size, or use a memfd \
                 backing; RAM that stays sparse is allowed by reserve=off",
            );
            fs::write("/dev/shm/ballast", vec![1; 3 * MIB as usize]).unwrap();
            let text = create(&BackingSource::PosixShm, 9 * MIB)
                .unwrap_err()
                .to_string();
            assert!(text.contains("holds 8 MiB and has 5 MiB free"), "{text}");
            fs::remove_file("/dev/shm/ballast").unwrap();

            // What fits is accepted and works, and a memfd is not concerned.
            let fits = memory(&BackingSource::PosixShm, 8 * MIB).unwrap();
            fits.write_obj(1u8, GuestAddress(8 * MIB - 1)).unwrap();
            memory(&BackingSource::Memfd, 64 * MIB).unwrap();
        });
        assert_eq!(names(), 0);
        umount("/dev/shm").unwrap();
    });
}

#[test]
fn without_dev_shm_posix_shm_is_refused_and_a_memfd_is_not() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        // An empty /dev: /dev/shm is not there at all.
        mount_tmpfs("/dev", MsFlags::empty(), "size=1m");
        assert!(!Path::new("/dev/shm").exists());
        leaves_nothing(|| {
            assert_refused!(
                memory(&BackingSource::PosixShm, MIB),
                Error::Backing(BackingError::ShmUnavailable { .. }),
                "cannot create POSIX shared memory: /dev/shm does not exist, mount a tmpfs \
                 there; or use a memfd backing",
            );
            assert!(memory(&BackingSource::Memfd, MIB).is_ok());
        });
        umount("/dev").unwrap();
        assert!(memory(&BackingSource::PosixShm, MIB).is_ok());
    });
}

#[test]
fn a_read_only_dev_shm_is_named() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::MS_RDONLY, "size=8m");
        leaves_nothing(|| {
            let error = memory(&BackingSource::PosixShm, MIB).unwrap_err();
            assert!(chain(&error).contains("os error 30"), "{}", chain(&error));
            assert_refused!(
                Err::<(), _>(error),
                Error::Backing(BackingError::ShmUnavailable { .. }),
                "cannot create POSIX shared memory: /dev/shm is read-only, remount it \
                 read-write; or use a memfd backing",
            );
        });
        umount("/dev/shm").unwrap();
    });
}

#[test]
fn a_dev_shm_without_room_for_one_more_file_is_named() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        // The root directory is one inode, and one file the other.
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m,nr_inodes=2");
        File::create("/dev/shm/ballast").unwrap();
        leaves_nothing(|| {
            assert_refused!(
                memory(&BackingSource::PosixShm, MIB),
                Error::Backing(BackingError::ShmUnavailable { .. }),
                "cannot create POSIX shared memory: /dev/shm is full, remove files from it or \
                 remount it larger; or use a memfd backing",
            );
        });
        fs::remove_file("/dev/shm/ballast").unwrap();
        assert!(memory(&BackingSource::PosixShm, MIB).is_ok());
        umount("/dev/shm").unwrap();
    });
}

/// A file that is removed however the test ends.
struct Named(String);

impl Named {
    fn create(path: String, text: &str) -> Self {
        fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // It is gone only if the test fails.
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_name_that_a_dead_process_left_is_passed_over_and_left_alone() {
    in_own_process(|| {
        // The names of a process start at 0, and this one has not made any yet: that these are
        // the ones is shown by the next test.
        let names = [0, 1, 2].map(|count| format!("/dev/shm/gms-{}-{count}", std::process::id()));
        let names = names.map(|name| Named::create(name, "left"));
        let made = leaves_nothing(|| create(&BackingSource::PosixShm, MIB).map(drop));
        let texts = names
            .each_ref()
            .map(|name| fs::read_to_string(&name.0).unwrap_or_default());
        assert!(made.is_ok());
        assert_eq!(texts, ["left"; 3]);
    });
}

#[test]
fn when_every_name_is_taken_the_last_is_told() {
    in_own_process(|| {
        let name = |count| format!("gms-{}-{count}", std::process::id());
        let path = |count| format!("/dev/shm/{}", name(count));
        let names: Vec<_> = (0..128).map(|n| Named::create(path(n), "")).collect();
        let result = leaves_nothing(|| create(&BackingSource::PosixShm, MIB));
        drop(names);
        assert_refused!(
            result,
            Error::Backing(BackingError::ShmNamesTaken { tried: 128, .. }),
            format!(
                "128 names for POSIX shared memory exist already, the last is /{}: remove them",
                name(127)
            ),
        );
        // The next try takes other names.
        assert!(create(&BackingSource::PosixShm, MIB).is_ok());
    });
}
