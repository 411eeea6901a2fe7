//! The end by a signal. SIGINT and SIGTERM can come at any moment, and then nothing may be left:
//! not a file, not a name in /dev/shm, not half a line on the terminal.
//!
//! All threads block both signals, and one waits for them. It ends the process by the very
//! signal, as if it had never been blocked (for a shell that is status 130 or 143), but for two
//! things: it waits for the end of what must not be left half done, and it undoes what was begun.

use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal, raise};

use crate::failure::{OrFail, Result};

type Action = Box<dyn Fn() + Send>;

static WHOLE: Mutex<()> = Mutex::new(());
static UNDO: Mutex<Vec<(u64, Action)>> = Mutex::new(Vec::new());

/// Has the signals waited for. To be called before there is another thread.
pub(crate) fn watch() -> Result<()> {
    let doing = || "cannot wait for signals";
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().or_fail(doing)?;
    let wait = move || {
        let Ok(signal) = signals.wait() else { return };
        let _whole = whole();
        for (_, undo) in lock(&UNDO).iter() {
            undo();
        }
        // If the process was started with the signal ignored, it does not kill.
        let _ = signals.thread_unblock().and_then(|()| raise(signal));
        process::exit(128 + signal as i32);
    };
    let thread = thread::Builder::new().name("signals".into());
    thread.spawn(wait).map(drop).or_fail(doing)
}

/// As long as the result lives, no signal ends the process: it must not live long.
pub(crate) fn whole() -> MutexGuard<'static, ()> {
    lock(&WHOLE)
}

/// Has `undo` called before a signal ends the process, as long as the result lives.
pub(crate) fn undo(undo: impl Fn() + Send + 'static) -> Undo {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let id = COUNT.fetch_add(1, Ordering::Relaxed);
    lock(&UNDO).push((id, Box::new(undo)));
    Undo { id }
}

/// What [`undo`] gives.
pub(crate) struct Undo {
    id: u64,
}

impl Drop for Undo {
    fn drop(&mut self) {
        lock(&UNDO).retain(|(id, _)| *id != self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
