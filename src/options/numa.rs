//! NUMA nodes of the host, and how RAM is placed on them (mbind(2)).

use std::fmt;

use super::error::{OptionsError, Result};
use crate::range::RangeSet;

/// A set of NUMA nodes of the host, numbered from 0 to 127.
///
/// ```
/// use guest_memory_shm::NodeSet;
///
/// let nodes = NodeSet::from_nodes([0, 2, 3])?;
/// assert_eq!(nodes.to_string(), "0,2-3");
/// assert!(nodes.contains(2) && !nodes.contains(1));
/// assert!(NodeSet::from_nodes([128]).is_err());
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct NodeSet {
    /// Two words and not one of 128 bits, which would align all errors that name nodes to 16 bytes.
    words: [u64; 2],
}

impl NodeSet {
    /// How many nodes there can be, as in QEMU: the highest has the number one less.
    pub const LIMIT: u32 = 128;

    /// The empty set.
    pub const fn new() -> Self {
        Self { words: [0; 2] }
    }

    /// The set of these nodes.
    ///
    /// # Errors
    ///
    /// [`OptionsError::NodeNumber`] for a node of 128 or more.
    pub fn from_nodes(nodes: impl IntoIterator<Item = u32>) -> Result<Self> {
        let mut set = Self::new();
        for node in nodes {
            set.insert(node)?;
        }
        Ok(set)
    }

    /// Adds a node.
    ///
    /// # Errors
    ///
    /// [`OptionsError::NodeNumber`] for a node of 128 or more.
    pub fn insert(&mut self, node: u32) -> Result<()> {
        if node >= Self::LIMIT {
            return Err(OptionsError::NodeNumber { node });
        }
        self.words[word(node)] |= bit(node);
        Ok(())
    }

    /// Whether a node is in it.
    pub const fn contains(&self, node: u32) -> bool {
        node < Self::LIMIT && self.words[word(node)] & bit(node) != 0
    }

    /// Whether the two sets have a node in common.
    pub const fn intersects(&self, other: Self) -> bool {
        !self.intersection(other).is_empty()
    }

    /// The nodes that are in both.
    pub(crate) const fn intersection(&self, other: Self) -> Self {
        Self {
            words: [
                self.words[0] & other.words[0],
                self.words[1] & other.words[1],
            ],
        }
    }

    /// Whether no node is in it.
    pub const fn is_empty(&self) -> bool {
        self.words[0] | self.words[1] == 0
    }

    /// The number of nodes in it.
    pub const fn len(&self) -> u32 {
        self.words[0].count_ones() + self.words[1].count_ones()
    }

    /// The nodes in it, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = u32> + use<> {
        let set = *self;
        (0..Self::LIMIT).filter(move |node| set.contains(*node))
    }
}

const fn word(node: u32) -> usize {
    (node / u64::BITS) as usize
}

const fn bit(node: u32) -> u64 {
    1 << (node % u64::BITS)
}

/// Ranges of nodes, as the kernel writes them: `0,2-3`, or `none`.
impl fmt::Display for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.iter().map(u64::from).map(|node| node..node + 1);
        let ranges: RangeSet = nodes.collect();
        let text: Vec<String> = ranges
            .into_iter()
            .map(|range| match (range.start, range.end - 1) {
                (first, last) if first == last => first.to_string(),
                (first, last) => format!("{first}-{last}"),
            })
            .collect();
        f.pad(&if text.is_empty() {
            "none".to_owned()
        } else {
            text.join(",")
        })
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeSet({self})")
    }
}

/// On which NUMA nodes of the host pages are allocated (QEMU's `policy` and `host-nodes`).
///
/// The policy belongs to the shared object: it holds for pages that daemons touch first, too.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, NodeSet, NumaPolicy, RamOptions};
/// use vm_memory::GuestAddress;
///
/// let local = RamOptions::new().with_numa(NumaPolicy::Bind(NodeSet::from_nodes([0])?));
/// let memory = GuestMemoryShm::<()>::builder()
///     .with_ram(local, [(GuestAddress(0), 16 << 20)])
///     .build()?;
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_sets_print_as_the_kernel_does() {
        for (nodes, text) in [
            (vec![], "none"),
            (vec![0], "0"),
            (vec![3, 0, 1], "0-1,3"),
            ((0..128).collect(), "0-127"),
        ] {
            assert_eq!(NodeSet::from_nodes(nodes).unwrap().to_string(), text);
        }
    }
}
