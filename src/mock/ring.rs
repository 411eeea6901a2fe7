//! Where the headers of requests and their status bytes lie in guest memory, after the queue.

use vm_memory::GuestAddress;

use super::blk::REQUEST_HEADER_SIZE;
use crate::driver::QueueLayout;

/// The places of a [`BlkDriver`](super::BlkDriver)'s structures in guest memory.
///
/// The three parts of a [`QueueLayout`], then what requests need. They follow each other in the
/// order of the fields.
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
        let queue = QueueLayout::at(start, queue_size);
        let headers = queue.size.next_multiple_of(REQUEST_HEADER_SIZE as u64);
        let statuses = headers + entries * REQUEST_HEADER_SIZE as u64;
        let place = |offset| GuestAddress(start.0.wrapping_add(offset));
        RingLayout {
            descriptors: queue.descriptors,
            avail: queue.avail,
            used: queue.used,
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
            assert!(ring.headers.0 >= ring.used.0 + 6 + 8 * entries);
            assert_eq!(ring.statuses.0, ring.headers.0 + 16 * entries);
            assert_eq!(ring.size, ring.statuses.0 + entries - 0x1000);
        }
    }
}
