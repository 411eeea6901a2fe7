//! Ranges of host addresses, and the one conversion of sizes.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::logs;

/// Where a mapping is. Safe to have and to pass on; what is there is accessed through raw
/// pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostAddr(NonNull<u8>);

impl HostAddr {
    /// The address of what another part of the process has mapped.
    #[cfg(feature = "kvm")]
    pub(crate) fn new(addr: NonNull<u8>) -> Self {
        Self(addr)
    }

    pub(super) fn of(start: NonNull<c_void>) -> Self {
        Self(start.cast())
    }

    #[inline]
    pub(crate) fn as_ptr(self) -> *mut u8 {
        self.0.as_ptr()
    }
}

/// A range of host addresses.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) start: NonNull<c_void>,
    pub(super) len: NonZeroUsize,
}

// SAFETY: an address is a number; to access what is there takes unsafe code elsewhere.
unsafe impl Send for HostAddr {}
// SAFETY: as above.
unsafe impl Sync for HostAddr {}

impl Span {
    /// Address space that nothing uses, inaccessible and without memory.
    pub(super) fn reserve(len: NonZeroUsize) -> nix::Result<Self> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses unused addresses, and PROT_NONE pages
        // cannot be accessed at all.
        let start = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, flags) }?;
        Ok(Self { start, len })
    }

    pub(super) fn unmap(self) {
        // SAFETY: spans are only made of address space that this module mapped and still owns (no
        // failed MAP_FIXED has torn a hole into it, see `rehearse`), and are unmapped only when
        // their owner is dropped or trims what it never hands out: no pointer into them is in use.
        // They hold whole hugetlb mappings, so the length needs no rounding to huge pages.
        let answer = unsafe { munmap(self.start, self.len.get()) };
        if let Err(errno) = answer {
            logs::error!(
                "cannot unmap {:#x} bytes at {:p}: {errno}",
                self.len,
                self.start
            );
        }
    }

    /// `len` bytes, `at` bytes into the span.
    pub(super) fn part(self, at: usize, len: usize) -> Self {
        // Both stay inside the span: the callers see to that.
        let start = self.start.as_ptr().map_addr(|addr| addr + at);
        match (NonNull::new(start), NonZeroUsize::new(len)) {
            (Some(start), Some(len)) => Self { start, len },
            _ => unreachable!("a part of a mapping is neither null nor empty"),
        }
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
