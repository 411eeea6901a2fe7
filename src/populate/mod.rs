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

/// Populates RAM that was just mapped, as the options of the backings say, all of it together.
///
/// When this fails it is dropped, and `on_failure` says what becomes of pages that stay then.
pub(crate) fn populate_mapped(made: Vec<Ram>, on_failure: OnFailure) -> Result<(), PopulateError> {
    let mut made = made;
    made.retain(|ram| ram.backing.options().populate() != Populate::Lazy);
    if made.is_empty() {
        return Ok(());
    }
    let options = made.iter().map(|ram| ram.backing.options());
    let threads = options.filter_map(RamOptions::populate_threads).max();
    let allowed = nodes::only_allowed();
    let part = |ram: Ram| {
        let options = ram.backing.options();
        let (mode, on_shortage) = (options.populate(), options.on_shortage());
        let range = 0..ram.range.size();
        Part::new(ram, range, mode, on_shortage, allowed)
    };
    let parts: Vec<Part> = made.into_iter().map(part).collect();
    let job = Job::new(parts, threads, on_failure, CancelToken::new())?;
    let populated = job.run(|_| {})?;
    logs::debug!("{populated}");
    Ok(())
}
