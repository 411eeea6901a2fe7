//! The file descriptors of this process (`/proc/thread-self/fd`, proc_pid_fd(5)).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

/// That of the thread: it may have a table of its own, and is there when the first one is gone.
const DIR: &str = "/proc/thread-self/fd";

/// How many descriptors this process may still open, and its limit, or `None` if that is unknown.
///
/// Other threads open and close some at any time: it is a fair warning, no promise.
pub(crate) fn left() -> Option<(u64, u64)> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let mut taken = 0_u64;
    for entry in fs::read_dir(DIR).ok()? {
        let number = entry.ok()?.file_name().to_str()?.parse::<u64>().ok()?;
        // The limit is one on the number of a new descriptor: inherited ones may lie beyond it.
        taken += u64::from(number < limit);
    }
    // The directory that is read here is among them, and is closed by now.
    Some((limit.saturating_sub(taken.saturating_sub(1)), limit))
}

/// How many descriptors this process may have.
pub(crate) fn limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}

/// Whether an answer is that no descriptor is left, of the process's or of the system's.
pub(crate) fn is_none_left(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

/// What the kernel calls the file: the path that it has, or had, or the name of a memfd.
pub(crate) fn name_of(file: impl AsFd) -> Option<String> {
    let path = fs::read_link(link(file.as_fd())).ok()?;
    let path = path.to_string_lossy();
    let path = path.strip_suffix(" (deleted)").unwrap_or(&path);
    Some(path.strip_prefix("/memfd:").unwrap_or(path).to_owned())
}

/// The file, opened anew for reading: with a position that no other process moves.
pub(crate) fn reopened(file: impl AsFd) -> io::Result<File> {
    File::open(link(file.as_fd()))
}

/// The name of an open file in procfs, which leads to it wherever it is, and if it has no other.
pub(super) fn link(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("{DIR}/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_left() {
        let (left, limit) = left().unwrap();
        assert!(left > 0 && left < limit);
    }

    #[test]
    fn files_are_named_also_when_they_are_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        assert_eq!(name_of(file.as_file()), Some(path.clone()));
        let file = file.into_file();
        assert_eq!(name_of(file), Some(path));
    }
}
