//! A job of populating, from its plan to its result.

use std::any::Any;
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread::available_parallelism;

use super::engine::{Engine, Failure, Stop};
use super::holes::Holes;
use super::plan::{Chunk, Part, Plan, Queue};
use super::work::Looking;
use super::{
    CancelToken, OnFailure, PopulateOptions, PopulateProgress, Populated, ProgressFn, cause,
};
use crate::error::PopulateError;
use crate::logs;
use crate::options::Populate;

/// A thread more for each of these, in bytes: below that it takes longer to start one.
const PER_THREAD: u64 = 64 << 20;

/// What is to be populated, and how.
pub(super) struct Job<'a> {
    pub(super) parts: Vec<Part>,
    pub(super) policy: Policy,
    pub(super) progress: Option<ProgressFn<'a>>,
}

/// How a job is to be done.
pub(super) struct Policy {
    pub(super) threads: Option<NonZeroU32>,
    pub(super) on_failure: OnFailure,
    pub(super) cancel: CancelToken,
}

impl<'a> Job<'a> {
    pub(super) fn new(parts: Vec<Part>, options: PopulateOptions<'a>, default: OnFailure) -> Self {
        Self {
            parts: match options.mode {
                Populate::Lazy => Vec::new(),
                Populate::Allocate | Populate::Prefault => parts,
            },
            policy: Policy {
                threads: options.threads,
                on_failure: options.on_failure.unwrap_or(default),
                cancel: options.cancel,
            },
            progress: options.progress,
        }
    }

    /// In bytes.
    pub(super) fn total(&self) -> u64 {
        self.parts.iter().map(Part::len).sum()
    }

    /// Looks whether there is memory for all of it.
    pub(super) fn look(&self) -> Result<Looking, PopulateError> {
        Looking::begin(&self.parts)
    }

    pub(super) fn run(self, looking: &Looking) -> Result<Populated, PopulateError> {
        let total = self.total();
        let asked = self.policy.threads.map(NonZeroU32::get);
        let threads = asked.unwrap_or_else(|| default_threads(total));
        let plan = Plan::new(self.parts, threads);
        let chunks = u32::try_from(plan.chunks()).unwrap_or(u32::MAX);
        let threads = threads.min(chunks);
        if total == 0 {
            return Ok(Populated { bytes: 0, threads });
        }
        let holes = match self.policy.on_failure {
            OnFailure::GiveBack => Some(Holes::of(&plan.parts)),
            OnFailure::Keep => None,
        };
        let stop = Stop::new(self.policy.cancel);
        let progress = self.progress;
        let ended = caught(|| {
            let mut outcome = populate(&plan, looking, threads, &stop, progress);
            match outcome.error(&plan, looking) {
                None => Ok(Populated {
                    bytes: total,
                    threads: outcome.threads,
                }),
                Some(error) => Err(error),
            }
        });
        if !matches!(ended, Ok(Ok(_)))
            && let Some(holes) = holes
        {
            give_back(&plan, threads, &holes);
        }
        ended.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// What came of it.
struct Outcome {
    /// In bytes.
    done: u64,
    threads: u32,
    failure: Option<Failure>,
}

fn populate(
    plan: &Plan,
    looking: &Looking,
    threads: u32,
    stop: &Stop,
    mut progress: Option<ProgressFn<'_>>,
) -> Outcome {
    let engine = Engine {
        queues: &plan.queues,
        stop,
        work: |chunk: &Chunk| plan.populate(chunk, looking, stop),
    };
    let mut done = 0;
    let mut failure = None;
    let threads = engine.run(threads, |result| match result {
        // Stopped before its first piece.
        Ok(0) => {}
        Ok(bytes) => {
            done += bytes;
            let total = plan.total;
            let goes_on = progress
                .as_mut()
                .is_none_or(|progress| progress(PopulateProgress { done, total }).is_continue());
            if !goes_on {
                stop.set();
                // What is still being done is not asked about any more.
                progress = None;
            }
        }
        Err(first) => {
            failure.get_or_insert(first);
            progress = None;
        }
    });
    Outcome {
        done,
        threads,
        failure,
    }
}

impl Outcome {
    /// Why not all is done, if it is not. The first failure counts: the others follow from it.
    fn error(&mut self, plan: &Plan, looking: &Looking) -> Option<PopulateError> {
        let (done, total) = (self.done, plan.total);
        if let Some(failure) = self.failure.take() {
            return Some(cause::find(plan, looking, failure, total - done));
        }
        if done < total {
            return Some(PopulateError::Cancelled { done, total });
        }
        // Pages of a file are no use behind its end.
        let mut parts = plan.parts.iter();
        parts.find_map(|part| cause::truncated(part, part.in_guest(&part.range)))
    }
}

/// Code of the user's runs while there are pages to be given back: the progress callback. Its panic
/// is resumed when they are.
fn caught<R>(work: impl FnOnce() -> R) -> Result<R, Box<dyn Any + Send>> {
    // Nothing that was half done is looked at afterwards, but what the kernel has.
    catch_unwind(AssertUnwindSafe(work))
}

/// Gives back what was worked on, all threads together: reading it takes its time, too.
fn give_back(plan: &Plan, threads: u32, holes: &Holes) {
    let taken: Vec<Queue> = plan.queues.iter().map(Queue::taken).collect();
    let engine = Engine {
        queues: &taken,
        stop: &Stop::default(),
        work: |chunk: &Chunk| {
            if let Err(error) = holes.give_back(&plan.parts, chunk) {
                let range = plan.parts[chunk.part].in_guest(&chunk.range);
                logs::warn!("cannot give back what was populated of {range}: {error}");
            }
            Ok(0)
        },
    };
    engine.run(threads, |_| {});
}

fn default_threads(bytes: u64) -> u32 {
    let cpus = available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    u32::try_from(cpus.min((bytes / PER_THREAD).max(1))).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_gets_one_thread_and_large_ram_one_for_each_cpu() {
        let cpus = available_parallelism().unwrap().get() as u32;
        assert_eq!(default_threads(0), 1);
        assert_eq!(default_threads(PER_THREAD * 2 - 1), 1);
        assert_eq!(default_threads(PER_THREAD * 2), cpus.min(2));
        assert_eq!(default_threads(u64::MAX), cpus);
    }
}
