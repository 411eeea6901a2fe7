//! A job of populating, from its plan to its result.

use std::convert::Infallible;
use std::fmt;
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread::available_parallelism;

use super::error::PopulateError;
use super::holes::Holes;
use super::options::OnFailure;
use super::part::Part;
use super::plan::{Chunk, Plan};
use super::watch::Watch;
use super::work::Failure;
use super::{cause, need};
use crate::logs;
use crate::pool::{CancelToken, Outcome, Pool, Progress, Queue, Stop};
use crate::shortage::Shortage;
use crate::units::HumanSize;

/// A thread more for each of these, in bytes: below that it takes longer to start one.
const PER_THREAD: u64 = 64 << 20;

/// The most threads for a job, unless there are more CPUs.
const MOST_THREADS: u32 = 64;

/// What populating did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Populated {
    /// The RAM that is populated now, in bytes, including what was there before.
    pub bytes: u64,
    /// How many threads worked on it.
    pub threads: u32,
}

impl fmt::Display for Populated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.threads == 1 { "" } else { "s" };
        let (bytes, threads) = (HumanSize(self.bytes), self.threads);
        write!(f, "{bytes} populated by {threads} thread{end}")
    }
}

/// What is to be populated, and how.
pub(super) struct Job {
    plan: Plan,
    watch: Watch,
    threads: u32,
    on_failure: OnFailure,
    cancel: CancelToken,
}

impl Job {
    /// Looks whether there is memory for all of the parts.
    ///
    /// # Errors
    ///
    /// [`PopulateError::Shortage`]; [`PopulateError::CannotLook`].
    pub(super) fn new(
        parts: Vec<Part>,
        threads: Option<NonZeroU32>,
        on_failure: OnFailure,
        cancel: CancelToken,
    ) -> Result<Self, PopulateError> {
        let watch = if parts.iter().all(|part| part.watched().is_none()) {
            Watch::of_nothing()
        } else {
            Watch::of_this_process().map_err(|answer| PopulateError::CannotLook {
                shortage: Box::new(Shortage::no_descriptors(&answer)),
            })?
        };
        if let Some((at, short)) = need::shortage(&parts, &watch) {
            let range = parts[at].ram.in_guest(parts[at].range.clone());
            return Err(PopulateError::short(range, short));
        }
        let total = parts.iter().map(Part::len).sum();
        let threads = threads.map_or_else(|| default_threads(total), wanted_threads);
        let plan = Plan::new(parts, threads);
        let chunks = u32::try_from(plan.chunks()).unwrap_or(u32::MAX);
        Ok(Self {
            plan,
            watch,
            threads: threads.min(chunks),
            on_failure,
            cancel,
        })
    }

    /// In bytes.
    pub(super) fn total(&self) -> u64 {
        self.plan.total
    }

    pub(super) fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Does it, and tells how far it is.
    pub(super) fn run(&self, mut told: impl FnMut(Progress)) -> Result<Populated, PopulateError> {
        let (threads, total) = (self.threads, self.plan.total);
        if total == 0 {
            return Ok(Populated { bytes: 0, threads });
        }
        let holes = match self.on_failure {
            OnFailure::GiveBack => Some(Holes::of(&self.plan.parts)),
            OnFailure::Keep => None,
        };
        let stop = Stop::new(self.cancel.clone());
        let work = |chunk: &Chunk| self.plan.populate(chunk, &self.watch, &stop);
        // Code of the user's runs while there are pages to be given back: its panic is resumed
        // when they are. Nothing that was half done is looked at afterwards, but what the kernel
        // has.
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let pool = self.pool(&self.plan.queues, &stop);
            let outcome = pool.run(work, |done| told(Progress { done, total }));
            let threads = outcome.threads;
            match self.error(outcome) {
                Some(error) => Err(error),
                None => Ok(Populated {
                    bytes: total,
                    threads,
                }),
            }
        }));
        if !matches!(ended, Ok(Ok(_)))
            && let Some(holes) = holes
        {
            self.give_back(&holes);
        }
        ended.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Why not all is done, if it is not.
    fn error(&self, outcome: Outcome<Failure>) -> Option<PopulateError> {
        let (done, total) = (outcome.done, self.plan.total);
        let parts = &self.plan.parts;
        if let Some(failure) = outcome.failure {
            return Some(cause::find(parts, &self.watch, failure, total - done));
        }
        if done < total {
            return Some(PopulateError::Cancelled { done, total });
        }
        // Pages of a file are no use past its end.
        let truncated =
            |part: &Part| cause::truncated(part, part.ram.in_guest(part.range.clone()));
        parts.iter().find_map(truncated)
    }

    /// Gives back what was worked on, all threads together: reading it takes its time, too.
    fn give_back(&self, holes: &Holes) {
        let parts = &self.plan.parts;
        let taken: Vec<Queue<Chunk>> = self.plan.queues.iter().map(Queue::taken).collect();
        let work = |chunk: &Chunk| {
            if let Err(error) = holes.give_back(parts, chunk) {
                let range = parts[chunk.part].ram.in_guest(chunk.range.clone());
                logs::warn!("cannot give back what was populated of {range}: {error}");
            }
            Ok::<_, Infallible>(0)
        };
        self.pool(&taken, &Stop::default()).run(work, |_| {});
    }

    fn pool<'a>(&self, queues: &'a [Queue<Chunk>], stop: &'a Stop) -> Pool<'a, Chunk> {
        Pool {
            name: "populate",
            threads: self.threads,
            queues,
            stop,
        }
    }
}

fn cpus() -> u32 {
    let cpus = available_parallelism().map_or(1, |cpus| cpus.get());
    u32::try_from(cpus).unwrap_or(u32::MAX)
}

fn default_threads(bytes: u64) -> u32 {
    let enough = u32::try_from(bytes / PER_THREAD).unwrap_or(u32::MAX);
    enough.clamp(1, cpus())
}

/// More than these only wait for CPUs, and take those of others that the system allows the user.
fn wanted_threads(wanted: NonZeroU32) -> u32 {
    wanted.get().min(cpus().max(MOST_THREADS))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::options::{Populate, RamOptions};
    use crate::region::GuestRegionShm;

    #[test]
    fn small_ram_gets_one_thread_and_large_ram_one_for_each_cpu() {
        let cpus = available_parallelism().unwrap().get() as u32;
        assert_eq!(default_threads(0), 1);
        assert_eq!(default_threads(PER_THREAD * 2 - 1), 1);
        assert_eq!(default_threads(PER_THREAD * 2), cpus.min(2));
        assert_eq!(default_threads(u64::MAX), cpus);
    }

    #[test]
    fn a_job_starts_no_more_threads_than_can_be_of_use() {
        let ram = RamOptions::new();
        let region = GuestRegionShm::<()>::new((GuestAddress(0), 4 << 30), &ram).unwrap();
        let threads = |wanted| {
            let part = Part::whole(region.ram().clone(), Populate::Prefault);
            let (wanted, token) = (NonZeroU32::new(wanted), CancelToken::new());
            let job = Job::new(vec![part], wanted, OnFailure::Keep, token);
            job.unwrap().threads
        };
        assert_eq!(threads(3), 3);
        assert_eq!(threads(MOST_THREADS), MOST_THREADS);
        assert_eq!(threads(u32::MAX), MOST_THREADS.max(cpus()));
    }
}
