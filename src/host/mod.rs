//! What this machine offers and forbids: memory, NUMA nodes, huge pages, calls, limits.
//!
//! Read from procfs and sysfs when it is asked for, because an administrator may change it. Where
//! they are not mounted, nothing is claimed.

mod cachestat;
pub(crate) mod calls;
mod control_group;
pub(crate) mod descriptors;
mod fields;
pub(crate) mod file_system;
mod kept;
pub(crate) mod meminfo;
pub(crate) mod memory;
pub(crate) mod mounts;
mod node_set;
pub(crate) mod nodes;
pub(crate) mod numa_maps;
mod pages;
pub(crate) mod pools;
#[cfg(feature = "vhost-user")]
pub(crate) mod process;
pub(crate) mod transparent;
#[cfg(feature = "vhost-user")]
pub(crate) mod vhost;

pub(crate) use cachestat::cached;
pub use node_set::NodeSet;
pub(crate) use pages::{base_page_size, locked, pagemap};
