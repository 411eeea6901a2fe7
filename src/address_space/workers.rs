//! Threads that tell several listeners side by side: each waits for another process, and all of
//! them together should cost the time of the slowest.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use vm_memory::bitmap::Bitmap;

use super::busy::Busy;
use crate::listener::{ListenerError, MemoryListener};
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};

pub(super) type Listener<B> = Box<dyn MemoryListener<B>>;
pub(super) type Answer = Result<(), ListenerError>;

/// What is asked of a listener.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    Check,
    Update,
}

impl Call {
    /// Makes the call. A listener that panics refuses.
    pub(super) fn make<B: 'static>(
        self,
        listener: &mut Listener<B>,
        memory: &GuestMemoryShm<B>,
    ) -> Answer {
        let call = || match self {
            Self::Check => listener.check(memory),
            Self::Update => listener.update(memory),
        };
        caught(call).unwrap_or_else(|panic| Err(panicked(&panic)))
    }
}

/// What a listener answers that panicked.
pub(super) fn panicked(message: &str) -> ListenerError {
    ListenerError::refused(format!("it panicked: {message}"))
}

/// Threads, started when they are first needed; each makes one call at a time.
///
/// A listener goes to the thread by value and comes back with the answer: nothing is borrowed.
pub(super) struct Workers<B: 'static> {
    threads: Vec<Worker<B>>,
    /// The process that the threads run in: a child of fork(2) has no copy of them.
    pid: u32,
}

struct Worker<B: 'static> {
    jobs: SyncSender<Job<B>>,
    answers: Receiver<(Listener<B>, Answer)>,
    thread: JoinHandle<()>,
}

/// What a worker is given to do.
struct Job<B: 'static> {
    listener: Listener<B>,
    memory: GuestMemoryShm<B>,
    /// The address spaces that the call is on behalf of.
    busy: Vec<u64>,
}

impl<B: Bitmap + Send + Sync + 'static> Workers<B> {
    pub(super) fn new() -> Self {
        Self {
            threads: Vec::new(),
            pid: std::process::id(),
        }
    }

    /// Tells all `listeners` this memory, side by side, and gives them back in their order.
    pub(super) fn update(
        &mut self,
        mut listeners: Vec<Listener<B>>,
        memory: &GuestMemoryShm<B>,
    ) -> Vec<(Listener<B>, Answer)> {
        let helpers = self.start(listeners.len().saturating_sub(1));
        // What does not go to another thread is done here.
        let here = listeners.split_off(helpers.len());
        for (worker, listener) in helpers.iter().zip(listeners) {
            worker.send(listener, memory);
        }
        let here: Vec<_> = here
            .into_iter()
            .map(|mut listener| {
                let answer = Call::Update.make(&mut listener, memory);
                (listener, answer)
            })
            .collect();
        let mut all: Vec<_> = helpers.iter().map(Worker::receive).collect();
        all.extend(here);
        all
    }

    /// As many of `wanted` threads as can be had.
    fn start(&mut self, wanted: usize) -> &[Worker<B>] {
        if self.pid != std::process::id() {
            // Copies have no threads: nothing answers, and there is nothing to wait for.
            std::mem::take(&mut self.threads)
                .into_iter()
                .for_each(std::mem::forget);
            self.pid = std::process::id();
        }
        while self.threads.len() < wanted {
            match Worker::start() {
                Ok(worker) => self.threads.push(worker),
                Err(error) => {
                    logs::warn!(
                        "listeners are told one after the other, no thread is left: {error}"
                    );
                    break;
                }
            }
        }
        &self.threads[..wanted.min(self.threads.len())]
    }
}

impl<B: 'static> Drop for Workers<B> {
    fn drop(&mut self) {
        let copies = self.pid != std::process::id();
        for worker in self.threads.drain(..) {
            if copies {
                std::mem::forget(worker);
                continue;
            }
            drop(worker.jobs);
            // It cannot panic: it does nothing but calls whose panics are caught.
            let _ = worker.thread.join();
        }
    }
}

impl<B: Bitmap + Send + Sync + 'static> Worker<B> {
    fn start() -> std::io::Result<Self> {
        let (jobs, to_do) = sync_channel::<Job<B>>(1);
        let (done, answers) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("memory-listener".to_owned())
            .spawn(move || {
                for job in to_do {
                    let Job {
                        mut listener,
                        memory,
                        busy,
                    } = job;
                    let busy = Busy::on_behalf(busy);
                    let answer = Call::Update.make(&mut listener, &memory);
                    // The memory is let go before the answer is seen: then no mapping is left.
                    discard(memory);
                    drop(busy);
                    if done.send((listener, answer)).is_err() {
                        break;
                    }
                }
            })?;
        Ok(Self {
            jobs,
            answers,
            thread,
        })
    }

    fn send(&self, listener: Listener<B>, memory: &GuestMemoryShm<B>) {
        let job = Job {
            listener,
            memory: memory.clone(),
            busy: Busy::spaces(),
        };
        if self.jobs.send(job).is_err() {
            unreachable!("the thread lives as long as its worker");
        }
    }

    fn receive(&self) -> (Listener<B>, Answer) {
        let Ok(answer) = self.answers.recv() else {
            unreachable!("the thread lives as long as its worker");
        };
        answer
    }
}
