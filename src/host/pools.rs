//! The pools of huge pages
//! (`/sys/kernel/mm/hugepages`, Documentation/admin-guide/mm/hugetlbpage.rst).

use std::fs;
use std::io;

use super::meminfo;

const DIR: &str = "/sys/kernel/mm/hugepages";

/// The state of a pool, in pages.
pub(crate) struct Pool {
    pub(crate) free: u64,
    pub(crate) reserved: u64,
    surplus: u64,
    overcommit: u64,
}

impl Pool {
    /// That of pages of this size in bytes.
    pub(crate) fn read(page_size: u64) -> io::Result<Self> {
        let number = |name: &str| -> io::Result<u64> {
            let kib = page_size / 1024;
            let text = fs::read_to_string(format!("{DIR}/hugepages-{kib}kB/{name}"))?;
            let number = text.trim().parse();
            number.map_err(|_| io::ErrorKind::InvalidData.into())
        };
        Ok(Self {
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
            surplus: number("surplus_hugepages")?,
            overcommit: number("nr_overcommit_hugepages")?,
        })
    }

    /// Pages that a new mapping can reserve: what is free and not promised, and what the kernel
    /// may still add beyond the pool.
    pub(crate) fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved) + self.overcommit.saturating_sub(self.surplus)
    }
}

/// The sizes in bytes that the kernel has pools for, smallest first; none without huge pages.
pub(crate) fn page_sizes() -> io::Result<Vec<u64>> {
    let dirs = match fs::read_dir(DIR) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        dirs => dirs?,
    };
    let mut sizes = Vec::new();
    for dir in dirs {
        // A list that breaks off is no list without the rest.
        let name = dir?.file_name();
        let kib = name
            .to_str()
            .and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB"));
        if let Some(Ok(kib)) = kib.map(str::parse::<u64>) {
            sizes.push(kib * 1024);
        }
    }
    sizes.sort_unstable();
    Ok(sizes)
}

/// The size of pages that is used unless another is asked for.
pub(crate) fn default_page_size() -> Option<u64> {
    meminfo::huge_page_size()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overcommitted_pages_count_and_reserved_ones_do_not() {
        let pool = |free, reserved, surplus, overcommit| Pool {
            free,
            reserved,
            surplus,
            overcommit,
        };
        assert_eq!(pool(10, 4, 0, 0).available(), 6);
        assert_eq!(pool(10, 4, 1, 3).available(), 8);
        assert_eq!(pool(0, 0, 5, 3).available(), 0);
    }
}
