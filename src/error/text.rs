//! Parts of the texts of errors that depend on their values.

use std::io;

use crate::options::NodeSet;
use crate::units::HumanSize;

pub(crate) fn human_sizes(sizes: &[u64]) -> String {
    if sizes.is_empty() {
        return "none".to_owned();
    }
    sizes
        .iter()
        .map(|size| HumanSize(*size).to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

pub(crate) fn shm_remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "/dev/shm does not exist, mount a tmpfs there",
        io::ErrorKind::ReadOnlyFilesystem => "/dev/shm is read-only, remount it read-write",
        io::ErrorKind::PermissionDenied => "/dev/shm may not be written, check its mode",
        io::ErrorKind::StorageFull => "/dev/shm is full, remove files from it or remount it larger",
        _ => "check /dev/shm",
    }
}

pub(crate) fn nodes_present(present: Option<NodeSet>) -> String {
    match present {
        Some(nodes) => format!("this machine has memory on nodes {nodes}"),
        None => "this kernel knows no NUMA nodes".to_owned(),
    }
}
