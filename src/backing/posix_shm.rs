//! POSIX shared memory objects without a name, made as QEMU's `memory-backend-shm` makes them.
//!
//! Only POSIX calls: shm_open(3), shm_unlink(3), ftruncate(2), statvfs(3). The name exists from
//! shm_open to shm_unlink, that is for one system call; nothing of it remains, however this
//! process ends after that.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::mman::{shm_open, shm_unlink};
use nix::sys::stat::Mode;

use super::error::{BackingError, Result};
use super::kind::BackingKind;

/// How many names are tried: a name can be left by a process that was killed between two system
/// calls and whose pid was reused, or by another user's on purpose.
const NAMES: usize = 128;

/// A nameless POSIX shared memory object of `len` bytes.
pub(super) fn create(len: u64) -> Result<File> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let names = std::iter::repeat_with(|| {
        name(std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
    });
    let file = File::from(open_nameless(len, names.take(NAMES))?);
    file.set_len(len).map_err(|source| BackingError::Resize {
        kind: BackingKind::PosixShm,
        len,
        source,
    })?;
    Ok(file)
}

/// A name that is unique among those of living processes.
fn name(pid: u32, count: u32) -> String {
    format!("/gms-{pid}-{count}")
}

/// Opens a new object under the first of `names` that is free, and removes the name at once.
fn open_nameless(len: u64, names: impl Iterator<Item = String>) -> Result<OwnedFd> {
    let failed = |errno: Errno| BackingError::create(BackingKind::PosixShm, len, errno.into());
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
    let (mut tried, mut last) = (0, String::new());
    for name in names {
        // Mode 0: no other process can open the name while it exists.
        match shm_open(name.as_str(), flags, Mode::empty()) {
            Ok(fd) => {
                shm_unlink(name.as_str()).map_err(failed)?;
                return Ok(fd);
            }
            Err(Errno::EEXIST) => {
                tried += 1;
                last = name;
            }
            Err(
                errno @ (Errno::ENOENT
                | Errno::EROFS
                | Errno::EACCES
                | Errno::EPERM
                | Errno::ENOSPC),
            ) => {
                return Err(BackingError::ShmUnavailable {
                    source: errno.into(),
                });
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
    Err(BackingError::ShmNamesTaken { tried, last })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn an_object_has_no_name_and_mode_0() {
        let file = create(1 << 20).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.nlink(), 0);
        assert_eq!(metadata.permissions().mode() & 0o777, 0);
        assert_eq!((metadata.len(), metadata.blocks()), (1 << 20, 0));
    }

    #[test]
    fn a_taken_name_is_passed_over_and_left_alone() {
        let name = |n| format!("/gms-test-{}-{n}", std::process::id());
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        shm_open(name(1).as_str(), flags, Mode::empty()).unwrap();

        let opened = open_nameless(4096, [name(1), name(2)].into_iter());
        let taken = open_nameless(4096, [name(1), name(1)].into_iter());
        // Removing it works only if it was left alone.
        shm_unlink(name(1).as_str()).unwrap();

        assert!(opened.is_ok());
        assert_eq!(shm_unlink(name(2).as_str()), Err(Errno::ENOENT));
        match taken {
            Err(BackingError::ShmNamesTaken { tried: 2, last }) => assert_eq!(last, name(1)),
            other => panic!("{other:?}"),
        }
    }
}
