//! Telling threads to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Cancels work that takes long, from anywhere: a clone is the same token. It stays cancelled:
/// what is begun afterwards gets a new one.
///
/// ```
/// use guest_memory_shm::{CancelToken, GuestMemoryShm, Populate, PopulateError, PopulateOptions};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
/// let token = CancelToken::new();
/// token.clone().cancel();
/// let cancelled = memory.populate(PopulateOptions::new(Populate::Allocate).with_cancel(token));
/// assert!(matches!(cancelled, Err(PopulateError::Cancelled { done: 0, .. })));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct CancelToken {
    cancelled: Arc<AtomicBool>,
}

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels: each thread stops after the piece that it works on, at most 16 MiB or one page.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Tells all threads of a pool to stop after the piece that they work on, because of a failure, or
/// because a token is cancelled.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    now: AtomicBool,
    token: CancelToken,
}

impl Stop {
    pub(crate) fn new(token: CancelToken) -> Self {
        Self {
            now: AtomicBool::new(false),
            token,
        }
    }

    pub(crate) fn set(&self) {
        self.now.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.now.load(Ordering::Relaxed) || self.token.is_cancelled()
    }
}
