//! Where a split virtqueue and its requests' headers lie in guest memory.

use vm_memory::GuestAddress;

use super::blk::REQUEST_HEADER_SIZE;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_SIZE: u64 = 16;
/// Bytes of the avail ring before its entries: flags and index.
pub(super) const AVAIL_HEADER_SIZE: u64 = 4;
/// Bytes of the used ring before its entries: flags and index.
pub(super) const USED_HEADER_SIZE: u64 = 4;
/// Bytes of a used ring's entry: head `u32` and length `u32`.
pub(super) const USED_ENTRY_SIZE: u64 = 8;
/// The index follows the flags in both rings.
pub(super) const INDEX_OFFSET: u64 = 2;

/// Alignment of the descriptor table, the strictest of the three.
pub(super) const ALIGNMENT: u64 = 16;

/// The places of a [`BlkDriver`](super::BlkDriver)'s structures in guest memory.
///
/// They follow each other in the order of the fields, each aligned as virtio 1.x demands of a
/// split virtqueue (16, 2 and 4 bytes).
///
/// ```
/// use guest_memory_shm::mock::RingLayout;
/// use vm_memory::GuestAddress;
///
/// let layout = RingLayout::at(GuestAddress(0x1000), 16);
/// assert_eq!(layout.descriptors, GuestAddress(0x1000));
/// assert_eq!(layout.avail, GuestAddress(0x1100));
/// assert_eq!(layout.size, RingLayout::required_size(16));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RingLayout {
    /// The descriptor table: 16 bytes per entry.
    pub descriptors: GuestAddress,
    /// The avail ring, written by the driver: 6 bytes and 2 per entry.
    pub avail: GuestAddress,
    /// The used ring, written by the device: 6 bytes and 8 per entry.
    pub used: GuestAddress,
    /// The headers of requests, written by the driver: 16 bytes per entry.
    pub headers: GuestAddress,
    /// The status bytes of requests, written by the device: one per entry.
    pub statuses: GuestAddress,
    /// Bytes from the start of the descriptor table to the end of the status bytes.
    pub size: u64,
}

impl RingLayout {
    /// The layout of a queue of `queue_size` entries whose descriptor table is at `start`. An
    /// address beyond the end of the address space wraps around; [`BlkDriver::new`] refuses it.
    ///
    /// [`BlkDriver::new`]: super::BlkDriver::new
    pub fn at(start: GuestAddress, queue_size: u16) -> RingLayout {
        let entries = u64::from(queue_size);
        let avail = entries * DESCRIPTOR_SIZE;
        // Both rings end with a field that only EVENT_IDX uses; its place belongs to the ring.
        let used = (avail + AVAIL_HEADER_SIZE + entries * 2 + 2).next_multiple_of(4);
        let headers = (used + USED_HEADER_SIZE + entries * USED_ENTRY_SIZE + 2)
            .next_multiple_of(DESCRIPTOR_SIZE);
        let statuses = headers + entries * REQUEST_HEADER_SIZE as u64;
        let place = |offset| GuestAddress(start.0.wrapping_add(offset));
        RingLayout {
            descriptors: start,
            avail: place(avail),
            used: place(used),
            headers: place(headers),
            statuses: place(statuses),
            size: statuses + entries,
        }
    }

    /// Bytes that a queue of `queue_size` entries takes in guest memory.
    pub fn required_size(queue_size: u16) -> u64 {
        RingLayout::at(GuestAddress(0), queue_size).size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_aligned_and_do_not_overlap() {
        for power in 0..=15 {
            let n = 1u16 << power;
            let ring = RingLayout::at(GuestAddress(0x1000), n);
            let entries = u64::from(n);
            assert_eq!(ring.avail.0 % 2, 0);
            assert_eq!(ring.used.0 % 4, 0);
            assert!(ring.avail.0 >= ring.descriptors.0 + 16 * entries);
            assert!(ring.used.0 >= ring.avail.0 + 6 + 2 * entries);
            assert!(ring.headers.0 >= ring.used.0 + 6 + 8 * entries);
            assert_eq!(ring.statuses.0, ring.headers.0 + 16 * entries);
            assert_eq!(ring.size, ring.statuses.0 + entries - 0x1000);
        }
    }
}
