//! A pool of threads that works through queues of chunks.

use std::io;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use nix::sys::signal::SigSet;

use super::CancelToken;
use super::node::Affinity;
use super::plan::{Chunk, Queue};
use crate::host::memory;
use crate::logs;

/// Threads need little but their few calls; the default of 2 MiB is address space for nothing.
const STACK: usize = 256 << 10;

/// How many results of each thread may wait for the listener: one that wants to cancel is heard in
/// time, however fast the threads are.
const AHEAD: usize = 2;

/// Why a chunk could not be done.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) chunk: Chunk,
    pub(super) why: Why,
}

/// What went wrong with it.
#[derive(Debug)]
pub(super) enum Why {
    /// The system refused to do this.
    Refused(Step, io::Error),
    /// Others took the memory.
    Short(memory::Short),
}

/// What is done to a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Allocate,
    Map,
}

/// Tells all threads to stop after the chunk that they work on.
#[derive(Debug, Default)]
pub(super) struct Stop {
    now: AtomicBool,
    token: CancelToken,
}

impl Stop {
    pub(super) fn new(token: CancelToken) -> Self {
        Self {
            now: AtomicBool::new(false),
            token,
        }
    }

    pub(super) fn set(&self) {
        self.now.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_set(&self) -> bool {
        self.now.load(Ordering::Relaxed) || self.token.is_cancelled()
    }
}

/// Sets it when it is dropped: the threads stop, too, if the one that waits for them panics.
struct StopOnDrop<'a>(&'a Stop);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// What all threads share.
pub(super) struct Engine<'a, W> {
    pub(super) queues: &'a [Queue],
    pub(super) stop: &'a Stop,
    /// What is to be done with a chunk: it gives how many bytes are done, of which some may be left
    /// when all is to stop.
    pub(super) work: W,
}

impl<W: Fn(&Chunk) -> Result<u64, Failure> + Sync> Engine<'_, W> {
    /// Works through the queues with at most `threads` threads, and calls `done` in this one with
    /// the result of each chunk. Gives the number of threads.
    ///
    /// If the system refuses threads, there are fewer; if it refuses all, this one does the work.
    /// A panic of `done` stops all of them and is resumed.
    pub(super) fn run(&self, threads: u32, mut done: impl FnMut(Result<u64, Failure>)) -> u32 {
        let gate = RwLock::new(());
        thread::scope(|scope| {
            let _stop = StopOnDrop(self.stop);
            // It ends with this closure: no thread waits for a listener that panicked.
            let (sender, receiver) = mpsc::sync_channel(threads as usize * AHEAD);
            let closed = gate.write();
            let mut started = Vec::new();
            for home in 0..threads {
                let sender = sender.clone();
                let gate = &gate;
                let body = move || {
                    // A signal would interrupt fallocate(2), which then undoes what it did; and
                    // a handler of the VMM's belongs into one of its threads.
                    let _ = SigSet::all().thread_block();
                    // Whether it was opened or abandoned: `stop` says what to do.
                    drop(gate.read());
                    self.work_through(home as usize, |result| {
                        // Nobody listens any more only if this is abandoned.
                        let _ = sender.send(result);
                    });
                };
                let builder = thread::Builder::new().name("populate".to_owned());
                match builder.stack_size(STACK).spawn_scoped(scope, body) {
                    Ok(thread) => started.push(thread),
                    Err(error) => {
                        let count = started.len();
                        logs::debug!("{count} of {threads} threads populate: {error}");
                        break;
                    }
                }
            }
            drop(sender);
            drop(closed);
            if started.is_empty() {
                self.work_through(0, &mut done);
                return 1;
            }
            receiver.iter().for_each(done);
            let mut count = 0;
            for thread in started {
                // The scope would only wait for the end of its work, not for its stack to go. No code
                // of others runs in it that could panic.
                let _ = thread.join();
                count += 1;
            }
            count
        })
    }

    /// Takes chunks until there are none: from the own queue first, then from the others.
    fn work_through(&self, home: usize, mut done: impl FnMut(Result<u64, Failure>)) {
        let mut affinity = Affinity::of_this_thread();
        let mut refused = None;
        for at in 0..self.queues.len() {
            let queue = &self.queues[(home + at) % self.queues.len()];
            if !queue.is_empty() {
                refused = affinity.keep_to(queue.nodes).err().or(refused);
            }
            while !self.stop.is_set()
                && let Some(chunk) = queue.take()
            {
                let result = (self.work)(chunk);
                if result.is_err() {
                    self.stop.set();
                }
                done(result);
            }
        }
        if let Some(errno) = refused {
            logs::debug!("cannot keep a thread to the nodes of its pages: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::{Barrier, Mutex};

    use super::*;
    use crate::options::NodeSet;

    fn queues(sizes: &[u64]) -> Vec<Queue> {
        let chunk = |part, at: u64| Chunk {
            part,
            range: at * 10..at * 10 + 10,
        };
        let queue = |(part, len): (usize, &u64)| {
            Queue::new(
                NodeSet::new(),
                (0..*len).map(|at| chunk(part, at)).collect(),
            )
        };
        sizes.iter().enumerate().map(queue).collect()
    }

    #[test]
    fn every_chunk_is_done_exactly_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let queues = queues(&[7, 0, 30]);
            let seen = Mutex::new(BTreeSet::new());
            let engine = Engine {
                queues: &queues,
                stop: &Stop::default(),
                work: |chunk: &Chunk| {
                    let new = seen.lock().unwrap().insert((chunk.part, chunk.range.start));
                    assert!(new, "{chunk:?} was done twice");
                    Ok(10)
                },
            };
            let mut bytes = 0;
            let started = engine.run(threads, |result| bytes += result.unwrap());
            assert_eq!((started, bytes), (threads, 370));
            assert_eq!(seen.into_inner().unwrap().len(), 37);
        }
    }

    #[test]
    fn all_threads_work_at_the_same_time() {
        // Nobody passes before all three are there.
        let queues = queues(&[3]);
        let meeting = Barrier::new(3);
        let engine = Engine {
            queues: &queues,
            stop: &Stop::default(),
            work: |_: &Chunk| {
                meeting.wait();
                Ok(10)
            },
        };
        let mut done = 0;
        engine.run(3, |_| done += 1);
        assert_eq!(done, 3);
    }

    #[test]
    fn after_a_failure_no_chunk_is_begun() {
        let queues = queues(&[100]);
        let engine = Engine {
            queues: &queues,
            stop: &Stop::default(),
            work: |chunk: &Chunk| match chunk.range.start {
                50 => Err(Failure {
                    chunk: chunk.clone(),
                    why: Why::Refused(Step::Map, io::ErrorKind::Other.into()),
                }),
                _ => Ok(10),
            },
        };
        let mut results = Vec::new();
        engine.run(1, |result| results.push(result.is_ok()));
        assert_eq!(results, [true, true, true, true, true, false]);
        assert_eq!(queues[0].taken().len(), 6);
    }

    #[test]
    fn a_panic_of_the_listener_stops_the_threads() {
        let queues = queues(&[100_000]);
        let stop = Stop::default();
        let engine = Engine {
            queues: &queues,
            stop: &stop,
            work: |_: &Chunk| Ok(10),
        };
        let run = std::panic::AssertUnwindSafe(|| engine.run(2, |_| panic!("on purpose")));
        assert!(std::panic::catch_unwind(run).is_err());
        assert!(stop.is_set());
    }
}
