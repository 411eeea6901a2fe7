//! Where an operation is attacked: its thread's system calls fail as a plan says.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::libc;

use super::call::{Call, looks_at_a_path};
use super::filter;

/// As many calls as an operation may make.
const MOST_CALLS: usize = 1 << 16;

/// Which calls fail, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) call: Call,
    pub(super) when: When,
    pub(super) errno: Errno,
}

/// Counted from 1, among equal calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum When {
    Only(usize),
    /// That one and all after it.
    From(usize),
}

/// What an attack needs to know, and what came of it.
pub(super) struct Stage {
    shared: Arc<Shared>,
    supervisors: Mutex<Vec<JoinHandle<()>>>,
    /// No call is looked at at all.
    calm: bool,
}

/// What a kernel does not know: calls that always fail, each with its error.
pub(super) type Missing = &'static [(Call, Errno)];

struct Shared {
    fault: Option<Fault>,
    missing: Missing,
    /// Calls count, and fail, only while this is set.
    armed: AtomicBool,
    /// How many calls equal to the one that is to fail there were, and how many failed.
    seen: AtomicUsize,
    failed: AtomicUsize,
    /// All calls, if none is to fail.
    calls: Mutex<Vec<Call>>,
    /// How many of them ask what is at a path.
    looks: AtomicUsize,
}

impl Stage {
    /// Nothing fails, and nothing is watched.
    pub(super) fn calm() -> Self {
        Self::new(None, &[], true)
    }

    /// Nothing fails but what is missing; calls are written down.
    pub(super) fn counting(missing: Missing) -> Self {
        Self::new(None, missing, false)
    }

    pub(super) fn attacking(fault: Fault, missing: Missing) -> Self {
        Self::new(Some(fault), missing, false)
    }

    fn new(fault: Option<Fault>, missing: Missing, calm: bool) -> Self {
        let shared = Shared {
            fault,
            missing,
            armed: AtomicBool::new(false),
            seen: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
            calls: Mutex::new(Vec::with_capacity(match fault {
                None if !calm => MOST_CALLS,
                _ => 0,
            })),
            looks: AtomicUsize::new(0),
        };
        Self {
            shared: Arc::new(shared),
            supervisors: Mutex::default(),
            calm,
        }
    }

    /// Whether a call failed.
    pub(super) fn has_fired(&self) -> bool {
        self.shared.failed.load(Ordering::SeqCst) > 0
    }

    /// How many calls asked what is at a path.
    pub(super) fn looks(&self) -> usize {
        self.shared.looks.load(Ordering::SeqCst)
    }

    /// The error by which a call fails, if one does.
    pub(super) fn errno(&self) -> Option<Errno> {
        self.shared.fault.map(|fault| fault.errno)
    }

    /// Runs `work` in a thread whose calls, and those of the threads that it starts, fail as
    /// planned.
    pub(super) fn attacked<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.watched(|| self.armed(work))
    }

    /// Runs `work` while calls of threads that [`watched`](Self::watched) started fail.
    pub(super) fn armed<T>(&self, work: impl FnOnce() -> T) -> T {
        let _disarm = Disarm(&self.shared);
        self.shared.armed.store(true, Ordering::SeqCst);
        work()
    }

    /// Runs `work` in a thread that is watched, as are the threads that it starts; nothing fails
    /// unless something is [armed](Self::armed).
    pub(super) fn watched<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        if self.calm {
            return work();
        }
        let desk = Arc::new(Desk::default());
        let (shared, inbox) = (Arc::clone(&self.shared), Arc::clone(&desk));
        let supervisor = std::thread::Builder::new().name("supervisor".to_owned());
        let supervisor = supervisor.spawn(move || shared.supervise(&inbox.wait()));
        lock(&self.supervisors).push(supervisor.unwrap());
        let watched = self.shared.fault.map(|fault| {
            let missing = self.shared.missing.iter().map(|(call, _)| call.number);
            std::iter::once(fault.call.number)
                .chain(missing)
                .collect::<Vec<_>>()
        });
        let done = std::thread::scope(|scope| {
            let subject = scope.spawn(|| {
                desk.put(filter::install(watched.as_deref()).expect("seccomp is there"));
                work()
            });
            subject.join()
        });
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Waits until all threads that were watched have ended. Gives the calls that were seen, if
    /// none was to fail.
    pub(super) fn end(self) -> Vec<Call> {
        let shared = Arc::clone(&self.shared);
        drop(self);
        std::mem::take(&mut *lock(&shared.calls))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for supervisor in std::mem::take(&mut *lock(&self.supervisors)) {
            // Its panic is counted.
            let _ = supervisor.join();
        }
    }
}

impl Shared {
    /// Answers calls until no thread is left that makes any.
    ///
    /// It never allocates: the thread that waits for the answer may hold the allocator's lock.
    fn supervise(&self, listener: &OwnedFd) {
        while let Some(notice) = filter::receive(listener) {
            let call = Call::of(&notice);
            let armed = self.armed.load(Ordering::SeqCst);
            if armed && looks_at_a_path(&notice) {
                self.looks.fetch_add(1, Ordering::SeqCst);
            }
            let error = armed.then(|| self.meet(call));
            let error = error.flatten();
            if error.is_some() && call.number == libc::SYS_close {
                // As the kernel does: whatever the answer, the descriptor is closed.
                filter::close(notice.data.args[0].try_into().unwrap_or(-1));
            }
            filter::answer(listener, &notice, error);
        }
    }

    /// How a call is to fail, if it is.
    fn meet(&self, call: Call) -> Option<Errno> {
        let missing = self.missing.iter().find(|(missing, _)| *missing == call);
        if let Some((_, errno)) = missing {
            return Some(*errno);
        }
        let Some(fault) = self.fault else {
            let mut calls = lock(&self.calls);
            assert!(calls.len() < MOST_CALLS);
            calls.push(call);
            return None;
        };
        if call != fault.call {
            return None;
        }
        let number = self.seen.fetch_add(1, Ordering::SeqCst) + 1;
        let fails = match fault.when {
            When::Only(only) => number == only,
            When::From(first) => number >= first,
        };
        if fails {
            self.failed.fetch_add(1, Ordering::SeqCst);
        }
        fails.then_some(fault.errno)
    }
}

struct Disarm<'a>(&'a Shared);

impl Drop for Disarm<'_> {
    fn drop(&mut self) {
        self.0.armed.store(false, Ordering::SeqCst);
    }
}

/// Where the descriptor of a filter is handed over, without an allocation or a system call but
/// futex(2).
#[derive(Default)]
struct Desk {
    listener: Mutex<Option<OwnedFd>>,
    put: Condvar,
}

impl Desk {
    fn put(&self, listener: OwnedFd) {
        *lock(&self.listener) = Some(listener);
        self.put.notify_one();
    }

    fn wait(&self) -> OwnedFd {
        let guard = lock(&self.listener);
        let guard = self.put.wait_while(guard, |listener| listener.is_none());
        let mut guard = guard.unwrap_or_else(PoisonError::into_inner);
        let listener = guard.take().expect("it is there");
        assert!(listener.as_raw_fd() >= 0);
        listener
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
