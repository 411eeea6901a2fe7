//! Why RAM cannot be placed on NUMA nodes.

use std::io;

use crate::error::text::nodes_present;
use crate::options::{NodeSet, NumaPolicy};

/// The RAM cannot be placed on the NUMA nodes that were asked for.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot place RAM on host-nodes={} (policy={}): {}; choose nodes that are there and that this \
     process may use (cpuset)",
    .policy.nodes(), .policy.name(), nodes_present(*.present)
)]
pub struct NumaError {
    /// What was asked for.
    pub policy: NumaPolicy,
    /// The nodes that have memory, if the kernel tells.
    pub present: Option<NodeSet>,
    /// The system's answer.
    pub source: io::Error,
}
