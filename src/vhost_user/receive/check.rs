//! The checks of a message's numbers, before any of its descriptors is looked at.

use super::error::ReceiveError;
use super::policy::ReceivePolicy;
use super::wire::ReceivedRegion;
use crate::range::{InvalidRange, RangePart};
use crate::region::MemoryError;

impl ReceivedRegion {
    /// It was not mapped, for this reason; `index` is its place in the message.
    pub(super) fn refused(&self, index: usize, cause: impl Into<MemoryError>) -> ReceiveError {
        ReceiveError::region(index, (self.guest_addr, self.size), cause)
    }

    /// One of its numbers.
    fn part(&self, part: RangePart) -> u64 {
        match part {
            RangePart::Address => self.guest_addr.0,
            RangePart::UserAddress => self.user_addr,
            RangePart::Size => self.size,
            RangePart::Offset => self.mmap_offset,
        }
    }
}

/// Checks everything about a message that can be known from its numbers; `held` are the regions
/// that stay.
pub(super) fn check_numbers(
    held: &[ReceivedRegion],
    new: &[ReceivedRegion],
    descriptors: usize,
    policy: &ReceivePolicy,
) -> Result<(), ReceiveError> {
    if new.is_empty() {
        return Err(ReceiveError::NoRegions);
    }
    if descriptors != new.len() {
        return Err(ReceiveError::Descriptors {
            regions: new.len(),
            descriptors,
        });
    }
    let (regions, limit) = (held.len() + new.len(), policy.mem_slots());
    if regions > limit {
        return Err(ReceiveError::TooManyRegions { regions, limit });
    }
    for (index, region) in new.iter().enumerate() {
        check_region(index, region)?;
    }
    let size = held.iter().chain(new).map(|r| u128::from(r.size)).sum();
    let limit = policy.max_size();
    if size > u128::from(limit) {
        return Err(ReceiveError::TooMuchMemory { size, limit });
    }
    check_disjoint(held, new, RangePart::Address)?;
    check_disjoint(held, new, RangePart::UserAddress)
}

fn check_region(index: usize, region: &ReceivedRegion) -> Result<(), ReceiveError> {
    let size = region.size;
    if size == 0 {
        let cause = InvalidRange::Empty {
            start: region.guest_addr,
        };
        return Err(region.refused(index, cause));
    }
    for (part, limit) in [
        (RangePart::Address, u64::MAX),
        (RangePart::UserAddress, u64::MAX),
        // What off_t holds.
        (RangePart::Offset, i64::MAX.unsigned_abs()),
    ] {
        let start = region.part(part);
        let end = start.checked_add(size);
        if end.is_none_or(|end| end > limit) {
            return Err(ReceiveError::Wraps {
                index,
                guest_addr: region.guest_addr,
                part,
                start,
                size,
                limit,
            });
        }
    }
    Ok(())
}

/// Checks that no two regions overlap; none of them wraps, and those that are held do not overlap.
fn check_disjoint(
    held: &[ReceivedRegion],
    new: &[ReceivedRegion],
    part: RangePart,
) -> Result<(), ReceiveError> {
    let held = held.iter().map(|region| (region, None));
    let new = new
        .iter()
        .enumerate()
        .map(|(at, region)| (region, Some(at)));
    let mut all: Vec<_> = held
        .chain(new)
        .map(|(region, index)| (region.part(part), region.size, index))
        .collect();
    all.sort_unstable();
    for pair in all.windows(2) {
        let (low, high) = (pair[0], pair[1]);
        if low.0 + low.1 <= high.0 {
            continue;
        }
        // The later in the message is the culprit; at least one of them is in it.
        let (other, culprit) = if low.2 < high.2 {
            (low, high)
        } else {
            (high, low)
        };
        return Err(ReceiveError::Overlap {
            index: culprit.2.unwrap_or_default(),
            part,
            range: (culprit.0, culprit.1),
            other: other.2,
            other_range: (other.0, other.1),
        });
    }
    Ok(())
}

/// Checks that a region consists of whole pages of its file.
pub(super) fn check_pages(
    index: usize,
    region: &ReceivedRegion,
    page_size: u64,
) -> Result<(), ReceiveError> {
    [RangePart::Address, RangePart::Offset, RangePart::Size]
        .into_iter()
        .try_for_each(|part| part.check_aligned(region.part(part), page_size))
        .map_err(|cause| region.refused(index, cause))
}
