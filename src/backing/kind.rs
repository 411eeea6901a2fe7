//! What a backing is, and which file.

use std::fmt;
use std::os::unix::fs::MetadataExt;

/// What st_blocks counts, in bytes, whatever the page size (stat(3type)).
pub(super) const BLOCK: u64 = 512;

/// What a backing turned out to be, whatever it [comes from](crate::BackingSource).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackingKind {
    /// A memfd of base pages that this crate created.
    Memfd,
    /// A memfd of huge pages that this crate created.
    HugetlbMemfd,
    /// A POSIX shared memory object that this crate created.
    PosixShm,
    /// A file on a tmpfs that this crate opened or created.
    ShmFile,
    /// A file of huge pages, on a hugetlbfs, that this crate opened or created.
    HugetlbFile,
    /// A file on another file system that this crate opened or created.
    File,
    /// An adopted memfd of base pages.
    AdoptedMemfd,
    /// An adopted POSIX shared memory object or other file on a tmpfs; or a memfd to which its
    /// owner allows no seal, which looks the same.
    AdoptedShm,
    /// An adopted memfd of huge pages or file on a hugetlbfs.
    AdoptedHugetlb,
    /// An adopted file on another file system.
    AdoptedFile,
}

impl BackingKind {
    /// Whether the pages come from a hugetlb pool.
    pub(super) fn is_hugetlb(self) -> bool {
        matches!(
            self,
            Self::HugetlbMemfd | Self::HugetlbFile | Self::AdoptedHugetlb
        )
    }

    /// Whether the size of a file system may limit it; memfds are on one without a limit.
    pub(super) fn is_on_file_system(self) -> bool {
        matches!(
            self,
            Self::PosixShm | Self::ShmFile | Self::File | Self::AdoptedShm | Self::AdoptedFile
        )
    }

    /// Whether it is on a file system that is neither a tmpfs nor a hugetlbfs.
    pub(super) fn is_on_disk(self) -> bool {
        matches!(self, Self::File | Self::AdoptedFile)
    }
}

#[cfg(feature = "serde")]
crate::units::serialized_as_text!(BackingKind);

impl fmt::Display for BackingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Memfd => "memfd",
            Self::HugetlbMemfd => "hugetlb memfd",
            Self::PosixShm => "posix-shm",
            Self::ShmFile => "shm file",
            Self::HugetlbFile => "hugetlb file",
            Self::File => "file",
            Self::AdoptedMemfd => "adopted memfd",
            Self::AdoptedShm => "adopted shm",
            Self::AdoptedHugetlb => "adopted hugetlb",
            Self::AdoptedFile => "adopted file",
        })
    }
}

/// Which file a descriptor stands for, whatever its number: `st_dev` and `st_ino` of fstat(2).
///
/// Two descriptors with the same identity give access to the same pages, in this process or
/// another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FileIdentity {
    /// The device number of the file system.
    pub dev: u64,
    /// The inode number on it.
    pub ino: u64,
}

impl FileIdentity {
    pub(super) fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
        }
    }
}
