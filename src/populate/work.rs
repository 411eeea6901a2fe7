//! What is done to a chunk: its pages allocated, and mapped.

use std::io;
use std::ops::Range;
use std::sync::PoisonError;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::engine::Failure;
use super::plan::{Chunk, Part, Plan};
use crate::error::Error;
use crate::options::Populate;

const ALLOCATE: &str = "allocate pages";
const MAP: &str = "map pages";

impl Plan {
    /// Does to the chunk what its part asks for.
    pub(super) fn populate(&self, chunk: &Chunk) -> Result<(), Failure> {
        let part = &self.parts[chunk.part];
        let allocating = self.allocating(chunk.part);
        let failed = |doing| {
            move |source| Failure {
                chunk: chunk.clone(),
                doing,
                source,
            }
        };
        match part.mode {
            Populate::Lazy => return Ok(()),
            Populate::Allocate if part.through_descriptor() => {
                // The kernel would let the threads wait for each other at its own lock, spinning.
                let alone = allocating.lock().unwrap_or_else(PoisonError::into_inner);
                if part.allocate(&chunk.range).map_err(failed(ALLOCATE))? {
                    return Ok(());
                }
                drop(alone);
            }
            Populate::Prefault if part.through_descriptor() => {
                // Whoever would have to wait maps without allocating first.
                if let Ok(_alone) = allocating.try_lock() {
                    part.allocate(&chunk.range).map_err(failed(ALLOCATE))?;
                }
            }
            // Pages that only come through the mapping.
            Populate::Allocate | Populate::Prefault => {}
        }
        part.map(&chunk.range).map_err(failed(MAP))
    }
}

impl Part {
    /// Allocates without mapping; `false` if the file system cannot do that.
    fn allocate(&self, range: &Range<u64>) -> io::Result<bool> {
        // Never makes a file longer that somebody truncated: that would hide it.
        if let Err(Error::BackingTruncated { .. }) = self.backing().check_not_truncated() {
            return Err(Errno::EFAULT.into());
        }
        let at = self.in_backing(range);
        let file_offset = |offset| i64::try_from(offset).map_err(|_| Errno::EFBIG);
        let (start, len) = (file_offset(at.start)?, file_offset(at.end - at.start)?);
        loop {
            let flags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match fallocate(self.backing(), flags, start, len) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn map(&self, range: &Range<u64>) -> io::Result<()> {
        let backing = self.backing();
        let access = backing.map_options().access;
        self.ram
            .mapping
            .populate(range.clone(), backing.page_size(), access)
    }
}
