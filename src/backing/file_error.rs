//! Why a file cannot be RAM.

use std::fs::FileType;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use nix::errno::Errno;

use super::seals::Seals;
use crate::units::HumanSize;

/// Why a file cannot be RAM, or a ROM.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// What is at the path is neither a file nor a directory.
    #[error(
        "{} is a {}: RAM needs a regular file, or a directory for a nameless one",
        .path.display(), file_type(*.found)
    )]
    #[non_exhaustive]
    NotAFile {
        /// The path that was given.
        path: PathBuf,
        /// What is there.
        found: FileType,
    },

    /// The path is a symbolic link that leads to nothing.
    #[error(
        "{} is a symbolic link to something that does not exist: create that, or remove the link",
        .path.display()
    )]
    #[non_exhaustive]
    DanglingLink {
        /// The path that was given.
        path: PathBuf,
    },

    /// The file could not be opened or created.
    #[error("cannot open {}: {}", .path.display(), remedy(.source))]
    #[non_exhaustive]
    Open {
        /// The path that was given.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// Its length could not be set (ftruncate(2)).
    #[error("cannot set the length of {} to {}", .path.display(), HumanSize(*.len))]
    #[non_exhaustive]
    Resize {
        /// The path that was given.
        path: PathBuf,
        /// The length in bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },

    /// The file has contents, and is shorter than the RAM.
    #[error(
        "{} has {}, too short for {} at offset {offset:#x}: a file that is not empty is never \
         made longer, so make it longer first (truncate -s {}) or ask for less",
        .path.display(), HumanSize(*.len), HumanSize(*.size), .offset.saturating_add(*.size)
    )]
    #[non_exhaustive]
    TooShort {
        /// The path that was given.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Where the RAM was to start in it, in bytes.
        offset: u64,
        /// The size of the RAM in bytes.
        size: u64,
    },

    /// The file is sealed against writing.
    #[error(
        "{} cannot be RAM, its seals are: {seals}; use a file without write seals, or map it as a \
         ROM",
        .path.display()
    )]
    #[non_exhaustive]
    WriteSealed {
        /// The path that was given.
        path: PathBuf,
        /// The seals of the file.
        seals: Seals,
    },

    /// The contents of the file cannot be discarded.
    #[error(
        "discard-data=on cannot be kept for {}: {}, so leave it off",
        .path.display(), why_not_discarded(.source)
    )]
    #[non_exhaustive]
    NoDiscard {
        /// The path that was given.
        path: PathBuf,
        /// The answer of fallocate(2).
        source: io::Error,
    },

    /// There is nothing to read for a ROM.
    #[error(
        "{} {}: a ROM needs a file that has contents",
        .path.display(), why_nothing_to_read(*.found)
    )]
    #[non_exhaustive]
    NothingToRead {
        /// The path that was given.
        path: PathBuf,
        /// What is there: a directory, an empty file, or nothing.
        found: Option<FileType>,
    },
}

/// What a file is, for people.
pub(super) fn file_type(found: FileType) -> &'static str {
    if found.is_file() {
        "file"
    } else if found.is_fifo() {
        "pipe"
    } else if found.is_socket() {
        "socket"
    } else if found.is_dir() {
        "directory"
    } else if found.is_char_device() {
        "character device"
    } else if found.is_block_device() {
        "block device"
    } else {
        // eventfd, epoll and the like: anonymous inodes have no type.
        "special file"
    }
}

/// What to do about a file that cannot be opened or created.
fn remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::EISDIR) => "its directory does not exist, create that first",
        Some(Errno::EACCES | Errno::EPERM) => {
            "that is not permitted, check the owner and the mode of the file and of its directory"
        }
        Some(Errno::EROFS) => {
            "its file system is read-only, remount it read-write or use the file as a ROM"
        }
        Some(Errno::ELOOP) => "its symbolic links lead in a circle, name the file itself",
        Some(Errno::ENOTDIR) => "a part of the path is no directory, check the path",
        Some(Errno::ENAMETOOLONG) => "the name is too long, use a shorter one",
        Some(Errno::ETXTBSY) => "it is a program that is running, use a copy of it",
        Some(Errno::ENOSPC | Errno::EDQUOT) => {
            "there is no room for another file, remove some or use another file system"
        }
        _ => "check the path and its file system",
    }
}

fn why_nothing_to_read(found: Option<FileType>) -> &'static str {
    match found {
        None => "does not exist",
        Some(found) if found.is_dir() => "is a directory",
        Some(_) => "is empty",
    }
}

fn why_not_discarded(source: &io::Error) -> &'static str {
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBADF) => "it is opened for reading only",
        Some(Errno::EPERM) => {
            "it is sealed against writing, may only be appended to, or a seccomp filter forbids \
             fallocate(2)"
        }
        _ => "its file system cannot free parts of a file",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_the_file_the_values_and_the_way_out() {
        let path = || PathBuf::from("/dev/shm/ram");
        let source = |errno: Errno| io::Error::from(errno);
        let open = |errno| FileError::Open {
            path: path(),
            source: source(errno),
        };
        let no_discard = |errno| FileError::NoDiscard {
            path: path(),
            source: source(errno),
        };
        let cases: Vec<(FileError, &str)> = vec![
            (
                FileError::NotAFile {
                    path: path(),
                    found: std::fs::metadata("/dev/null").unwrap().file_type(),
                },
                "/dev/shm/ram is a character device: RAM needs a regular file, or a directory \
                 for a nameless one",
            ),
            (
                FileError::DanglingLink { path: path() },
                "/dev/shm/ram is a symbolic link to something that does not exist: create that, \
                 or remove the link",
            ),
            (
                open(Errno::ENOENT),
                "cannot open /dev/shm/ram: its directory does not exist, create that first",
            ),
            (
                open(Errno::EACCES),
                "cannot open /dev/shm/ram: that is not permitted, check the owner and the mode of \
                 the file and of its directory",
            ),
            (
                open(Errno::ETXTBSY),
                "cannot open /dev/shm/ram: it is a program that is running, use a copy of it",
            ),
            (
                open(Errno::ENOSPC),
                "cannot open /dev/shm/ram: there is no room for another file, remove some or use \
                 another file system",
            ),
            (
                open(Errno::EIO),
                "cannot open /dev/shm/ram: check the path and its file system",
            ),
            (
                FileError::Resize {
                    path: path(),
                    len: 1 << 20,
                    source: source(Errno::EFBIG),
                },
                "cannot set the length of /dev/shm/ram to 1 MiB",
            ),
            (
                FileError::TooShort {
                    path: path(),
                    len: 1 << 20,
                    offset: 4096,
                    size: 2 << 20,
                },
                "/dev/shm/ram has 1 MiB, too short for 2 MiB at offset 0x1000: a file that is not \
                 empty is never made longer, so make it longer first (truncate -s 2101248) or ask \
                 for less",
            ),
            (
                no_discard(Errno::EBADF),
                "discard-data=on cannot be kept for /dev/shm/ram: it is opened for reading only, \
                 so leave it off",
            ),
            (
                no_discard(Errno::EPERM),
                "discard-data=on cannot be kept for /dev/shm/ram: it is sealed against writing, \
                 may only be appended to, or a seccomp filter forbids fallocate(2), so leave it \
                 off",
            ),
            (
                no_discard(Errno::EOPNOTSUPP),
                "discard-data=on cannot be kept for /dev/shm/ram: its file system cannot free \
                 parts of a file, so leave it off",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), text);
        }
    }
}
