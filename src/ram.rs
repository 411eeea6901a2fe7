//! The RAM of a region: a mapping, the backing behind it, and where it lies in both.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::backing::ShmBacking;
use crate::host::calls::was_refused;
use crate::mapping::Mapping;
use crate::range::{GuestRange, InvalidRange};

/// The RAM of a region, without its bitmap: for what is done to RAM as a whole. Cheap to clone; it
/// stays mapped as long as any clone lives.
///
/// Its mapping is whole pages. The range need not be, where it was made as vm-memory makes regions:
/// what is mapped after it belongs to nothing else, and is not RAM.
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

    /// Refuses RAM that does not consist of whole pages, for what the kernel or another process
    /// takes in pages only.
    pub(crate) fn check_pages(&self) -> Result<(), InvalidRange> {
        self.range.check_pages(self.backing.page_size())
    }

    /// Frees the pages at these byte offsets in the region, for every process that maps them. The
    /// offsets must be multiples of the page size.
    pub(crate) fn remove(&self, range: Range<u64>) -> io::Result<()> {
        match self.mapping.remove(range.clone()) {
            // Forbidden by a filter. The descriptor does the same, but tells no userfaultfd.
            Err(error) if was_refused(&error) => {
                let range = self.offset + range.start..self.offset + range.end;
                self.backing.punch(range).map_err(|_| error)
            }
            answer => answer,
        }
    }
}
