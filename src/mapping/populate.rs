//! Allocating the pages of a mapping before their first use (madvise(2)).

use std::io;
use std::ops::Range;

use nix::sys::mman::{MmapAdvise, madvise};

use super::Mapping;
use crate::host::calls::retried;
use crate::options::Access;

impl Mapping {
    /// Allocates and maps every page of `range`, in bytes from the start of the mapping and whole
    /// pages of its backing; pages that are there are left as they are.
    ///
    /// `MADV_POPULATE_WRITE`, or `MADV_POPULATE_READ` where the mapping cannot be written: no
    /// signal is raised where a page cannot be allocated.
    ///
    /// # Errors
    ///
    /// `EFAULT` where a touch would have been SIGBUS, for whatever reason; `ENOMEM`.
    pub(crate) fn populate(&self, range: Range<u64>, access: Access) -> io::Result<()> {
        let advice = match access {
            Access::ReadWrite => MmapAdvise::MADV_POPULATE_WRITE,
            Access::ReadOnly => MmapAdvise::MADV_POPULATE_READ,
        };
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
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    use nix::errno::Errno;

    use super::super::to_usize;
    use super::*;
    use crate::backing::{AdoptPolicy, ShmBacking, base_page_size};
    use crate::options::RamOptions;

    const PAGES: u64 = 16;

    fn mapped(backing: &ShmBacking) -> Mapping {
        Mapping::new(backing, 0, backing.size()).unwrap()
    }

    fn resident(mapping: &Mapping) -> Vec<bool> {
        let pages = mapping.len() as u64 / base_page_size();
        let text = crate::host::pagemap().unwrap();
        let first = mapping.ram().start.addr().get() as u64 / base_page_size();
        (first..first + pages)
            .map(|page| {
                let mut entry = [0; 8];
                text.read_exact_at(&mut entry, page * 8).unwrap();
                u64::from_ne_bytes(entry) >> 63 == 1
            })
            .collect()
    }

    #[test]
    fn populating_maps_exactly_the_pages_asked_for_and_keeps_what_is_there() {
        let page = base_page_size();
        let backing = ShmBacking::create(&RamOptions::new(), PAGES * page).unwrap();
        let bytes = vec![7; to_usize(page)];
        backing.file().write_all_at(&bytes, 3 * page).unwrap();
        let mapping = mapped(&backing);
        assert!(resident(&mapping).iter().all(|resident| !resident));
        mapping
            .populate(2 * page..5 * page, Access::ReadWrite)
            .unwrap();
        let there = resident(&mapping);
        for (at, there) in there.iter().enumerate() {
            assert_eq!(*there, (2..5).contains(&at), "page {at}");
        }
        assert_eq!(backing.allocated().unwrap(), 3 * page);
        let mut now = vec![0; bytes.len()];
        backing.file().read_exact_at(&mut now, 3 * page).unwrap();
        assert!(now == bytes);
    }

    #[test]
    fn a_page_that_cannot_be_had_is_an_error_and_no_signal() {
        // Past the end of a file that was truncated, a touch is SIGBUS.
        let page = base_page_size();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(PAGES * page).unwrap();
        let fd: OwnedFd = file.try_clone().unwrap().into();
        let backing = ShmBacking::adopt(fd, &AdoptPolicy::new()).unwrap();
        let mapping = mapped(&backing);
        file.set_len(4 * page).unwrap();
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let refused = mapping.populate(0..PAGES * page, access).unwrap_err();
            let errno = refused.raw_os_error();
            assert_eq!(errno, Some(Errno::EFAULT as i32), "{access:?}");
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
        let Some(file) = file_on_tmpfs(4 * page, PAGES * page) else {
            eprintln!("skipped: this process may not mount a tmpfs");
            return;
        };
        let backing = ShmBacking::adopt(file.into(), &AdoptPolicy::new()).unwrap();
        let mapping = mapped(&backing);
        let populate = |pages| mapping.populate(0..pages * page, Access::ReadWrite);
        populate(4).unwrap();
        let refused = populate(PAGES).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::EFAULT as i32));
        assert_eq!(backing.allocated().unwrap(), 4 * page);
    }

    #[test]
    fn nothing_outside_of_the_mapping_is_ever_touched() {
        let page = base_page_size();
        let backing = ShmBacking::create(&RamOptions::new(), page).unwrap();
        let mapping = mapped(&backing);
        let populate = |range| mapping.populate(range, Access::ReadWrite);
        assert!(populate(0..2 * page).is_err());
        assert!(populate(page..2 * page).is_err());
        populate(page..page).unwrap();
        assert_eq!(backing.allocated().unwrap(), 0);
    }
}
