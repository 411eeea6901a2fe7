//! What a daemon was being told when it failed.

use std::fmt;

use crate::range::GuestRange;
use crate::units::HumanSize;

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

/// A step on the way to a daemon's new memory table, for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemTableChange {
    /// GET_MAX_MEM_SLOTS: ask how many regions it takes.
    QuerySlots,
    /// SET_MEM_TABLE with this many regions.
    SetTable(usize),
    /// ADD_MEM_REG of this range.
    Add(GuestRange),
    /// REM_MEM_REG of this range.
    Remove(GuestRange),
    /// SET_LOG_BASE with a log of this many bytes.
    SetLog(u64),
}

impl MemTableChange {
    /// Why a daemon refuses it, most likely.
    pub(crate) fn likely_refusal(self) -> &'static str {
        match self {
            Self::Remove(_) => {
                "it may not know the region by this address and size, or remove no regions at all"
            }
            Self::QuerySlots | Self::SetTable(_) | Self::Add(_) | Self::SetLog(_) => {
                "it may be out of memory, address space or memory slots, or its policy (seals) \
                 forbids it"
            }
        }
    }
}

impl fmt::Display for MemTableChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QuerySlots => f.write_str("say how many memory slots it has"),
            Self::SetTable(regions) => write!(f, "take a memory table of {regions} regions"),
            Self::Add(range) => write!(f, "add the region {range}"),
            Self::Remove(range) => write!(f, "remove the region {range}"),
            Self::SetLog(size) => write!(f, "take a dirty log of {}", HumanSize(*size)),
        }
    }
}
