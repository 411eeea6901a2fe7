//! Facts about running RAM: what of it exists, where, and by which pages.

use std::collections::{BTreeMap, BTreeSet};

use crate::backing::{BackingKind, Seals, ShmBacking};
use crate::host::{descriptors, locked, meminfo, nodes, numa_maps};
use crate::memory::GuestMemoryShm;
use crate::ram::Ram;
use crate::range::GuestRange;
use crate::report::BuildReport;

mod allocated;
mod error;
mod extents;
mod table;

use allocated::by_backing;
pub use error::StatsError;
use error::failed;
pub use extents::Extents;

/// What the kernel says about the RAM of a guest at one time. All sizes are in bytes.
///
/// `Display` prints a table of the regions. It costs per region, and not per byte, unless several
/// regions share a backing that is allocated in part (20 ns for each page allocated in all of them
/// but the largest), transparent huge pages are in use (the page tables are walked), or there are
/// several NUMA nodes.
///
/// ```
/// use guest_memory_shm::GuestMemoryShm;
/// use vm_memory::{Bytes, GuestAddress};
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
/// memory.write_obj(1u8, GuestAddress(0x5000)).expect("there is RAM");
/// let stats = memory.stats()?;
/// assert_eq!((stats.size(), stats.allocated()), (64 << 20, 4096));
/// println!("{stats}");
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct MemoryStats {
    /// The regions, by address.
    pub regions: Vec<RegionStats>,
    /// What is allocated on each NUMA node with memory, by the number of the node.
    ///
    /// On a machine with one node it is all there. On others only pages that this process has
    /// mapped can be told (`/proc/self/numa_maps`): what only daemons have touched, or was
    /// allocated without being mapped, is missing, and for huge RAM of base pages it takes a walk
    /// over all page tables of the process.
    pub nodes: BTreeMap<u32, u64>,
    /// What is allocated of hugetlb backings that several regions share, where the kernel does not
    /// say in which of them: it was touched by other processes only.
    pub unlocated: u64,
    /// What this process has locked into memory, guest RAM or not (`VmLck` of
    /// `/proc/self/status`).
    pub locked: u64,
    /// Options of the backings that have no effect, and limits that were near, each once.
    pub notes: BuildReport,
}

/// What the kernel says about a region. All sizes are in bytes.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RegionStats {
    /// The guest addresses.
    pub range: GuestRange,
    /// What its backing is.
    pub kind: BackingKind,
    /// The name that its backing was given, or what the kernel calls it: the name of the memfd, or
    /// the path of the file, which may have been removed since.
    pub name: String,
    /// The size of the pages of its backing.
    pub page_size: u64,
    /// What of it takes memory (or swap space) now, whichever process touched it.
    pub allocated: u64,
    /// What of it is mapped by huge pages in this process, or is in huge pages of hugetlb; none if
    /// the kernel cannot say (`PAGEMAP_SCAN`, Linux 6.7).
    pub huge: Option<u64>,
    /// The seals on its backing. [`Seals::SEAL`] alone is the kernel's mark of a tmpfs file that
    /// cannot be sealed: its size is not.
    pub seals: Seals,
}

impl RegionStats {
    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.range.size()
    }
}

impl MemoryStats {
    /// The size of all regions in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(RegionStats::size).sum()
    }

    /// What of all regions is allocated, in bytes, located or not.
    pub fn allocated(&self) -> u64 {
        let located: u64 = self.regions.iter().map(|region| region.allocated).sum();
        located + self.unlocated
    }

    /// What of all regions is in huge pages, in bytes; none if it is not known of all.
    pub fn huge(&self) -> Option<u64> {
        self.regions.iter().map(|region| region.huge).sum()
    }
}

impl<B> GuestMemoryShm<B> {
    /// What of the RAM exists now, and by which pages. Cheap enough to be asked every second.
    ///
    /// The RAM is in use meanwhile: the numbers are of slightly different times.
    ///
    /// # Errors
    ///
    /// If a system call fails, or `/proc` cannot be read.
    pub fn stats(&self) -> Result<MemoryStats, StatsError> {
        let regions = self.arc_regions();
        let rams: Vec<&Ram> = regions.iter().map(|region| region.ram()).collect();
        let (allocated, unlocated) = allocated::per_region(&rams)?;
        let is_huge_mapped = meminfo::is_huge_mapped().map_err(failed("read /proc/meminfo"))?;
        let mut stats = Vec::with_capacity(rams.len());
        for (ram, allocated) in rams.iter().zip(allocated) {
            let huge = if ram.backing.is_hugetlb() {
                Some(allocated)
            } else if is_huge_mapped {
                let found = ram.mapping.mapped_huge();
                found.map_err(failed("scan /proc/self/pagemap"))?
            } else {
                Some(0)
            };
            stats.push(RegionStats {
                range: ram.range,
                kind: ram.backing.kind(),
                name: name(&ram.backing),
                page_size: ram.backing.page_size(),
                allocated,
                huge,
                seals: ram.backing.seals(),
            });
        }
        let mut stats = MemoryStats {
            regions: stats,
            nodes: BTreeMap::new(),
            unlocated,
            locked: locked().map_err(failed("read /proc/self/status"))?,
            notes: notes(&rams),
        };
        stats.nodes = per_node(&rams, stats.allocated())?;
        Ok(stats)
    }
}

/// What was known when the backings were made, and when parts of them were mapped.
fn notes(rams: &[&Ram]) -> BuildReport {
    let mut report = BuildReport::default();
    for group in by_backing(rams) {
        let backing = &rams[group[0]].backing;
        let of_mappings = group.iter().flat_map(|at| rams[*at].mapping.notes());
        let mut known = BTreeSet::new();
        let notes = backing.notes().iter().chain(of_mappings);
        let new = notes.filter(|note| known.insert(note.to_string()));
        report.add(&backing.label(), new.cloned());
    }
    report
}

/// The name that the backing was given, or what the kernel calls the file.
fn name(backing: &ShmBacking) -> String {
    if let Some(name) = backing.name() {
        return name.to_owned();
    }
    descriptors::name_of(backing).unwrap_or_default()
}

fn per_node(rams: &[&Ram], allocated: u64) -> Result<BTreeMap<u32, u64>, StatsError> {
    // A kernel without NUMA has one node, which it does not name.
    let online = nodes::with_memory().map_or_else(|| vec![0], |nodes| nodes.iter().collect());
    if let [node] = online[..] {
        return Ok(BTreeMap::from([(node, allocated)]));
    }
    let mappings: Vec<u64> = rams
        .iter()
        .map(|ram| ram.mapping.host_addr().as_ptr().addr() as u64)
        .collect();
    let found = numa_maps::bytes_on_nodes(&mappings);
    let mut nodes: BTreeMap<u32, u64> = online.into_iter().map(|node| (node, 0)).collect();
    for (node, bytes) in found.map_err(failed("read /proc/self/numa_maps"))? {
        *nodes.entry(node).or_default() += bytes;
    }
    Ok(nodes)
}
