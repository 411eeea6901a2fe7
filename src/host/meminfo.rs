//! The memory of the machine (proc_meminfo(5)), in bytes.

use std::fs::read_to_string;
use std::io;

use super::fields::bytes;

pub(super) const MEMINFO: &str = "/proc/meminfo";

/// Whether any process maps a huge page of a file or of shared memory: if none does, no walk need
/// look for them. A kernel without such pages does not have the lines.
pub(crate) fn is_huge_mapped() -> io::Result<bool> {
    let text = read_to_string(MEMINFO)?;
    let of = |name| bytes(&text, name).unwrap_or(0);
    Ok(of("ShmemPmdMapped") + of("FilePmdMapped") > 0)
}

/// The size of the huge pages that are used unless another is asked for.
pub(super) fn huge_page_size() -> Option<u64> {
    bytes(&read_to_string(MEMINFO).ok()?, "Hugepagesize")
}
