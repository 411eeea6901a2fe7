//! What the kernel says about pages: which are mapped here, which by huge pages.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;

use super::Mapping;
use super::span::{Span, to_usize};
use crate::host::calls::{is_refused, was_refused};
use crate::host::{base_page_size, pagemap};
use crate::range::RangeSet;

/// How much of a mapping mincore(2) is asked about at once, in bytes: a byte of answer per page.
const WINDOW: u64 = 1 << 30;

/// `PAGE_IS_PRESENT` of linux/fs.h: mapped in this process.
const PAGE_IS_PRESENT: u64 = 1 << 3;

/// `PAGE_IS_HUGE` of linux/fs.h: mapped by an entry of a page middle directory, or of hugetlb.
const PAGE_IS_HUGE: u64 = 1 << 6;

/// The argument of `PAGEMAP_SCAN`: `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// A part of its answer: `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

impl Mapping {
    /// The byte offsets in the mapping of the pages of a hugetlb backing that this process has
    /// mapped, in order (mincore(2)). `page_size` is that of the backing.
    ///
    /// Pages that only other processes have touched are not among them, and none is where a filter
    /// forbids the call. (For a tmpfs mincore would name them too.)
    pub(crate) fn mapped(&self, page_size: u64) -> io::Result<RangeSet> {
        let base = base_page_size();
        let window = WINDOW.max(page_size).min(self.len() as u64);
        let mut answer = vec![0u8; to_usize(window / base)];
        let mut found = RangeSet::default();
        for from in (0..self.len() as u64).step_by(to_usize(window)) {
            let len = window.min(self.len() as u64 - from);
            let span = self.ram().part(to_usize(from), to_usize(len));
            match mincore(span, &mut answer) {
                // A filter forbids it: nothing is known of any page then.
                Err(error) if was_refused(&error) => return Ok(RangeSet::default()),
                done => done?,
            }
            for page in (0..len).step_by(to_usize(page_size)) {
                if answer[to_usize(page / base)] & 1 != 0 {
                    found.insert(from + page..from + page + page_size);
                }
            }
        }
        Ok(found)
    }

    /// How many bytes of it this process has mapped by huge pages; none if the kernel cannot say,
    /// or must not (`PAGEMAP_SCAN` of /proc/PID/pagemap, Linux 6.7).
    pub(crate) fn mapped_huge(&self) -> io::Result<Option<u64>> {
        self.bytes_that_are(PAGE_IS_HUGE, 0..self.len() as u64)
    }

    /// How many bytes of a part of it this process has mapped, in whatever way; none if that
    /// cannot be known, as above.
    pub(crate) fn mapped_in(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        self.bytes_that_are(PAGE_IS_PRESENT, range)
    }

    fn bytes_that_are(&self, category: u64, range: Range<u64>) -> io::Result<Option<u64>> {
        let pagemap = pagemap()?;
        let start = self.ram().start.addr().get() as u64;
        let (mut at, end) = (start + range.start, start + range.end);
        let mut answer = [PageRegion::default(); 256];
        let mut bytes = 0;
        while at < end {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                start: at,
                end,
                vec: answer.as_mut_ptr().expose_provenance() as u64,
                vec_len: answer.len() as u64,
                category_mask: category,
                return_mask: category,
                ..PmScanArg::default()
            };
            // SAFETY: the descriptor and the structures live through the call; the kernel writes
            // to `arg` and to at most `vec_len` elements at `vec`, which are plain numbers.
            // Without flags it only looks at the mapping.
            let found = unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut arg) };
            let found = match found {
                Ok(found) => usize::try_from(found).unwrap_or(0),
                Err(Errno::ENOTTY | Errno::EINVAL) => return Ok(None),
                Err(errno) if is_refused(errno) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            };
            bytes += answer
                .iter()
                .take(found)
                .map(|part| part.end.saturating_sub(part.start))
                .sum::<u64>();
            if arg.walk_end <= at {
                return Ok(None);
            }
            at = arg.walk_end;
        }
        Ok(Some(bytes))
    }
}

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, PmScanArg);

/// One byte per base page of the span.
fn mincore(span: Span, answer: &mut [u8]) -> io::Result<()> {
    let pages = span.len.get().div_ceil(to_usize(base_page_size()));
    if answer.len() < pages {
        return Err(Errno::EINVAL.into());
    }
    // SAFETY: the span is mapped by this crate, and the kernel writes a byte for each of its
    // pages, for all of which there is room, as just checked.
    let done = unsafe { libc::mincore(span.start.as_ptr(), span.len.get(), answer.as_mut_ptr()) };
    Errno::result(done)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::ShmBacking;
    use crate::options::RamOptions;
    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    #[test]
    fn the_structures_have_the_kernels_layout() {
        assert_eq!(size_of::<PmScanArg>(), 96);
        assert_eq!(size_of::<PageRegion>(), 24);
    }

    #[test]
    fn what_a_filter_forbids_to_ask_is_not_known() {
        use crate::host::calls::forbidden;
        let page = base_page_size();
        let backing = ShmBacking::create(&RamOptions::new(), 8 * page).unwrap();
        let mapping = Mapping::new(&backing, 0, 8 * page).unwrap();
        mapping
            .populate(0..page, crate::options::Access::ReadWrite)
            .unwrap();
        for errno in [Errno::EPERM, Errno::EACCES, Errno::ENOSYS] {
            let calls = [libc::SYS_ioctl, libc::SYS_mincore, libc::SYS_msync];
            forbidden(&calls, errno, || {
                assert_eq!(mapping.mapped_huge().unwrap(), None);
                assert_eq!(mapping.mapped(page).unwrap(), RangeSet::default());
                assert!(!mapping.is_locked(0..page).unwrap());
            });
        }
        // The control: another answer is none that means that.
        let calls = [libc::SYS_ioctl, libc::SYS_mincore];
        forbidden(&calls, Errno::EIO, || {
            assert!(mapping.mapped_huge().is_err());
            assert!(mapping.mapped(page).is_err());
        });
        assert_eq!(mapping.mapped(page).unwrap(), RangeSet::from(0..page));
    }

    #[test]
    fn base_pages_are_not_huge_and_mapped_ones_are_found() {
        let page = base_page_size();
        let region =
            crate::GuestRegionShm::<()>::new((GuestAddress(0), 8 * page), &RamOptions::new())
                .unwrap();
        for at in [0, 1, 5] {
            let at = MemoryRegionAddress(at * page);
            region.write_obj(1u8, at).unwrap();
        }
        let mapping = &region.ram().mapping;
        assert_eq!(
            mapping.mapped(page).unwrap(),
            RangeSet::from_iter([0..2 * page, 5 * page..6 * page])
        );
        assert!(matches!(mapping.mapped_huge().unwrap(), Some(0) | None));
    }
}
