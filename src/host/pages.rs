//! Pages: their size, and those of this process.

use std::fs::{self, File};
use std::io;

use nix::unistd::{SysconfVar, sysconf};

use super::fields::bytes;

/// The size of base pages in bytes.
pub(crate) fn base_page_size() -> u64 {
    // POSIX requires the variable; a system without it would have no page size at all.
    let size = sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .unwrap_or(4096);
    size.unsigned_abs()
}

/// What this process has locked into memory, in bytes.
pub(crate) fn locked() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    Ok(bytes(&text, "VmLck").unwrap_or(0))
}

/// The file that `PAGEMAP_SCAN` is asked of (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) fn pagemap() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}
