//! Sets of NUMA nodes.

use std::fmt;

use crate::range::RangeSet;

/// A set of NUMA nodes of the host, numbered from 0 to 127.
///
/// ```
/// use guest_memory_shm::NodeSet;
///
/// let nodes = NodeSet::from_nodes([0, 2, 3]).expect("all are below 128");
/// assert_eq!(nodes.to_string(), "0,2-3");
/// assert!(nodes.contains(2) && !nodes.contains(1));
/// assert_eq!(NodeSet::from_nodes([128]), None);
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct NodeSet {
    /// Two words and not one of 128 bits, which would align all errors that name nodes to 16
    /// bytes.
    words: [u64; 2],
}

impl NodeSet {
    /// How many nodes there can be, as in QEMU: the highest has the number one less.
    pub const LIMIT: u32 = 128;

    /// The empty set.
    pub const fn new() -> Self {
        Self { words: [0; 2] }
    }

    /// The set of these nodes; none if one of them is 128 or more.
    pub fn from_nodes(nodes: impl IntoIterator<Item = u32>) -> Option<Self> {
        let mut set = Self::new();
        nodes
            .into_iter()
            .all(|node| set.insert(node))
            .then_some(set)
    }

    /// Adds a node, unless it is 128 or more; says whether it is in the set now.
    #[must_use = "a node of 128 or more is not added"]
    pub fn insert(&mut self, node: u32) -> bool {
        let fits = node < Self::LIMIT;
        if fits {
            self.words[word(node)] |= bit(node);
        }
        fits
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

/// A list of nodes.
#[cfg(feature = "serde")]
impl serde::Serialize for NodeSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for NodeSet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let nodes = Vec::<u32>::deserialize(deserializer)?;
        let too_high = "a node is 128 or more";
        Self::from_nodes(nodes).ok_or_else(|| serde::de::Error::custom(too_high))
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
