//! Creating backings: what can be known beforehand is checked, then the object is made.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};

use super::error::{BackingError, Result};
use super::{
    BLOCK, BackingKind, FileIdentity, Inner, ShmBacking, base_page_size, capacity, check_groups,
    check_pool, file, hugetlb, memfd, notes, posix_shm, seals,
};
use crate::host::nodes;
use crate::logs;
use crate::options::{
    Backing, NumaPolicy, OnShortage, OptionsError, PageSize, Populate, RamOptions,
};
use crate::range::RangePart;
use crate::report::log_notes;
use crate::shortage::{ResourceLimit, Shortage};

impl ShmBacking {
    /// Creates a backing that leaves nothing when it is dropped without having been
    /// [kept](Self::keep): for what is not done before it is mapped.
    pub(crate) fn create_provisional(options: &RamOptions, len: u64) -> Result<Self> {
        let page_size = check_creation(options, len)?;
        let huge_pages = huge_pages(options, len, page_size)?;
        if huge_pages > 0 {
            check_pool(huge_pages, page_size)?;
            if options.on_shortage() == OnShortage::Refuse {
                check_groups(huge_pages, page_size)?;
            }
        }
        if let Backing::File(path) = options.backing() {
            let backing = Self::from_file(file::open(options, path, len)?, options, len);
            log_notes(&backing.label(), backing.notes());
            logs::debug!("opened {}: {backing:?}", path.display());
            return Ok(backing);
        }
        let (file, kind) = match (options.backing(), options.page_size()) {
            (Backing::Memfd, PageSize::Huge(_)) => (
                memfd::create(options, len, Some(page_size))?,
                BackingKind::HugetlbMemfd,
            ),
            (Backing::Memfd, _) => (memfd::create(options, len, None)?, BackingKind::Memfd),
            (Backing::PosixShm, _) => (posix_shm::create(options, len)?, BackingKind::PosixShm),
            (Backing::File(_), _) => unreachable!("files are opened above"),
        };
        let metadata = file.metadata().map_err(BackingError::inspect)?;
        let seals = seals::read(&file).map_err(BackingError::inspect)?;
        let mut notes = notes::of_options(options, kind);
        if kind.is_on_file_system() && options.populate() == Populate::Lazy {
            notes.extend(capacity::note(&file, len));
        }
        let mut backing = Self::new(file, page_size, kind, seals, &metadata, options.into());
        if let Some(inner) = Arc::get_mut(&mut backing.inner) {
            inner.name = options.name().map(str::to_owned);
            inner.notes = notes;
        }
        log_notes(&backing.label(), backing.notes());
        logs::debug!("created {backing:?}");
        Ok(backing)
    }

    fn from_file(opened: file::Opened, options: &RamOptions, len: u64) -> Self {
        let kind = opened.kind;
        let mut notes = notes::of_options(options, kind);
        if kind.is_on_file_system() && options.populate() == Populate::Lazy {
            let missing = len.saturating_sub(opened.metadata.blocks() * BLOCK);
            notes.extend(capacity::note(&opened.file, missing));
        }
        Self {
            inner: Arc::new(Inner {
                start: options.offset(),
                end: options.offset() + len,
                page_size: opened.page_size,
                kind,
                seals: opened.seals,
                identity: FileIdentity::of(&opened.metadata),
                map_options: options.into(),
                name: options.name().map(str::to_owned),
                notes,
                file: opened.file,
                file_end: Some(opened.end),
                gate: Arc::default(),
            }),
        }
    }
}

/// The size in bytes of the pages that backings with these options have, which are checked before
/// the system is asked for anything: all that creates begins here.
pub(crate) fn page_size_of(options: &RamOptions) -> Result<u64> {
    options.check()?;
    if let Backing::File(path) = options.backing() {
        return file::page_size(path);
    }
    match options.page_size() {
        PageSize::Base | PageSize::Transparent => Ok(base_page_size()),
        PageSize::Huge(size) => hugetlb::page_size(size),
    }
}

/// Everything about a new backing that can be checked without creating it, but the pool of huge
/// pages, which several backings may share; gives its page size.
pub(crate) fn check_creation(options: &RamOptions, len: u64) -> Result<u64> {
    let page_size = page_size_of(options)?;
    if let Some(set) = options.size().filter(|set| *set != len) {
        return Err(OptionsError::SizeMismatch { set, ram: len }.into());
    }
    let end = start_of(options).saturating_add(len);
    if len == 0 || i64::try_from(end).is_err() {
        return Err(BackingError::Length {
            len: if len == 0 { 0 } else { end },
            limit: i64::MAX.unsigned_abs(),
        });
    }
    RangePart::Size.check_aligned(len, page_size)?;
    check_nodes(options.numa())?;
    match options.backing() {
        Backing::File(path) => file::check(options, path, len)?,
        Backing::Memfd | Backing::PosixShm => check_file_size_limit(len)?,
    }
    Ok(page_size)
}

/// Where RAM begins in a backing with these options, in bytes.
pub(crate) fn start_of(options: &RamOptions) -> u64 {
    match options.backing() {
        Backing::File(_) => options.offset(),
        Backing::Memfd | Backing::PosixShm => 0,
    }
}

/// How many pages a new backing of `len` bytes takes from the pool of its page size.
pub(crate) fn huge_pages(options: &RamOptions, len: u64, page_size: u64) -> Result<u64> {
    match (options.backing(), options.page_size()) {
        _ if options.is_unreserved() => Ok(0),
        (Backing::File(path), _) => file::huge_pages(path, len),
        (_, PageSize::Huge(_)) => Ok(len / page_size),
        _ => Ok(0),
    }
}

/// Refuses a policy of which no node has memory, as mbind(2) would.
fn check_nodes(policy: NumaPolicy) -> Result<()> {
    match nodes::with_memory() {
        Some(present) if policy != NumaPolicy::Default && !present.intersects(policy.nodes()) => {
            Err(BackingError::NoSuchNodes { policy, present })
        }
        _ => Ok(()),
    }
}

/// Refuses what ftruncate(2) would answer with SIGXFSZ, which ends a process that does not
/// expect it.
pub(super) fn check_file_size_limit(len: u64) -> Result<()> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if len > limit => {
            Err(Shortage::new(len, limit, ResourceLimit::FileSize).into())
        }
        // Without an answer the limit is left to the kernel.
        _ => Ok(()),
    }
}

pub(super) fn kind_name(backing: &Backing) -> &'static str {
    match backing {
        Backing::Memfd => "memfd",
        Backing::PosixShm => "POSIX shm",
        Backing::File(_) => "file",
    }
}
