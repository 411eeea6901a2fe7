//! Giving pages of a mapping back (madvise(2), `MADV_REMOVE`).

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, MsFlags, madvise, msync};

use super::Mapping;
use super::span::{Span, to_usize};
use crate::host::calls::{is_refused, retried};

impl Mapping {
    /// Frees the pages at these byte offsets in the mapping, for every process that maps them, and
    /// makes a hole of them in the backing. The offsets must be multiples of its page size.
    ///
    /// `MADV_REMOVE` and not fallocate(2): besides punching the hole it tells a userfaultfd that
    /// is registered on the mapping.
    pub(crate) fn remove(&self, range: Range<u64>) -> io::Result<()> {
        let Some(span) = self.inside(range)? else {
            return Ok(());
        };
        retried(|| {
            // SAFETY: the range is mapped, and by a mapping of this crate, as `inside` checked. It
            // stays mapped, and its bytes become 0. That changes memory under all that
            // access it, as the guest and other processes do at any time: there is no reference
            // to it, and all accesses are volatile or atomic.
            unsafe { madvise(span.start, span.len.get(), MmapAdvise::MADV_REMOVE) }
        })?;
        Ok(())
    }

    /// Whether a page at these offsets is locked (mlock(2)): the kernel does not remove such
    /// pages. The offsets must be multiples of the page size.
    ///
    /// msync(2) with `MS_INVALIDATE` tells, and does nothing else on Linux.
    pub(crate) fn is_locked(&self, range: Range<u64>) -> io::Result<bool> {
        let Some(span) = self.inside(range)? else {
            return Ok(false);
        };
        // SAFETY: the range is mapped by a mapping of this crate, as `inside` checked, and without
        // MS_SYNC or MS_ASYNC neither it nor its backing is changed.
        match unsafe { msync(span.start, span.len.get(), MsFlags::MS_INVALIDATE) } {
            Ok(()) => Ok(false),
            Err(Errno::EBUSY) => Ok(true),
            // A filter forbids it: then a locked page is noticed when it is to be removed.
            Err(errno) if is_refused(errno) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The host addresses of these byte offsets; none if there are none.
    ///
    /// Fails for offsets past the end: what is there belongs to others.
    pub(super) fn inside(&self, range: Range<u64>) -> io::Result<Option<Span>> {
        if range.start > range.end || range.end > self.len() as u64 {
            return Err(Errno::EINVAL.into());
        }
        let len = NonZeroUsize::new(to_usize(range.end - range.start));
        Ok(len.map(|len| self.ram().part(to_usize(range.start), len.get())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::ShmBacking;
    use crate::options::RamOptions;

    #[test]
    fn nothing_past_the_end_is_touched() {
        let backing = ShmBacking::create(&RamOptions::new(), 8192).unwrap();
        let mapping = Mapping::new(&backing, 0, 8192).unwrap();
        let ends = [(4096, 12288), (8192, 12288), (8192, 4096), (0, u64::MAX)];
        for range in ends.map(|(start, end)| start..end) {
            assert!(mapping.remove(range.clone()).is_err(), "{range:?}");
            assert!(mapping.is_locked(range.clone()).is_err(), "{range:?}");
        }
        mapping.remove(8192..8192).unwrap();
        mapping.remove(0..8192).unwrap();
        assert!(!mapping.is_locked(0..8192).unwrap());
    }
}
