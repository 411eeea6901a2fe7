//! Why regions make no memory.

use vm_memory::GuestAddress;

use crate::range::{GuestRange, InvalidRange};
use crate::units::HumanSize;

/// Why there is no region, or why regions make no memory.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A range is not what it should be: empty, too large, not whole pages, or taken.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// Guest memory without any range was asked for.
    #[error("no range of guest RAM was given: give at least one")]
    NoRanges,

    /// Ranges or regions are not sorted by address, which vm-memory's constructors demand.
    #[error(
        "the guest range {second} was given after {first}: sort them by address, or use \
         GuestMemoryShm::builder, which takes any order"
    )]
    #[non_exhaustive]
    Unsorted {
        /// The range that was given first.
        first: GuestRange,
        /// The range after it, at a lower address.
        second: GuestRange,
    },

    /// No region has exactly this address and size.
    #[error(
        "no region of {} starts at guest address {:#x}, where {}",
        HumanSize(*.size), .start.0, found_instead(*.found)
    )]
    #[non_exhaustive]
    NoSuchRegion {
        /// The address that was looked for.
        start: GuestAddress,
        /// The size that was looked for, in bytes.
        size: u64,
        /// The size of the region that starts there, if one does.
        found: Option<u64>,
    },

    /// A second view on the RAM, as vm-memory's own type, could not be made.
    #[error("cannot map {range} once more as vm-memory's GuestMemoryMmap")]
    #[non_exhaustive]
    Remap {
        /// The range of the region, or of all of them.
        range: GuestRange,
        /// vm-memory's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn found_instead(found: Option<u64>) -> String {
    match found {
        Some(size) => format!("one of {} does", HumanSize(size)),
        None => "none does".to_owned(),
    }
}
