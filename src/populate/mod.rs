//! Populate: pages of RAM allocated and mapped ahead of their first use, by several threads.
//!
//! A [`plan`] cuts the RAM into chunks, and puts them into queues: one for RAM that may come from
//! anywhere, and one for each set of NUMA nodes that RAM is bound to. An [`engine`] of threads
//! works on the queues, [`work`] is what is done to a chunk, and [`holes`] remembers what was
//! there before, so that a failure can be undone. [`need`] counts what is missing, before anything
//! is done, and [`watch`] looks again before each piece whether there is memory for it. [`cause`]
//! finds out why there was a failure, which the kernel does not tell. [`handle`] does all this in the
//! background.
//!
//! # Why it is done as it is
//!
//! - fallocate(2) on a tmpfs needs a third of the time of a page fault, tells `ENOSPC` where a fault
//!   is SIGBUS (and `MADV_POPULATE_WRITE` only says `EFAULT`), and makes the fault afterwards
//!   cheaper by more than it costs. But it holds the lock of the inode: two threads in it are
//!   slower than one. So a thread that finds the lock free allocates its chunk and then maps it, and
//!   one that does not maps its chunk right away.
//! - The stack of a new thread is a mapping, and making one waits for all page faults of the
//!   process: all threads are started, then they are released together.
//! - Where memory is short the kernel refuses nothing: it ends a process. So what a control group or
//!   the machine can still give is asked, not tried out. A look takes some microseconds for each
//!   group that is limited, and 20 or so for the machine.

use std::fmt;
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Result;
use crate::logs;
use crate::options::{OnShortage, Populate, RamOptions};
use crate::ram::Ram;
use crate::range::GuestRange;

mod cause;
mod engine;
mod error;
mod handle;
mod holes;
mod need;
mod node;
mod plan;
mod run;
mod watch;
mod work;

pub use error::PopulateError;
pub use handle::PopulateHandle;
use plan::Part;
use run::{Job, Policy};

/// How RAM is to be populated.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, Populate, PopulateOptions};
/// use std::ops::ControlFlow;
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
/// let mut percent = 0;
/// let options = PopulateOptions::new(Populate::Prefault).with_progress(|progress| {
///     percent = progress.done * 100 / progress.total;
///     ControlFlow::Continue(())
/// });
/// let populated = memory.populate(options)?;
/// assert_eq!((populated.bytes, percent), (64 << 20, 100));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[must_use = "nothing is populated before the options are given to a memory"]
pub struct PopulateOptions<'a> {
    mode: Populate,
    threads: Option<NonZeroU32>,
    range: Option<GuestRange>,
    progress: Option<ProgressFn<'a>>,
    cancel: CancelToken,
    on_failure: Option<OnFailure>,
    on_shortage: OnShortage,
}

type ProgressFn<'a> = Box<dyn FnMut(PopulateProgress) -> ControlFlow<()> + Send + 'a>;

/// How far populating has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PopulateProgress {
    /// What is populated, in bytes; it never goes down.
    pub done: u64,
    /// What is to be populated, in bytes.
    pub total: u64,
}

/// What populating did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Populated {
    /// The RAM that is populated now, in bytes, including what was there before.
    pub bytes: u64,
    /// How many threads worked on it.
    pub threads: u32,
}

/// What becomes of pages that were allocated before populating failed or was cancelled.
///
/// ```
/// use guest_memory_shm::{OnFailure, Populate, PopulateOptions};
///
/// // A guest runs on this RAM already.
/// let careful = PopulateOptions::new(Populate::Prefault).with_on_failure(OnFailure::Keep);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnFailure {
    /// They are given back, if they were not there before and hold nothing but zeros.
    ///
    /// For RAM that nobody uses yet. What a guest or a daemon wrote meanwhile is kept, but a write
    /// that falls between the look and the giving back, some microseconds, is lost, and a device that
    /// has the pages pinned is left with them: for RAM in use there is [`Keep`](Self::Keep). Nothing
    /// is given back where pages cannot be told from holes: on a hugetlb backing that had any
    /// before, and before Linux 6.5 on one of which some were allocated, but never written
    /// ([`Populate::Allocate`]).
    GiveBack,
    /// They stay: nothing is lost but memory, and populating the same range again goes on where it
    /// ended.
    Keep,
}

/// Cancels populating from anywhere: a clone is the same token. It stays cancelled: what is to be
/// populated afterwards gets a new one.
///
/// ```
/// use guest_memory_shm::{CancelToken, Error, GuestMemoryShm, Populate, PopulateError, PopulateOptions};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
/// let token = CancelToken::new();
/// token.clone().cancel();
/// let cancelled = memory.populate(PopulateOptions::new(Populate::Allocate).with_cancel(token));
/// assert!(matches!(
///     cancelled,
///     Err(Error::Populate(PopulateError::Cancelled { done: 0, .. }))
/// ));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct CancelToken {
    cancelled: Arc<AtomicBool>,
}

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels: each thread stops after the chunk that it works on, at most 16 MiB or one page.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

impl<'a> PopulateOptions<'a> {
    /// To populate all of the RAM in this mode, with the default number of threads.
    /// [`Populate::Lazy`] does nothing.
    pub fn new(mode: Populate) -> Self {
        Self {
            mode,
            threads: None,
            range: None,
            progress: None,
            cancel: CancelToken::new(),
            on_failure: None,
            on_shortage: OnShortage::Refuse,
        }
    }

    /// Sets how many threads work on it; unless set, as many as there are CPUs, at most one for
    /// each 64 MiB.
    ///
    /// There are fewer if the system refuses one, or if there are fewer pieces (of at least 2 MiB)
    /// to work on.
    pub fn with_threads(mut self, threads: NonZeroU32) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets the part of the RAM; all of it unless set.
    ///
    /// All of the range must be RAM. Every page that has a byte in it is populated.
    pub fn with_range(mut self, range: GuestRange) -> Self {
        self.range = Some(range);
        self
    }

    /// Sets what is called whenever a piece is done, last when all is: it may cancel by
    /// `ControlFlow::Break`.
    ///
    /// It is called in the calling thread, in the background in that which coordinates. The threads
    /// are at most a few pieces ahead of it, so it should be quick.
    pub fn with_progress(
        mut self,
        progress: impl FnMut(PopulateProgress) -> ControlFlow<()> + Send + 'a,
    ) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Sets a token by which others can cancel it.
    pub fn with_cancel(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Sets what becomes of pages that were allocated before it failed or was cancelled: given
    /// back unless set, and kept in the background.
    pub fn with_on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = Some(on_failure);
        self
    }

    /// Sets what becomes of it if there is not enough memory; it is refused unless set.
    pub fn with_on_shortage(mut self, on_shortage: OnShortage) -> Self {
        self.on_shortage = on_shortage;
        self
    }
}

impl fmt::Debug for PopulateOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PopulateOptions")
            .field("mode", &self.mode)
            .field("threads", &self.threads)
            .field("range", &self.range)
            .field("cancel", &self.cancel)
            .field("on_failure", &self.on_failure)
            .field("on_shortage", &self.on_shortage)
            .finish_non_exhaustive()
    }
}

/// Populates RAM, or the part of it that the options name, and returns when that is done.
pub(crate) fn populate(
    rams: impl Iterator<Item = Ram>,
    options: PopulateOptions<'_>,
) -> Result<Populated> {
    let parts = parts(rams, &options)?;
    let job = Job::new(parts, options, OnFailure::GiveBack);
    let looking = job.look()?;
    Ok(job.run(&looking)?)
}

/// As [`populate`], while the caller goes on.
pub(crate) fn populate_in_background(
    rams: impl Iterator<Item = Ram>,
    options: PopulateOptions<'static>,
) -> Result<PopulateHandle> {
    let parts = parts(rams, &options)?;
    let job = Job::new(parts, options, OnFailure::Keep);
    Ok(PopulateHandle::start(job)?)
}

/// The parts of the RAM, sorted by address, that the options are about.
fn parts(rams: impl Iterator<Item = Ram>, options: &PopulateOptions<'_>) -> Result<Vec<Part>> {
    let parts = match options.range {
        Some(range) => plan::select(rams, range, options.mode)?,
        None => rams.map(|ram| Part::whole(ram, options.mode)).collect(),
    };
    let parts = parts.into_iter();
    Ok(parts
        .map(|part| part.with_on_shortage(options.on_shortage))
        .collect())
}

/// Populates RAM on backings that were just made, as their options say, all of it together.
///
/// Nobody else has it yet, and when this fails it is dropped.
pub(crate) fn populate_new<'a>(
    made: impl IntoIterator<Item = (Ram, &'a RamOptions)>,
) -> Result<()> {
    let mut threads = None;
    let mut parts = Vec::new();
    for (ram, options) in made {
        if options.populate() != Populate::Lazy {
            threads = threads.max(options.populate_threads());
            let part = Part::whole(ram, options.populate());
            parts.push(part.with_on_shortage(options.on_shortage()));
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    // The pages of nameless objects go away with them; those of a file would stay.
    let nameless = parts.iter().all(|part| part.ram.backing.is_nameless());
    let on_failure = if nameless {
        OnFailure::Keep
    } else {
        OnFailure::GiveBack
    };
    let job = Job {
        parts,
        policy: Policy {
            threads,
            on_failure,
            cancel: CancelToken::new(),
        },
        progress: None,
    };
    let looking = job.look()?;
    let populated = job.run(&looking)?;
    logs::debug!("{populated:?}");
    Ok(())
}
