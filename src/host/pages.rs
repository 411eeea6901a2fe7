//! The size of pages, and which of this process's are where.

use std::fs::File;
use std::io;

use nix::unistd::{SysconfVar, sysconf};

/// The size of base pages in bytes.
pub(crate) fn base_page_size() -> u64 {
    // POSIX requires the variable; a system without it would have no page size at all.
    let size = sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .unwrap_or(4096);
    size.unsigned_abs()
}

/// The file that `PAGEMAP_SCAN` is asked of (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) fn pagemap() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}
