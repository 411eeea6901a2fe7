//! What kind of file system a file is on, which decides what its pages are (statfs(2)).

use std::fs::File;
use std::io;
use std::path::Path;

use nix::sys::statfs::{Statfs, fstatfs, statfs};

use crate::host::base_page_size;
use crate::host::calls::retried;

/// The kinds of file systems that matter to RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileSystem {
    /// Files in memory: memfds and POSIX shared memory too.
    Tmpfs,
    /// Files of huge pages from a pool.
    Hugetlbfs { page_size: u64 },
    /// Any other, taken to be on a disk.
    Other { fs_type: u64 },
}

impl FileSystem {
    /// That of an open file.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        Ok(Self::from(&retried(|| fstatfs(file))?))
    }

    /// That of what is at a path.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::from(&retried(|| statfs(path))?))
    }

    /// The size in bytes of the pages of its files.
    pub(super) fn page_size(self) -> u64 {
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
