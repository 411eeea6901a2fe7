//! The RAM of a region: a mapping, the backing behind it, and where it lies in both.

use std::sync::Arc;

use crate::backing::ShmBacking;
use crate::layout::GuestRange;
use crate::mapping::Mapping;

/// The RAM of a region, without its bitmap: for what is done to RAM as a whole. Cheap to clone; it
/// stays mapped as long as any clone lives.
#[derive(Clone, Debug)]
pub(crate) struct Ram {
    pub(crate) range: GuestRange,
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) backing: ShmBacking,
    /// Where it starts in the backing, in bytes.
    pub(crate) offset: u64,
}
