//! Why a page could not be had, found out after the fact: the kernel only says that it could not.

use std::io;

use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;

use super::engine::{Failure, Step, Why};
use super::need;
use super::plan::{Part, Plan};
use super::work::Looking;
use crate::backing::{BackingError, check_pool};
use crate::error::PopulateError;
use crate::host::memory::{Demand, MemoryLimits};
use crate::host::nodes;
use crate::range::GuestRange;
use crate::shortage::{ResourceLimit, Shortage};

/// The cause of a failure, when `needed` bytes were still missing. To be called before anything is
/// given back.
pub(super) fn find(plan: &Plan, looking: &Looking, failure: Failure, needed: u64) -> PopulateError {
    let part = &plan.parts[failure.chunk.part];
    let range = part.in_guest(&failure.chunk.range);
    let len = failure.chunk.range.end - failure.chunk.range.start;
    let (step, source) = match failure.why {
        Why::Refused(step, source) => (step, source),
        Why::Short(piece) => {
            // Of all that is still missing, unless others have given something back by now.
            let all = looking.shortage(&plan.parts);
            let shortage = all.map_or(piece, |(_, shortage)| shortage);
            return PopulateError::short(range, shortage);
        }
    };
    truncated(part, range)
        .or_else(|| pool_empty(part, range, needed))
        .or_else(|| file_system_full(part, range, needed, len, &source))
        .or_else(|| not_enough(part, range, needed, len))
        .unwrap_or(match step {
            Step::Allocate => PopulateError::Allocate { range, source },
            Step::Map => PopulateError::Map { range, source },
        })
}

/// Whether somebody truncated the backing of the part.
pub(super) fn truncated(part: &Part, range: GuestRange) -> Option<PopulateError> {
    match part.backing().check_not_truncated() {
        Err(BackingError::Truncated { end, now }) => {
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
        Err(BackingError::Shortage(shortage))
            if matches!(shortage.limit, ResourceLimit::HugePages { .. }) =>
        {
            Some(PopulateError::Shortage { range, shortage })
        }
        _ => None,
    }
}

fn file_system_full(
    part: &Part,
    range: GuestRange,
    needed: u64,
    len: u64,
    source: &io::Error,
) -> Option<PopulateError> {
    let stat = fstatvfs(part.backing()).ok()?;
    let unit = stat.fragment_size();
    let size = stat.blocks().saturating_mul(unit);
    let free = stat.blocks_available().saturating_mul(unit);
    // A memfd is on a tmpfs without a limit, which says 0.
    let limited = size > 0;
    let full = source.raw_os_error() == Some(Errno::ENOSPC as i32) || free < len;
    let limit = ResourceLimit::FileSystem { path: None, size };
    (limited && full).then(|| PopulateError::short(range, Shortage::new(needed, free, limit)))
}

/// Without memory it was refused by what limits that, though it was not looked at before.
fn not_enough(part: &Part, range: GuestRange, needed: u64, len: u64) -> Option<PopulateError> {
    let kind = need::kind(part, nodes::only_allowed())?;
    let demand = Demand::of(kind, len);
    let limits = MemoryLimits::of_this_process().ok()?;
    let mut shortage = demand.shortage(&limits.bounds(&demand, 0))?;
    shortage.needed = needed.max(shortage.needed);
    Some(PopulateError::short(range, shortage))
}
