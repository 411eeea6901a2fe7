//! What is done to a chunk: its pages allocated, and mapped.

use std::ops::Range;
use std::sync::PoisonError;

use super::error::PopulateError;
use super::need;
use super::part::Part;
use super::plan::{Chunk, GRAIN, Plan};
use super::watch::{Watch, Wish};
use crate::options::Populate;
use crate::pool::Stop;

/// Why pages of a part could not be had, as far as the kernel tells.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) part: usize,
    pub(super) error: PopulateError,
}

impl Plan {
    /// Does to the chunk what its part asks for, in pieces for which there is memory, unless it is
    /// to stop; gives what is done of it, in bytes.
    pub(super) fn populate(
        &self,
        chunk: &Chunk,
        watch: &Watch,
        stop: &Stop,
    ) -> Result<u64, Failure> {
        let part = &self.parts[chunk.part];
        let failed = |error| Failure {
            part: chunk.part,
            error,
        };
        let (start, end) = (chunk.range.start, chunk.range.end);
        let Some(pages) = part.watched() else {
            self.populate_piece(part, start..end).map_err(failed)?;
            return Ok(end - start);
        };
        let grain = GRAIN.max(part.backing().page_size());
        let mut at = start;
        while at < end {
            let wish = Wish {
                pages,
                len: end - at,
                grain,
            };
            let missing = |len| need::missing(part, part.ram.in_backing(at..at + len));
            let begun = watch.begin(&wish, stop, missing);
            let short = |short| failed(PopulateError::short(part.ram.in_guest(at..end), short));
            let Some(pass) = begun.map_err(short)? else {
                break;
            };
            // No huge page is cut in two.
            let past = (part.ram.offset + at + pass.len) % grain;
            let len = if pass.len < wish.len && past < pass.len {
                pass.len - past
            } else {
                pass.len
            };
            self.populate_piece(part, at..at + len).map_err(failed)?;
            at += len;
        }
        Ok(at - start)
    }

    fn populate_piece(&self, part: &Part, piece: Range<u64>) -> Result<(), PopulateError> {
        let range = part.ram.in_guest(piece.clone());
        let not_allocated = |source| PopulateError::Allocate { range, source };
        match part.mode {
            Populate::Lazy => return Ok(()),
            Populate::Allocate if part.through_descriptor() => {
                // The kernel would let the threads wait for each other at its own lock, spinning.
                let alone = self.allocating(part).lock();
                let _alone = alone.unwrap_or_else(PoisonError::into_inner);
                if part.allocate(&piece).map_err(not_allocated)? {
                    return Ok(());
                }
            }
            Populate::Prefault if part.through_descriptor() => {
                // A thread that would have to wait maps without allocating first.
                if let Ok(_alone) = self.allocating(part).try_lock() {
                    part.allocate(&piece).map_err(not_allocated)?;
                }
            }
            // Pages that only come through the mapping.
            Populate::Allocate | Populate::Prefault => {}
        }
        let mapped = part.map(&piece);
        mapped.map_err(|source| PopulateError::Map { range, source })
    }
}
