//! Mappings of backings into this process, each between two guard pages.
//!
//! The one module that calls mmap(2) and munmap(2). A [`Mapping`] first reserves address space
//! (`PROT_NONE`, no memory), chooses in it a host address that suits huge pages, maps the backing
//! there, and keeps one inaccessible page on either side, so that an access that runs off the end
//! of guest RAM faults instead of reaching whatever the process has there.
#![expect(
    unsafe_code,
    reason = "the memory map of the process is changed and raw memory is handed out here"
)]

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

mod numa;
mod populate;
mod remove;

use crate::backing::{ShmBacking, base_page_size};
use crate::error::{Error, FileError, Result};
use crate::host::transparent;
use crate::options::{Access, CoreDump, MapOptions};
use crate::report::{NotHuge, Note, log_notes};

mod scan;

pub(crate) use scan::cached;

/// Sizes for which the kernel and the hypervisor can use one large mapping, largest first.
const LARGE: [u64; 2] = [1 << 30, 2 << 20];

/// A part of a backing, mapped shared for reading and writing, with a guard page at both ends.
///
/// Dropping it unmaps all of it, hugetlb mappings included.
pub(crate) struct Mapping {
    /// The reservation: guard, RAM, guard.
    reserved: Span,
    /// The RAM in it.
    ram: Span,
    /// What the kernel does not do that was asked for.
    notes: Vec<Note>,
}

/// Where a mapping is. Safe to have and to pass on; what is there is accessed through raw pointers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostAddr(NonNull<u8>);

impl HostAddr {
    #[inline]
    pub(crate) fn as_ptr(self) -> *mut u8 {
        self.0.as_ptr()
    }
}

/// A range of host addresses.
#[derive(Clone, Copy)]
struct Span {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

// SAFETY: a Mapping owns its range of the address space, which belongs to the process, not to a
// thread. Nothing in it is thread-bound: accesses to the RAM are made by others, through volatile
// or atomic operations (`VolatileSlice`), as is needed for memory that other processes write too.
unsafe impl Send for Mapping {}
// SAFETY: as above; through a shared reference only the address and the length can be read.
unsafe impl Sync for Mapping {}
// SAFETY: an address is a number; to access what is there takes unsafe code elsewhere.
unsafe impl Send for HostAddr {}
// SAFETY: as above.
unsafe impl Sync for HostAddr {}

impl Mapping {
    /// Maps `size` bytes at `offset` of `backing`.
    ///
    /// The host address is congruent with the offset modulo 2 MiB, or 1 GiB for parts that large,
    /// or the page size of the backing where that is larger: the condition under which shmem and
    /// the hypervisor can map huge pages. Where the guest address is congruent with the offset,
    /// it is congruent with the host address too. An alignment that the options ask for comes
    /// first. What may only be read is mapped for reading only.
    ///
    /// # Errors
    ///
    /// [`Error::UnalignedOffset`], [`Error::UnalignedSize`], [`Error::OutsideBacking`],
    /// [`Error::BackingTruncated`]; [`Error::Numa`];
    /// [`Error::HugePoolShort`] if the pool cannot promise the pages; [`Error::Map`].
    pub(crate) fn new(backing: &ShmBacking, offset: u64, size: u64) -> Result<Self> {
        backing.check_inside(offset, size)?;
        backing.check_not_truncated()?;
        if !backing.is_on_tmpfs() {
            rehearse(backing, offset, size)?;
        }
        let (modulus, congruent) = placement(backing, offset, size);
        let reserved = Reservation::new(size, congruent, modulus)?;
        let ram = reserved.map(backing, offset)?;
        let mut mapping = reserved.into_mapping(ram);
        // Nodes and advice come before the first page: afterwards they are without effect.
        mapping.bind(backing.map_options().numa)?;
        mapping.advise(backing.map_options());
        if backing.map_options().transparent_huge {
            let why_not = why_not_huge(backing, offset, size);
            mapping.notes.extend(why_not.map(Note::NotHuge));
        }
        log_notes(&backing.label(), &mapping.notes);
        Ok(mapping)
    }

    /// The host address of the first byte. It may be kept beside the mapping, not longer.
    pub(crate) fn host_addr(&self) -> HostAddr {
        HostAddr(self.ram.start.cast())
    }

    /// The length in bytes, without the guard pages.
    pub(crate) fn len(&self) -> usize {
        self.ram.len.get()
    }

    /// What the kernel does not do that was asked for.
    pub(crate) fn notes(&self) -> &[Note] {
        &self.notes
    }

    fn advise(&mut self, options: MapOptions) {
        if options.core_dump == CoreDump::Exclude {
            self.advise_one(
                MmapAdvise::MADV_DONTDUMP,
                "leave guest RAM out of core dumps",
            );
        }
        if options.transparent_huge {
            self.advise_one(MmapAdvise::MADV_HUGEPAGE, "use transparent huge pages");
        }
    }

    /// Advice that the kernel does not know (it may be built without the feature) is no reason
    /// to do without RAM.
    fn advise_one(&mut self, what: MmapAdvise, meaning: &'static str) {
        // SAFETY: the range is a mapping of ours, whole pages, and neither MADV_DONTDUMP nor
        // MADV_HUGEPAGE changes what is in it.
        let answer = unsafe { madvise(self.ram.start, self.ram.len.get(), what) };
        if let Err(errno) = answer {
            self.notes.push(Note::Advice {
                meaning,
                source: Arc::new(errno.into()),
            });
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.reserved.unmap();
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:p} + {:#x})", self.ram.start, self.len())
    }
}

/// Address space that is set aside for a mapping, and given back if it comes to nothing.
struct Reservation {
    span: Span,
    /// Where the RAM goes in it.
    ram: Span,
}

impl Reservation {
    /// Reserves room for `size` bytes at a host address congruent with `offset` modulo `modulus`, a
    /// power of two, and for a guard page on either side.
    fn new(size: u64, offset: u64, modulus: u64) -> Result<Self> {
        let failed = |errno: Errno| Error::Map {
            doing: "reserve address space for a region",
            size,
            source: errno.into(),
        };
        let guard = base_page_size();
        let room = size
            .checked_add(modulus + 2 * guard)
            .and_then(|room| NonZeroUsize::new(to_usize(room)))
            .ok_or_else(|| failed(Errno::ENOMEM))?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses, and PROT_NONE
        // pages cannot be accessed by anybody.
        let answer = unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, flags) };
        let whole = Span {
            start: answer.map_err(failed)?,
            len: room,
        };

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
    fn map(&self, backing: &ShmBacking, offset: u64) -> Result<Span> {
        let size = self.ram.len.get() as u64;
        let at = file_offset(backing, offset, size)?;
        let flags = shared_flags(backing) | MapFlags::MAP_FIXED;
        // SAFETY: MAP_FIXED replaces pages of this reservation only: PROT_NONE pages that nobody
        // else knows of. The range of the file exists (`check_inside`), so that no access to the
        // mapping is SIGBUS as long as nobody truncates the file, which seals forbid; that
        // unsealed files can be truncated is documented on `Backing`.
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
            Ok(_) => Ok(self.ram),
            Err(errno) => Err(map_error(backing, size, errno)),
        }
    }

    fn into_mapping(self, ram: Span) -> Mapping {
        let reserved = self.span;
        std::mem::forget(self);
        Mapping {
            reserved,
            ram,
            notes: Vec::new(),
        }
    }
}

/// Maps a part of a backing anywhere, and unmaps it again, to learn whether it can be mapped.
///
/// MAP_FIXED takes away what was there before it asks the file, and does not put it back when the
/// file's answer is no, as that of a short hugetlb pool: then there is a hole in the reservation,
/// another thread may map something into it, and giving the reservation back would unmap that.
/// Where the file says yes now, it says so then too: the huge pages are promised to the inode, and
/// stay promised. A tmpfs never says no.
fn rehearse(backing: &ShmBacking, offset: u64, size: u64) -> Result<()> {
    let at = file_offset(backing, offset, size)?;
    let failed = |errno| map_error(backing, size, errno);
    let len = NonZeroUsize::new(to_usize(size)).ok_or_else(|| failed(Errno::EINVAL))?;
    let access = protection(backing);
    // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses, and nobody is told
    // of the mapping.
    let answer = unsafe { mmap(None, len, access, shared_flags(backing), backing, at) };
    let start = answer.map_err(failed)?;
    Span { start, len }.unmap();
    Ok(())
}

/// An offset in a backing as mmap(2) takes it.
fn file_offset(backing: &ShmBacking, offset: u64, size: u64) -> Result<i64> {
    i64::try_from(offset).map_err(|_| Error::OutsideBacking {
        offset,
        size,
        len: backing.len(),
    })
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.span.unmap();
    }
}

impl Span {
    fn unmap(self) {
        // SAFETY: spans are only made of address space that this module mapped and still owns (no
        // failed MAP_FIXED has torn a hole into it, see `rehearse`), and are unmapped only when
        // their owner is dropped or trims what it never hands out: no pointer into them is in use.
        // They hold whole hugetlb mappings, so the length needs no rounding to huge pages.
        let answer = unsafe { munmap(self.start, self.len.get()) };
        if let Err(errno) = answer {
            log::error!(
                "cannot unmap {:#x} bytes at {:p}: {errno}",
                self.len,
                self.start
            );
        }
    }

    /// `len` bytes, `at` bytes into the span.
    fn part(self, at: usize, len: usize) -> Self {
        // Both stay inside the span: the callers see to that.
        let start = self.start.as_ptr().map_addr(|addr| addr + at);
        match (NonNull::new(start), NonZeroUsize::new(len)) {
            (Some(start), Some(len)) => Self { start, len },
            _ => unreachable!("a part of a mapping is neither null nor empty"),
        }
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

/// Why the kernel will not map this part of a backing by transparent huge pages, as far as it can
/// be known: the host address is never the reason, see [`Mapping::new`].
fn why_not_huge(backing: &ShmBacking, offset: u64, size: u64) -> Option<NotHuge> {
    if !backing.is_on_tmpfs() {
        return Some(NotHuge::FileSystem);
    }
    let Some(huge) = transparent::page_size() else {
        return Some(NotHuge::Kernel);
    };
    if let Some(why) = transparent::why_not_on_tmpfs(backing.identity().dev) {
        return Some(why);
    }
    if size < huge {
        return Some(NotHuge::Size { size, huge });
    }
    let whole = offset.is_multiple_of(huge) && size.is_multiple_of(huge);
    (!whole).then_some(NotHuge::Alignment { offset, size, huge })
}

/// Where the host address of a part is to be: a modulus in bytes, and what it is congruent with.
fn placement(backing: &ShmBacking, offset: u64, size: u64) -> (u64, u64) {
    let large = large_page(size, backing);
    match backing.map_options().align {
        // Both are powers of two. Where the offset is no multiple of `align`, the address cannot be
        // congruent with it.
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

fn map_error(backing: &ShmBacking, size: u64, errno: Errno) -> Error {
    if backing.is_hugetlb() && errno == Errno::ENOMEM {
        let needed = size / backing.page_size();
        if let Err(short) = crate::backing::check_pool(needed, backing.page_size()) {
            return short;
        }
    }
    let source = io::Error::from(errno);
    match errno {
        // These are answers of the file, not of the address space.
        Errno::ENODEV | Errno::EINVAL | Errno::EACCES | Errno::EPERM => {
            FileError::NotMappable { size, source }.into()
        }
        _ => Error::Map {
            doing: "map a region",
            size,
            source,
        },
    }
}

/// The one conversion of sizes in guest or file space to sizes in this process.
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits: vm-memory builds for no other target"
)]
#[inline]
pub(crate) const fn to_usize(size: u64) -> usize {
    const { assert!(size_of::<usize>() == size_of::<u64>()) };
    size as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::RamOptions;

    fn backing(len: u64) -> ShmBacking {
        ShmBacking::create(&RamOptions::new(), len).unwrap()
    }

    fn map(backing: &ShmBacking, offset: u64, size: u64) -> Mapping {
        Mapping::new(backing, offset, size).unwrap()
    }

    #[test]
    fn the_host_address_is_congruent_with_the_offset() {
        let page = base_page_size();
        let small = backing(16 << 20);
        for offset in [0, page, 2 << 20, (2 << 20) + 3 * page, (4 << 20) - page] {
            for size in [page, 1 << 20, 2 << 20, 4 << 20] {
                let host = map(&small, offset, size).ram.start.addr().get() as u64;
                assert_eq!(
                    host % (2 << 20),
                    offset % (2 << 20),
                    "{offset:#x} {size:#x}"
                );
            }
        }
        let large = backing(5 << 30);
        for offset in [0, page, 1 << 30, (1 << 30) + (2 << 20)] {
            let host = map(&large, offset, 2 << 30).ram.start.addr().get() as u64;
            assert_eq!(host % (1 << 30), offset % (1 << 30), "{offset:#x}");
        }
    }

    #[test]
    fn the_reservation_is_the_ram_and_a_page_on_either_side() {
        let page = to_usize(base_page_size());
        let mapping = map(&backing(4 << 20), 0, 4 << 20);
        assert_eq!(mapping.len(), 4 << 20);
        assert_eq!(mapping.reserved.len.get(), (4 << 20) + 2 * page);
        assert_eq!(
            mapping.reserved.start.addr().get() + page,
            mapping.ram.start.addr().get()
        );
    }

    #[test]
    fn what_cannot_be_mapped_leaves_no_reservation() {
        let backing = backing(4096);
        let refused = Mapping::new(&backing, 0, 8192).unwrap_err();
        assert!(matches!(refused, Error::OutsideBacking { .. }));
        let refused = Reservation::new(1 << 62, 0, 2 << 20).err();
        assert!(matches!(refused, Some(Error::Map { .. })));
        let refused = Reservation::new(u64::MAX - 4095, 0, 2 << 20).err();
        assert!(matches!(refused, Some(Error::Map { .. })));
    }
}
