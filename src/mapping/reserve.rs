//! Where a mapping goes: address space that is reserved for it, suits huge pages, and is then
//! mapped over.

use std::io;
use std::num::NonZeroUsize;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

use super::error::{MapError, Result};
use super::span::{Span, to_usize};
use crate::backing::{BackingError, ShmBacking, base_page_size, check_groups, check_pool};
use crate::options::Access;

/// Sizes for which the kernel and the hypervisor can use one large mapping, largest first.
const LARGE: [u64; 2] = [1 << 30, 2 << 20];

/// Address space that is set aside for a mapping, and given back with all that is mapped there.
pub(super) struct Reservation {
    span: Span,
    /// Where the RAM goes in it.
    ram: Span,
}

impl Reservation {
    /// Reserves room for `size` bytes at a host address congruent with `offset` modulo `modulus`,
    /// a power of two, and for a guard page on either side.
    pub(super) fn new(size: u64, offset: u64, modulus: u64) -> Result<Self> {
        let failed = |errno: Errno| MapError::Reserve {
            size,
            source: errno.into(),
        };
        let guard = base_page_size();
        let room = size
            .checked_add(modulus + 2 * guard)
            .and_then(|room| NonZeroUsize::new(to_usize(room)))
            .ok_or_else(|| failed(Errno::ENOMEM))?;
        let whole = Span::reserve(room).map_err(failed)?;

        // The first suitable address that leaves room for the guard before it.
        let first = whole.start.addr().get() as u64 + guard;
        let skip = (offset.wrapping_sub(first)) % modulus;
        let head = to_usize(skip);
        let kept = to_usize(size + 2 * guard);
        let tail = room.get() - head - kept;
        let this = Self {
            span: whole.part(head, kept),
            ram: whole.part(head + to_usize(guard), to_usize(size)),
        };
        for (at, len) in [(0, head), (head + kept, tail)] {
            if len > 0 {
                whole.part(at, len).unmap();
            }
        }
        Ok(this)
    }

    /// Maps the backing over the middle of the reservation.
    ///
    /// A file's own mmap must not fail here, see [`rehearse`].
    pub(super) fn map(&self, backing: &ShmBacking, offset: u64) -> Result<()> {
        let size = self.ram.len.get() as u64;
        let at = file_offset(backing, offset, size)?;
        let flags = shared_flags(backing) | MapFlags::MAP_FIXED;
        // SAFETY: MAP_FIXED replaces pages of this reservation only: PROT_NONE pages that nothing
        // else knows of. The range of the file exists (`check_inside`), so that no access to the
        // mapping is SIGBUS as long as no process truncates the file, which seals forbid; that
        // unsealed files can be truncated is documented on `ShmBacking`.
        let answer = unsafe {
            mmap(
                Some(self.ram.start.addr()),
                self.ram.len,
                protection(backing),
                flags,
                backing,
                at,
            )
        };
        match answer {
            Ok(_) => Ok(()),
            Err(errno) => Err(map_error(backing, size, errno)),
        }
    }

    /// All of it.
    #[cfg(test)]
    pub(super) fn span(&self) -> Span {
        self.span
    }

    /// Where the RAM goes.
    pub(super) fn ram(&self) -> Span {
        self.ram
    }
}

/// Maps a part of a backing anywhere, and unmaps it again, to learn whether it can be mapped.
///
/// MAP_FIXED takes away what was there before it asks the file, and does not put it back when the
/// file refuses, for example because a hugetlb pool is short: then the reservation has a hole,
/// another thread may map something into it, and giving the reservation back would unmap that.
/// Where the file agrees now, it agrees then too: the huge pages are reserved for the inode, and
/// stay reserved. A tmpfs never refuses.
pub(super) fn rehearse(backing: &ShmBacking, offset: u64, size: u64) -> Result<()> {
    let at = file_offset(backing, offset, size)?;
    let failed = |errno| map_error(backing, size, errno);
    let len = NonZeroUsize::new(to_usize(size)).ok_or_else(|| failed(Errno::EINVAL))?;
    let access = protection(backing);
    // SAFETY: without MAP_FIXED the kernel chooses unused addresses, and nothing is told of the
    // mapping.
    let answer = unsafe { mmap(None, len, access, shared_flags(backing), backing, at) };
    let start = answer.map_err(failed)?;
    Span { start, len }.unmap();
    Ok(())
}

/// An offset in a backing as mmap(2) takes it.
fn file_offset(backing: &ShmBacking, offset: u64, size: u64) -> Result<i64> {
    let end = backing.end();
    Ok(i64::try_from(offset).map_err(|_| BackingError::Outside { offset, size, end })?)
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.span.unmap();
    }
}

/// How a backing is mapped.
///
/// Without MAP_NORESERVE hugetlb mappings reserve their pages now; else touching them is SIGBUS
/// when the pool is empty. Pages of a tmpfs are not accounted here in any case.
fn shared_flags(backing: &ShmBacking) -> MapFlags {
    if backing.map_options().unreserved {
        MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE
    } else {
        MapFlags::MAP_SHARED
    }
}

/// Where the host address of a part is to be: a modulus in bytes, and what it is congruent with.
pub(super) fn placement(backing: &ShmBacking, offset: u64, size: u64) -> (u64, u64) {
    let large = large_page(size, backing);
    match backing.map_options().align {
        // Both are powers of two. Where the offset is no multiple of `align`, the address cannot
        // be congruent with it.
        Some(align) if align > 0 && !offset.is_multiple_of(align) => (large.max(align), 0),
        Some(align) => (large.max(align), offset),
        None => (large, offset),
    }
}

/// What may be done with the RAM.
fn protection(backing: &ShmBacking) -> ProtFlags {
    match backing.map_options().access {
        Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        Access::ReadOnly => ProtFlags::PROT_READ,
    }
}

/// The modulus in bytes for the host address of a part of this size.
fn large_page(size: u64, backing: &ShmBacking) -> u64 {
    let large = LARGE.iter().find(|large| size >= **large);
    let large = large.copied().unwrap_or(LARGE[1]);
    large.max(backing.page_size())
}

fn map_error(backing: &ShmBacking, size: u64, errno: Errno) -> MapError {
    if backing.is_hugetlb() && errno == Errno::ENOMEM {
        let needed = size / backing.page_size();
        let page_size = backing.page_size();
        let short = check_pool(needed, page_size).and_then(|()| check_groups(needed, page_size));
        if let Err(short) = short {
            return short.into();
        }
    }
    let source = io::Error::from(errno);
    match errno {
        // These errors are the file's, not the address space's.
        Errno::ENODEV | Errno::EINVAL | Errno::EACCES | Errno::EPERM => {
            MapError::NotShareable { size, source }
        }
        _ => MapError::Map { size, source },
    }
}
