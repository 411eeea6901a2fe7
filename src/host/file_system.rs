//! What kind of file system a file is on, which decides what its pages are, and how much room that
//! has (statfs(2)).
//!
//! An open file is asked about by its name in procfs: the filters of VMMs that allow statfs(2) may
//! end the process for fstatfs(2). Both answer alike, for memfds and for files without a name too.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{Statfs, fstatfs, statfs};
use nix::sys::statvfs::{Statvfs, fstatvfs, statvfs};

use super::calls::{is_refused, retried};
use super::descriptors::link;
use super::pages::base_page_size;

/// The kinds of file systems that matter to RAM.
///
/// They are those of regular files: a device, too, is on a file system, often a tmpfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileSystem {
    /// Files in memory: memfds and POSIX shared memory too.
    Tmpfs,
    /// Files of huge pages from a pool.
    Hugetlbfs { page_size: u64 },
    /// Any other, taken to be on a disk.
    Other { fs_type: u64 },
}

impl FileSystem {
    /// That of an open file.
    pub(crate) fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = ask(file.as_fd(), statfs, || fstatfs(&file))?;
        Ok(Self::from(&stat))
    }

    /// That of what is at a path.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::from(&retried(|| statfs(path))?))
    }

    /// The size in bytes of the pages of its files.
    pub(crate) fn page_size(self) -> u64 {
        match self {
            Self::Hugetlbfs { page_size } => page_size,
            Self::Tmpfs | Self::Other { .. } => base_page_size(),
        }
    }
}

impl From<&Statfs> for FileSystem {
    fn from(stat: &Statfs) -> Self {
        // From linux/magic.h.
        const TMPFS_MAGIC: u64 = 0x0102_1994;
        const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
        // The width and the sign of f_type differ between architectures; its value has 32 bits.
        #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)]
        let fs_type = stat.filesystem_type().0 as u64 & 0xffff_ffff;
        match fs_type {
            TMPFS_MAGIC => Self::Tmpfs,
            HUGETLBFS_MAGIC => Self::Hugetlbfs {
                // hugetlbfs names its page size as its block size.
                page_size: u64::try_from(stat.block_size()).unwrap_or_else(|_| base_page_size()),
            },
            _ => Self::Other { fs_type },
        }
    }
}

/// The size of a file system and what is free of it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) total: u64,
    pub(crate) free: u64,
}

impl Room {
    /// That of the file system of an open file, if it answers.
    pub(crate) fn of(file: impl AsFd) -> Option<Self> {
        let stat = ask(file.as_fd(), statvfs, || fstatvfs(&file));
        Self::new(&stat.ok()?)
    }

    /// That of the file system of what is at a path, if it answers.
    pub(crate) fn at(path: &Path) -> Option<Self> {
        Self::new(&statvfs(path).ok()?)
    }

    /// None for a tmpfs without a limit, as that of memfds, which reports 0 blocks.
    fn new(stat: &Statvfs) -> Option<Self> {
        let unit = stat.fragment_size();
        let total = stat.blocks().saturating_mul(unit);
        (total > 0).then(|| Self {
            total,
            free: stat.blocks_available().saturating_mul(unit),
        })
    }
}

/// Asks about an open file by its name in procfs; where that leads nowhere, or a filter forbids
/// it, by its number.
fn ask<T>(
    file: BorrowedFd<'_>,
    by_name: impl Fn(&PathBuf) -> nix::Result<T>,
    by_number: impl Fn() -> nix::Result<T>,
) -> nix::Result<T> {
    let name = link(file);
    match retried(|| by_name(&name)) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => retried(by_number),
        Err(errno) if is_refused(errno) => retried(by_number),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::libc::{SYS_fstatfs, SYS_statfs};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::host::calls::forbidden;
    use crate::host::pools;

    #[test]
    fn both_ways_of_asking_answer_alike_and_either_is_enough() {
        let memfd = || File::from(memfd_create("file-system", MFdFlags::empty()).unwrap());
        let shm = || tempfile::tempfile_in("/dev/shm").unwrap();
        let disk = || tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let kinds = [(memfd(), false), (shm(), true), (disk(), true)];
        for (file, limited) in kinds {
            let of = || FileSystem::of(&file).unwrap();
            for errno in [Errno::EPERM, Errno::EACCES, Errno::ENOSYS] {
                let by_name = forbidden(&[SYS_fstatfs], errno, of);
                let by_number = forbidden(&[SYS_statfs], errno, of);
                assert_eq!(by_name, by_number, "{file:?}");
            }
            let total = || Room::of(&file).map(|room| room.total);
            let by_name = forbidden(&[SYS_fstatfs], Errno::EPERM, total);
            let by_number = forbidden(&[SYS_statfs], Errno::EPERM, total);
            assert_eq!(by_name, by_number, "{file:?}");
            assert_eq!(by_name.is_some(), limited, "{file:?}");
            // The control: it is one of the two.
            let neither = || FileSystem::of(&file).map_err(|error| error.raw_os_error());
            let refused = forbidden(&[SYS_statfs, SYS_fstatfs], Errno::EPERM, neither);
            assert_eq!(refused, Err(Some(Errno::EPERM as i32)));
        }
        assert_eq!(FileSystem::of(memfd()).unwrap(), FileSystem::Tmpfs);
        assert_eq!(FileSystem::of(shm()).unwrap(), FileSystem::Tmpfs);
    }

    #[test]
    fn a_memfd_of_huge_pages_has_those_of_its_pool() {
        // None is needed for a file without a page.
        let Some(page_size) = pools::default_page_size() else {
            return;
        };
        let file = memfd_create("file-system", MFdFlags::MFD_HUGETLB).unwrap();
        let of = || FileSystem::of(&file).unwrap();
        for call in [SYS_fstatfs, SYS_statfs] {
            let found = forbidden(&[call], Errno::ENOSYS, of);
            assert_eq!(found, FileSystem::Hugetlbfs { page_size });
        }
    }

    #[test]
    fn an_answer_about_the_file_system_itself_is_not_asked_for_twice() {
        let file = tempfile::tempfile().unwrap();
        let asked = ask(
            file.as_fd(),
            |_| Err::<(), _>(Errno::EIO),
            || unreachable!("asked by number"),
        );
        assert_eq!(asked, Err(Errno::EIO));
    }
}
