//! A deadline for calls that would wait for a silent peer indefinitely.
//!
//! A timeout on the socket does not help: vhost's `Frontend` takes `EAGAIN` for a reason to try
//! again. What ends its wait is the end of the connection, which is also all that is left to do:
//! an answer that came after the limit would be taken for the answer to a later request.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::Frontend;

use super::disconnector::{Disconnector, Line};
use super::error::{DaemonFailure, DaemonRequest, Result, ShareError};
use crate::logs;
use crate::panics::caught;

/// Hangs up on a daemon that does not answer in time, so that no call waits indefinitely.
///
/// It is one thread, which sleeps. [`VhostUserShare`](crate::VhostUserShare) has one of its own. A
/// VMM that makes other calls on its `Frontend` (negotiation, rings) needs one for them too.
///
/// ```no_run
/// use std::time::Duration;
///
/// use guest_memory_shm::CallDeadline;
/// use vhost::VhostBackend;
/// use vhost::vhost_user::Frontend;
///
/// let frontend = Frontend::connect("/run/vhost-user-blk.sock", 1)?;
/// let mut limit = CallDeadline::new(&frontend, Duration::from_secs(5));
/// let features = limit.run(|| frontend.get_features())??;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct CallDeadline {
    shared: Arc<Shared>,
    /// What watches the time, or why it could not be started.
    thread: io::Result<JoinHandle<()>>,
    limit: Duration,
    /// The process that the thread runs in: a child of fork(2) has no copy of it.
    pid: u32,
}

struct Shared {
    state: Mutex<State>,
    /// For the thread: there is something to do.
    changed: Condvar,
    /// For all others: the thread knows the connection.
    known: Condvar,
}

#[derive(Default)]
struct State {
    /// Until the thread takes it.
    disconnector: Option<Disconnector>,
    /// The connection, once it is known.
    line: Option<Line>,
    /// The connection is to be ended as soon as it is known.
    end_due: bool,
    /// It was waited for in vain.
    is_busy: bool,
    /// When the call that is under way must be over.
    deadline: Option<Instant>,
    /// The thread waits without a deadline and must be woken for a new one. While it sleeps
    /// towards an old deadline it need not be: it looks again when that has come.
    idle: bool,
    expired: bool,
    ended: bool,
}

/// Whether a call may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    /// It may: it will be ended in time.
    Runs,
    /// Its time ran out before it could be made: another thread has waited on the connection all
    /// the time.
    RanOut,
}

impl CallDeadline {
    /// A limit for each call on `frontend`.
    ///
    /// After the first call that takes longer the connection is closed, and every later call on
    /// the frontend fails. That includes calls of other threads on clones of it: one that waits
    /// has the frontend's lock, so it takes from the time of the calls that are made here, and is
    /// ended with them. One that waits already when the limit is made cannot be ended, because the
    /// descriptor is not known then: a call here fails when its time is over, all the same.
    pub fn new(frontend: &Frontend, limit: Duration) -> Self {
        Self::with_disconnector(frontend.into(), limit)
    }

    pub(super) fn with_disconnector(disconnector: Disconnector, limit: Duration) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                disconnector: Some(disconnector),
                ..State::default()
            }),
            changed: Condvar::new(),
            known: Condvar::new(),
        });
        Self {
            thread: Shared::start(&shared),
            shared,
            limit,
            pid: std::process::id(),
        }
    }

    /// Whether the thread is there; it is tried again if there was none to be had before.
    fn is_watched(&mut self) -> io::Result<()> {
        if self.thread.is_err() {
            self.thread = Shared::start(&self.shared);
        }
        match &self.thread {
            Ok(_) => Ok(()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }

    /// Makes a call on the frontend.
    ///
    /// # Errors
    ///
    /// [`ShareError::Daemon`] with [`DaemonFailure::Silent`] if it took longer than the limit: the
    /// connection is closed then. [`ShareError::NoDeadline`] if the time cannot be watched,
    /// because no thread could be had, or because this process is a child of the one that made the
    /// limit: the call was not made. The next call tries to have a thread again. What the call
    /// itself answers is inside `Ok`.
    pub fn run<T>(&mut self, call: impl FnOnce() -> T) -> Result<T> {
        let late = ShareError::Daemon {
            request: DaemonRequest::Other,
            failure: DaemonFailure::Silent(self.limit),
        };
        if self.start()? == Clock::RanOut {
            return Err(late);
        }
        let answer = call();
        match self.stop() {
            true => Err(late),
            false => Ok(answer),
        }
    }

    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
        // It may sleep towards a deadline that is later than the next one.
        self.shared.changed.notify_one();
    }

    /// Starts the clock, or sets it back if it runs.
    ///
    /// Without a thread to end it a call must not even begin to wait: that is an error.
    pub(super) fn start(&mut self) -> Result<Clock> {
        if self.is_a_copy() {
            let source = io::Error::other("this is a child of the process that connected");
            return Err(ShareError::NoDeadline { source });
        }
        self.is_watched()
            .map_err(|source| ShareError::NoDeadline { source })?;
        let mut state = self
            .shared
            .wait_known(Instant::now().checked_add(self.limit));
        if state.line.is_none() {
            return Ok(Clock::RanOut);
        }
        // The daemon's time begins now: the start of the thread is not its fault.
        state.deadline = Instant::now().checked_add(self.limit);
        if state.idle {
            state.idle = false;
            self.shared.changed.notify_one();
        }
        Ok(Clock::Runs)
    }

    /// Ends the connection: now, or as soon as it is known. Without a thread it stays until its
    /// owner drops it: to get to know it could be to wait for another thread's call.
    pub(super) fn end_connection(&mut self) {
        if self.is_a_copy() {
            return; // It is the parent's.
        }
        if let Err(error) = self.is_watched() {
            return logs::warn!("a connection stays open, no thread can be had: {error}");
        }
        let mut state = self.shared.lock();
        match &state.line {
            Some(line) => line.end(),
            None => state.end_due = true,
        }
    }

    /// Whether the other side has ended the connection, as far as that can be seen without a word.
    /// It takes no longer than a call may.
    pub(super) fn is_gone(&mut self) -> bool {
        if self.is_a_copy() || self.is_watched().is_err() {
            return false;
        }
        let deadline = Instant::now().checked_add(self.limit);
        let state = self.shared.wait_known(deadline);
        state.line.as_ref().is_some_and(Line::is_gone)
    }

    /// Whether fork(2) made it: then the thread is not in this process.
    fn is_a_copy(&self) -> bool {
        std::process::id() != self.pid
    }

    /// Stops the clock, and tells whether it had run out.
    pub(super) fn stop(&self) -> bool {
        let mut state = self.shared.lock();
        state.deadline = None;
        state.expired
    }
}

impl Shared {
    fn start(shared: &Arc<Self>) -> io::Result<JoinHandle<()>> {
        let watched = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("vhost-deadline".to_owned());
        thread.spawn(move || watched.watch())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock but that of a connection, which leaves it
        // consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the connection is known, or the deadline has come; once in vain, no more.
    fn wait_known(&self, deadline: Option<Instant>) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while state.line.is_none() && !state.is_busy {
            state = match deadline {
                None => self
                    .known
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        state.is_busy = true;
                        break;
                    }
                    let woken = self.known.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        state
    }

    /// Gets to know the connection, however long that takes: without the lock.
    fn learn(&self) {
        let disconnector = self.lock().disconnector.take();
        let line = disconnector.map(Disconnector::learn);
        let mut state = self.lock();
        if let (Some(line), true) = (&line, state.end_due) {
            line.end();
        }
        state.line = line;
        self.known.notify_all();
    }

    fn watch(&self) {
        self.learn();
        let mut state = self.lock();
        while !state.ended {
            state = match state.deadline {
                None => {
                    state.idle = true;
                    let woken = self.changed.wait(state);
                    woken.unwrap_or_else(PoisonError::into_inner)
                }
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        state.expired = true;
                        state.deadline = None;
                        if let Some(line) = &state.line {
                            // If it panics, which was reported then, later calls are watched
                            // still.
                            let _ = caught(|| line.end());
                        }
                        continue;
                    }
                    let woken = self.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl Drop for CallDeadline {
    fn drop(&mut self) {
        if self.is_a_copy() {
            return;
        }
        let gone = Err(io::ErrorKind::NotConnected.into());
        let Ok(thread) = std::mem::replace(&mut self.thread, gone) else {
            return;
        };
        // It may have hardly begun, and holds the connection open until it has ended.
        let deadline = Instant::now().checked_add(self.limit);
        let mut state = self.shared.wait_known(deadline);
        state.ended = true;
        let is_known = state.line.is_some();
        drop(state);
        self.shared.changed.notify_one();
        // If it is not known, the thread ends by itself, once the call is over that another makes.
        if is_known {
            // It panics only if the connection's code did, which was reported then.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for CallDeadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CallDeadline({:?})", self.limit)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use nix::errno::Errno;
    use nix::libc;

    use super::*;
    use crate::host::calls::forbidden;

    fn limit(limit: Duration) -> (CallDeadline, mpsc::Receiver<()>) {
        let (sender, receiver) = mpsc::channel();
        let disconnector = move || sender.send(()).unwrap();
        (
            CallDeadline::with_disconnector(Disconnector::new(disconnector), limit),
            receiver,
        )
    }

    #[test]
    fn a_call_that_waits_too_long_is_ended() {
        let (mut limit, hung_up) = limit(Duration::from_millis(5));
        let refused = limit.run(|| hung_up.recv()).unwrap_err();
        let late = "the daemon did not answer within 5ms: the connection was closed";
        assert!(refused.to_string().starts_with(late), "{refused}");
        // It stays expired: the connection is gone.
        assert!(limit.run(|| ()).is_err());
    }

    #[test]
    fn without_a_watcher_no_call_is_made_until_a_thread_can_be_had() {
        let calls = [libc::SYS_clone3, libc::SYS_clone];
        let (mut unwatched, hung_up) = forbidden(&calls, Errno::EPERM, || {
            let (mut unwatched, hung_up) = limit(Duration::from_secs(3600));
            let refused = unwatched.run(|| panic!("it could wait indefinitely"));
            assert!(matches!(refused, Err(ShareError::NoDeadline { .. })));
            assert!(!unwatched.is_gone());
            unwatched.end_connection();
            (unwatched, hung_up)
        });
        assert!(unwatched.run(|| ()).is_ok());
        unwatched.end_connection();
        hung_up.recv().unwrap();
    }

    #[test]
    fn in_a_child_of_the_process_no_call_is_made() {
        let (mut unwatched, _hung_up) = limit(Duration::from_secs(3600));
        let pid = std::mem::replace(&mut unwatched.pid, 1);
        let refused = unwatched.run(|| panic!("it could wait indefinitely"));
        assert!(matches!(refused, Err(ShareError::NoDeadline { .. })));
        unwatched.pid = pid;
        assert!(unwatched.run(|| ()).is_ok());
    }

    #[test]
    fn calls_in_time_are_left_alone_however_many() {
        let (mut limit, hung_up) = limit(Duration::from_secs(3600));
        for call in 0..1000 {
            assert_eq!(limit.run(|| call).unwrap(), call);
        }
        drop(limit);
        assert!(hung_up.try_recv().is_err());
    }

    #[test]
    fn a_shorter_limit_holds_for_the_next_call() {
        let (mut limit, hung_up) = limit(Duration::from_secs(3600));
        limit.run(|| ()).unwrap();
        limit.set_limit(Duration::from_millis(5));
        assert!(limit.run(|| hung_up.recv()).is_err());
    }

    #[test]
    fn each_call_has_the_whole_time() {
        // The thread sleeps towards a deadline that later calls push away. Calls that together
        // take longer than one may are in time; on a machine so busy that one of them is not,
        // another limit is tried.
        let in_time = |time: Duration| {
            let (mut limit, hung_up) = limit(time);
            for _ in 0..4 {
                let start = Instant::now();
                let answer = limit.run(|| hung_up.recv_timeout(time * 2 / 5));
                if start.elapsed() >= time {
                    return false;
                }
                assert!(answer.unwrap().is_err(), "hung up too early");
            }
            true
        };
        assert!((0..8).any(|power| in_time(Duration::from_millis(100 << power))));
    }
}
