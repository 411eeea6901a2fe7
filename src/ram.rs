//! The RAM of a region: a mapping, its backing, and where it lies in both.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::backing::ShmBacking;
use crate::host::calls::was_refused;
use crate::mapping::Mapping;
use crate::range::{GuestRange, InvalidRange};

/// The RAM of a region, without its bitmap: for what is done to RAM as a whole. Cheap to clone; it
/// stays mapped as long as any clone lives.
///
/// Its mapping is whole pages. The range need not be, where it was made as vm-memory makes
/// regions: the rest of its last page is mapped, but is not RAM.
#[derive(Clone, Debug)]
pub(crate) struct Ram {
    pub(crate) range: GuestRange,
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) backing: ShmBacking,
    /// Where it starts in the backing, in bytes.
    pub(crate) offset: u64,
}

impl Ram {
    /// The part of the backing that is mapped, in bytes: the pages that the region has a part of.
    pub(crate) fn pages(&self) -> Range<u64> {
        self.offset..self.offset + self.mapping.len() as u64
    }

    /// Where these byte offsets in the region are in the backing.
    pub(crate) fn in_backing(&self, inside: Range<u64>) -> Range<u64> {
        self.offset + inside.start..self.offset + inside.end
    }

    /// The guest addresses at these byte offsets in the region, some of which must be in the
    /// guest: the last page may be there in part.
    pub(crate) fn in_guest(&self, inside: Range<u64>) -> GuestRange {
        let start = self.range.start_addr().0 + inside.start;
        let end = inside.end.min(self.range.size());
        // A part of a region is a range as good as the region.
        GuestRange::new(GuestAddress(start), end - inside.start).unwrap_or(self.range)
    }

    /// Refuses RAM that does not consist of whole pages, for what the kernel or another process
    /// takes in pages only.
    pub(crate) fn check_pages(&self) -> Result<(), InvalidRange> {
        self.range.check_pages(self.backing.page_size())
    }

    /// Frees the pages at these byte offsets in the region, for every process that maps them. The
    /// offsets must be multiples of the page size.
    pub(crate) fn remove(&self, range: Range<u64>) -> io::Result<()> {
        match self.mapping.remove(range.clone()) {
            // A filter forbids it. Punching a hole by the descriptor does the same, but tells no
            // userfaultfd.
            Err(error) if was_refused(&error) => self
                .backing
                .punch(self.in_backing(range))
                .map_err(|_| error),
            answer => answer,
        }
    }
}
