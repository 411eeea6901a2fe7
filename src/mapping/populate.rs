//! Bringing in the pages of a mapping ahead of their first use (madvise(2), futex(2)).

use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::libc::{
    FUTEX_CMP_REQUEUE, FUTEX_OP_CMP_EQ, FUTEX_OP_OR, FUTEX_PRIVATE_FLAG, FUTEX_WAKE_OP, SYS_futex,
    c_int, c_long, syscall,
};
use nix::sys::mman::{MmapAdvise, madvise};

use super::{Mapping, to_usize};
use crate::host::calls::{retried, was_refused};
use crate::options::Access;

impl Mapping {
    /// Allocates and maps every page of `range`, in bytes from the start of the mapping and whole
    /// pages of `page_size`; pages that are there are left as they are.
    ///
    /// `MADV_POPULATE_WRITE`, or `MADV_POPULATE_READ` where the mapping cannot be written: no
    /// signal is raised where a page cannot be had.
    ///
    /// # Errors
    ///
    /// `EFAULT` where a touch would have been SIGBUS, for whatever reason; `ENOMEM`.
    pub(crate) fn populate(
        &self,
        range: Range<u64>,
        page_size: u64,
        access: Access,
    ) -> io::Result<()> {
        let advice = match access {
            Access::ReadWrite => MmapAdvise::MADV_POPULATE_WRITE,
            Access::ReadOnly => MmapAdvise::MADV_POPULATE_READ,
        };
        match self.advise_range(range.clone(), advice) {
            // Linux before 5.14, or a filter that does not know the advice.
            Err(error)
                if error.raw_os_error() == Some(Errno::EINVAL as i32) || was_refused(&error) =>
            {
                self.touch(range, page_size, access)
            }
            answer => answer,
        }
    }

    fn advise_range(&self, range: Range<u64>, advice: MmapAdvise) -> io::Result<()> {
        let Some(span) = self.inside(range)? else {
            return Ok(());
        };
        let answer = retried(|| {
            // SAFETY: the range is mapped, and by a mapping of this crate, as `inside` checked.
            // Nothing that is there is changed, only what a touch would bring in is brought in.
            unsafe { madvise(span.start, span.len.get(), advice) }
        });
        Ok(answer?)
    }

    /// Touches each page by the kernel's hand: for kernels that cannot populate, or must not.
    ///
    /// A store of ours would be SIGBUS where there is no page, and a load and store would undo
    /// what others write in between. A futex operation is neither: it answers `EFAULT`, and
    /// `FUTEX_WAKE_OP` does an atomic "or" with 0 on the word. It wakes nobody who is not ready
    /// to be woken for nothing: futexes allow that.
    fn touch(&self, range: Range<u64>, page_size: u64, access: Access) -> io::Result<()> {
        let Some(span) = self.inside(range)? else {
            return Ok(());
        };
        for at in (0..span.len.get()).step_by(to_usize(page_size)) {
            let page = span.start.as_ptr().wrapping_byte_add(at).cast::<u32>();
            let answer = match access {
                Access::ReadWrite => or_zero(page),
                Access::ReadOnly => look(page),
            };
            answer?;
        }
        Ok(())
    }
}

/// An atomic "or" with 0 on the word, done by the kernel (`FUTEX_WAKE_OP` of futex(2)).
fn or_zero(word: *mut u32) -> io::Result<()> {
    let operation = (FUTEX_OP_OR << 28) | (FUTEX_OP_CMP_EQ << 24);
    futex(FUTEX_WAKE_OP, word, operation).map(drop)
}

/// A load of the word by the kernel: `FUTEX_CMP_REQUEUE` compares it, and then does nothing.
fn look(word: *mut u32) -> io::Result<()> {
    let own = 0_u32;
    // SAFETY: the kernel reads the word, which is in a mapping of the caller's, or answers EFAULT;
    // nobody waits on it, so that nobody is moved to the other word, which lives until then.
    let answer = unsafe {
        syscall(
            SYS_futex,
            word,
            FUTEX_CMP_REQUEUE | FUTEX_PRIVATE_FLAG,
            0,
            0_usize,
            &raw const own,
            0,
        )
    };
    match Errno::result(answer) {
        // The word is not 0: it was read, which is all that is wanted.
        Ok(_) | Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// An operation on two words: one of ours, on which nobody waits, and `word`.
fn futex(operation: c_int, word: *mut u32, encoded: c_int) -> io::Result<c_long> {
    let own = 0_u32;
    let answer = retried(|| {
        // SAFETY: `own` lives until the call is over. `word` is in a mapping of the caller's, is
        // aligned (it starts a page), and is accessed by the kernel atomically, which other
        // processes may do at any time: guest RAM is never referred to by a reference.
        let answer = unsafe {
            syscall(
                SYS_futex,
                &raw const own,
                operation | FUTEX_PRIVATE_FLAG,
                0,
                0_usize,
                word,
                encoded,
            )
        };
        Errno::result(answer)
    });
    Ok(answer?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::backing::{AdoptPolicy, ShmBacking, base_page_size};
    use crate::options::RamOptions;

    const PAGES: u64 = 16;

    type Call = fn(&Mapping, Range<u64>, u64) -> io::Result<()>;

    /// With the kernel's own call, and without.
    const CALLS: [Call; 2] = [
        |mapping, range, page| mapping.populate(range, page, Access::ReadWrite),
        |mapping, range, page| mapping.touch(range, page, Access::ReadWrite),
    ];

    fn mapped(backing: &ShmBacking) -> Mapping {
        Mapping::new(backing, 0, backing.size()).unwrap()
    }

    fn resident(mapping: &Mapping) -> Vec<bool> {
        let pages = mapping.len() as u64 / base_page_size();
        let text = crate::host::pagemap().unwrap();
        let first = mapping.ram.start.addr().get() as u64 / base_page_size();
        (first..first + pages)
            .map(|page| {
                let mut entry = [0; 8];
                text.read_exact_at(&mut entry, page * 8).unwrap();
                u64::from_ne_bytes(entry) >> 63 == 1
            })
            .collect()
    }

    #[test]
    fn populating_maps_exactly_the_pages_asked_for() {
        let page = base_page_size();
        for call in CALLS {
            let backing = ShmBacking::create(&RamOptions::new(), PAGES * page).unwrap();
            let mapping = mapped(&backing);
            assert!(resident(&mapping).iter().all(|resident| !resident));
            call(&mapping, 2 * page..5 * page, page).unwrap();
            let there = resident(&mapping);
            for (at, there) in there.iter().enumerate() {
                assert_eq!(*there, (2..5).contains(&at), "page {at}");
            }
            assert_eq!(backing.allocated().unwrap(), 3 * page);
        }
    }

    #[test]
    fn touching_by_the_kernel_keeps_what_is_there() {
        let page = base_page_size();
        let backing = ShmBacking::create(&RamOptions::new(), PAGES * page).unwrap();
        let bytes: Vec<u8> = (0..PAGES * page).map(|at| (at % 251) as u8).collect();
        backing.file().write_all_at(&bytes, 0).unwrap();
        let mapping = mapped(&backing);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            mapping.touch(0..PAGES * page, page, access).unwrap();
            assert!(resident(&mapping).iter().all(|resident| *resident));
            let mut now = vec![0; bytes.len()];
            backing.file().read_exact_at(&mut now, 0).unwrap();
            assert!(now == bytes, "{access:?}");
        }
    }

    #[test]
    fn a_page_that_cannot_be_had_is_an_error_and_no_signal() {
        // Behind the end of a file that somebody truncated, a touch is SIGBUS.
        let page = base_page_size();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(PAGES * page).unwrap();
        let fd: OwnedFd = file.try_clone().unwrap().into();
        let backing = ShmBacking::adopt(fd, &AdoptPolicy::new()).unwrap();
        let mapping = mapped(&backing);
        file.set_len(4 * page).unwrap();
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let touched = mapping.touch(0..PAGES * page, page, access);
            let populated = mapping.populate(0..PAGES * page, page, access);
            for refused in [touched, populated] {
                let errno = refused.unwrap_err().raw_os_error();
                assert_eq!(errno, Some(Errno::EFAULT as i32), "{access:?}");
            }
        }
        assert_eq!(backing.allocated().unwrap(), 4 * page);
    }

    /// A file of `len` bytes on a tmpfs of its own of `size` bytes, or `None` without the right.
    ///
    /// The mount is one of a mount namespace that only a thread is in, which is gone by then; the
    /// file holds the file system.
    fn file_on_tmpfs(size: u64, len: u64) -> Option<std::fs::File> {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            unshare(CloneFlags::CLONE_NEWNS).ok()?;
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).ok()?;
            let (tmpfs, data) = (Some("tmpfs"), format!("size={size}"));
            mount(
                tmpfs,
                dir.path(),
                tmpfs,
                MsFlags::empty(),
                Some(data.as_str()),
            )
            .ok()?;
            let file = tempfile::tempfile_in(dir.path()).unwrap();
            file.set_len(len).unwrap();
            Some(file)
        };
        std::thread::scope(|scope| scope.spawn(open).join().unwrap())
    }

    #[test]
    fn a_full_file_system_is_an_error_and_no_signal() {
        let page = base_page_size();
        for call in CALLS {
            let Some(file) = file_on_tmpfs(4 * page, PAGES * page) else {
                eprintln!("skipped: this process may not mount a tmpfs");
                return;
            };
            let backing = ShmBacking::adopt(file.into(), &AdoptPolicy::new()).unwrap();
            let mapping = mapped(&backing);
            call(&mapping, 0..4 * page, page).unwrap();
            let refused = call(&mapping, 0..PAGES * page, page).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EFAULT as i32));
            assert_eq!(backing.allocated().unwrap(), 4 * page);
        }
    }

    #[test]
    fn nothing_outside_of_the_mapping_is_ever_touched() {
        let page = base_page_size();
        let backing = ShmBacking::create(&RamOptions::new(), page).unwrap();
        let mapping = mapped(&backing);
        for call in CALLS {
            assert!(call(&mapping, 0..2 * page, page).is_err());
            assert!(call(&mapping, page..2 * page, page).is_err());
            call(&mapping, page..page, page).unwrap();
        }
        assert_eq!(backing.allocated().unwrap(), 0);
    }
}
