//! What is short, for those who are told: how much is needed, how much there is, where the limit
//! stands, and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::options::NodeSet;
use crate::units::HumanSize;

/// Memory that is short: what is needed, what is left, and which limit says so.
///
/// ```
/// use guest_memory_shm::{Error, GuestMemoryShm, MemoryLimit, Populate, PopulateError, RamOptions};
/// use vm_memory::GuestAddress;
///
/// // More than any machine has.
/// let options = RamOptions::new().with_populate(Populate::Prefault);
/// let refused = GuestMemoryShm::<()>::builder()
///     .with_ram(options, [(GuestAddress(0), 1 << 46)])
///     .build();
/// match refused {
///     Err(Error::Populate(PopulateError::NotEnoughMemory { shortage, .. })) => {
///         assert!(shortage.needed > shortage.left);
///         println!("{} stands in {}", shortage.left, shortage.limit.path().display());
///     }
///     other => panic!("{other:?}"),
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryShortage {
    /// What is needed, in bytes: pages that are there already do not count, and what the kernel
    /// needs for itself to manage the others, at most one byte in 128, does.
    pub needed: u64,
    /// What can still be had, in bytes: without what cannot be reclaimed, with what can be swapped
    /// out, and less a margin for what this process needs besides.
    pub left: u64,
    /// Which limit leaves so little.
    pub limit: MemoryLimit,
}

/// What limits the memory that RAM can have.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryLimit {
    /// A control group that this process is in (cgroups(7)).
    #[non_exhaustive]
    ControlGroup {
        /// The file in which the limit stands: `memory.max`, `memory.limit_in_bytes`, or that of
        /// another controller or resource.
        file: PathBuf,
    },
    /// The memory and the swap space of the machine: `MemAvailable` and `SwapFree` of
    /// proc_meminfo(5).
    Machine,
    /// The memory of the NUMA nodes that the RAM is bound to, or that this process may use at all
    /// (cpuset(7)).
    #[non_exhaustive]
    Nodes {
        /// The nodes.
        nodes: NodeSet,
    },
}

impl MemoryLimit {
    /// The file in which the limit stands, or the directory for that of NUMA nodes.
    pub fn path(&self) -> &Path {
        match self {
            Self::ControlGroup { file } => file,
            Self::Machine => Path::new("/proc/meminfo"),
            Self::Nodes { .. } => Path::new("/sys/devices/system/node"),
        }
    }
}

/// As it reads after "are left of".
impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ControlGroup { file } => {
                write!(f, "the control group's limit in {}", file.display())
            }
            Self::Machine => f.write_str("this machine's memory and swap (/proc/meminfo)"),
            Self::Nodes { nodes } => {
                write!(f, "the memory of node {nodes} (/sys/devices/system/node)")
            }
        }
    }
}

impl fmt::Display for MemoryShortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = match self.limit {
            MemoryLimit::ControlGroup { .. } => "raise it",
            MemoryLimit::Machine => "free memory or add swap",
            MemoryLimit::Nodes { .. } => "free memory there or allow more nodes",
        };
        write!(
            f,
            "{} more are needed, and {} are left of {}: {remedy}, or ask for less RAM, or try anyway \
             and risk SIGKILL (OnShortage::TryAnyway, on-shortage=try-anyway)",
            HumanSize(self.needed),
            HumanSize(self.left),
            self.limit
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_need_rest_limit_and_the_way_out() {
        let text = |limit| {
            let shortage = MemoryShortage {
                needed: 1 << 30,
                left: 1 << 20,
                limit,
            };
            shortage.to_string()
        };
        let way_out = "or ask for less RAM, or try anyway and risk SIGKILL \
                       (OnShortage::TryAnyway, on-shortage=try-anyway)";
        let file = PathBuf::from("/sys/fs/cgroup/vm/memory.max");
        assert_eq!(
            text(MemoryLimit::ControlGroup { file }),
            format!(
                "1 GiB more are needed, and 1 MiB are left of the control group's limit in \
                 /sys/fs/cgroup/vm/memory.max: raise it, {way_out}"
            )
        );
        assert_eq!(
            text(MemoryLimit::Machine),
            format!(
                "1 GiB more are needed, and 1 MiB are left of this machine's memory and swap \
                 (/proc/meminfo): free memory or add swap, {way_out}"
            )
        );
        let nodes = NodeSet::from_nodes([1]).unwrap();
        assert_eq!(
            text(MemoryLimit::Nodes { nodes }),
            format!(
                "1 GiB more are needed, and 1 MiB are left of the memory of node 1 \
                 (/sys/devices/system/node): free memory there or allow more nodes, {way_out}"
            )
        );
    }
}
