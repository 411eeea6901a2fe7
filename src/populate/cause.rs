//! Why a page could not be had, found out after the fact: the kernel only says that it could not.

use std::io;

use nix::errno::Errno;

use super::error::PopulateError;
use super::need;
use super::part::Part;
use super::watch::Watch;
use super::work::Failure;
use crate::host::file_system::Room;
use crate::host::memory::{Demand, MemoryLimits};
use crate::range::GuestRange;
use crate::shortage::{ResourceLimit, Shortage};

/// The cause of a failure, when `needed` bytes were still missing. To be called before anything is
/// given back.
pub(super) fn find(parts: &[Part], watch: &Watch, failure: Failure, needed: u64) -> PopulateError {
    let part = &parts[failure.part];
    match failure.error {
        PopulateError::Shortage { range, shortage } => {
            // Of all that is still missing, unless others have given something back by now.
            let all = need::shortage(parts, watch);
            let shortage = all.map_or(shortage, |(_, short)| Box::new(short.into()));
            PopulateError::Shortage { range, shortage }
        }
        PopulateError::Allocate { range, ref source }
        | PopulateError::Map { range, ref source } => truncated(part, range)
            .or_else(|| short(part, range, needed, source))
            .unwrap_or(failure.error),
        other => other,
    }
}

/// Whether another process truncated the backing of the part.
pub(super) fn truncated(part: &Part, range: GuestRange) -> Option<PopulateError> {
    let (end, now) = (part.backing().end(), part.backing().truncated_to().ok()??);
    Some(PopulateError::Truncated { range, end, now })
}

/// What is short of the `needed` bytes, when this range could not be had.
fn short(
    part: &Part,
    range: GuestRange,
    needed: u64,
    source: &io::Error,
) -> Option<PopulateError> {
    let shortage = pool_empty(part, needed)
        .or_else(|| file_system_full(part, needed, range.size(), source))
        .or_else(|| not_enough(part, needed, range.size()))?;
    Some(PopulateError::Shortage {
        range,
        shortage: Box::new(shortage),
    })
}

fn pool_empty(part: &Part, needed: u64) -> Option<Shortage> {
    let backing = part.backing();
    let page_size = backing.page_size();
    let pages = needed.div_ceil(page_size);
    let short = backing
        .is_hugetlb()
        .then(|| Shortage::of_pool(page_size, pages));
    short?.ok()?
}

fn file_system_full(part: &Part, needed: u64, len: u64, source: &io::Error) -> Option<Shortage> {
    let room = Room::of(part.backing())?;
    let full = source.raw_os_error() == Some(Errno::ENOSPC as i32) || room.free < len;
    let size = room.total;
    let limit = ResourceLimit::FileSystem { path: None, size };
    full.then(|| Shortage::new(needed, room.free, limit))
}

/// Without memory it was refused by what limits that, though it was not looked at before.
fn not_enough(part: &Part, needed: u64, len: u64) -> Option<Shortage> {
    let demand = Demand::of(part.pages?, len);
    let limits = MemoryLimits::of_this_process().ok()?;
    let mut short = demand.shortage(&limits.bounds(&demand, 0))?;
    short.needed = needed.max(short.needed);
    Some(short.into())
}
