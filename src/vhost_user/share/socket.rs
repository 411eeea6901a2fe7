//! The socket of vhost's `Frontend`, which gives out its number only.
#![expect(unsafe_code, reason = "the number is to be borrowed as a descriptor")]

use std::os::fd::{AsRawFd, BorrowedFd};

use vhost::vhost_user::Frontend;

/// The socket of a frontend. Takes its lock for a moment.
pub(super) fn socket_of(frontend: &Frontend) -> BorrowedFd<'_> {
    // SAFETY: the frontend owns the socket of which it gives the number, never -1, and closes it
    // with the last of its clones, no earlier: the one that is borrowed here outlives what is
    // returned.
    unsafe { BorrowedFd::borrow_raw(frontend.as_raw_fd()) }
}
