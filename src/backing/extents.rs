//! Which parts of a backing are allocated.
//!
//! On a tmpfs cachestat(2) counts the pages of a range. lseek(2), which other files
//! need, would take pages for holes that fallocate(2) allocated and no process has touched yet
//! ([`Populate::Allocate`](crate::Populate::Allocate)), and would walk over all of them each time.

use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use super::kind::BLOCK;
use super::shm_backing::ShmBacking;
use crate::host::descriptors::reopened;
use crate::host::{base_page_size, cached};
use crate::range::RangeSet;

/// Below so many pages of resolution, runs of allocated pages are measured, not stepped through: a
/// call costs as much as the kernel needs to walk over this many pages.
const FINE: u64 = 8;

/// The most that the kernel is asked about at once, in bytes: it takes 20 ns or so for each page
/// that is allocated, and little for those that are not.
const CHUNK: u64 = 128 << 20;

/// What `st_blocks` tells about a backing as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allocation {
    Nothing,
    Everything,
    /// So many bytes of it, and nothing besides.
    Some(u64),
    /// At most so many bytes: some may be in parts of the file outside the backing.
    AtMost(u64),
}

impl ShmBacking {
    /// What is allocated of it as a whole.
    pub(crate) fn allocation(&self) -> io::Result<Allocation> {
        let metadata = self.file().metadata()?;
        let bytes = metadata.blocks() * BLOCK;
        if bytes == 0 {
            return Ok(Allocation::Nothing);
        }
        if self.start() > 0 || metadata.len() != self.end() {
            return Ok(Allocation::AtMost(bytes));
        }
        // A file on a disk has blocks besides those of its contents.
        let exact = self.is_on_tmpfs() || self.is_hugetlb();
        if exact && bytes >= self.size() {
            return Ok(Allocation::Everything);
        }
        Ok(Allocation::Some(bytes.min(self.size())))
    }

    /// How many bytes of the range are allocated. Not for hugetlb, where the kernel does not
    /// report it.
    pub(crate) fn allocated_in(&self, range: Range<u64>) -> io::Result<u64> {
        if self.is_on_tmpfs()
            && let Some(bytes) = cached(self, range.clone())?
        {
            return Ok(bytes);
        }
        let data = self.data();
        let parts = data.parts(range);
        parts
            .map(|part| part.map(|part| part.end - part.start))
            .sum()
    }

    /// What is data in its file, and what are holes.
    pub(crate) fn data(&self) -> Data<'_> {
        Data {
            own: reopened(self.file()).ok(),
            shared: self.file(),
        }
    }

    /// The parts of the range that are allocated, sorted and merged, in steps of `step` bytes from
    /// its start, rounded outwards. Not for hugetlb, where the kernel does not report it.
    ///
    /// `step` must be a multiple of the page size.
    pub(crate) fn extents_in(&self, range: Range<u64>, step: u64) -> io::Result<RangeSet> {
        let mut steps = Steps {
            range,
            step,
            found: RangeSet::default(),
        };
        if self.counts_pages()? {
            self.count(&mut steps)?;
        } else {
            self.seek(&mut steps)?;
        }
        Ok(steps.found)
    }

    /// Whether its pages can be counted, untouched ones too (cachestat(2), Linux 6.5).
    pub(crate) fn counts_pages(&self) -> io::Result<bool> {
        Ok(self.is_on_tmpfs() && cached(self, 0..base_page_size())?.is_some())
    }

    /// Finds the extents by counting pages.
    fn count(&self, steps: &mut Steps) -> io::Result<()> {
        let (step, end) = (steps.step, steps.range.end);
        let page = base_page_size();
        let mut at = steps.range.start;
        while at < end {
            if step < FINE * page {
                at = self.count_run(at, steps)?;
            } else if self.count_in(at..at + page)? > 0 {
                // One page suffices: the whole step is reported.
                steps.add(at..at + page);
                at = steps.up(at + page);
                continue;
            }
            at = self.skip_hole(at, steps)?;
            if at < end {
                steps.add(at..at + page);
                at = steps.up(at + page);
            }
        }
        Ok(())
    }

    /// Adds the run of allocated pages at `at`, as far as it is whole steps; gives its end.
    fn count_run(&self, mut at: u64, steps: &mut Steps) -> io::Result<u64> {
        let (step, end) = (steps.step, steps.range.end);
        let mut window = step;
        while at < end {
            let asked = at..at.saturating_add(window).min(end);
            let len = asked.end - asked.start;
            if self.count_in(asked.clone())? >= len {
                at = asked.end;
                steps.add(asked);
                window = window.saturating_mul(2).min(CHUNK.next_multiple_of(step));
            } else if window > step {
                window = step;
            } else {
                break;
            }
        }
        Ok(at)
    }

    /// The first step from `at` on that has an allocated page, or the end.
    fn skip_hole(&self, mut at: u64, steps: &Steps) -> io::Result<u64> {
        let (step, end) = (steps.step, steps.range.end);
        let mut window = step;
        let mut after = at;
        while at < end {
            after = at.saturating_add(window).min(end);
            if self.count_in(at..after)? > 0 {
                break;
            }
            at = after;
            window = window.saturating_mul(2);
        }
        // It is in at..after.
        while after - at > step {
            let middle = steps.down(at + (after - at) / 2).max(at + step);
            if self.count_in(at..middle)? > 0 {
                after = middle;
            } else {
                at = middle;
            }
        }
        Ok(at)
    }

    fn count_in(&self, range: Range<u64>) -> io::Result<u64> {
        Ok(cached(self, range)?.unwrap_or(0))
    }

    /// Finds the extents by looking for data.
    fn seek(&self, steps: &mut Steps) -> io::Result<()> {
        let data = self.data();
        let mut rest = steps.range.clone();
        while let Some(start) = data.start_in(&rest)? {
            let end = if steps.step < FINE * base_page_size() {
                data.end_in(start..rest.end)?
            } else {
                start + 1
            };
            rest.start = steps.up(end);
            steps.add(start..end);
        }
        Ok(())
    }
}

/// Extents as they are found, from the start of a range to its end.
struct Steps {
    range: Range<u64>,
    step: u64,
    found: RangeSet,
}

impl Steps {
    /// The start of the step that has the offset.
    fn down(&self, offset: u64) -> u64 {
        offset - (offset - self.range.start) % self.step
    }

    /// The end of the last step that begins below the offset.
    fn up(&self, offset: u64) -> u64 {
        let steps = (offset - self.range.start).div_ceil(self.step);
        let end = steps.checked_mul(self.step);
        let end = end.and_then(|end| end.checked_add(self.range.start));
        end.unwrap_or(u64::MAX).min(self.range.end)
    }

    fn add(&mut self, part: Range<u64>) {
        self.found.insert(self.down(part.start)..self.up(part.end));
    }
}

/// What is data in a file, and what are holes (lseek(2)).
///
/// lseek(2) moves the position of the open file description, which is shared with every process
/// that was sent the descriptor. This crate never uses the position, but such a process may, so a
/// description of its own is opened. Where that is not allowed (POSIX shm is created with mode 0,
/// which stops all but root) the shared one is used.
pub(crate) struct Data<'a> {
    own: Option<File>,
    shared: &'a File,
}

impl Data<'_> {
    /// The parts of a range that are data, each looked for when the previous one has been used.
    pub(crate) fn parts(
        &self,
        mut rest: Range<u64>,
    ) -> impl Iterator<Item = io::Result<Range<u64>>> {
        let mut next = move || {
            let Some(start) = self.start_in(&rest)? else {
                return Ok(None);
            };
            rest.start = self.end_in(start..rest.end)?;
            Ok(Some(start..rest.start))
        };
        iter::from_fn(move || next().transpose())
    }

    /// Where data begins in a range, if it has any.
    fn start_in(&self, range: &Range<u64>) -> io::Result<Option<u64>> {
        if range.is_empty() {
            return Ok(None);
        }
        let start = self.seek(range.start, Whence::SeekData)?;
        Ok(start.filter(|start| *start < range.end))
    }

    /// Where the data ends with which a range begins.
    fn end_in(&self, range: Range<u64>) -> io::Result<u64> {
        let end = self.seek(range.start, Whence::SeekHole)?;
        Ok(end.map_or(range.end, |end| end.min(range.end)))
    }

    fn seek(&self, from: u64, whence: Whence) -> io::Result<Option<u64>> {
        let file = self.own.as_ref().unwrap_or(self.shared);
        let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        match lseek64(file, from, whence) {
            Ok(found) => Ok(Some(found.unsigned_abs())),
            // No data any more up to the end of the file, or the file ends before.
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_counted_from_the_start_and_cut_at_the_end() {
        let mut steps = Steps {
            range: 3..50,
            step: 10,
            found: RangeSet::default(),
        };
        assert_eq!((steps.down(3), steps.down(12), steps.down(13)), (3, 3, 13));
        assert_eq!((steps.up(3), steps.up(4), steps.up(13)), (3, 13, 13));
        assert_eq!(steps.up(49), 50);
        steps.add(4..5);
        steps.add(12..13);
        steps.add(30..31);
        steps.add(33..34);
        steps.add(49..50);
        assert_eq!(steps.found.iter().collect::<Vec<_>>(), [3..13, 23..50]);
    }

    #[test]
    fn a_step_larger_than_any_offset_is_the_range() {
        let steps = Steps {
            range: 4096..8192,
            step: u64::MAX,
            found: RangeSet::default(),
        };
        assert_eq!((steps.down(8000), steps.up(5000)), (4096, 8192));
    }
}
