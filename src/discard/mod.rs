//! Giving RAM back to the host while the guest runs.

use std::sync::Arc;

use crate::backing::{DiscardGate, Passage, ShmBacking};
use crate::memory::GuestMemoryShm;
use crate::range::{GuestRange, InvalidRange};

mod accumulator;
mod collector;
mod discarded;
mod error;
mod inhibit;
mod pieces;

pub use accumulator::DiscardAccumulator;
pub use discarded::Discarded;
pub use error::DiscardError;
pub use inhibit::DiscardInhibitor;
use pieces::{Piece, pieces};

impl<B> GuestMemoryShm<B> {
    /// Gives a range of RAM back to the host: what a balloon, free page reporting or virtio-mem
    /// ask for.
    ///
    /// The bytes become 0 in every process that maps them, daemons included, and the pages take no
    /// memory until they are touched again. It suffices that a daemon *reads* one: shared
    /// memory has no common page of zeroes, so the read allocates it. The range may span adjacent
    /// regions, of different backings too. Sealed RAM is discarded like any other.
    ///
    /// Only whole pages of the backing are given back: base pages, or the huge pages of hugetlb.
    /// The kernel would accept less of a huge page, and do nothing; here it is reported as kept. A
    /// *transparent* huge page that is discarded in part is split by the kernel, or, if a device
    /// has it pinned, only zeroed: then what is left of it in the range is reported as kept. (So
    /// is what the guest touches again before this returns, next to such an edge.)
    ///
    /// The dirty bitmaps are not marked. The call made is madvise(2) with `MADV_REMOVE`;
    /// `MADV_DONTNEED` would succeed and free nothing, because the RAM is shared.
    ///
    /// ```
    /// use guest_memory_shm::GuestMemoryShm;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    ///
    /// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// memory.write_obj(42u64, GuestAddress(0x5000)).expect("there is RAM");
    /// let backing = memory.iter().next().expect("there is a region").backing();
    /// assert_eq!(backing.allocated()?, 4096);
    ///
    /// memory.discard((GuestAddress(0x5000), 4096))?;
    /// assert_eq!(backing.allocated()?, 0);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// A whole program with what is kept, an inhibitor, and collected reports of a balloon:
    /// `examples/discard.rs`.
    ///
    /// # Errors
    ///
    /// [`Error::Range`](crate::Error::Range) for what is no range; [`DiscardError::NotRam`],
    /// [`DiscardError::Inhibited`], [`DiscardError::ReadOnly`], [`DiscardError::Locked`] and
    /// [`DiscardError::NoHoles`] for what cannot be given back: all of these are found before the
    /// first page is. [`DiscardError::Failed`] and [`DiscardError::CannotLook`] if a call fails
    /// nevertheless.
    pub fn discard(
        &self,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
    ) -> Result<Discarded, DiscardError> {
        let range = GuestRange::at(range)?;
        let pieces = pieces(self, range)?;
        let gates = gates(pieces.iter().map(|piece| &piece.ram.backing));
        let _open = enter(&gates, range)?;
        pieces.iter().try_for_each(Piece::check)?;

        let mut discarded = Discarded::default();
        for piece in &pieces {
            discarded += piece.discard(range, discarded.freed)?;
        }
        Ok(discarded)
    }
}

/// The gates of the backings, each once, in the order in which they are to be entered.
fn gates<'a>(backings: impl Iterator<Item = &'a ShmBacking>) -> Vec<&'a Arc<DiscardGate>> {
    let mut gates: Vec<_> = backings.map(ShmBacking::gate).collect();
    gates.sort_unstable_by_key(|gate| gate.place());
    gates.dedup_by_key(|gate| gate.place());
    gates
}

/// Enters all gates, or none.
fn enter<'a>(
    gates: &[&'a Arc<DiscardGate>],
    range: GuestRange,
) -> Result<Vec<Passage<'a>>, DiscardError> {
    let enter = |gate: &&'a Arc<DiscardGate>| {
        let passage = gate.enter();
        passage.map_err(|by| DiscardError::Inhibited { range, by })
    };
    gates.iter().map(enter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::RamOptions;

    /// Two discards that entered the gates in different orders would wait for each other, as soon
    /// as an inhibitor waits to close both.
    #[test]
    fn gates_are_entered_once_and_in_the_same_order_by_all() {
        let create = |_| ShmBacking::create(&RamOptions::new(), 4096).unwrap();
        let backings: Vec<_> = (0..8).map(create).collect();
        let places = |backings: &mut dyn Iterator<Item = &ShmBacking>| -> Vec<usize> {
            gates(backings).iter().map(|gate| gate.place()).collect()
        };
        let one = places(&mut backings.iter());
        let clones = backings.clone();
        let other = places(&mut backings.iter().rev().chain(&clones));
        assert_eq!(one, other);
        assert_eq!(one.len(), 8);
    }
}
