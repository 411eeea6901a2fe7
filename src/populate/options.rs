//! How RAM is to be populated.

use std::fmt;
use std::num::NonZeroU32;

use crate::options::{OnShortage, Populate};
use crate::pool::{CancelToken, Progress};
use crate::range::GuestRange;

/// How RAM is to be populated.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, Populate, PopulateOptions};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
/// let mut percent = 0;
/// let options = PopulateOptions::new(Populate::Prefault).with_progress(|progress| {
///     percent = progress.done * 100 / progress.total;
/// });
/// let populated = memory.populate(options)?;
/// assert_eq!((populated.bytes, percent), (64 << 20, 100));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[must_use = "nothing is populated before the options are given to a memory"]
pub struct PopulateOptions<'a> {
    pub(super) mode: Populate,
    pub(super) threads: Option<NonZeroU32>,
    range: Option<GuestRange>,
    pub(super) progress: Option<ProgressFn<'a>>,
    pub(super) cancel: CancelToken,
    pub(super) on_failure: Option<OnFailure>,
    pub(super) on_shortage: OnShortage,
}

pub(super) type ProgressFn<'a> = Box<dyn FnMut(Progress) + Send + 'a>;

/// What becomes of pages that were allocated before populating failed or was cancelled.
///
/// ```
/// use guest_memory_shm::{OnFailure, Populate, PopulateOptions};
///
/// // A guest runs on this RAM already.
/// let careful = PopulateOptions::new(Populate::Prefault).with_on_failure(OnFailure::Keep);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnFailure {
    /// They are given back, if they were not there before and hold nothing but zeros.
    ///
    /// For RAM that is not in use yet. What a guest or a daemon wrote meanwhile is kept, but a
    /// write that falls between the look and the giving back, some microseconds, is lost, and a
    /// device that has the pages pinned is left with them: for RAM in use there is
    /// [`Keep`](Self::Keep). Nothing is given back where pages cannot be told from holes: on a
    /// hugetlb backing that had any before, and before Linux 6.5 on one of which some were
    /// allocated, but never written ([`Populate::Allocate`]).
    GiveBack,
    /// They stay: nothing is lost but memory, and populating the same range again goes on where it
    /// ended.
    Keep,
}

impl<'a> PopulateOptions<'a> {
    /// The part of the RAM, if it is not all.
    pub(crate) fn range(&self) -> Option<GuestRange> {
        self.range
    }

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
    /// to work on; and never more than 64, or than there are CPUs if those are more.
    /// [`Populated::threads`](crate::Populated::threads) says how many there were.
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

    /// Sets what is called whenever a piece is done, last when all is.
    ///
    /// It is called in the calling thread, in the background in that which coordinates. The
    /// threads are at most a few pieces ahead of it, so it should be quick.
    pub fn with_progress(mut self, progress: impl FnMut(Progress) + Send + 'a) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Sets a token that cancels it, from another thread or as it progresses.
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
