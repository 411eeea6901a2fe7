//! Huge pages of a pool: which sizes the kernel offers, and whether enough are left
//! (`/sys/kernel/mm/hugepages`, Documentation/admin-guide/mm/hugetlbpage.rst).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::memfd::MFdFlags;

use crate::error::{Error, Result};
use crate::host::meminfo;
use crate::host::memory::{Demand, Kind, MemoryLimits};
use crate::shortage::{ResourceLimit, Shortage};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The page size in bytes that was asked for, or the default one, if the kernel offers it.
pub(super) fn page_size(asked: Option<u64>) -> Result<u64> {
    let offered = offered_sizes()?;
    // Without any pool there is no default either, and no size is offered.
    let page_size = asked.or_else(default_size).unwrap_or_default();
    if !offered.contains(&page_size) {
        return Err(Error::NoSuchHugePageSize { page_size, offered });
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
///
/// Others may take them right after; the reservation at mmap time is what decides, this gives the
/// clear answer beforehand.
pub(crate) fn check_pool(needed: u64, page_size: u64) -> Result<()> {
    let pool = Pool::read(page_size)?;
    if needed > pool.available() {
        let limit = ResourceLimit::HugePages {
            page_size,
            free: pool.free,
            reserved: pool.reserved,
        };
        let bytes = |pages: u64| pages.saturating_mul(page_size);
        return Err(Shortage::new(bytes(needed), bytes(pool.available()), limit).into());
    }
    Ok(())
}

/// Checks that the control groups of this process leave `needed` pages of `page_size` bytes, and
/// their promise.
pub(crate) fn check_groups(needed: u64, page_size: u64) -> Result<()> {
    let kind = Kind::Huge {
        page_size,
        reserving: true,
    };
    let demand = Demand::of(kind, needed.saturating_mul(page_size));
    let limits = MemoryLimits::of_this_process().map_err(unreadable)?;
    match demand.shortage(&limits.bounds(&demand, 0)) {
        Some(short) => Err(Shortage::from(short).into()),
        None => Ok(()),
    }
}

/// The state of a pool, in pages.
struct Pool {
    free: u64,
    reserved: u64,
    surplus: u64,
    overcommit: u64,
}

impl Pool {
    fn read(page_size: u64) -> Result<Self> {
        let dir = pool_dir(page_size);
        let number = |name: &str| {
            let text = fs::read_to_string(dir.join(name)).map_err(unreadable)?;
            let number = text.trim().parse();
            number.map_err(|_| unreadable(io::ErrorKind::InvalidData.into()))
        };
        Ok(Self {
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
            surplus: number("surplus_hugepages")?,
            overcommit: number("nr_overcommit_hugepages")?,
        })
    }

    /// Pages that a new mapping can reserve: what is free and not promised, and what the kernel
    /// may still add beyond the pool.
    fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved) + self.overcommit.saturating_sub(self.surplus)
    }
}

fn pool_dir(page_size: u64) -> PathBuf {
    Path::new(POOLS).join(format!("hugepages-{}kB", page_size / 1024))
}

/// The sizes in bytes that the kernel has pools for, smallest first; none without huge pages.
fn offered_sizes() -> Result<Vec<u64>> {
    let dirs = match fs::read_dir(POOLS) {
        Ok(dirs) => dirs,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut sizes = Vec::new();
    for dir in dirs {
        // A list that breaks off is no list without the rest.
        let name = dir.map_err(unreadable)?.file_name();
        let kib = name
            .to_str()
            .and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB"));
        if let Some(Ok(kib)) = kib.map(str::parse::<u64>) {
            sizes.push(kib * 1024);
        }
    }
    sizes.sort_unstable();
    Ok(sizes)
}

/// What is there cannot be known: no more descriptors, or a masked /sys.
fn unreadable(source: io::Error) -> Error {
    match Shortage::of_descriptors(&source) {
        Some(shortage) => shortage.into(),
        None => Error::HugePoolUnreadable { source },
    }
}

fn default_size() -> Option<u64> {
    meminfo::value(&fs::read_to_string("/proc/meminfo").ok()?, "Hugepagesize")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overcommitted_pages_count_and_reserved_ones_do_not() {
        let pool = |free, reserved, surplus, overcommit| Pool {
            free,
            reserved,
            surplus,
            overcommit,
        };
        assert_eq!(pool(10, 4, 0, 0).available(), 6);
        assert_eq!(pool(10, 4, 1, 3).available(), 8);
        assert_eq!(pool(0, 0, 5, 3).available(), 0);
    }

    #[test]
    fn the_page_size_goes_into_the_flags_as_a_logarithm() {
        let bits = memfd_flags(2 << 20).bits();
        assert_eq!((bits >> 26, bits & 4), (21, 4));
        assert_eq!(memfd_flags(1 << 30).bits() >> 26, 30);
    }
}
