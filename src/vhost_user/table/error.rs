//! Why a daemon cannot be told of a memory.

use crate::range::{GuestRange, InvalidRange};
use crate::units::{Counted, HumanSize};

/// Why a memory table cannot be made, or a daemon cannot be sent it. Nothing was sent.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, TableError, TableView};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let view = TableView::default().with_opaque_addresses(1);
/// let error = memory.memory_table_as(&view).unwrap_err();
/// assert!(matches!(error, TableError::OpaqueConstant { constant: 1, .. }));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// A region is not whole pages, as daemons map them.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// A constant that cannot be added to guest addresses to make user addresses.
    #[non_exhaustive]
    #[error(
        "{constant:#x} is no user address for guest address 0: for the region {range} it must be \
         at most {limit:#x}, so that no address runs past 2^64, and a multiple of {}",
        HumanSize(*.page_size)
    )]
    OpaqueConstant {
        /// The region whose user addresses it would make.
        range: GuestRange,
        /// The constant in bytes.
        constant: u64,
        /// The largest constant for this region.
        limit: u64,
        /// The page size in bytes.
        page_size: u64,
    },

    /// In-kernel vhost cannot be told of a region that is not mapped in this process at its user
    /// address.
    #[non_exhaustive]
    #[error(
        "the kernel would use the region {range} at its user address in this process, where it is \
         not mapped: send a table without opaque addresses (TableView), of memory that is \
         still alive; nothing was sent"
    )]
    NoHostAddress {
        /// The region.
        range: GuestRange,
    },

    /// An empty memory table, which SET_MEM_TABLE cannot carry.
    #[error(
        "SET_MEM_TABLE cannot carry an empty memory table: keep a region in it, or negotiate \
         CONFIGURE_MEM_SLOTS; nothing was sent"
    )]
    Empty,

    /// A memory table has more regions than the daemon takes.
    #[non_exhaustive]
    #[error(
        "the memory table has {}, {}; nothing was sent",
        Counted(regions, "region"), .slots.remedy(*.limit)
    )]
    TooManyRegions {
        /// The number of regions.
        regions: usize,
        /// The number that the daemon takes.
        limit: u64,
        /// Which limit was met.
        slots: SlotLimit,
    },
}

/// Which limit on the number of regions a table met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotLimit {
    /// SET_MEM_TABLE carries at most 8 regions, and the daemon did not negotiate
    /// CONFIGURE_MEM_SLOTS, which would allow more.
    Message,
    /// The daemon's answer to GET_MAX_MEM_SLOTS.
    Daemon,
    /// The parameter `max_mem_regions` of the kernel module vhost.
    Kernel,
}

impl SlotLimit {
    fn remedy(self, limit: u64) -> String {
        match self {
            Self::Message => format!(
                "SET_MEM_TABLE carries {limit}: negotiate CONFIGURE_MEM_SLOTS with the daemon or \
                 use fewer regions"
            ),
            Self::Daemon => {
                let slots = Counted(limit, "memory slot");
                format!("the daemon has {slots}: use fewer regions or another daemon")
            }
            Self::Kernel => format!(
                "in-kernel vhost takes {limit}: load the module vhost with a larger \
                 max_mem_regions or use fewer regions"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_the_limit_that_was_met_and_the_way_out() {
        let too_many = |regions, limit, slots| TableError::TooManyRegions {
            regions,
            limit,
            slots,
        };
        let cases = [
            (
                too_many(9, 8, SlotLimit::Message),
                "the memory table has 9 regions, SET_MEM_TABLE carries 8: negotiate \
                 CONFIGURE_MEM_SLOTS with the daemon or use fewer regions; nothing was sent",
            ),
            (
                too_many(33, 32, SlotLimit::Daemon),
                "the memory table has 33 regions, the daemon has 32 memory slots: use fewer \
                 regions or another daemon; nothing was sent",
            ),
            (
                too_many(65, 64, SlotLimit::Kernel),
                "the memory table has 65 regions, in-kernel vhost takes 64: load the module vhost \
                 with a larger max_mem_regions or use fewer regions; nothing was sent",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), text);
        }
    }
}
