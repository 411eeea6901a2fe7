//! What can go wrong at a driver's end of a queue.

use std::io;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryError};

/// What a [`DriverQueue`](super::DriverQueue) can fail at.
///
/// ```
/// use guest_memory_shm::driver::{DriverQueue, QueueError};
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let error = DriverQueue::new(&memory, GuestAddress(0xff0), 16).unwrap_err();
/// assert!(matches!(error, QueueError::Place { size: 0x1ae, .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The queue size is no power of two.
    #[error("a queue size of {0}: it must be a power of two from 1 to 32768")]
    Size(u16),
    /// The queue's place is not aligned to 16 bytes, or not wholly in guest memory.
    #[error(
        "no queue of {size:#x} bytes fits at {:#x}: it must be aligned to 16 and in guest memory",
        .addr.0
    )]
    #[non_exhaustive]
    Place {
        /// Where the descriptor table was to be.
        addr: GuestAddress,
        /// Bytes that the queue needs from there on.
        size: u64,
    },
    /// A chain without a buffer, which virtio has no way to say.
    #[error("a chain needs at least one buffer")]
    EmptyChain,
    /// A buffer has no bytes, which virtio forbids.
    #[error("the buffer at {:#x} has a length of 0", .0.0)]
    EmptyBuffer(GuestAddress),
    /// The chain will never have room on this queue.
    #[error("the chain needs {needed} descriptors, the queue has {size}")]
    #[non_exhaustive]
    ChainTooLong {
        /// Descriptors that the chain needs: one per buffer.
        needed: usize,
        /// Descriptors of the queue.
        size: u16,
    },
    /// The chain has no room before others are completed.
    #[error("the chain needs {needed} descriptors, {free} are free: take completions first")]
    #[non_exhaustive]
    Full {
        /// Descriptors that the chain needs: one per buffer.
        needed: usize,
        /// Descriptors that are free.
        free: usize,
    },
    /// The device's used index is not between the completions that were taken and the chains that
    /// were added: it jumped, or went back.
    #[error(
        "the used index is {index}: completions were taken up to {taken}, \
         and {in_flight} in flight could follow"
    )]
    #[non_exhaustive]
    UsedIndex {
        /// What the device wrote.
        index: u16,
        /// The index up to which completions were taken.
        taken: u16,
        /// Chains in flight.
        in_flight: usize,
    },
    /// The device completed a chain that is not in flight.
    #[error("used entry {index} is of chain {head}, which is not in flight")]
    #[non_exhaustive]
    UsedHead {
        /// What the device wrote as the chain's first descriptor.
        head: u32,
        /// The index of the entry; its place on the ring is the remainder by the queue's size.
        index: u16,
    },
    /// Completions wait on the used ring which a resubmission would have carried out again.
    #[error("{0} completions have not been taken: poll until there are none, then resubmit")]
    NotTaken(u16),
    /// The device did not complete anything in time. The chains stay in flight: the device may
    /// still write to their buffers.
    #[error("the device has completed nothing within {limit:?}, {in_flight} chains are in flight")]
    #[non_exhaustive]
    TimedOut {
        /// The limit that was given.
        limit: Duration,
        /// Chains that the device has not completed.
        in_flight: usize,
    },
    /// There is nothing to wait for.
    #[error("no chain is in flight: nothing can complete")]
    NothingInFlight,
    /// Guest memory cannot be reached.
    #[error("cannot access guest memory at {:#x}", .addr.0)]
    #[non_exhaustive]
    Memory {
        /// The first byte of the access.
        addr: GuestAddress,
        /// Why not.
        source: GuestMemoryError,
    },
    /// An eventfd of the queue, or its epoll, failed.
    #[error("cannot make or use the eventfds of the queue")]
    Event(#[source] io::Error),
}
