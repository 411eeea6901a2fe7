//! What is done to a chunk: its pages allocated, and mapped.

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::engine::{Failure, Step, Stop, Why};
use super::need;
use super::plan::{Chunk, GRAIN, Part, Plan};
use super::watch::{Watch, Wish};
use crate::backing::BackingError;
use crate::error::PopulateError;
use crate::host::calls::{is_refused, retried};
use crate::host::memory::{Kind, MemoryLimits, Short};
use crate::options::Populate;
use crate::shortage::Shortage;

/// What looks whether there is memory.
pub(super) struct Looking {
    limits: Arc<MemoryLimits>,
    /// Of each part; none if nothing is to be looked at.
    kinds: Vec<Option<Kind>>,
    watch: Watch,
}

impl Looking {
    /// Before the first page of these parts.
    ///
    /// # Errors
    ///
    /// [`PopulateError::Shortage`] if there is not enough for all of them;
    /// [`PopulateError::CannotLook`].
    pub(super) fn begin(parts: &[Part]) -> Result<Self, PopulateError> {
        let kinds = need::kinds(parts);
        if kinds.iter().all(Option::is_none) {
            return Ok(Self::without(kinds));
        }
        let limits = MemoryLimits::of_this_process();
        let limits = limits.map_err(|answer| PopulateError::CannotLook {
            shortage: Box::new(Shortage::no_descriptors(&answer)),
        })?;
        let limits = Arc::new(limits);
        let looked_at = limits.clone();
        let this = Self {
            limits,
            kinds,
            watch: Watch::new(move |demand, enough| looked_at.bounds(demand, enough)),
        };
        match this.shortage(parts) {
            None => Ok(this),
            Some((at, shortage)) => {
                let range = parts[at].in_guest(&parts[at].range);
                Err(PopulateError::short(range, shortage))
            }
        }
    }

    /// Nothing is looked at.
    fn without(kinds: Vec<Option<Kind>>) -> Self {
        Self {
            limits: Arc::default(),
            kinds,
            watch: Watch::new(|_, _| Vec::new()),
        }
    }

    /// What is short of what the parts need, and the part at which it ends.
    pub(super) fn shortage(&self, parts: &[Part]) -> Option<(usize, Short)> {
        need::shortage(&self.limits, parts, &self.kinds)
    }
}

impl Plan {
    /// Does to the chunk what its part asks for, unless it is to stop; gives what is done of it.
    pub(super) fn populate(
        &self,
        chunk: &Chunk,
        looking: &Looking,
        stop: &Stop,
    ) -> Result<u64, Failure> {
        let Some(kind) = looking.kinds[chunk.part] else {
            return self.populate_piece(chunk);
        };
        let part = &self.parts[chunk.part];
        let grain = GRAIN.max(part.backing().page_size());
        let mut at = chunk.range.start;
        while at < chunk.range.end {
            let wish = Wish {
                kind,
                len: chunk.range.end - at,
                grain,
            };
            let missing = |len| need::missing(part, part.in_backing(&(at..at + len)));
            let piece = |len| Chunk {
                part: chunk.part,
                range: at..at + len,
            };
            let pass = match looking.watch.begin(&wish, stop, missing) {
                Ok(Some(pass)) => pass,
                Ok(None) => break,
                Err(shortage) => {
                    return Err(Failure {
                        chunk: piece(wish.len),
                        why: Why::Short(shortage),
                    });
                }
            };
            // No huge page is cut in two.
            let past = (part.ram.offset + at + pass.len) % grain;
            let len = if pass.len < wish.len && past < pass.len {
                pass.len - past
            } else {
                pass.len
            };
            at += self.populate_piece(&piece(len))?;
        }
        Ok(at - chunk.range.start)
    }

    fn populate_piece(&self, chunk: &Chunk) -> Result<u64, Failure> {
        let part = &self.parts[chunk.part];
        let len = chunk.range.end - chunk.range.start;
        let allocating = self.allocating(chunk.part);
        let failed = |step| {
            move |source| Failure {
                chunk: chunk.clone(),
                why: Why::Refused(step, source),
            }
        };
        match part.mode {
            Populate::Lazy => return Ok(len),
            Populate::Allocate if part.through_descriptor() => {
                // The kernel would let the threads wait for each other at its own lock, spinning.
                let alone = allocating.lock().unwrap_or_else(PoisonError::into_inner);
                if part
                    .allocate(&chunk.range)
                    .map_err(failed(Step::Allocate))?
                {
                    return Ok(len);
                }
                drop(alone);
            }
            Populate::Prefault if part.through_descriptor() => {
                // Whoever would have to wait maps without allocating first.
                if let Ok(_alone) = allocating.try_lock() {
                    part.allocate(&chunk.range)
                        .map_err(failed(Step::Allocate))?;
                }
            }
            // Pages that only come through the mapping.
            Populate::Allocate | Populate::Prefault => {}
        }
        part.map(&chunk.range).map_err(failed(Step::Map))?;
        Ok(len)
    }
}

impl Part {
    /// Allocates without mapping; `false` if the file system cannot do that, or a filter forbids it.
    fn allocate(&self, range: &Range<u64>) -> io::Result<bool> {
        // Never makes a file longer that somebody truncated: that would hide it.
        if let Err(BackingError::Truncated { .. }) = self.backing().check_not_truncated() {
            return Err(Errno::EFAULT.into());
        }
        let at = self.in_backing(range);
        let file_offset = |offset| i64::try_from(offset).map_err(|_| Errno::EFBIG);
        let (start, len) = (file_offset(at.start)?, file_offset(at.end - at.start)?);
        let flags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match retried(|| fallocate(self.backing(), flags, start, len)) {
            Ok(()) => Ok(true),
            // A signal undoes what it did: where they come faster than it is done, it never is.
            Err(Errno::EOPNOTSUPP | Errno::EINTR) => Ok(false),
            Err(errno) if is_refused(errno) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn map(&self, range: &Range<u64>) -> io::Result<()> {
        let backing = self.backing();
        let access = backing.map_options().access;
        self.ram.mapping.populate(range.clone(), access)
    }
}
