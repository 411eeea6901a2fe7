//! Why a backing could not be mapped.

use std::io;

use nix::errno::Errno;

use crate::backing::BackingError;
use crate::host::NodeSet;
use crate::options::NumaPolicy;
use crate::shortage::Shortage;
use crate::units::HumanSize;

pub(crate) type Result<T, E = MapError> = std::result::Result<T, E>;

/// Why a backing could not be mapped.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, MapError, MemoryError, RamOptions};
/// use vm_memory::GuestAddress;
///
/// // More than the address space of a process.
/// let refused = GuestMemoryShm::<()>::builder()
///     .add_ram(RamOptions::new(), [(GuestAddress(0), 1 << 60)])
///     .build();
/// assert!(matches!(refused, Err(MemoryError::Map(MapError::Reserve { .. }))));
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The backing does not have the part that was to be mapped.
    #[error(transparent)]
    Backing(#[from] BackingError),

    /// There is no address space for it.
    #[error(
        "cannot reserve address space for a region of {}: the address space of this process is \
         limited, by the CPU, by RLIMIT_AS and by vm.max_map_count",
        HumanSize(*.size)
    )]
    #[non_exhaustive]
    Reserve {
        /// The size in bytes.
        size: u64,
        /// The answer of mmap(2).
        source: io::Error,
    },

    /// The mapping was refused.
    #[error(
        "cannot map a region of {}: the address space of this process is limited, by the CPU, by \
         RLIMIT_AS and by vm.max_map_count",
        HumanSize(*.size)
    )]
    #[non_exhaustive]
    Map {
        /// The size in bytes.
        size: u64,
        /// The answer of mmap(2).
        source: io::Error,
    },

    /// The file cannot be mapped shared.
    #[error(
        "cannot map {} of the file shared: its file system or its seals do not allow that, use a \
         file on a tmpfs, a hugetlbfs or a local disk",
        HumanSize(*.size)
    )]
    #[non_exhaustive]
    NotShareable {
        /// The size in bytes.
        size: u64,
        /// The answer of mmap(2).
        source: io::Error,
    },

    /// The RAM cannot be placed on the NUMA nodes that were asked for.
    #[error(
        "cannot place RAM on host-nodes={} (policy={}): {}",
        .policy.nodes(), .policy.name(), why_not_placed(.source, *.present)
    )]
    #[non_exhaustive]
    Nodes {
        /// What was asked for.
        policy: NumaPolicy,
        /// The nodes that have memory, if the kernel tells.
        present: Option<NodeSet>,
        /// The answer of mbind(2).
        source: io::Error,
    },
}

impl From<Shortage> for MapError {
    fn from(shortage: Shortage) -> Self {
        Self::Backing(shortage.into())
    }
}

fn why_not_placed(source: &io::Error, present: Option<NodeSet>) -> String {
    if source.raw_os_error() == Some(Errno::EIO as i32) {
        return "it has pages on other nodes that cannot be moved, as those cannot that another \
                process maps; place it before others use it, or leave the policy out"
            .to_owned();
    }
    let nodes = match present {
        Some(nodes) => format!("this machine has memory on nodes {nodes}"),
        None => "this kernel knows no NUMA nodes".to_owned(),
    };
    format!("{nodes}; choose nodes that are there and that this process may use (cpuset)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_are_not_there_and_pages_that_stay_where_they_are_have_their_own_texts() {
        let nodes = NodeSet::from_nodes([1]).unwrap();
        let text = |errno: Errno| {
            let error = MapError::Nodes {
                policy: NumaPolicy::Bind(nodes),
                present: Some(NodeSet::from_nodes([0]).unwrap()),
                source: errno.into(),
            };
            error.to_string()
        };
        assert_eq!(
            text(Errno::EINVAL),
            "cannot place RAM on host-nodes=1 (policy=bind): this machine has memory on nodes 0; \
             choose nodes that are there and that this process may use (cpuset)"
        );
        assert_eq!(
            text(Errno::EIO),
            "cannot place RAM on host-nodes=1 (policy=bind): it has pages on other nodes that \
             cannot be moved, as those cannot that another process maps; place it before others \
             use it, or leave the policy out"
        );
    }
}
