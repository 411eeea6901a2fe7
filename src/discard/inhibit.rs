//! Forbidding discards while devices have pages pinned.

use super::gates;
use crate::backing::Closed;
use crate::memory::GuestMemoryShm;

/// As long as it lives, no RAM of the backings that it was taken for is discarded.
///
/// For users that have pages pinned, as VFIO has all of the RAM that a device may reach by DMA: a
/// discard would replace the page for the guest, while the device goes on to use the old one.
/// Taken by [`GuestMemoryShm::inhibit_discards`].
#[derive(Debug)]
#[must_use = "discards are allowed again when it is dropped"]
pub struct DiscardInhibitor {
    _closed: Vec<Closed>,
}

impl<B> GuestMemoryShm<B> {
    /// Forbids discards of all this RAM until the inhibitor is dropped.
    ///
    /// When this returns, no discard is running any more; later ones are refused with
    /// [`DiscardError::Inhibited`](crate::DiscardError::Inhibited). Several inhibitors add up. It
    /// holds for the [backings](crate::ShmBacking) of the regions and their clones, and so for
    /// every memory that has a region on one of them: those that hotplug made before or makes
    /// later too. A backing that is *added* later is not covered: take another inhibitor for the
    /// new memory. Nor is the same descriptor, adopted a second time, or what other processes do
    /// with it.
    ///
    /// ```
    /// use guest_memory_shm::{DiscardError, Error, GuestMemoryShm};
    /// use vm_memory::GuestAddress;
    ///
    /// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// let pinned = memory.inhibit_discards();
    /// let refused = memory.discard((GuestAddress(0), 4096)).unwrap_err();
    /// assert!(matches!(refused, DiscardError::Inhibited { by: 1, .. }));
    /// drop(pinned);
    /// memory.discard((GuestAddress(0), 4096))?;
    /// # Ok::<(), Error>(())
    /// ```
    pub fn inhibit_discards(&self) -> DiscardInhibitor {
        let regions = self.arc_regions();
        let gates = gates(regions.iter().map(|region| region.backing()));
        // One after the other, and no lock is held meanwhile: discards that enter several gates
        // are never waited for with a gate in hand.
        let closed = gates.into_iter().map(|gate| gate.close()).collect();
        DiscardInhibitor { _closed: closed }
    }
}
