//! What can go wrong for the guest's driver.

use std::io;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryError};

use crate::driver::QueueError;

/// Names a submitted request until it has been waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) u64);

/// What [`BlkDriver`](super::BlkDriver) can fail at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkError {
    /// The device did not complete a request in time. It stays in flight: the device may still
    /// write to its buffers.
    #[error(
        "the device has not completed the request within {limit:?}, {in_flight} are in flight; \
         if the device is gone, restart the queue after BlkDriver::resubmit or reset"
    )]
    #[non_exhaustive]
    TimedOut {
        /// The limit that was set.
        limit: Duration,
        /// Requests that the device has not completed.
        in_flight: usize,
    },
    /// The device completed the request with a status other than OK: 1 is an I/O error, 2 an
    /// unsupported request, 255 means that it wrote no status.
    #[error("the device completed request {} with status {status}, which is not OK", .request.0)]
    #[non_exhaustive]
    Status {
        /// The request.
        request: RequestId,
        /// What the device wrote.
        status: u8,
    },
    /// The queue has no room for the request before others are waited for.
    #[error("the request needs {needed} descriptors, {free} are free: wait for others first")]
    #[non_exhaustive]
    QueueFull {
        /// Descriptors that the request needs: its buffers and two.
        needed: usize,
        /// Descriptors that are free.
        free: usize,
    },
    /// A buffer has no bytes, which virtio forbids.
    #[error("the buffer at {:#x} has a length of 0", .0.0)]
    EmptyBuffer(GuestAddress),
    /// The request is not in flight: it was waited for, or it was forgotten by a reset.
    #[error("request {} is not in flight", .0.0)]
    UnknownRequest(RequestId),
    /// The queue size is no power of two from 4 on.
    #[error("a queue size of {0}: it must be a power of two from 4 to 32768")]
    QueueSize(u16),
    /// The ring's place is not aligned to 16 bytes, or not wholly in guest memory.
    #[error(
        "no queue of {size:#x} bytes fits at {:#x}: it must be aligned to 16 and in guest memory",
        .addr.0
    )]
    #[non_exhaustive]
    RingAddress {
        /// Where the descriptor table was to be.
        addr: GuestAddress,
        /// Bytes that the queue needs from there on.
        size: u64,
    },
    /// The device wrote nonsense to the used ring.
    #[error("the device broke the used ring: {0}")]
    BrokenRing(String),
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

impl From<QueueError> for BlkError {
    fn from(error: QueueError) -> BlkError {
        match error {
            QueueError::Size(size) => BlkError::QueueSize(size),
            QueueError::Place { addr, size } => BlkError::RingAddress { addr, size },
            QueueError::EmptyBuffer(addr) => BlkError::EmptyBuffer(addr),
            QueueError::Full { needed, free } => BlkError::QueueFull { needed, free },
            QueueError::TimedOut { limit, in_flight } => BlkError::TimedOut { limit, in_flight },
            QueueError::Memory { addr, source } => BlkError::Memory { addr, source },
            QueueError::Event(source) => BlkError::Event(source),
            broken => BlkError::BrokenRing(broken.to_string()),
        }
    }
}
