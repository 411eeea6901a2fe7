//! Ranges: where RAM lies in the guest, checked before anything is created.
//!
//! Pure arithmetic: no I/O, no unsafe code. A [`GuestRange`] is never empty and never runs past
//! the end of the 64-bit address space, so no later module has to think about overflow.

mod guest_range;

use nix::unistd::{SysconfVar, sysconf};

pub(crate) use guest_range::check_disjoint;
pub use guest_range::{GuestRange, InvalidRange, RangePart, ram_around_hole};

/// The size of base pages in bytes.
pub(crate) fn base_page_size() -> u64 {
    // POSIX requires the variable; a system without it would have no page size at all.
    let size = sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .unwrap_or(4096);
    size.unsigned_abs()
}
