//! A range of guest addresses as parts of regions.

use std::ops::Range;

use vm_memory::GuestAddress;

use super::GuestMemoryShm;
use crate::ram::Ram;
use crate::range::GuestRange;

impl<B> GuestMemoryShm<B> {
    /// The parts of a range, in order: the RAM of a region, and byte offsets in it, never none.
    ///
    /// # Errors
    ///
    /// The first address of the range that is no RAM.
    pub(crate) fn pieces(
        &self,
        range: GuestRange,
    ) -> Result<Vec<(&Ram, Range<u64>)>, GuestAddress> {
        let mut pieces = Vec::with_capacity(1);
        let mut at = range.start_addr().0;
        let end = at + range.size();
        while at < end {
            let addr = GuestAddress(at);
            let (region, offset) = self.find(addr).ok_or(addr)?;
            let len = (end - at).min(region.range().size() - offset);
            pieces.push((region.ram(), offset..offset + len));
            at += len;
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_range_is_cut_at_the_ends_of_regions_and_must_be_ram() {
        let ranges = [0, MIB, 4 * MIB].map(|start| (GuestAddress(start), MIB as usize));
        let memory = GuestMemoryShm::<()>::from_ranges(&ranges).unwrap();
        let pieces = |start, size| {
            let range = GuestRange::new(GuestAddress(start), size).unwrap();
            let pieces = memory.pieces(range)?;
            let pieces = pieces.into_iter();
            Ok(pieces
                .map(|(ram, inside)| (ram.range.start_addr().0, inside))
                .collect::<Vec<_>>())
        };
        assert_eq!(pieces(0, 1), Ok(vec![(0, 0..1)]));
        assert_eq!(pieces(4095, 2), Ok(vec![(0, 4095..4097)]));
        assert_eq!(pieces(MIB - 1, 2), Ok(vec![(0, MIB - 1..MIB), (MIB, 0..1)]));
        assert_eq!(pieces(4 * MIB, MIB), Ok(vec![(4 * MIB, 0..MIB)]));
        for (start, size, missing) in [
            (0, 2 * MIB + 1, 2 * MIB),
            (2 * MIB, 1, 2 * MIB),
            (4 * MIB - 1, 2, 4 * MIB - 1),
            (5 * MIB, 4096, 5 * MIB),
            (4 * MIB, MIB + 1, 5 * MIB),
        ] {
            assert_eq!(pieces(start, size), Err(GuestAddress(missing)));
        }
    }
}
