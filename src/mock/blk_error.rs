//! What can go wrong for the guest's driver.

use std::io::{self, ErrorKind};
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryError};

use super::driver::RequestId;
use crate::error::Error;

/// The errors of [`BlkDriver`](super::BlkDriver).
///
/// It converts to the crate's [`Error::Mock`], which carries it as its source: `?` works in
/// functions of either kind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkError {
    /// The device did not complete a request in time. It stays in flight: the device may still
    /// write to its buffers.
    #[error(
        "the device has not completed the request within {limit:?}, {in_flight} are in flight; \
         if the device is gone, restart the queue after BlkDriver::reset"
    )]
    TimedOut {
        /// The limit that was set.
        limit: Duration,
        /// Requests that the device has not completed.
        in_flight: usize,
    },
    /// The device completed the request with a status other than OK: 1 is an I/O error, 2 an
    /// unsupported request, 255 means that it wrote no status.
    #[error("the device completed request {} with status {status}, which is not OK", .request.0)]
    Status {
        /// The request.
        request: RequestId,
        /// What the device wrote.
        status: u8,
    },
    /// The queue has no room for the request before others are waited for.
    #[error("the request needs {needed} descriptors, {free} are free: wait for others first")]
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
    #[error("no queue of {size:#x} bytes fits at {:#x}: it must be aligned to 16 and in guest memory", .addr.0)]
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
    Memory {
        /// The first byte of the access.
        addr: GuestAddress,
        /// Why not.
        source: GuestMemoryError,
    },
    /// An eventfd or its epoll failed.
    #[error("cannot {doing}")]
    Event {
        /// What was attempted.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl From<BlkError> for Error {
    fn from(error: BlkError) -> Error {
        let kind = match error {
            BlkError::TimedOut { .. } => ErrorKind::TimedOut,
            _ => ErrorKind::Other,
        };
        Error::Mock {
            doing: "use the block device as its driver",
            source: io::Error::new(kind, error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn an_error_converts_to_the_crates_with_its_kind() {
        let error = BlkError::TimedOut {
            limit: Duration::from_secs(2),
            in_flight: 3,
        };
        let error = crate::error::Error::from(error);
        let source = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
        assert_eq!(source.kind(), ErrorKind::TimedOut);
        let text = source.to_string();
        assert!(
            text.contains("2s") && text.contains("3 are in flight"),
            "{text}"
        );
    }
}
