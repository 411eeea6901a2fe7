//! A driver's end of a split virtqueue, for tests and programs that take a guest's place.
//!
//! A device's end of a virtqueue is in `virtio-queue`; the other end is otherwise in the guest's
//! kernel. [`DriverQueue`] puts chains of buffers on a queue in guest memory, wakes the device,
//! and takes what it has completed. It knows nothing of what the buffers mean, nor of how the
//! device was told of the queue: vhost-user, vhost in the kernel, a device of the same process.
//!
//! **The device is not trusted.** What it writes is checked against what is in flight; nonsense is
//! a [`QueueError`] that names the value, which stays until a [reset](DriverQueue::reset).
//!
//! **A device may die.** Chains that it took are in flight until they come back. Without in-flight
//! buffers (`VHOST_USER_SET_INFLIGHT_FD`), its successor knows the two indices only:
//! [`DriverQueue::resubmit`] places on the avail ring what those then mean, and
//! [`DriverQueue::reset`] hands out the chains of a queue that begins anew.
//!
//! # What it does not do
//! - No packed rings, EVENT_IDX or indirect descriptors: their features must not be acknowledged.
//! - Nothing keeps a device out that is slow and not dead: stop it before `resubmit` and `reset`.
//! - The device shares the flags of the eventfds. One that makes them blocking, and fills or
//!   drains them, can make the driver wait in write(2) or read(2).

mod error;
mod layout;
mod queue;

pub use error::QueueError;
pub use layout::QueueLayout;
pub use queue::{Chain, Completion, DriverQueue};
