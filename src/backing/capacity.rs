//! What the system can hold, asked before anything is created: file systems, descriptors.

use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::sys::statvfs::{Statvfs, fstatvfs};

use super::error::Result;
use super::{file, hugetlb};
use crate::host::descriptors;
use crate::host::memory::{Demand, Kind, MemoryLimits};
use crate::options::{Backing, NodeSet, PageSize, Populate, RamOptions};
use crate::report::Note;
use crate::shortage::{ResourceLimit, Shortage};

/// Where POSIX shared memory objects are, on Linux.
#[cfg(target_os = "linux")]
const SHM: &str = "/dev/shm";

/// The size of a file system and what is free of it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    pub(super) total: u64,
    pub(super) free: u64,
}

impl Capacity {
    /// Nothing is known of a tmpfs without a limit, which says 0 blocks.
    pub(super) fn new(stat: &Statvfs) -> Option<Self> {
        let unit = stat.fragment_size();
        let total = stat.blocks().saturating_mul(unit);
        (total > 0).then(|| Self {
            total,
            free: stat.blocks_available().saturating_mul(unit),
        })
    }

    /// That it has not so many bytes more, of the file system of what is at a path.
    pub(super) fn shortage(self, needed: u64, path: Option<PathBuf>) -> Shortage {
        let limit = ResourceLimit::FileSystem {
            path,
            size: self.total,
        };
        Shortage::new(needed, self.free, limit)
    }
}

/// Refuses RAM that the file system of `file` can never hold, or, if it is to be populated, cannot
/// hold now: touching it would be SIGBUS.
pub(super) fn check_file_system(file: &impl AsFd, options: &RamOptions, size: u64) -> Result<()> {
    // A system whose shm objects have no file system has no capacity to check either.
    let stat = fstatvfs(file).ok();
    check(
        stat.as_ref().and_then(Capacity::new),
        size,
        lazily(options),
        options,
    )
}

/// As [`check_file_system`], for all POSIX shm of `sizes` together, before any of it is created.
#[cfg(target_os = "linux")]
pub(crate) fn check_posix_shm(parts: &[(&RamOptions, u64)]) -> Result<()> {
    let Ok(stat) = nix::sys::statvfs::statvfs(SHM) else {
        // Creating it says what is wrong.
        return Ok(());
    };
    let capacity = Capacity::new(&stat);
    let checked = || parts.iter().filter(|(options, _)| !options.is_unreserved());
    let Some((first, _)) = checked().next() else {
        return Ok(());
    };
    let sum = |populated: bool| {
        checked()
            .filter(|(options, _)| !populated || !lazily(options))
            .fold(0, |sum: u64, (_, size)| sum.saturating_add(*size))
    };
    check(capacity, sum(false), true, first)?;
    check(capacity, sum(true), false, first)
}

/// Elsewhere nobody knows where the objects are.
#[cfg(not(target_os = "linux"))]
pub(crate) fn check_posix_shm(_parts: &[(&RamOptions, u64)]) -> Result<()> {
    Ok(())
}

fn check(capacity: Option<Capacity>, size: u64, lazily: bool, options: &RamOptions) -> Result<()> {
    match capacity {
        Some(capacity)
            if !options.is_unreserved()
                && (size > capacity.total || !lazily && size > capacity.free) =>
        {
            Err(capacity.shortage(size, Some(SHM.into())).into())
        }
        _ => Ok(()),
    }
}

/// The note about a file system that holds the RAM, but not now.
pub(super) fn note(file: &impl AsFd, size: u64) -> Option<Note> {
    let capacity = Capacity::new(&fstatvfs(file).ok()?)?;
    (size > capacity.free).then(|| Note::Shortage(capacity.shortage(size, None)))
}

/// The notes about limits on memory that new RAM of these sizes may meet when it is used.
pub(crate) fn memory_notes(parts: &[(&RamOptions, u64)]) -> Vec<Note> {
    let mut demand = Demand::default();
    for (options, size) in parts {
        if let Some(kind) = kind(options) {
            demand.add(kind, *size);
        }
    }
    // Without a descriptor for that nothing can be built either.
    let limits = MemoryLimits::of_this_process().unwrap_or_default();
    let short = limits.too_small_for(&demand).into_iter();
    short.map(|short| Note::Shortage(short.into())).collect()
}

/// What pages the RAM will have; none for files on a disk, whose pages the kernel can drop.
fn kind(options: &RamOptions) -> Option<Kind> {
    match (options.backing(), options.page_size()) {
        (Backing::File(path), _) => file::memory_kind(path),
        (_, PageSize::Huge(size)) => Some(Kind::Huge {
            page_size: hugetlb::page_size(size).ok()?,
            reserving: true,
        }),
        _ => Some(Kind::Base(NodeSet::new())),
    }
}

/// Refuses more backings than there are descriptors for.
pub(crate) fn check_descriptors(needed: u64) -> Result<()> {
    match descriptors::left() {
        Some((left, limit)) if needed > left => {
            let limit = ResourceLimit::Descriptors { limit };
            Err(Shortage::new(needed, left, limit).into())
        }
        _ => Ok(()),
    }
}

pub(super) fn lazily(options: &RamOptions) -> bool {
    options.populate() == Populate::Lazy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::BackingError;
    use crate::options::Reserve;

    #[test]
    fn ram_must_fit_at_all_and_populated_ram_now() {
        let capacity = Some(Capacity {
            total: 100,
            free: 10,
        });
        let on = RamOptions::new();
        let off = RamOptions::new().with_reserve(Reserve::Off);
        for (size, lazily, fits) in [
            (100, true, true),
            (101, true, false),
            (10, false, true),
            (11, false, false),
        ] {
            let checked = check(capacity, size, lazily, &on);
            assert_eq!(checked.is_ok(), fits, "{size} {lazily}");
            assert!(check(capacity, size, lazily, &off).is_ok());
            assert!(check(None, size, lazily, &on).is_ok());
        }
    }

    #[test]
    fn more_descriptors_than_are_left_are_refused() {
        assert!(check_descriptors(1).is_ok());
        let refused = check_descriptors(u64::MAX);
        let Err(BackingError::Shortage(shortage)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(shortage.needed, u64::MAX);
        assert!(matches!(shortage.limit, ResourceLimit::Descriptors { .. }));
    }
}
