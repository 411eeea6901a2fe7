//! How many pages of a file exist (cachestat(2)).
#![expect(unsafe_code, reason = "neither std nor nix has the call")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;

use super::calls::is_refused;
use super::pages::base_page_size;

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// `struct cachestat`: numbers of base pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How many bytes of a range of a file on a tmpfs are allocated, swapped out or not; none if the
/// kernel cannot say (cachestat(2), Linux 6.5).
///
/// It sees what lseek(2) and mincore(2) do not: pages that were allocated by fallocate(2) and not
/// touched since.
pub(crate) fn cached(file: impl AsFd, range: Range<u64>) -> io::Result<Option<u64>> {
    // The same on all architectures that this crate builds for.
    const SYS_CACHESTAT: libc::c_long = 451;
    if range.is_empty() {
        return Ok(Some(0));
    }
    let range = CachestatRange {
        off: range.start,
        len: range.end - range.start,
    };
    let mut answer = Cachestat::default();
    let fd = file.as_fd().as_raw_fd();
    let flags: libc::c_uint = 0;
    // SAFETY: the descriptor and both structures live through the call, and have the layout that
    // it knows; it reads the one and writes the other.
    let done =
        unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut answer, flags) };
    match Errno::result(done) {
        // What is swapped out counts as evicted here.
        Ok(_) => Ok(Some((answer.cache + answer.evicted) * base_page_size())),
        // Not there, not allowed (a seccomp filter), or not for this file system.
        Err(Errno::EOPNOTSUPP) => Ok(None),
        Err(errno) if is_refused(errno) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_that_were_allocated_and_never_touched() {
        assert_eq!(size_of::<Cachestat>(), 40, "the kernel's layout");
        let page = base_page_size();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(16 * page).unwrap();
        let Some(0) = cached(&file, 0..16 * page).unwrap() else {
            return;
        };
        let len = i64::try_from(2 * page).unwrap();
        nix::fcntl::posix_fallocate(&file, 0, len).unwrap();
        assert_eq!(cached(&file, 0..16 * page).unwrap(), Some(2 * page));
        assert_eq!(cached(&file, page..2 * page).unwrap(), Some(page));
        assert_eq!(cached(&file, 2 * page..16 * page).unwrap(), Some(0));
    }
}
