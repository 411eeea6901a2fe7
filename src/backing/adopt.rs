//! Adopting a descriptor that came from elsewhere: everything about it is checked.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::error::{AdoptError, BackingError, Result};
use super::existing;
use super::kind::BackingKind;
use super::made::Made;
use super::notes;
use super::seals::{self, Seals};
use super::shm_backing::{Inner, ShmBacking};
use crate::host::base_page_size;
use crate::host::file_system::FileSystem;
use crate::logs;
use crate::options::RamOptions;
use crate::range::RangePart;
use crate::report::log_notes;

/// What is demanded of a descriptor that is to be adopted.
///
/// ```
/// use std::os::fd::AsFd;
///
/// use guest_memory_shm::{AdoptPolicy, RamOptions, ShmBacking};
///
/// let theirs = ShmBacking::create(&RamOptions::new(), 1 << 20)?;
/// let fd = theirs.as_fd().try_clone_to_owned().expect("a descriptor is free");
/// let policy = AdoptPolicy::new()
///     .with_min_len(1 << 20)
///     .with_required_seals();
/// let ours = ShmBacking::adopt(fd, &policy)?;
/// assert_eq!(ours, theirs);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdoptPolicy {
    min_len: u64,
    disk_files: bool,
    seals: Demand,
    options: RamOptions,
    /// Whether the file may end within a page. Touching the rest of that page is not SIGBUS.
    partial_page: bool,
}

/// What is demanded of the seals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Demand {
    #[default]
    Nothing,
    Sealed,
    SealNow,
}

impl AdoptPolicy {
    /// Accepts memfds, POSIX shared memory and hugetlbfs files of any length, sealed or not.
    pub fn new() -> Self {
        Self::default()
    }

    /// Demands a file of at least `len` bytes; any length unless set.
    #[must_use]
    pub fn with_min_len(mut self, len: u64) -> Self {
        self.min_len = len;
        self
    }

    /// Accepts files on a disk (on any file system) too, whose pages are written back; refused
    /// unless set.
    #[must_use]
    pub fn with_disk_files(mut self) -> Self {
        self.disk_files = true;
        self
    }

    /// Sets the options of the RAM on it: NUMA nodes, populating, huge page advice and whatever
    /// else [`ShmBacking::with_options`] takes; the default ones unless set.
    ///
    /// ```
    /// use guest_memory_shm::{AdoptPolicy, PageSize, Populate, RamOptions};
    ///
    /// let policy = AdoptPolicy::new().with_required_seals().with_options(
    ///     RamOptions::new()
    ///         .with_name("ram0")
    ///         .with_page_size(PageSize::Transparent)
    ///         .with_populate(Populate::Prefault),
    /// );
    /// ```
    #[must_use]
    pub fn with_options(mut self, options: RamOptions) -> Self {
        self.options = options;
        self
    }

    /// Demands that the size is sealed ([`Seals::RESIZE`]) already.
    ///
    /// Unless this or [`with_added_seals`](Self::with_added_seals) is set, any seals do that allow
    /// writing: a file that is not sealed can be truncated by every process that has it, and
    /// touching the lost pages is then SIGBUS. That is for trusted owners only.
    #[must_use]
    pub fn with_required_seals(mut self) -> Self {
        self.seals = Demand::Sealed;
        self
    }

    /// Seals the size now, if it is not yet (`F_ADD_SEALS` of fcntl(2)); what cannot be sealed is
    /// refused.
    #[must_use]
    pub fn with_added_seals(mut self) -> Self {
        self.seals = Demand::SealNow;
        self
    }
}

impl ShmBacking {
    /// Adopts a descriptor that came from elsewhere, after checking that it can be RAM.
    ///
    /// It must be a regular file, open for reading and writing, on a tmpfs (that is a memfd or
    /// POSIX shared memory), a hugetlbfs, or, if the policy allows it, any other file system. Its
    /// length must be whole pages, at least one, and what the policy asks for; its seals must not
    /// forbid writing, and must be what the policy demands.
    ///
    /// Nothing is mapped or populated before a region is made on it: the builder's
    /// [`add_backing`](crate::GuestMemoryShmBuilder::add_backing) makes some, or
    /// [`GuestRegionShm::from_backing`](crate::GuestRegionShm::from_backing) one.
    ///
    /// ```
    /// use guest_memory_shm::{AdoptPolicy, BackingError, ShmBacking};
    ///
    /// let (pipe, _) = std::io::pipe()?;
    /// let refused = ShmBacking::adopt(pipe.into(), &AdoptPolicy::new()).unwrap_err();
    /// assert!(matches!(refused.error(), BackingError::NotMemory { .. }));
    /// let pipe_again = refused.into_fd();
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// An [`AdoptError`] that gives the descriptor back and holds the reason:
    /// [`BackingError::NotMemory`], [`BackingError::NotWritable`], [`BackingError::OnDisk`],
    /// [`BackingError::TooShort`], [`BackingError::Range`], [`BackingError::WriteSealed`],
    /// [`BackingError::NotSealed`], those of [`with_options`](Self::with_options) for the options
    /// in the policy, or [`BackingError::FileSystemUnknown`] and [`BackingError::Inspect`] if a
    /// system call fails. What is refused is not sealed.
    pub fn adopt(fd: OwnedFd, policy: &AdoptPolicy) -> Result<Self, AdoptError> {
        let file = File::from(fd);
        let found = match check(&file, policy) {
            Ok(found) => found,
            Err(error) => return Err(AdoptError::new(error, file.into())),
        };
        Ok(found.adopt(file.into(), policy))
    }

    /// Adopts any file that can be mapped shared, as vm-memory does: on a disk too, and of any
    /// length.
    pub(crate) fn of_file(file: Arc<File>, options: &RamOptions) -> Result<Self> {
        let policy = AdoptPolicy {
            disk_files: true,
            partial_page: true,
            options: options.clone(),
            ..AdoptPolicy::default()
        };
        Ok(check(&file, &policy)?.adopt(file, &policy))
    }
}

struct Found {
    metadata: Metadata,
    page_size: u64,
    kind: BackingKind,
    seals: Seals,
}

impl Found {
    fn adopt(self, file: Arc<File>, policy: &AdoptPolicy) -> ShmBacking {
        let made = Made {
            file,
            metadata: self.metadata,
            kind: self.kind,
            page_size: self.page_size,
            seals: self.seals,
            end: None,
        };
        let mut inner = Inner::new(made, policy.options.clone());
        inner.notes = notes::of_options(&policy.options, self.kind);
        let backing = ShmBacking::new(inner);
        log_notes(&backing.label(), backing.notes());
        logs::debug!("adopted {backing:?}");
        backing
    }
}

fn check(file: &File, policy: &AdoptPolicy) -> Result<Found> {
    let found = file.metadata().map_err(BackingError::inspect)?;
    if !found.is_file() {
        let found = found.file_type();
        return Err(BackingError::NotMemory { found });
    }
    check_read_write(file)?;
    let (kind, page_size) = file_system(file, policy)?;
    // Before the seals, so that a refused file is not sealed; and once more after them, because
    // its owner could change its length until then, and a wrong length is SIGBUS.
    check_len(found.len(), page_size, policy)?;
    existing::check(&policy.options, kind, page_size)?;
    let seals = check_seals(file, policy.seals)?;
    let kind = match kind {
        BackingKind::AdoptedShm if seals != seals::NO_SEALS => BackingKind::AdoptedMemfd,
        kind => kind,
    };
    let metadata = file.metadata().map_err(BackingError::inspect)?;
    check_len(metadata.len(), page_size, policy)?;
    Ok(Found {
        metadata,
        page_size,
        kind,
        seals,
    })
}

fn check_len(len: u64, page_size: u64, policy: &AdoptPolicy) -> Result<()> {
    if len == 0 || len < policy.min_len {
        return Err(BackingError::TooShort {
            len,
            needed: policy.min_len.max(page_size),
        });
    }
    if !policy.partial_page {
        RangePart::Size.check_aligned(len, page_size)?;
    }
    existing::check_size(&policy.options, len.next_multiple_of(page_size))
}

fn check_read_write(file: &File) -> Result<()> {
    let bits = fcntl(file, FcntlArg::F_GETFL).map_err(io::Error::from);
    let bits = OFlag::from_bits_retain(bits.map_err(BackingError::inspect)?);
    if bits & OFlag::O_ACCMODE != OFlag::O_RDWR {
        return Err(BackingError::NotWritable);
    }
    Ok(())
}

fn file_system(file: &File, policy: &AdoptPolicy) -> Result<(BackingKind, u64)> {
    let found = FileSystem::of(file);
    let found = found.map_err(|source| BackingError::FileSystemUnknown { source })?;
    match found {
        FileSystem::Tmpfs => Ok((BackingKind::AdoptedShm, base_page_size())),
        FileSystem::Hugetlbfs { page_size } => Ok((BackingKind::AdoptedHugetlb, page_size)),
        FileSystem::Other { .. } if policy.disk_files => {
            Ok((BackingKind::AdoptedFile, base_page_size()))
        }
        FileSystem::Other { fs_type } => Err(BackingError::OnDisk { fs_type }),
    }
}

fn check_seals(file: &impl AsFd, demand: Demand) -> Result<Seals> {
    let read = || seals::read(file).map_err(BackingError::inspect);
    let seals = read()?;
    if seals.intersects(Seals::WRITE | Seals::FUTURE_WRITE) {
        return Err(BackingError::WriteSealed { seals });
    }
    if seals.contains(Seals::RESIZE) || demand == Demand::Nothing {
        return Ok(seals);
    }
    if demand == Demand::SealNow && seals::add(file, seals::RAM).is_ok() {
        return read();
    }
    Err(BackingError::NotSealed { seals })
}
