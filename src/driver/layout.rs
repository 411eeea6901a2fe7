//! Where the three parts of a split virtqueue lie in guest memory.

use vm_memory::GuestAddress;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_SIZE: u64 = 16;
/// Bytes of either ring before its entries: flags and index.
pub(super) const RING_HEADER_SIZE: u64 = 4;
/// Bytes of an avail ring's entry: a head.
pub(super) const AVAIL_ENTRY_SIZE: u64 = 2;
/// Bytes of a used ring's entry: head `u32` and length `u32`.
pub(super) const USED_ENTRY_SIZE: u64 = 8;
/// The index follows the flags in both rings.
pub(super) const INDEX_OFFSET: u64 = 2;

/// Alignment of the descriptor table, the strictest of the three.
pub(super) const ALIGNMENT: u64 = 16;

/// The places of a split virtqueue's parts in guest memory.
///
/// They follow each other in the order of the fields, each aligned as virtio 1.x demands (16, 2
/// and 4 bytes; "Split Virtqueues").
///
/// ```
/// use guest_memory_shm::driver::QueueLayout;
/// use vm_memory::GuestAddress;
///
/// let layout = QueueLayout::at(GuestAddress(0x1000), 16);
/// assert_eq!(layout.descriptors, GuestAddress(0x1000));
/// assert_eq!(layout.avail, GuestAddress(0x1100));
/// assert_eq!(layout.size, QueueLayout::required_size(16));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueLayout {
    /// The descriptor table: 16 bytes per entry.
    pub descriptors: GuestAddress,
    /// The avail ring, written by the driver: 6 bytes and 2 per entry.
    pub avail: GuestAddress,
    /// The used ring, written by the device: 6 bytes and 8 per entry.
    pub used: GuestAddress,
    /// Bytes from the start of the descriptor table to the end of the used ring.
    pub size: u64,
}

impl QueueLayout {
    /// The layout of a queue of `queue_size` entries whose descriptor table is at `start`. An
    /// address beyond the end of the address space wraps around; [`DriverQueue::new`] refuses it.
    ///
    /// [`DriverQueue::new`]: super::DriverQueue::new
    pub fn at(start: GuestAddress, queue_size: u16) -> QueueLayout {
        let entries = u64::from(queue_size);
        let avail = entries * DESCRIPTOR_SIZE;
        // Both rings end with a field that only EVENT_IDX uses; its place belongs to the ring.
        let used = (avail + RING_HEADER_SIZE + entries * AVAIL_ENTRY_SIZE + 2).next_multiple_of(4);
        let place = |offset| GuestAddress(start.0.wrapping_add(offset));
        QueueLayout {
            descriptors: start,
            avail: place(avail),
            used: place(used),
            size: used + RING_HEADER_SIZE + entries * USED_ENTRY_SIZE + 2,
        }
    }

    /// Bytes that a queue of `queue_size` entries takes in guest memory.
    pub fn required_size(queue_size: u16) -> u64 {
        QueueLayout::at(GuestAddress(0), queue_size).size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_aligned_and_do_not_overlap() {
        for power in 0..=15 {
            let n = 1u16 << power;
            let queue = QueueLayout::at(GuestAddress(0x1000), n);
            let entries = u64::from(n);
            assert_eq!(queue.avail.0 % 2, 0);
            assert_eq!(queue.used.0 % 4, 0);
            assert!(queue.avail.0 >= queue.descriptors.0 + 16 * entries);
            assert!(queue.used.0 >= queue.avail.0 + 6 + 2 * entries);
            assert_eq!(queue.size, queue.used.0 + 6 + 8 * entries - 0x1000);
        }
    }
}
