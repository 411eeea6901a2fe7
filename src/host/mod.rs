//! What this machine offers and forbids: memory, NUMA nodes, transparent huge pages, calls, limits.
//!
//! Read from procfs and sysfs when it is asked for, because an administrator may change it. Where
//! they are not mounted, nothing is claimed.

pub(crate) mod calls;
mod control_group;
mod kept;
pub(crate) mod limits;
pub(crate) mod meminfo;
pub(crate) mod memory;
pub(crate) mod mounts;
pub(crate) mod nodes;
pub(crate) mod transparent;
