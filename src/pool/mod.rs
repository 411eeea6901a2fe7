//! A pool of threads that works through queues of pieces, tells how far it is, and can be
//! cancelled: for all work that takes long because there is much RAM.
//!
//! Its threads live as long as one run: work in the background has a thread that runs a pool.

use std::fmt;
use std::mem::forget;
use std::panic::resume_unwind;
use std::sync::RwLock;
use std::sync::mpsc;
use std::thread;

use nix::sys::signal::SigSet;

use crate::logs;
use crate::units::HumanSize;

mod affinity;
mod queue;
mod stop;

use affinity::Affinity;
pub(crate) use queue::Queue;
pub use stop::CancelToken;
pub(crate) use stop::Stop;

/// Threads make few calls: the default of 2 MiB would waste address space.
const STACK: usize = 256 << 10;

/// How many results of each thread may wait to be told: a caller that wants to cancel is heard in
/// time, however fast the threads are.
const AHEAD: usize = 2;

/// How far work has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Progress {
    /// What is done, in bytes; it never goes down.
    pub done: u64,
    /// What is to be done, in bytes.
    pub total: u64,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", HumanSize(self.done), HumanSize(self.total))
    }
}

/// Queues, and the threads that are to work through them.
pub(crate) struct Pool<'a, T> {
    /// What the threads are called.
    pub(crate) name: &'a str,
    /// How many there are, unless the system refuses some.
    pub(crate) threads: u32,
    pub(crate) queues: &'a [Queue<T>],
    pub(crate) stop: &'a Stop,
}

/// What came of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome<E> {
    /// In bytes.
    pub(crate) done: u64,
    /// How many threads worked on it.
    pub(crate) threads: u32,
    /// The first failure: all others follow from it.
    pub(crate) failure: Option<E>,
}

/// Sets it when it is dropped: all threads stop, too, if one of them panics, or the one that waits
/// for them.
struct StopOnDrop<'a>(&'a Stop);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

impl<T: Sync> Pool<'_, T> {
    /// Works through the queues. `work` does a piece, and gives how many bytes of it are done, of
    /// which some may be left when all is to stop; after a failure no piece is begun. `told` is
    /// called in this thread with the bytes that are done so far, whenever there are more.
    ///
    /// If the system refuses threads, there are fewer; if it refuses all, this one does the work.
    /// A panic of `work` or `told` stops all of them and is resumed: what it leaves undone is
    /// never taken for something else.
    pub(crate) fn run<E: Send>(
        &self,
        work: impl Fn(&T) -> Result<u64, E> + Sync,
        mut told: impl FnMut(u64),
    ) -> Outcome<E> {
        let mut outcome = Outcome {
            done: 0,
            threads: 0,
            failure: None,
        };
        let mut note = |result| match result {
            // Stopped before any of it was done.
            Ok(0) => {}
            Ok(bytes) => {
                outcome.done += bytes;
                if outcome.failure.is_none() {
                    told(outcome.done);
                }
            }
            Err(failure) => {
                outcome.failure.get_or_insert(failure);
            }
        };
        outcome.threads = self.spread(&work, &mut note);
        outcome
    }

    /// Does it in threads, and calls `note` in this one with the result of each piece. Gives the
    /// number of threads.
    fn spread<E: Send>(
        &self,
        work: &(impl Fn(&T) -> Result<u64, E> + Sync),
        note: &mut impl FnMut(Result<u64, E>),
    ) -> u32 {
        // The stack of a new thread is a mapping, and making one waits for all page faults of the
        // process: all threads are started, then they are released together.
        let gate = RwLock::new(());
        thread::scope(|scope| {
            let _stop = StopOnDrop(self.stop);
            // It ends with this closure: no thread waits for a caller that panicked.
            let (sender, receiver) = mpsc::sync_channel(self.threads as usize * AHEAD);
            let closed = gate.write();
            let mut started = Vec::new();
            for home in 0..self.threads {
                let sender = sender.clone();
                let gate = &gate;
                let body = move || {
                    // A signal would interrupt fallocate(2), which then undoes what it did; and
                    // a handler of the VMM's belongs into one of its threads.
                    let _ = SigSet::all().thread_block();
                    // Whether it was opened or abandoned: `stop` says what to do.
                    drop(gate.read());
                    let stop = StopOnDrop(self.stop);
                    self.work_through(home as usize, work, |result| {
                        // It is received unless this is abandoned.
                        let _ = sender.send(result);
                    });
                    forget(stop);
                };
                let builder = thread::Builder::new().name(self.name.to_owned());
                match builder.stack_size(STACK).spawn_scoped(scope, body) {
                    Ok(thread) => started.push(thread),
                    Err(error) => {
                        let (count, all, name) = (started.len(), self.threads, self.name);
                        logs::debug!("{count} of {all} threads {name}: {error}");
                        break;
                    }
                }
            }
            drop(sender);
            drop(closed);
            if started.is_empty() {
                self.work_through(0, work, note);
                return 1;
            }
            receiver.iter().for_each(note);
            let (mut count, mut panic) = (0, None);
            for thread in started {
                // The scope would only wait for the end of its work, not for its stack to go.
                panic = panic.or(thread.join().err());
                count += 1;
            }
            panic.map_or(count, |panic| resume_unwind(panic))
        })
    }

    /// Takes pieces until there are none: from the own queue first, then from the others.
    fn work_through<E>(
        &self,
        home: usize,
        work: impl Fn(&T) -> Result<u64, E>,
        mut note: impl FnMut(Result<u64, E>),
    ) {
        let mut affinity = Affinity::of_this_thread();
        let mut refused = None;
        for at in 0..self.queues.len() {
            let queue = &self.queues[(home + at) % self.queues.len()];
            if !queue.is_empty() {
                refused = affinity.keep_to(queue.nodes).err().or(refused);
            }
            while !self.stop.is_set()
                && let Some(piece) = queue.take()
            {
                let result = work(piece);
                if result.is_err() {
                    self.stop.set();
                }
                note(result);
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
    use std::convert::Infallible;
    use std::sync::{Barrier, Mutex};

    use super::*;
    use crate::host::NodeSet;

    /// Pieces are the number of their queue and their own.
    fn queues(sizes: &[u64]) -> Vec<Queue<(usize, u64)>> {
        let queue = |(at, len): (usize, &u64)| {
            Queue::new(NodeSet::new(), (0..*len).map(|piece| (at, piece)).collect())
        };
        sizes.iter().enumerate().map(queue).collect()
    }

    fn pool<'a, T>(threads: u32, queues: &'a [Queue<T>], stop: &'a Stop) -> Pool<'a, T> {
        Pool {
            name: "test",
            threads,
            queues,
            stop,
        }
    }

    #[test]
    fn every_piece_is_done_exactly_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let queues = queues(&[7, 0, 30]);
            let seen = Mutex::new(BTreeSet::new());
            let work = |piece: &(usize, u64)| {
                let new = seen.lock().unwrap().insert(*piece);
                assert!(new, "{piece:?} was done twice");
                Ok::<_, Infallible>(10)
            };
            let mut told = Vec::new();
            let stop = Stop::default();
            let outcome = pool(threads, &queues, &stop).run(work, |done| told.push(done));
            let (done, failure) = (370, None);
            assert_eq!(
                outcome,
                Outcome {
                    done,
                    threads,
                    failure
                }
            );
            assert_eq!(told, (1..=37).map(|count| count * 10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn all_threads_work_at_the_same_time() {
        // None passes before all three are there.
        let queues = queues(&[3]);
        let meeting = Barrier::new(3);
        let work = |_: &_| {
            meeting.wait();
            Ok::<_, Infallible>(10)
        };
        let outcome = pool(3, &queues, &Stop::default()).run(work, |_| {});
        assert_eq!(outcome.done, 30);
    }

    #[test]
    fn after_a_failure_no_piece_is_begun() {
        let queues = queues(&[100]);
        let work = |piece: &(usize, u64)| match piece.1 {
            5 => Err("on purpose"),
            _ => Ok(10),
        };
        let outcome = pool(1, &queues, &Stop::default()).run(work, |_| {});
        assert_eq!((outcome.done, outcome.failure), (50, Some("on purpose")));
        assert_eq!(queues[0].taken().len(), 6);
    }

    #[test]
    fn a_panic_of_who_is_told_stops_the_threads() {
        let queues = queues(&[100_000]);
        let stop = Stop::default();
        let work = |_: &_| Ok::<_, Infallible>(10);
        let pool = pool(2, &queues, &stop);
        let run = std::panic::AssertUnwindSafe(|| pool.run(work, |_| panic!("on purpose")));
        assert!(std::panic::catch_unwind(run).is_err());
        assert!(stop.is_set());
    }

    #[test]
    fn a_panic_of_work_stops_the_threads_and_is_no_smaller_result() {
        let queues = queues(&[100_000]);
        let stop = Stop::default();
        let work = |piece: &(usize, u64)| match piece.1 {
            5 => panic!("on purpose"),
            _ => Ok::<_, Infallible>(10),
        };
        let pool = pool(2, &queues, &stop);
        let run = std::panic::AssertUnwindSafe(|| pool.run(work, |_| {}));
        let panic = std::panic::catch_unwind(run).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
        assert!(stop.is_set());
        assert!(queues[0].taken().len() < 100_000);
    }
}
