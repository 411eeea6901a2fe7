//! Requests that stop on their way, until they are let go on or their daemon is no more.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock::lock;

/// How far the device has come with a request.
///
/// The steps are those of the vhost-user specification's "Inflight I/O tracking" for a split
/// virtqueue. Without an in-flight buffer a request comes to all of them too, and what a step does
/// to the buffer is left out; one that an earlier daemon had in flight begins at `CarriedOut`.
///
/// ```
/// use guest_memory_shm::mock::{MockDaemon, RequestStep};
///
/// # fn main() -> Result<(), guest_memory_shm::mock::MockError> {
/// let daemon = MockDaemon::builder().start_unnamed()?;
/// daemon.hold_requests(2, RequestStep::CarriedOut); // the second write is on the disk,
/// // ... and is not completed: daemon.wait_held(limit)?
/// daemon.release_requests();
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestStep {
    /// It is taken from the avail ring. For the buffer it is still there.
    Taken,
    /// It is in flight: `counter` and `inflight` are set.
    Marked,
    /// Data and status are written.
    CarriedOut,
    /// It is the head of the last batch, of which it is all: `next` and `last_batch_head` are set.
    Listed,
    /// It is on the used ring, and still marked.
    Used,
    /// It is not marked any more, and `used_idx` does not count it yet.
    Unmarked,
    /// `used_idx` counts it. The guest is not woken yet.
    Counted,
}

/// What the worker of a connection is told while it serves requests.
#[derive(Debug, Default)]
pub(super) struct Hold {
    /// Spares requests the lock where nothing is to be held.
    armed: AtomicBool,
    /// The connection is over: a driver that keeps its ring full must not keep the worker.
    over: AtomicBool,
    state: Mutex<HoldState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct HoldState {
    /// The step, and how many requests are still to come to it.
    at: Option<(RequestStep, u64)>,
    held: bool,
}

impl Hold {
    pub(super) fn arm(&self, count: u64, step: RequestStep) {
        lock(&self.state).at = Some((step, count));
        self.armed.store(true, Ordering::Release);
    }

    /// Lets go what is held, and holds nothing more.
    pub(super) fn release(&self) {
        self.armed.store(false, Ordering::Release);
        *lock(&self.state) = HoldState::default();
        self.changed.notify_all();
    }

    /// Waits until a request is held; false after `limit`.
    pub(super) fn wait_held(&self, limit: Duration) -> bool {
        self.changed
            .wait_timeout_while(lock(&self.state), limit, |state| !state.held)
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .held
    }

    /// A request has come to `step`. None: the daemon ended meanwhile, and does nothing more.
    pub(super) fn pass(&self, step: RequestStep) -> Option<()> {
        if !self.armed.load(Ordering::Acquire) {
            return Some(());
        }
        let mut state = lock(&self.state);
        if let Some((at, count)) = &mut state.at
            && *at == step
        {
            *count = count.wrapping_sub(1);
            if *count == 0 {
                *state = HoldState {
                    at: None,
                    held: true,
                };
                self.changed.notify_all();
            }
        }
        let mut state = self
            .changed
            .wait_while(state, |state| state.held && !self.is_over())
            .unwrap_or_else(PoisonError::into_inner);
        state.held = false;
        (!self.is_over()).then_some(())
    }

    pub(super) fn begin(&self) {
        self.over.store(false, Ordering::Release);
    }

    /// Ends the worker: at once where it is held, else after the batch that is under way.
    pub(super) fn end(&self) {
        let state = lock(&self.state);
        self.over.store(true, Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}
