//! The parts of a range that are each in one region, and what is done to each.

use std::io;
use std::ops::Range;

use nix::errno::Errno;

use super::discarded::{Discarded, split};
use super::error::DiscardError;
use crate::backing::{ShmBacking, base_page_size};
use crate::host::transparent;
use crate::memory::GuestMemoryShm;
use crate::options::Access;
use crate::ram::Ram;
use crate::range::{GuestRange, inwards};

/// The part of a range that is in one region.
#[derive(Debug)]
pub(super) struct Piece<'a> {
    pub(super) ram: &'a Ram,
    /// Byte offsets in the region, never empty.
    pub(super) inside: Range<u64>,
}

/// The pieces that a range consists of, in order, if all of it is RAM.
pub(super) fn pieces<B>(
    memory: &GuestMemoryShm<B>,
    range: GuestRange,
) -> Result<Vec<Piece<'_>>, DiscardError> {
    let pieces = memory.pieces(range);
    let pieces = pieces.map_err(|first| DiscardError::NotRam { range, first })?;
    pieces.iter().try_for_each(|(ram, _)| ram.check_pages())?;
    let pieces = pieces.into_iter();
    Ok(pieces.map(|(ram, inside)| Piece { ram, inside }).collect())
}

impl Piece<'_> {
    /// Refuses what the kernel would refuse, and changes nothing.
    pub(super) fn check(&self) -> Result<(), DiscardError> {
        let range = self.ram.in_guest(self.inside.clone());
        if self.ram.backing.map_options().access != Access::ReadWrite {
            return Err(DiscardError::ReadOnly { range });
        }
        // What is in no whole page is not discarded either way.
        let (whole, _) = split(self.inside.clone(), self.ram.backing.page_size());
        let locked = self.ram.mapping.is_locked(whole);
        let cannot_look = |source| DiscardError::CannotLook {
            range,
            freed: 0,
            source,
        };
        if locked.map_err(cannot_look)? {
            return Err(DiscardError::Locked { range });
        }
        let kind = self.ram.backing.kind();
        if !can_punch_holes(&self.ram.backing).map_err(cannot_look)? {
            return Err(DiscardError::NoHoles { range, kind });
        }
        Ok(())
    }

    /// Gives back the whole pages of it, after so many bytes of `range`.
    pub(super) fn discard(
        &self,
        range: GuestRange,
        freed: u64,
    ) -> Result<Discarded, DiscardError> {
        let (whole, mut discarded) = split(self.inside.clone(), self.ram.backing.page_size());
        if whole.is_empty() {
            return Ok(discarded);
        }
        let removed = self.ram.remove(whole.clone());
        removed.map_err(|source| DiscardError::Failed {
            range,
            freed,
            source,
        })?;

        // A huge page of shmem that is not whole in the range was split, or, if it could not be,
        // zeroed: what is still there is at the edges.
        if self.ram.backing.is_on_tmpfs() {
            let (head, tail) = edges(self.ram.in_backing(whole), transparent_huge_page());
            for (edge, kept) in [
                (head, &mut discarded.kept_head),
                (tail, &mut discarded.kept_tail),
            ] {
                let left = self.ram.backing.allocated_in(edge);
                let left = left.map_err(|source| DiscardError::CannotLook {
                    range,
                    freed: freed + discarded.freed,
                    source,
                })?;
                *kept += left;
                discarded.freed -= left;
            }
        }
        Ok(discarded)
    }
}

/// The parts at the ends of a range of offsets that are no whole huge pages; either may be empty.
fn edges(range: Range<u64>, huge: u64) -> (Range<u64>, Range<u64>) {
    let whole = inwards(range.clone(), huge);
    (range.start..whole.start, whole.end..range.end)
}

/// The size in bytes of the largest transparent huge page; of a base page if there are none.
pub(super) fn transparent_huge_page() -> u64 {
    let size = transparent::page_size().filter(|size| size.is_power_of_two());
    size.unwrap_or_else(base_page_size)
}

/// Whether holes can be punched into the file, found out by punching one where it has nothing.
fn can_punch_holes(backing: &ShmBacking) -> io::Result<bool> {
    /// So far past its end that it is still past it when the file grows meanwhile.
    const FAR: u64 = 1 << 30;
    if backing.is_on_tmpfs() || backing.is_hugetlb() {
        return Ok(true);
    }
    let page = backing.page_size();
    let past = backing.file().metadata()?.len().next_multiple_of(page) + FAR;
    match backing.punch(past..past + page) {
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Ok(false),
        // What else stands in the way (a largest file size) says nothing about holes.
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_what_is_no_whole_huge_page() {
        for (range, head, tail) in [
            (0..200, 0..0, 200..200),
            (50..250, 50..100, 200..250),
            (120..180, 120..180, 180..180),
            (100..150, 100..100, 100..150),
            (150..200, 150..200, 200..200),
        ] {
            assert_eq!(edges(range.clone(), 100), (head, tail), "{range:?}");
        }
    }
}
