//! Why a page could not be had, found out after the fact: the kernel only says that it could not.

use std::fs;

use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;

use super::engine::Failure;
use super::plan::{Part, Plan};
use crate::backing::check_pool;
use crate::error::{Error, PopulateError};
use crate::host::limits::ControlGroup;
use crate::layout::GuestRange;

/// The cause of a failure, when `needed` bytes were still missing. To be called before anything is
/// given back.
pub(super) fn find(plan: &Plan, failure: Failure, needed: u64) -> PopulateError {
    let part = &plan.parts[failure.chunk.part];
    let range = part.in_guest(&failure.chunk.range);
    let len = failure.chunk.range.end - failure.chunk.range.start;
    truncated(part, range)
        .or_else(|| pool_empty(part, range, needed))
        .or_else(|| file_system_full(part, range, needed, len, &failure))
        .or_else(|| control_group(range, needed, len))
        .or_else(|| out_of_memory(range, needed, len))
        .unwrap_or(PopulateError::System {
            range,
            doing: failure.doing,
            source: failure.source,
        })
}

/// Whether somebody truncated the backing of the part.
pub(super) fn truncated(part: &Part, range: GuestRange) -> Option<PopulateError> {
    match part.backing().check_not_truncated() {
        Err(Error::BackingTruncated { end, now }) => {
            Some(PopulateError::Truncated { range, end, now })
        }
        _ => None,
    }
}

fn pool_empty(part: &Part, range: GuestRange, needed: u64) -> Option<PopulateError> {
    let backing = part.backing();
    if !backing.is_hugetlb() {
        return None;
    }
    let page_size = backing.page_size();
    match check_pool(needed.div_ceil(page_size), page_size) {
        Err(Error::HugePoolShort {
            needed, available, ..
        }) => Some(PopulateError::HugePoolEmpty {
            range,
            needed,
            available,
            page_size,
        }),
        _ => None,
    }
}

fn file_system_full(
    part: &Part,
    range: GuestRange,
    needed: u64,
    len: u64,
    failure: &Failure,
) -> Option<PopulateError> {
    let stat = fstatvfs(part.backing()).ok()?;
    let unit = stat.fragment_size();
    let size = stat.blocks().saturating_mul(unit);
    let free = stat.blocks_available().saturating_mul(unit);
    // A memfd is on a tmpfs without a limit, which says 0.
    let limited = size > 0;
    let full = failure.source.raw_os_error() == Some(Errno::ENOSPC as i32) || free < len;
    (limited && full).then_some(PopulateError::FileSystemFull {
        range,
        needed,
        size,
        free,
    })
}

fn control_group(range: GuestRange, needed: u64, len: u64) -> Option<PopulateError> {
    let group = ControlGroup::tightest()?;
    let left = group.left();
    (left < len).then(|| PopulateError::ControlGroup {
        range,
        needed,
        group: group.name.into(),
        left,
    })
}

fn out_of_memory(range: GuestRange, needed: u64, len: u64) -> Option<PopulateError> {
    let available = available_memory(&fs::read_to_string("/proc/meminfo").ok()?)?;
    (available < len).then_some(PopulateError::OutOfMemory {
        range,
        needed,
        available,
    })
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let value = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        let meminfo = "MemTotal:       24654560 kB\nMemAvailable:   23068672 kB\n";
        assert_eq!(available_memory(meminfo), Some(23_068_672 << 10));
        assert_eq!(available_memory("MemTotal: 1 kB\n"), None);
    }
}
