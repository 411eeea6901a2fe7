//! Least privilege: which regions a daemon is told of, and by which user addresses.

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::error::TableError;
use super::{MemoryTable, TableRegion};
use crate::host::base_page_size;
use crate::memory::GuestMemoryShm;
use crate::range::GuestRange;

/// What one daemon gets to see of a guest's memory: a selection of the regions, and what their user
/// addresses say.
///
/// By default a daemon sees all regions by their host addresses. One that moves data through a
/// bounce buffer needs only the region of that buffer and the rings; and no vhost-user daemon needs
/// our host addresses.
///
/// A view says what the daemon is *told*. What it *can* map is the descriptor of each region that it
/// is told of, all of its file: give what a daemon may see a backing of its own, as here, where the
/// bounce buffer shares no memfd with the other RAM.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, GuestRange, RamOptions, TableView, UserAddresses};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::builder()
///     .with_ram(RamOptions::new(), [(GuestAddress(0), 1 << 20)])
///     .with_ram(RamOptions::new(), [(GuestAddress(1 << 32), 1 << 20)])
///     .build()?;
/// let bounce = GuestRange::new(GuestAddress(1 << 32), 1 << 20)?;
/// let view = TableView::default()
///     .only([bounce])
///     .with_user_addresses(UserAddresses::Opaque { constant: 1 << 46 });
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
    /// Sorted, with gaps between them; absent: everything.
    only: Option<Vec<GuestRange>>,
    user_addresses: UserAddresses,
}

/// What the user address of a region says.
///
/// ```
/// use guest_memory_shm::UserAddresses;
///
/// assert_eq!(UserAddresses::default(), UserAddresses::Host);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum UserAddresses {
    /// Where the region is mapped in this process, as in-kernel vhost needs it.
    #[default]
    Host,
    /// The guest address plus a constant: where this process has its mappings stays secret.
    Opaque {
        /// The constant in bytes, a multiple of the page size. No region's user addresses may run
        /// past 2^64.
        constant: u64,
    },
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
        let mut ranges: Vec<_> = ranges.into_iter().collect();
        ranges.sort_unstable();
        let mut merged: Vec<(GuestAddress, u64)> = Vec::with_capacity(ranges.len());
        for range in ranges {
            let end = range.start_addr().0 + range.size();
            match merged.last_mut() {
                Some((_, last)) if range.start_addr().0 <= *last => *last = end.max(*last),
                _ => merged.push((range.start_addr(), end)),
            }
        }
        let ranges = merged
            .into_iter()
            .filter_map(|(start, end)| GuestRange::new(start, end - start.0).ok());
        self.only = Some(ranges.collect());
        self
    }

    /// Sets what user addresses say; host addresses unless set.
    #[must_use]
    pub fn with_user_addresses(mut self, user_addresses: UserAddresses) -> Self {
        self.user_addresses = user_addresses;
        self
    }

    /// What user addresses say.
    pub fn user_addresses(&self) -> UserAddresses {
        self.user_addresses
    }

    /// Whether a region of this range is seen.
    pub fn sees(&self, region: GuestRange) -> bool {
        let Some(ranges) = &self.only else {
            return true;
        };
        let behind = ranges.partition_point(|range| range.start_addr() <= region.start_addr());
        let below = behind.checked_sub(1).map(|at| ranges[at]);
        below.is_some_and(|range| region.last_addr() <= range.last_addr())
    }
}

impl<B: Bitmap> GuestMemoryShm<B> {
    /// The table that tells a daemon what `view` lets it see.
    ///
    /// # Errors
    ///
    /// [`TableError::OpaqueConstant`] if a region's user addresses would run past 2^64, or the constant
    /// is not a multiple of the page size.
    pub fn memory_table_as(&self, view: &TableView) -> Result<MemoryTable, TableError> {
        let seen = self.iter().filter(|region| view.sees(region.range()));
        let regions = seen.map(|region| {
            let mut region = TableRegion::from(region);
            if let UserAddresses::Opaque { constant } = view.user_addresses {
                region.userspace_addr = opaque(region.range, constant)?;
                region.mapping = None;
            }
            Ok(region)
        });
        Ok(MemoryTable {
            regions: regions.collect::<Result<_, TableError>>()?,
        })
    }
}

/// The first user address of a region. The address behind its last one must exist, too: daemons
/// compute it.
fn opaque(range: GuestRange, constant: u64) -> Result<u64, TableError> {
    let page_size = base_page_size();
    let most = u64::MAX - (range.start_addr().0 + range.size());
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
        let view = TableView::default().with_user_addresses(UserAddresses::Opaque { constant });
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
            let view = TableView::default().with_user_addresses(UserAddresses::Opaque { constant });
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
