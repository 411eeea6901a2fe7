//! Huge pages of a pool: whether the kernel offers a size, and whether enough are left.

use std::io;

use nix::sys::memfd::MFdFlags;

use super::error::{BackingError, Result};
use crate::host::memory::{Demand, MemoryLimits, Pages};
use crate::host::pools;
use crate::shortage::Shortage;

/// The page size in bytes that was asked for, or the default one, if the kernel offers it.
pub(super) fn page_size(asked: Option<u64>) -> Result<u64> {
    let offered = pools::page_sizes().map_err(unreadable)?;
    // Without any pool there is no default either, and no size is offered.
    let page_size = asked.or_else(pools::default_page_size).unwrap_or_default();
    if !offered.contains(&page_size) {
        return Err(BackingError::NoSuchHugePageSize { page_size, offered });
    }
    Ok(page_size)
}

/// The flags of memfd_create(2) for pages of this size, a power of two.
pub(super) fn memfd_flags(page_size: u64) -> MFdFlags {
    // The base-2 logarithm of the size stands in the upper bits of the flags.
    const MFD_HUGE_SHIFT: u32 = 26;
    MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(page_size.ilog2() << MFD_HUGE_SHIFT)
}

/// Checks that `needed` pages of `page_size` bytes can still be had.
pub(crate) fn check_pool(needed: u64, page_size: u64) -> Result<()> {
    match Shortage::of_pool(page_size, needed).map_err(unreadable)? {
        Some(shortage) => Err(shortage.into()),
        None => Ok(()),
    }
}

/// Checks that the control groups of this process leave `needed` pages of `page_size` bytes, and
/// as much to reserve.
pub(crate) fn check_groups(needed: u64, page_size: u64) -> Result<()> {
    let pages = Pages::Huge {
        page_size,
        reserving: true,
    };
    let demand = Demand::of(pages, needed.saturating_mul(page_size));
    let limits = MemoryLimits::of_this_process().map_err(unreadable)?;
    match demand.shortage(&limits.bounds(&demand, 0)) {
        Some(short) => Err(Shortage::from(short).into()),
        None => Ok(()),
    }
}

/// The pools cannot be read: no descriptor is left, or /sys is masked.
fn unreadable(source: io::Error) -> BackingError {
    match Shortage::of_descriptors(&source) {
        Some(shortage) => shortage.into(),
        None => BackingError::HugePoolsUnreadable { source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_size_goes_into_the_flags_as_a_logarithm() {
        let bits = memfd_flags(2 << 20).bits();
        assert_eq!((bits >> 26, bits & 4), (21, 4));
        assert_eq!(memfd_flags(1 << 30).bits() >> 26, 30);
    }
}
