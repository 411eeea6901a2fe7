//! Writing options.

use std::fmt;

use super::backend_type::BackendType;
use super::pairs::write_value;
use super::values::write_size;
use crate::options::{
    Access, BackingSource, CoreDump, DiscardData, OnShortage, PageSize, Populate, RamOptions,
    Reserve, Sealing,
};

/// As QEMU's `-object` takes them, but for this crate's own properties:
/// `memory-backend-memfd,size=64M,dump=off`.
///
/// What is written can be [read](RamOptions#impl-FromStr-for-RamOptions) again and gives the same
/// options, if they are [valid](RamOptions::check) and have a size, which QEMU demands and typed
/// options need not have. Without one the size is left out, and reading says so. A path that is
/// not UTF-8 is written with replacement characters: reading gives another path then.
///
/// ```
/// use guest_memory_shm::{BackingSource, Populate, RamOptions};
///
/// let options = RamOptions::new()
///     .with_backing(BackingSource::PosixShm)
///     .with_size(64 << 20)
///     .with_populate(Populate::Prefault);
/// assert_eq!(
///     options.to_string(),
///     "memory-backend-shm,size=64M,prealloc=on,dump=off"
/// );
/// assert_eq!(options.to_string().parse::<RamOptions>()?, options);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
impl fmt::Display for RamOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(BackendType::of(&self.backing).name())?;
        if let Some(name) = &self.name {
            write!(f, ",id={}", write_value(name))?;
        }
        write_bytes(f, "size", self.size)?;
        if let BackingSource::File(path) = &self.backing {
            let path = write_value(&path.to_string_lossy());
            // QEMU's own default for a file is RAM that is not shared.
            write!(f, ",mem-path={path},share=on")?;
        }
        self.write_file(f)?;
        self.write_pages(f)?;
        self.write_populate(f)?;
        self.write_numa(f)?;
        match self.unused.merge {
            None => {}
            Some(true) => f.write_str(",merge=on")?,
            Some(false) => f.write_str(",merge=off")?,
        }
        if self.core_dump == CoreDump::Exclude {
            f.write_str(",dump=off")?;
        }
        if let Some(canonical) = self.unused.canonical_path {
            let value = if canonical { "on" } else { "off" };
            write!(f, ",x-use-canonical-path-for-ramblock-id={value}")?;
        }
        Ok(())
    }
}

impl RamOptions {
    fn write_file(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_bytes(f, "align", self.align)?;
        write_bytes(f, "offset", Some(self.offset).filter(|offset| *offset != 0))?;
        if self.access == Access::ReadOnly {
            f.write_str(",readonly=on")?;
        }
        if self.discard_data == DiscardData::OnDrop {
            f.write_str(",discard-data=on")?;
        }
        Ok(())
    }

    fn write_pages(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.page_size {
            PageSize::Base => {}
            PageSize::Transparent => f.write_str(",thp=on")?,
            PageSize::Huge(size) => {
                f.write_str(",hugetlb=on")?;
                write_bytes(f, "hugetlbsize", size)?;
            }
        }
        write_bytes(f, "hugetlbsize", self.unused.hugetlb_size)?;
        if self.sealing == Sealing::Unsealed {
            f.write_str(",seal=off")?;
        }
        Ok(())
    }

    fn write_populate(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reserve {
            None => {}
            Some(Reserve::On) => f.write_str(",reserve=on")?,
            Some(Reserve::Off) => f.write_str(",reserve=off")?,
        }
        match self.populate {
            Populate::Lazy => {}
            Populate::Allocate => f.write_str(",populate=allocate")?,
            Populate::Prefault => f.write_str(",prealloc=on")?,
        }
        if let Some(threads) = self.populate_threads {
            write!(f, ",prealloc-threads={threads}")?;
        }
        if self.on_shortage == OnShortage::TryAnyway {
            f.write_str(",on-shortage=try-anyway")?;
        }
        Ok(())
    }

    fn write_numa(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.numa.nodes();
        if nodes.is_empty() {
            return Ok(());
        }
        write!(f, ",policy={}", self.numa.name())?;
        // One property for each range, because a comma ends a property.
        let ranges = nodes.to_string();
        ranges
            .split(',')
            .try_for_each(|range| write!(f, ",host-nodes={range}"))
    }
}

fn write_bytes(f: &mut fmt::Formatter<'_>, property: &str, bytes: Option<u64>) -> fmt::Result {
    match bytes {
        Some(bytes) => write!(f, ",{property}={}", write_size(bytes)),
        None => Ok(()),
    }
}
