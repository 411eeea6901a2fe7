//! What ends a process in which a test hangs, and says where.

use std::fs;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// More than a thousand times what a case takes.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Watchdog {
    shared: Arc<(Mutex<State>, Condvar)>,
    thread: JoinHandle<()>,
}

struct State {
    /// What is under way, and by when it must be over; none once all is.
    current: Option<(String, Instant)>,
}

impl Watchdog {
    pub(crate) fn start() -> Self {
        let state = State {
            current: Some(("start".to_owned(), Instant::now() + LIMIT)),
        };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let watched = Arc::clone(&shared);
        let thread = std::thread::spawn(move || watch(&watched.0, &watched.1));
        Self { shared, thread }
    }

    /// Something begins: it has time until the limit.
    pub(crate) fn expect(&self, what: &str) {
        let mut state = lock(&self.shared.0);
        state.current = Some((what.to_owned(), Instant::now() + LIMIT));
    }

    pub(crate) fn end(self) {
        lock(&self.shared.0).current = None;
        self.shared.1.notify_one();
        self.thread.join().expect("it does not panic");
    }
}

fn watch(state: &Mutex<State>, changed: &Condvar) {
    let mut guard = lock(state);
    while let Some((what, deadline)) = &guard.current {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            eprintln!("failed: {what}: it hangs\n{}", threads());
            std::process::abort();
        }
        let woken = changed.wait_timeout(guard, left);
        guard = woken.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// The threads, and the system calls that they are in.
fn threads() -> String {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs is mounted");
    let line = |task: fs::DirEntry| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        format!("{}: {}\n", read("comm").trim(), read("syscall").trim())
    };
    tasks.flatten().map(line).collect()
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
