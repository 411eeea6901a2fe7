//! A backing: a descriptor of known length.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::error::{BackingError, Result};
use super::file_end::{FileEnd, punch};
use super::gate::DiscardGate;
use super::kind::{BLOCK, BackingKind, FileIdentity};
use super::made::Made;
use super::seals::Seals;
#[cfg(doc)]
use crate::options::BackingSource;
use crate::options::{MapOptions, RamOptions};
use crate::range::RangePart;
use crate::report::BuildNote;
use crate::units::HumanSize;

/// The object that backs guest RAM: a descriptor of known length, cheap to clone.
///
/// Clones share the descriptor; the pages live as long as any clone, any region on it, or any
/// other process's copy of it.
///
/// ```
/// use guest_memory_shm::{RamOptions, Seals, ShmBacking};
///
/// let backing = ShmBacking::create(&RamOptions::new(), 64 << 20)?;
/// assert_eq!(backing.size(), 64 << 20);
/// assert_eq!(backing.allocated()?, 0);
/// assert!(backing.seals().contains(Seals::SHRINK | Seals::GROW));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone)]
pub struct ShmBacking {
    inner: Arc<Inner>,
}

/// What the clones of a backing share.
#[derive(Clone)]
pub(super) struct Inner {
    file: Arc<File>,
    /// Where RAM begins in it.
    pub(super) start: u64,
    /// Where RAM ends in it.
    pub(super) end: u64,
    page_size: u64,
    kind: BackingKind,
    seals: Seals,
    identity: FileIdentity,
    /// For all RAM on it.
    pub(super) options: RamOptions,
    /// What of its options has no effect, and limits that are near.
    pub(super) notes: Vec<BuildNote>,
    /// Of a file that was opened by its path.
    file_end: Option<Arc<FileEnd>>,
    /// For every discard on it.
    gate: Arc<DiscardGate>,
}

impl Inner {
    /// All of an object.
    pub(super) fn new(made: Made, options: RamOptions) -> Self {
        Self {
            file: made.file,
            start: 0,
            // All of the last page can be touched, also if the file ends within it.
            end: made.metadata.len().next_multiple_of(made.page_size),
            page_size: made.page_size,
            kind: made.kind,
            seals: made.seals,
            identity: FileIdentity::of(&made.metadata),
            options,
            notes: Vec::new(),
            file_end: made.end.map(Arc::new),
            gate: Arc::default(),
        }
    }
}

impl ShmBacking {
    /// What creating it did stays from now on, also when it is dropped.
    pub(super) fn keep(&self) {
        if let Some(end) = &self.inner.file_end {
            end.keep();
        }
    }

    pub(super) fn new(inner: Inner) -> Self {
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The first `len` bytes, which are there.
    #[cfg(feature = "vhost-user")]
    pub(super) fn seen_as(&self, len: u64) -> Self {
        Self::new(Inner {
            end: len,
            ..Inner::clone(&self.inner)
        })
    }

    /// The same object with other options, and with what there is to say of them.
    pub(super) fn seen_with(&self, options: RamOptions, notes: Vec<BuildNote>) -> Self {
        Self::new(Inner {
            options,
            notes,
            ..Inner::clone(&self.inner)
        })
    }

    /// Where RAM begins in it, in bytes: [`RamOptions::offset`] of a file, else 0.
    pub fn start(&self) -> u64 {
        self.inner.start
    }

    /// Where RAM ends in it, in bytes from the start of the file: no region reaches further.
    ///
    /// Of a [`BackingSource::File`] that is [`RamOptions::offset`] and the size of the RAM, and
    /// the file may be longer; of all others it is the length of the file when the backing was
    /// made, which sealed ones keep.
    pub fn end(&self) -> u64 {
        self.inner.end
    }

    /// How much RAM it can carry, in bytes: from [`start`](Self::start) to [`end`](Self::end).
    ///
    /// ```
    /// use guest_memory_shm::{BackingSource, RamOptions, ShmBacking};
    ///
    /// let options = RamOptions::new()
    ///     .with_backing(BackingSource::File("/dev/shm".into()))
    ///     .with_offset(1 << 20);
    /// let backing = ShmBacking::create(&options, 4 << 20)?;
    /// assert_eq!((backing.start(), backing.end()), (1 << 20, 5 << 20));
    /// assert_eq!(backing.size(), 4 << 20);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    pub fn size(&self) -> u64 {
        self.inner.end - self.inner.start
    }

    /// The size of its pages in bytes: offsets and sizes of regions are multiples of it.
    pub fn page_size(&self) -> u64 {
        self.inner.page_size
    }

    /// The name that it was given ([`RamOptions::with_name`]), when it was created, adopted, or
    /// [later](Self::with_options).
    pub fn name(&self) -> Option<&str> {
        self.inner.options.name()
    }

    /// What of its options has no effect, and limits that are near: known when it was created, or
    /// was given its options.
    pub fn notes(&self) -> &[BuildNote] {
        &self.inner.notes
    }

    /// What people know it by: its name, or what it is.
    pub(crate) fn label(&self) -> String {
        match self.name() {
            Some(name) => name.to_owned(),
            None => self.kind().to_string(),
        }
    }

    /// What the backing is.
    pub fn kind(&self) -> BackingKind {
        self.inner.kind
    }

    /// Whether its pages come from a hugetlb pool.
    pub fn is_hugetlb(&self) -> bool {
        self.inner.kind.is_hugetlb()
    }

    /// Whether it goes away, pages and all, with its last user: it has no name, and no other
    /// process had it when it was created.
    pub(crate) fn is_nameless(&self) -> bool {
        matches!(
            self.inner.kind,
            BackingKind::Memfd | BackingKind::HugetlbMemfd | BackingKind::PosixShm
        )
    }

    /// Whether it is a file on a tmpfs: a memfd of base pages or POSIX shared memory too.
    pub(crate) fn is_on_tmpfs(&self) -> bool {
        matches!(
            self.inner.kind,
            BackingKind::Memfd
                | BackingKind::PosixShm
                | BackingKind::ShmFile
                | BackingKind::AdoptedMemfd
                | BackingKind::AdoptedShm
        )
    }

    /// The seals on it. Of POSIX shared memory and other files on a tmpfs the kernel says
    /// [`Seals::SEAL`]: they cannot be sealed; of files elsewhere nothing.
    pub fn seals(&self) -> Seals {
        self.inner.seals
    }

    /// Which file it is, the same in every process that holds a descriptor of it.
    pub fn identity(&self) -> FileIdentity {
        self.inner.identity
    }

    /// The memory that is allocated for it now, in bytes (`st_blocks` of fstat(2)).
    ///
    /// # Errors
    ///
    /// [`BackingError::Inspect`] if fstat(2) fails.
    pub fn allocated(&self) -> Result<u64> {
        let metadata = self.inner.file.metadata();
        let metadata = metadata.map_err(BackingError::inspect)?;
        Ok(metadata.blocks() * BLOCK)
    }

    /// Makes a hole of a part of it, for every process that maps it (fallocate(2)).
    pub(crate) fn punch(&self, range: Range<u64>) -> io::Result<()> {
        punch(self.file(), range)
    }

    /// The gate that discards on it go through, the same for all clones.
    pub(crate) fn gate(&self) -> &Arc<DiscardGate> {
        &self.inner.gate
    }

    /// What holds for all RAM on it.
    pub(crate) fn options(&self) -> &RamOptions {
        &self.inner.options
    }

    /// What holds for every mapping of it.
    pub(crate) fn map_options(&self) -> MapOptions {
        MapOptions::from(self.options())
    }

    /// Looks again whether the file is as long as it was: one that is not sealed may have been
    /// truncated, and touching what is gone is SIGBUS.
    pub(crate) fn check_not_truncated(&self) -> Result<()> {
        let now = self.truncated_to();
        match now.map_err(BackingError::inspect)? {
            Some(now) => Err(BackingError::Truncated {
                end: self.end(),
                now,
            }),
            None => Ok(()),
        }
    }

    /// How long the file is, if it is shorter than it was.
    pub(crate) fn truncated_to(&self) -> io::Result<Option<u64>> {
        if self.seals().contains(Seals::SHRINK) {
            return Ok(None);
        }
        let now = self.inner.file.metadata()?.len();
        // What is left of a page is not SIGBUS.
        Ok((now.next_multiple_of(self.page_size()) < self.end()).then_some(now))
    }

    /// The file, for vm-memory's `FileOffset`.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.inner.file
    }

    /// Checks that none of `size` bytes at `offset` lie in what is left of the page in which the
    /// file ends. Those after it are for [`check_inside`](Self::check_inside).
    pub(crate) fn check_inside_file(&self, offset: u64, size: u64) -> Result<()> {
        let len = self.inner.file.metadata();
        let len = len.map_err(BackingError::inspect)?.len();
        let past = |end: u64| len < end && end <= self.end();
        if !offset.checked_add(size).is_some_and(past) {
            return Ok(());
        }
        Err(BackingError::EndsInPage {
            offset,
            size,
            len,
            page_size: self.page_size(),
        })
    }

    /// Checks that `size` bytes at `offset` lie inside it, at page boundaries.
    pub(crate) fn check_inside(&self, offset: u64, size: u64) -> Result<()> {
        RangePart::Offset.check_aligned(offset, self.page_size())?;
        RangePart::Size.check_aligned(size, self.page_size())?;
        match offset.checked_add(size) {
            Some(end) if end <= self.end() => Ok(()),
            _ => Err(BackingError::Outside {
                offset,
                size,
                end: self.end(),
            }),
        }
    }
}

impl AsFd for ShmBacking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }
}

impl fmt::Debug for ShmBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmBacking")
            .field("kind", &self.inner.kind)
            .field("start", &format_args!("{:#x}", self.inner.start))
            .field("size", &format_args!("{}", HumanSize(self.size())))
            .field(
                "page_size",
                &format_args!("{}", HumanSize(self.inner.page_size)),
            )
            .field("seals", &self.inner.seals)
            .field("fd", &self.inner.file.as_raw_fd())
            .finish()
    }
}

/// Two backings are equal if they are the same file.
impl PartialEq for ShmBacking {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for ShmBacking {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::base_page_size;
    use crate::options::{BackingSource, RamOptions};

    #[test]
    fn a_created_backing_has_its_size_and_no_page() {
        for source in [BackingSource::Memfd, BackingSource::PosixShm] {
            let options = RamOptions::new().with_backing(source);
            let backing = ShmBacking::create(&options, 1 << 20).unwrap();
            assert_eq!(backing.file().metadata().unwrap().len(), 1 << 20);
            assert_eq!(backing.allocated().unwrap(), 0);
            assert_eq!(backing.page_size(), base_page_size());
        }
    }

    #[test]
    fn clones_are_the_same_file_and_others_are_not() {
        let create = || ShmBacking::create(&RamOptions::new(), 1 << 20).unwrap();
        let one = create();
        assert_eq!(one, one.clone());
        assert_ne!(one, create());
    }
}
