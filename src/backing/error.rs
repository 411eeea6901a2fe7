//! Why a backing cannot be had, or not the part of it that was asked for.

use std::fmt;
use std::fs::FileType;
use std::io;
use std::os::fd::OwnedFd;

use super::file_error::{FileError, file_type};
use super::kind::BackingKind;
use super::seals::Seals;
use crate::host::NodeSet;
use crate::options::{NumaPolicy, OptionsError};
use crate::range::InvalidRange;
use crate::shortage::Shortage;
use crate::units::HumanSize;

pub(crate) type Result<T, E = BackingError> = std::result::Result<T, E>;

/// Why a backing could not be created or adopted, or is not what it was.
///
/// ```
/// use guest_memory_shm::{BackingError, PageSize, RamOptions, ShmBacking};
///
/// let options = RamOptions::new().with_page_size(PageSize::Huge(Some(4 << 20)));
/// match ShmBacking::create(&options, 4 << 20) {
///     Err(BackingError::NoSuchHugePageSize { offered, .. }) => println!("there are {offered:?}"),
///     other => panic!("{other:?}"),
/// }
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The options are wrong; nothing was created.
    #[error(transparent)]
    Options(#[from] OptionsError),

    /// A length, a size or an offset does not consist of whole pages.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// Something that it needs is short.
    #[error(transparent)]
    Shortage(Box<Shortage>),

    /// A file cannot be RAM.
    #[error(transparent)]
    File(#[from] FileError),

    /// A length that no backing can have.
    #[error(
        "a backing of {} cannot exist: it must have at least one page and at most {}",
        HumanSize(*.len), HumanSize(*.limit)
    )]
    #[non_exhaustive]
    Length {
        /// The length that was asked for, in bytes: 0, or where it would end in a file.
        len: u64,
        /// The largest length of a file, in bytes.
        limit: u64,
    },

    /// A page size that the kernel does not offer for huge pages.
    #[error(
        "huge pages of {} are not offered by this kernel, which has {}",
        HumanSize(*.page_size), human_sizes(.offered)
    )]
    #[non_exhaustive]
    NoSuchHugePageSize {
        /// The page size that was asked for, in bytes.
        page_size: u64,
        /// The sizes that the kernel offers, in bytes, smallest first.
        offered: Vec<u64>,
    },

    /// The state of the pools of huge pages cannot be read.
    #[error(
        "cannot read the pools of huge pages in /sys/kernel/mm/hugepages: mount sysfs there, or \
         leave out hugetlb=on (PageSize::Base)"
    )]
    #[non_exhaustive]
    HugePoolsUnreadable {
        /// The system's answer.
        source: io::Error,
    },

    /// None of the NUMA nodes that were asked for has memory.
    #[error(
        "cannot place RAM on host-nodes={} (policy={}): this machine has memory on nodes \
         {present}; choose nodes that are there and that this process may use (cpuset)",
        .policy.nodes(), .policy.name()
    )]
    #[non_exhaustive]
    NoSuchNodes {
        /// What was asked for.
        policy: NumaPolicy,
        /// The nodes that have memory.
        present: NodeSet,
    },

    /// POSIX shared memory cannot be had at all: `/dev/shm` is missing, read-only or forbidden.
    #[error(
        "cannot create POSIX shared memory: {}; or use a memfd backing",
        shm_remedy(.source)
    )]
    #[non_exhaustive]
    ShmUnavailable {
        /// The answer of shm_open(3).
        source: io::Error,
    },

    /// Every name that was tried for a POSIX shared memory object exists already.
    #[error(
        "{tried} names for POSIX shared memory exist already, the last is {last}: remove them"
    )]
    #[non_exhaustive]
    ShmNamesTaken {
        /// How many names were tried.
        tried: usize,
        /// The last of them.
        last: String,
    },

    /// The object could not be created (memfd_create(2), shm_open(3)).
    #[error("cannot create a {kind} of {}", HumanSize(*.len))]
    #[non_exhaustive]
    Create {
        /// What was to be created.
        kind: BackingKind,
        /// Its length in bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },

    /// Its length could not be set (ftruncate(2)).
    #[error("cannot set the length of a {kind} to {}", HumanSize(*.len))]
    #[non_exhaustive]
    Resize {
        /// What it is.
        kind: BackingKind,
        /// The length in bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },

    /// What a descriptor is could not be asked (fstat(2), fcntl(2)).
    #[error("cannot ask the kernel about a descriptor that is RAM or is to become RAM")]
    #[non_exhaustive]
    Inspect {
        /// The system's answer.
        source: io::Error,
    },

    /// On which file system a descriptor is that was to be adopted could not be asked (statfs(2)
    /// of its name in procfs, or fstatfs(2)).
    #[error(
        "cannot ask on which file system a descriptor is that is to become RAM: mount procfs at \
         /proc, and let a seccomp filter allow statfs(2)"
    )]
    #[non_exhaustive]
    FileSystemUnknown {
        /// The system's answer.
        source: io::Error,
    },

    /// A descriptor that was to be adopted is no file with pages that can be shared.
    #[error(
        "cannot adopt a descriptor of a {}: RAM needs a memfd, POSIX shm or hugetlbfs file",
        file_type(*.found)
    )]
    #[non_exhaustive]
    NotMemory {
        /// What the descriptor is.
        found: FileType,
    },

    /// A descriptor that was to be adopted is a file on disk (or on a file system that this crate
    /// does not know), and the policy does not allow that.
    #[error(
        "cannot adopt a file on a file system of type {fs_type:#x}: RAM on disk is slow and is \
         written back, allow it with AdoptPolicy::with_disk_files if that is meant"
    )]
    #[non_exhaustive]
    OnDisk {
        /// The type of the file system (`f_type` of statfs(2)).
        fs_type: u64,
    },

    /// A descriptor that was to be adopted is not open for reading and writing.
    #[error("cannot adopt a descriptor that is not open for reading and writing: open it O_RDWR")]
    NotWritable,

    /// A file that was to be adopted is shorter than the RAM.
    #[error(
        "cannot adopt a file of {} for RAM of {}: touching RAM past the end of the file would \
         be SIGBUS, make the file longer first",
        HumanSize(*.len), HumanSize(*.needed)
    )]
    #[non_exhaustive]
    TooShort {
        /// The length of the file in bytes.
        len: u64,
        /// The length that is needed, in bytes.
        needed: u64,
    },

    /// A file that was to be adopted is sealed against writing.
    #[error(
        "cannot adopt a file whose seals are: {seals}; RAM must be writable, ask its owner for \
         one without write seals"
    )]
    #[non_exhaustive]
    WriteSealed {
        /// The seals that the file has.
        seals: Seals,
    },

    /// The size of a file that was to be adopted is not sealed, and cannot be, as the policy
    /// demands.
    #[error(
        "cannot adopt a file whose size is not sealed (its seals are: {seals}): ask its owner \
         for a memfd made with MFD_ALLOW_SEALING (and sealed against shrinking and growing), or \
         trust the owner and adopt it without AdoptPolicy::with_required_seals"
    )]
    #[non_exhaustive]
    NotSealed {
        /// The seals that the file has.
        seals: Seals,
    },

    /// A part reaches past the end of the backing.
    #[error(
        "a region of {} at offset {offset:#x} runs past the end of its backing at {end:#x}: \
         touching it there would be SIGBUS",
        HumanSize(*.size)
    )]
    #[non_exhaustive]
    Outside {
        /// The offset in the backing, in bytes.
        offset: u64,
        /// The size of the part in bytes.
        size: u64,
        /// Where the RAM of the backing ends in it, in bytes.
        end: u64,
    },

    /// A part reaches past the end of a file that ends inside a page: what is written there is
    /// never a part of the file.
    #[error(
        "a region of {} at offset {offset:#x} runs past the end of its file at {len:#x}, inside a \
         page of {}: what is written there never reaches the file, make the file longer first",
        HumanSize(*.size), HumanSize(*.page_size)
    )]
    #[non_exhaustive]
    EndsInPage {
        /// The offset in the file, in bytes.
        offset: u64,
        /// The size of the part in bytes.
        size: u64,
        /// The length of the file in bytes.
        len: u64,
        /// The page size of the file in bytes.
        page_size: u64,
    },

    /// A backing that is not sealed became shorter since it was created or adopted.
    #[error(
        "the backing had at least {} and has {} now: another process truncated it, touching what \
         is gone would be SIGBUS; use a sealed memfd or a trusted peer",
        HumanSize(*.end), HumanSize(*.now)
    )]
    #[non_exhaustive]
    Truncated {
        /// Where its RAM ends in it, in bytes: it was at least that long.
        end: u64,
        /// The length that it has, in bytes.
        now: u64,
    },
}

impl BackingError {
    /// A failed call that was to make a descriptor.
    pub(super) fn create(kind: BackingKind, len: u64, source: io::Error) -> Self {
        match Shortage::of_descriptors(&source) {
            Some(shortage) => shortage.into(),
            None => Self::Create { kind, len, source },
        }
    }

    pub(super) fn inspect(source: io::Error) -> Self {
        Self::Inspect { source }
    }
}

impl From<Shortage> for BackingError {
    fn from(shortage: Shortage) -> Self {
        Self::Shortage(Box::new(shortage))
    }
}

/// A descriptor that was not adopted, given back, and the reason.
#[derive(Debug)]
pub struct AdoptError {
    error: Box<BackingError>,
    fd: OwnedFd,
}

impl AdoptError {
    pub(super) fn new(error: BackingError, fd: OwnedFd) -> Self {
        Self {
            error: Box::new(error),
            fd,
        }
    }

    /// Why the descriptor was not adopted.
    pub fn error(&self) -> &BackingError {
        &self.error
    }

    /// Takes both apart.
    pub fn into_parts(self) -> (BackingError, OwnedFd) {
        (*self.error, self.fd)
    }

    /// Takes the descriptor back, as it was given.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl fmt::Display for AdoptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for AdoptError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<AdoptError> for BackingError {
    /// Keeps the reason and closes the descriptor.
    fn from(refused: AdoptError) -> Self {
        *refused.error
    }
}

fn human_sizes(sizes: &[u64]) -> String {
    if sizes.is_empty() {
        return "none".to_owned();
    }
    let sizes = sizes.iter().map(|size| HumanSize(*size).to_string());
    sizes.collect::<Vec<_>>().join(", ")
}

fn shm_remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "/dev/shm does not exist, mount a tmpfs there",
        io::ErrorKind::ReadOnlyFilesystem => "/dev/shm is read-only, remount it read-write",
        io::ErrorKind::PermissionDenied => "/dev/shm may not be written, check its mode",
        io::ErrorKind::StorageFull => {
            "/dev/shm is full, remove files from it or remount it larger"
        }
        _ => "check /dev/shm",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_the_values_and_the_way_out() {
        let cases = [
            (
                BackingError::NoSuchHugePageSize {
                    page_size: 3 << 20,
                    offered: vec![2 << 20, 1 << 30],
                },
                "huge pages of 3 MiB are not offered by this kernel, which has 2 MiB, 1 GiB",
            ),
            (
                BackingError::ShmUnavailable {
                    source: io::Error::from_raw_os_error(30),
                },
                "cannot create POSIX shared memory: /dev/shm is read-only, remount it read-write; \
                 or use a memfd backing",
            ),
            (
                BackingError::Resize {
                    kind: BackingKind::PosixShm,
                    len: 1 << 20,
                    source: io::Error::from_raw_os_error(5),
                },
                "cannot set the length of a posix-shm to 1 MiB",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn the_errors_are_small_enough_to_return() {
        assert!(size_of::<BackingError>() <= 56);
        assert!(size_of::<AdoptError>() <= 16);
    }
}
