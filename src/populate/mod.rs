//! Populate: pages of RAM allocated and mapped ahead of their first use, by several threads.
//!
//! A [`job`] has a [`plan`], which cuts each [`part`] of the RAM into chunks, and a pool of
//! threads that works through them: [`work`] is what is done to a chunk. [`need`] counts what is
//! missing, before anything is done, and [`watch`] looks again before each piece whether there is
//! memory for it. [`holes`] remembers what was there before, so that a failure can be undone, and
//! [`cause`] finds out why there was one, which the kernel does not tell. [`handle`] does all this
//! in the background.
//!
//! # Why it is done as it is
//!
//! - fallocate(2) on a tmpfs needs a third of the time of a page fault, tells `ENOSPC` where a
//!   fault is SIGBUS (and `MADV_POPULATE_WRITE` only says `EFAULT`), and makes the fault
//!   afterwards cheaper by more than it costs. But it holds the lock of the inode: two threads in
//!   it are slower than one. So a thread that finds the lock free allocates its chunk and then
//!   maps it, and one that does not maps its chunk right away.
//! - Where memory is short the kernel refuses nothing: it ends a process. So what a control group
//!   or the machine can still give is asked, not tried out. A look takes some microseconds for
//!   each group that is limited, and 20 or so for the machine.

use std::ops::Range;

use crate::host::nodes;
use crate::logs;
use crate::options::{Populate, RamOptions};
use crate::pool::CancelToken;
use crate::ram::Ram;

mod cause;
mod error;
mod handle;
mod holes;
mod job;
mod need;
mod options;
mod part;
mod plan;
mod watch;
mod work;

pub use error::PopulateError;
pub use handle::PopulateHandle;
use job::Job;
pub use job::Populated;
use options::ProgressFn;
pub use options::{OnFailure, PopulateOptions};
use part::Part;

/// Parts of regions, in bytes from the start of each.
pub(crate) type Parts = Vec<(Ram, Range<u64>)>;

/// Populates parts of regions, and returns when that is done.
pub(crate) fn populate(
    parts: Parts,
    options: PopulateOptions<'_>,
) -> Result<Populated, PopulateError> {
    let (job, told) = job(parts, options, OnFailure::GiveBack)?;
    job.run(told)
}

/// As [`populate`], while the caller goes on. Asking for too much is an error at once.
pub(crate) fn populate_in_background(
    parts: Parts,
    options: PopulateOptions<'static>,
) -> Result<PopulateHandle, PopulateError> {
    let (job, told) = job(parts, options, OnFailure::Keep)?;
    PopulateHandle::start(job, told)
}

fn job(
    parts: Parts,
    options: PopulateOptions<'_>,
    default: OnFailure,
) -> Result<(Job, ProgressFn<'_>), PopulateError> {
    let (mode, on_shortage) = (options.mode, options.on_shortage);
    let allowed = nodes::only_allowed();
    let part = |(ram, range)| Part::new(ram, range, mode, on_shortage, allowed);
    let parts = match mode {
        Populate::Lazy => Vec::new(),
        Populate::Allocate | Populate::Prefault => parts.into_iter().map(part).collect(),
    };
    let on_failure = options.on_failure.unwrap_or(default);
    let job = Job::new(parts, options.threads, on_failure, options.cancel)?;
    Ok((job, options.progress.unwrap_or_else(|| Box::new(|_| {}))))
}

/// Populates RAM on backings that were just made, as their options say, all of it together.
///
/// It is not in use yet, and when this fails it is dropped.
pub(crate) fn populate_new<'a>(
    made: impl IntoIterator<Item = (Ram, &'a RamOptions)>,
) -> Result<(), PopulateError> {
    let made = made.into_iter();
    let made: Vec<_> = made
        .filter(|(_, options)| options.populate() != Populate::Lazy)
        .collect();
    if made.is_empty() {
        return Ok(());
    }
    let threads = made
        .iter()
        .filter_map(|(_, options)| options.populate_threads());
    let threads = threads.max();
    let allowed = nodes::only_allowed();
    let part = |(ram, options): (Ram, &RamOptions)| {
        let (range, mode) = (0..ram.range.size(), options.populate());
        Part::new(ram, range, mode, options.on_shortage(), allowed)
    };
    let parts: Vec<Part> = made.into_iter().map(part).collect();
    // The pages of nameless objects go away with them; those of a file would stay.
    let nameless = parts.iter().all(|part| part.ram.backing.is_nameless());
    let on_failure = if nameless {
        OnFailure::Keep
    } else {
        OnFailure::GiveBack
    };
    let job = Job::new(parts, threads, on_failure, CancelToken::new())?;
    let populated = job.run(|_| {})?;
    logs::debug!("{populated}");
    Ok(())
}
