//! Populating in the background, and the handle to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};

use nix::sys::signal::SigSet;

use super::error::PopulateError;
use super::job::{Job, Populated};
use super::options::ProgressFn;
use crate::pool::{CancelToken, Progress};

/// Populating that goes on in the background: to ask how far it is, and to wait for.
///
/// A [`CancelToken`] cancels it, and so does dropping the handle, which waits until the threads
/// are gone. In a child of fork(2), which has the handle and none of the threads, dropping it does
/// nothing.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, Populate, PopulateOptions};
/// use vm_memory::{Bytes, GuestAddress};
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
/// let handle = memory.populate_in_background(PopulateOptions::new(Populate::Prefault))?;
/// // The VMM goes on, for example to load a kernel.
/// memory.write_obj(0x90_u8, GuestAddress(0x1000)).expect("there is RAM");
/// assert!(handle.progress().done <= 64 << 20);
/// assert_eq!(handle.wait()?.bytes, 64 << 20);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping it cancels"]
pub struct PopulateHandle {
    done: Arc<AtomicU64>,
    total: u64,
    cancel: CancelToken,
    /// There until it is waited for.
    thread: Option<JoinHandle<Result<Populated, PopulateError>>>,
    /// The process that the thread runs in: a child of fork(2) has no copy of it.
    pid: u32,
}

impl PopulateHandle {
    pub(super) fn start(job: Job, mut told: ProgressFn<'static>) -> Result<Self, PopulateError> {
        let done = Arc::new(AtomicU64::new(0));
        let (total, cancel) = (job.total(), job.cancel_token());
        let counter = done.clone();
        let body = move || {
            // As in the threads that do the work, which inherit it.
            let _ = SigSet::all().thread_block();
            job.run(|progress| {
                counter.store(progress.done, Ordering::Relaxed);
                told(progress);
            })
        };
        let builder = Builder::new().name("populate".to_owned());
        let thread = builder.spawn(body);
        let thread = thread.map_err(|source| PopulateError::NoThread { source })?;
        Ok(Self {
            done,
            total,
            cancel,
            thread: Some(thread),
            pid: std::process::id(),
        })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            done: self.done.load(Ordering::Relaxed),
            total: self.total,
        }
    }

    /// Whether it has ended, in whatever way: [`wait`](Self::wait) returns at once then.
    pub fn is_finished(&self) -> bool {
        self.is_elsewhere() || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until it has ended, and gives its result.
    ///
    /// # Errors
    ///
    /// Those of [`GuestMemoryShm::populate`](crate::GuestMemoryShm::populate);
    /// [`PopulateError::OtherProcess`] in a child of fork(2).
    ///
    /// # Panics
    ///
    /// If the progress callback panicked, with its panic.
    pub fn wait(mut self) -> Result<Populated, PopulateError> {
        if self.is_elsewhere() {
            return Err(PopulateError::OtherProcess);
        }
        let Some(thread) = self.thread.take() else {
            unreachable!("only this method and drop take it");
        };
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Whether this is a copy of the handle in a child of fork(2).
    fn is_elsewhere(&self) -> bool {
        self.pid != std::process::id()
    }
}

impl Drop for PopulateHandle {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        if self.is_elsewhere() {
            // There is no such thread to be joined or detached, and asking for one is undefined.
            std::mem::forget(thread);
            return;
        }
        self.cancel.cancel();
        if let Err(panic) = thread.join() {
            // It was printed where it happened, and there is no caller to be told. Dropping it may
            // panic in turn, which would end the process if this is dropped by a panic.
            std::mem::forget(panic);
        }
    }
}
