//! What is wrong with options: each names the property, the value, and what to write instead.

use crate::units::HumanSize;

/// What is wrong with [`RamOptions`](crate::RamOptions), whether set or read from a string.
///
/// The properties are named as in QEMU's `-object`, which the setters name too.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// A NUMA node beyond those that can be named.
    #[error("host-nodes: there is no node {node}, the highest that can be named is 127")]
    NodeNumber {
        /// The node that was asked for.
        node: u32,
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
}
