//! The dirty log that a frontend shares, and the marks that writes to guest RAM leave in it (see
//! "Migration" in the vhost-user specification).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{FileOffset, GuestAddress, MmapRegion, VolatileMemory};

/// Bytes of guest memory for which there is a bit, from guest address 0 on.
const PAGE: u64 = 4096;

/// A log that is mapped. No touch of it is SIGBUS, now or later: its file is long enough, and
/// sealed against being cut.
#[derive(Debug)]
pub(crate) struct Log {
    bits: MmapRegion,
}

impl Log {
    /// Maps `size` bytes at `offset` of `file`.
    pub(crate) fn map(file: File, offset: u64, size: u64) -> io::Result<Self> {
        let refuse = |reason: String| {
            let text = format!("the dirty log of {size} bytes at offset {offset:#x} {reason}");
            io::Error::new(ErrorKind::InvalidInput, text)
        };
        seal(&file)
            .map_err(|error| refuse(format!("is not sealed against shrinking: {error}")))?;
        let len = file.metadata()?.len();
        let end = offset.checked_add(size);
        if size == 0 || end.is_none_or(|end| end > len) {
            return Err(refuse(format!("is not in its file of {len} bytes")));
        }
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let bits = MmapRegion::from_file(FileOffset::new(file, offset), size);
        let bits = bits.map_err(|error| refuse(format!("cannot be mapped: {error}")))?;
        Ok(Self { bits })
    }

    /// Whether it has a bit for the page of an address.
    pub(crate) fn covers(&self, addr: GuestAddress) -> bool {
        (addr.0 / PAGE / 8) < self.bits.size() as u64
    }

    fn with_byte(&self, page: u64, access: impl FnOnce(&AtomicU8) -> u8) -> u8 {
        let all = self.bits.as_volatile_slice();
        let byte = usize::try_from(page / 8).ok();
        // Pages that it does not cover have no bits: they are those of regions that came after it.
        let byte = byte.and_then(|byte| all.get_atomic_ref::<AtomicU8>(byte).ok());
        byte.map_or(0, access)
    }
}

/// Makes sure that the file cannot become shorter.
fn seal(file: &File) -> io::Result<()> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain)?;
    if !seals.contains(SealFlag::F_SEAL_SHRINK) {
        fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    }
    Ok(())
}

/// The dirty bitmap of a region: marks go to the log that the frontend shared last, if any.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marks {
    place: Arc<RwLock<Option<Place>>>,
    /// Where this slice starts in the region.
    offset: u64,
}

#[derive(Debug)]
struct Place {
    region: GuestAddress,
    log: Arc<Log>,
}

impl Marks {
    /// Has writes to the region, which starts at `region`, leave marks in `log` from now on.
    pub(crate) fn go_to(&self, log: &Arc<Log>, region: GuestAddress) {
        let log = Arc::clone(log);
        let mut place = self.place.write().unwrap_or_else(PoisonError::into_inner);
        *place = Some(Place { region, log });
    }

    /// Does something with each page of a part of the slice, if there is a log.
    fn each_page(&self, offset: usize, len: usize, mut with: impl FnMut(&Log, u64)) {
        let place = self.place.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Place { region, log }) = place.as_ref()
            && let Some(last) = (len as u64).checked_sub(1)
        {
            // The region is mapped, and so does not wrap.
            let start = region.0 + self.offset + offset as u64;
            (start / PAGE..=(start + last) / PAGE).for_each(|page| with(log, page));
        }
    }
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.each_page(offset, len, |log, page| {
            log.with_byte(page, |byte| {
                byte.fetch_or(1 << (page % 8), Ordering::SeqCst)
            });
        });
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let mut dirty = false;
        self.each_page(offset, 1, |log, page| {
            let byte = log.with_byte(page, |byte| byte.load(Ordering::SeqCst));
            dirty = byte & 1 << (page % 8) != 0;
        });
        dirty
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            place: Arc::clone(&self.place),
            offset: self.offset + offset as u64,
        }
    }
}

impl WithBitmapSlice<'_> for Marks {
    type S = Self;
}

impl BitmapSlice for Marks {}

impl NewBitmap for Marks {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}
