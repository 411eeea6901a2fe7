//! Least privilege: which regions a daemon is told of, and by which user addresses.

use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::error::TableError;
use super::{MemoryTable, TableRegion};
use crate::host::base_page_size;
use crate::memory::GuestMemoryShm;
use crate::range::{GuestRange, RangeSet};

/// What one daemon gets to see of a guest's memory: a selection of the regions, and whether their
/// user addresses say where they are mapped in this process.
///
/// By default a daemon sees all regions by their host addresses. One that moves data through a
/// bounce buffer needs only the region of that buffer and the rings; and no vhost-user daemon
/// needs our host addresses.
///
/// A view says what the daemon is *told*. What it *can* map is the descriptor of each region that
/// it is told of, all of its file: give what a daemon may see a backing of its own, as here, where
/// the bounce buffer shares no memfd with the other RAM.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, GuestRange, RamOptions, TableView};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::builder()
///     .add_ram(RamOptions::new(), [(GuestAddress(0), 1 << 20)])
///     .add_ram(RamOptions::new(), [(GuestAddress(1 << 32), 1 << 20)])
///     .build()?;
/// let bounce = GuestRange::new(GuestAddress(1 << 32), 1 << 20)?;
/// let view = TableView::default()
///     .only([bounce])
///     .with_opaque_addresses(1 << 46);
///
/// let table = memory.memory_table_as(&view)?;
/// assert_eq!(table.regions().len(), 1);
/// // One function translates ring addresses, whatever the view.
/// let ring = GuestAddress((1 << 32) + 0x1000);
/// assert_eq!(table.user_addr(ring), Some((1 << 46) + ring.0));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableView {
    /// The addresses of what is seen; absent: everything.
    only: Option<RangeSet>,
    /// What is added to guest addresses to make user addresses; absent: they are host addresses.
    opaque_constant: Option<u64>,
}

impl TableView {
    /// Restricts the view to the regions that lie wholly inside one of `ranges`; ranges that touch
    /// count as one. A region that is partly inside is not seen at all. Takes the place of an
    /// earlier restriction; without any range nothing is seen.
    ///
    /// A daemon that takes whole tables only cannot be shown nothing once it was shown a region:
    /// to unplug the last one that it sees is [`TableError::Empty`].
    #[must_use]
    pub fn only(mut self, ranges: impl IntoIterator<Item = GuestRange>) -> Self {
        self.only = Some(ranges.into_iter().map(|range| range.addrs()).collect());
        self
    }

    /// Makes user addresses of guest addresses, by adding a constant number of bytes, so that
    /// where this process has its mappings stays secret; host addresses unless set, which
    /// in-kernel vhost needs.
    ///
    /// The constant is a multiple of the page size, and no region's user addresses may run past
    /// 2^64.
    #[must_use]
    pub fn with_opaque_addresses(mut self, constant: u64) -> Self {
        self.opaque_constant = Some(constant);
        self
    }

    /// What is added to guest addresses to make user addresses; `None` if those are host
    /// addresses.
    pub fn opaque_constant(&self) -> Option<u64> {
        self.opaque_constant
    }

    /// Whether a region of this range is seen.
    pub fn sees(&self, region: GuestRange) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| only.contains(region.addrs()))
    }
}

impl<B: Bitmap> GuestMemoryShm<B> {
    /// The table that tells a daemon what `view` lets it see.
    ///
    /// # Errors
    ///
    /// [`TableError::OpaqueConstant`] if a region's user addresses would run past 2^64, or the
    /// constant is not a multiple of the page size.
    pub fn memory_table_as(&self, view: &TableView) -> Result<MemoryTable, TableError> {
        let seen = self.iter().filter(|region| view.sees(region.range()));
        let regions = seen.map(|region| {
            let mut region = TableRegion::from(region);
            if let Some(constant) = view.opaque_constant {
                region.user_addr = opaque(region.range, constant)?;
                region.mapping = None;
            }
            Ok(region)
        });
        Ok(MemoryTable {
            regions: regions.collect::<Result<_, TableError>>()?,
        })
    }
}

/// The first user address of a region. The address after its last one must exist, too: daemons
/// compute it.
fn opaque(range: GuestRange, constant: u64) -> Result<u64, TableError> {
    let page_size = base_page_size();
    let most = u64::MAX - range.addrs().end;
    let limit = most - most % page_size;
    if constant > limit || !constant.is_multiple_of(page_size) {
        return Err(TableError::OpaqueConstant {
            range,
            constant,
            limit,
            page_size,
        });
    }
    Ok(range.start_addr().0 + constant)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, size: u64) -> GuestRange {
        GuestRange::new(GuestAddress(start * MIB), size * MIB).unwrap()
    }

    fn memory(starts: &[u64]) -> GuestMemoryShm {
        let ranges: Vec<_> = starts
            .iter()
            .map(|start| (GuestAddress(start * MIB), 2 << 20))
            .collect();
        GuestMemoryShm::from_ranges(&ranges).unwrap()
    }

    fn seen(memory: &GuestMemoryShm, view: &TableView) -> Vec<u64> {
        let table = memory.memory_table_as(view).unwrap();
        table
            .regions()
            .iter()
            .map(|region| region.range().start_addr().0 / MIB)
            .collect()
    }

    #[test]
    fn only_whole_regions_inside_a_range_are_seen() {
        let memory = memory(&[0, 2, 10, 20]);
        let all = TableView::default();
        assert_eq!(memory.memory_table_as(&all).unwrap(), memory.memory_table());
        type Case = (&'static [(u64, u64)], &'static [u64]);
        let cases: [Case; 8] = [
            (&[], &[]),
            (&[(0, 100)], &[0, 2, 10, 20]),
            (&[(10, 2)], &[10]),
            // Partly inside, at either end.
            (&[(1, 3)], &[2]),
            (&[(10, 1), (20, 1)], &[]),
            (&[(11, 1)], &[]),
            // Ranges that touch or overlap count as one, in any order.
            (&[(11, 1), (10, 1)], &[10]),
            (&[(19, 2), (20, 2), (0, 3)], &[0, 20]),
        ];
        for (ranges, expected) in cases {
            let ranges = ranges.iter().map(|(start, size)| range(*start, *size));
            let view = TableView::default().only(ranges);
            assert_eq!(seen(&memory, &view), expected, "{view:?}");
        }
        // The last restriction counts.
        let view = TableView::default().only([]).only([range(0, 2)]);
        assert_eq!(seen(&memory, &view), [0]);
    }

    #[test]
    fn opaque_addresses_are_the_guests_plus_a_constant_and_say_nothing_of_ours() {
        let memory = memory(&[1, 4]);
        let constant = 0x4000_0000_0000;
        let view = TableView::default().with_opaque_addresses(constant);
        let table = memory.memory_table_as(&view).unwrap();
        for addr in [MIB, 3 * MIB - 1, 4 * MIB, 6 * MIB - 1] {
            let addr = GuestAddress(addr);
            assert_eq!(table.user_addr(addr), Some(addr.0 + constant));
            assert_ne!(table.user_addr(addr), memory.memory_table().user_addr(addr));
        }
        assert_eq!(table.user_addr(GuestAddress(0)), None);
        assert_eq!(table.user_addr(GuestAddress(3 * MIB)), None);
        // To a daemon it is another table.
        assert_ne!(table, memory.memory_table());
    }

    #[test]
    fn a_constant_that_cannot_be_names_the_largest_that_can() {
        let memory = memory(&[1, 4]);
        let with = |constant| {
            let view = TableView::default().with_opaque_addresses(constant);
            memory.memory_table_as(&view)
        };
        let largest = (u64::MAX - 6 * MIB) & !4095;
        with(largest).unwrap();
        let Err(TableError::OpaqueConstant { range, limit, .. }) = with(largest + 4096) else {
            panic!("addresses wrap");
        };
        assert_eq!((range.start_addr().0, limit), (4 * MIB, largest));
        let refused = with(0x1234).unwrap_err().to_string();
        assert!(refused.contains("0x1234 is no user address"), "{refused}");
        assert!(refused.contains("multiple of 4 KiB"), "{refused}");
    }
}
