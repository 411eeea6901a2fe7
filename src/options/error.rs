//! What is wrong with options: each names the property, the value, and what to write instead.

use crate::host::NodeSet;
use crate::range::InvalidRange;
use crate::units::HumanSize;

pub(crate) type Result<T, E = OptionsError> = std::result::Result<T, E>;

/// What is wrong with [`RamOptions`](crate::RamOptions), whether set or read from a string.
///
/// The properties are named as in QEMU's `-object`, which the setters name too.
///
/// ```
/// use guest_memory_shm::{OptionsError, RamOptions};
///
/// let refused = "memory-backend-shm,size=1M,share=off".parse::<RamOptions>();
/// assert!(matches!(
///     refused,
///     Err(OptionsError::NotShared { by_default: false })
/// ));
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// A string names no type of backend.
    #[error(
        "the type of the backend is missing: begin with memory-backend-memfd, memory-backend-shm \
         or memory-backend-file"
    )]
    MissingType,

    /// A string names something that is no backend of RAM that can be shared.
    #[error(
        "qom-type={found}: expected memory-backend-memfd, memory-backend-shm or memory-backend-file"
    )]
    UnknownType {
        /// What it names.
        found: Box<str>,
    },

    /// A string has a property that its type of backend does not have.
    #[error("{property:?} is no property of {of}: it has {}", .known.join(", "))]
    UnknownProperty {
        /// The property.
        property: Box<str>,
        /// The type of backend.
        of: &'static str,
        /// The properties that it has.
        known: &'static [&'static str],
    },

    /// A string lacks a property.
    #[error("{property} is missing: {remedy}")]
    Missing {
        /// The property.
        property: &'static str,
        /// What to write.
        remedy: &'static str,
    },

    /// The value of a property is none that it can have.
    #[error("{property}={value}: expected {expected}")]
    Value {
        /// The property.
        property: &'static str,
        /// Its value.
        value: Box<str>,
        /// What is accepted.
        expected: &'static str,
    },

    /// A property asks for what QEMU can do and this crate cannot.
    #[error("{property}={value} is not supported: {remedy}")]
    Unsupported {
        /// The property.
        property: &'static str,
        /// Its value.
        value: Box<str>,
        /// What to do.
        remedy: &'static str,
    },

    /// A string asks for RAM that no other process could see.
    #[error(
        "share=off{}: RAM that cannot be shared cannot be expressed, write share=on",
        if *.by_default { ", the default of memory-backend-file" } else { "" }
    )]
    NotShared {
        /// Whether it is only QEMU's default.
        by_default: bool,
    },

    /// Two properties contradict each other.
    #[error("{first} and {second} contradict each other: {remedy}")]
    Conflict {
        /// The one, with its value.
        first: &'static str,
        /// The other, with its value.
        second: &'static str,
        /// What to do.
        remedy: &'static str,
    },

    /// A property that this kind of backing does not have.
    #[error("{property} does not go with {backing}: {remedy}")]
    NotOfBacking {
        /// The property.
        property: &'static str,
        /// The kind of backing.
        backing: &'static str,
        /// What to do.
        remedy: &'static str,
    },

    /// A size or an offset does not consist of whole pages.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// A size that no RAM can have.
    #[error(
        "size={}: RAM has at least one page, and at most the {} that a file can have",
        HumanSize(*.size), HumanSize(*.limit)
    )]
    Size {
        /// The size in bytes.
        size: u64,
        /// The largest size in bytes.
        limit: u64,
    },

    /// A size of huge pages that is no power of two.
    #[error(
        "hugetlbsize={}: huge pages have a power of two of bytes, 2M and 1G are usual",
        HumanSize(*.size)
    )]
    HugePageSize {
        /// The size in bytes.
        size: u64,
    },

    /// An alignment that is no power of two, or less than a page.
    #[error(
        "align={align:#x}: expected a power of two that is at least the page size {}",
        HumanSize(*.page_size)
    )]
    Align {
        /// The alignment in bytes.
        align: u64,
        /// The page size in bytes.
        page_size: u64,
    },

    /// RAM that ends behind the end that a file can have.
    #[error(
        "offset={offset:#x} and a size of {} end behind 2^63, where no file reaches: lower the \
         offset or the size",
        HumanSize(*.size)
    )]
    PastLongestFile {
        /// The offset in bytes.
        offset: u64,
        /// The size in bytes, 0 if none is set.
        size: u64,
    },

    /// The size that is set is not that of the RAM.
    #[error(
        "size={} does not match the RAM of {}: leave the size out, or make the ranges as large",
        HumanSize(*.set), HumanSize(*.ram)
    )]
    SizeMismatch {
        /// The size that is set, in bytes.
        set: u64,
        /// The size of all ranges together, in bytes.
        ram: u64,
    },

    /// A NUMA policy without the nodes that it is about.
    #[error("policy={policy}: it needs nodes, write host-nodes=0 or those that are meant")]
    PolicyWithoutNodes {
        /// The policy.
        policy: &'static str,
    },

    /// NUMA nodes without a policy that says what they are for.
    #[error(
        "host-nodes={nodes}: policy=default chooses no nodes, write policy=bind, preferred or \
         interleave"
    )]
    NodesWithoutPolicy {
        /// The nodes.
        nodes: NodeSet,
    },

    /// A NUMA node beyond those that can be named.
    #[error("host-nodes: there is no node {node}, the highest that can be named is 127")]
    NodeNumber {
        /// The node that was asked for.
        node: u32,
    },
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
