//! How RAM is placed on the NUMA nodes of the host (mbind(2)).

use crate::host::NodeSet;

/// On which NUMA nodes of the host pages are allocated (QEMU's `policy` and `host-nodes`).
///
/// The policy belongs to the shared object: it holds for pages that daemons touch first, too.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, NodeSet, NumaPolicy, RamOptions};
/// use vm_memory::GuestAddress;
///
/// let first = NodeSet::from_nodes([0]).expect("0 is below 128");
/// let local = RamOptions::new().with_numa(NumaPolicy::Bind(first));
/// let memory = GuestMemoryShm::<()>::builder()
///     .add_ram(local, [(GuestAddress(0), 16 << 20)])
///     .build()?;
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum NumaPolicy {
    /// Where the thread runs that touches a page first, or as its own policy says.
    #[default]
    Default,
    /// From these nodes as long as they have free pages, then from others.
    #[doc(alias = "MPOL_PREFERRED")]
    #[doc(alias = "MPOL_PREFERRED_MANY")]
    Preferred(NodeSet),
    /// From these nodes only.
    #[doc(alias = "MPOL_BIND")]
    Bind(NodeSet),
    /// From these nodes in turn.
    #[doc(alias = "MPOL_INTERLEAVE")]
    Interleave(NodeSet),
}

impl NumaPolicy {
    /// The nodes that it names; none for the default.
    pub fn nodes(&self) -> NodeSet {
        match self {
            Self::Default => NodeSet::new(),
            Self::Preferred(nodes) | Self::Bind(nodes) | Self::Interleave(nodes) => *nodes,
        }
    }

    /// Its name in QEMU's `policy` property.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Preferred(_) => "preferred",
            Self::Bind(_) => "bind",
            Self::Interleave(_) => "interleave",
        }
    }
}
