//! RAM on backings that are to be created, or that exist: options, length and path are resolved
//! once, all backings are checked together, and only then is anything made.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::capacity::{
    self, Draw, Name, Taken, check_descriptors, check_file_size, check_file_systems,
};
use super::error::{BackingError, Result};
use super::kind::{BLOCK, BackingKind, FileIdentity};
use super::made::Made;
use super::place::Place;
use super::seals::{self, Seals};
use super::shm_backing::{Inner, ShmBacking};
use super::{file, hugetlb, memfd, notes, posix_shm};
use crate::host::file_system::Room;
use crate::host::memory::{Demand, MemoryLimits, Pages};
use crate::host::{NodeSet, base_page_size, nodes};
use crate::logs;
use crate::options::{
    BackingSource, NumaPolicy, OnShortage, OptionsError, PageSize, RamOptions, Reserve, Sealing,
};
use crate::range::{RangePart, RangeSet};
use crate::report::{BuildNote, log_notes};

/// Options that are valid in themselves, and what they mean on this machine.
///
/// The path of a file is looked at here, and not again until it is opened.
#[derive(Debug)]
pub(crate) struct Resolved<'a> {
    options: &'a RamOptions,
    kind: BackingKind,
    page_size: u64,
    /// Where the RAM begins in it, in bytes.
    start: u64,
    object: Object<'a>,
}

/// The object that is to back RAM.
#[derive(Debug)]
enum Object<'a> {
    /// To be created, without a name.
    New,
    /// What is at the path of a file, which is to be opened or created.
    At(Place<'a>),
    /// Created or adopted before.
    There(&'a ShmBacking),
}

/// RAM on a backing that can be created or exists, as far as can be known without the others.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    of: Resolved<'a>,
    len: u64,
    /// Of a memfd that is to be created.
    seals: Seals,
}

/// A backing for RAM that is being made. If it was just created, dropping it and all its clones
/// undoes that.
#[derive(Debug)]
pub(crate) struct Provisional {
    backing: ShmBacking,
    is_new: bool,
}

impl ShmBacking {
    /// Creates a backing for `len` bytes of RAM; no page of it is allocated.
    ///
    /// The options hold for every region on it: transparent huge pages and core dumps too, and a
    /// region is populated when it is made. A memfd is sealed against any change of its size
    /// before this returns. In a [`BackingSource::File`] the RAM is past [`RamOptions::offset`],
    /// from [`start`](Self::start) to [`end`](Self::end).
    ///
    /// ```
    /// use guest_memory_shm::{BackingSource, BackingKind, RamOptions, ShmBacking};
    ///
    /// // A file without a name, which lives as long as a process uses it.
    /// let options = RamOptions::new().with_backing(BackingSource::File("/dev/shm".into()));
    /// let backing = ShmBacking::create(&options, 1 << 20)?;
    /// assert_eq!(backing.kind(), BackingKind::ShmFile);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`BackingError::Options`] for those that [`RamOptions::check`] refuses, and a size that is
    /// not `len`; [`BackingError::Length`] and [`BackingError::Range`] for a bad `len`;
    /// [`BackingError::NoSuchHugePageSize`] and [`BackingError::NoSuchNodes`] for what this
    /// machine does not have; [`BackingError::Shortage`], [`BackingError::ShmUnavailable`] and
    /// [`BackingError::ShmNamesTaken`] for the limits of the system; [`BackingError::File`] for a
    /// file that cannot be used; others if a system call fails. Nothing is left behind: a file
    /// that was created is removed, one that was empty is empty again.
    pub fn create(options: &RamOptions, len: u64) -> Result<Self> {
        Resolved::new(options)?.with_len(len)?.create_alone()
    }
}

impl<'a> Resolved<'a> {
    /// Everything that creates begins here.
    pub(crate) fn new(options: &'a RamOptions) -> Result<Self> {
        options.check()?;
        let mut object = Object::New;
        let (kind, page_size) = match (options.backing(), options.page_size()) {
            (BackingSource::File(path), _) => {
                let place = Place::look(path)?;
                let found = (place.kind(), place.page_size());
                object = Object::At(place);
                found
            }
            (BackingSource::Memfd, PageSize::Huge(size)) => {
                (BackingKind::HugetlbMemfd, hugetlb::page_size(size)?)
            }
            (BackingSource::Memfd, _) => (BackingKind::Memfd, base_page_size()),
            (BackingSource::PosixShm, _) => (BackingKind::PosixShm, base_page_size()),
        };
        Ok(Self {
            options,
            kind,
            page_size,
            // Only files have one.
            start: options.offset(),
            object,
        })
    }

    /// RAM from `start` on in a backing that exists, whose options were checked when it got them.
    pub(crate) fn existing(backing: &'a ShmBacking, start: u64) -> Self {
        Self {
            options: backing.options(),
            kind: backing.kind(),
            page_size: backing.page_size(),
            start,
            object: Object::There(backing),
        }
    }

    /// The size of its pages in bytes.
    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Where RAM begins in it, in bytes.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// What is at the path of a file.
    fn place(&self) -> Option<&Place<'a>> {
        match &self.object {
            Object::At(place) => Some(place),
            Object::New | Object::There(_) => None,
        }
    }

    /// The error that no file is long enough for `len` bytes of RAM, or this one is not.
    pub(crate) fn too_long(&self, len: u64) -> BackingError {
        match self.object {
            Object::There(backing) => BackingError::Outside {
                offset: self.start,
                size: len,
                end: backing.end(),
            },
            Object::New | Object::At(_) => BackingError::Length {
                len: if len == 0 {
                    0
                } else {
                    self.start.saturating_add(len)
                },
                limit: i64::MAX.unsigned_abs(),
            },
        }
    }

    /// Checks everything about a backing for `len` bytes of RAM that can be checked without
    /// creating it, except for resources that several backings share.
    pub(crate) fn with_len(self, len: u64) -> Result<Request<'a>> {
        let options = self.options;
        if let Object::There(backing) = self.object {
            backing.check_inside(self.start, len)?;
            let seals = backing.seals();
            return Ok(Request {
                of: self,
                len,
                seals,
            });
        }
        if let Some(set) = options.size().filter(|set| *set != len) {
            return Err(OptionsError::SizeMismatch { set, ram: len }.into());
        }
        let end = self.start().saturating_add(len);
        if len == 0 || i64::try_from(end).is_err() {
            return Err(self.too_long(len));
        }
        RangePart::Size.check_aligned(len, self.page_size)?;
        check_nodes(options.numa())?;
        if let Some(place) = self.place() {
            place.check(options, len)?;
        }
        // An existing file is not made longer, so the limit does not apply.
        if self.place().is_none_or(Place::is_new) {
            check_file_size(end)?;
        }
        let seals = match options.sealing() {
            Sealing::Sealed => seals::RAM,
            // No process that gets the descriptor may add seals, for example against writing.
            Sealing::Unsealed => Seals::SEAL,
        };
        Ok(Request {
            of: self,
            len,
            seals,
        })
    }
}

impl<'a> Request<'a> {
    /// The same with other seals, whatever the options say of them.
    #[cfg(feature = "vhost-user")]
    pub(super) fn with_seals(self, seals: Seals) -> Self {
        Self { seals, ..self }
    }

    pub(crate) fn options(&self) -> &'a RamOptions {
        self.of.options
    }

    /// Checks backings together where they draw on the same resource.
    pub(crate) fn check_all<'r>(
        requests: impl Iterator<Item = &'r Request<'r>> + Clone,
    ) -> Result<()> {
        let count = requests.clone().filter(|request| request.is_new()).count() as u64;
        // Creating a single one says as much.
        if count > 1 {
            check_descriptors(count)?;
        }
        check_file_systems(requests.clone().filter_map(Request::draw))?;
        // Pages of each size that the pool must have, and of these those that a control group must
        // leave.
        let mut pages: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        for request in requests {
            let (all, limited) = pages.entry(request.of.page_size).or_default();
            *all += request.huge_pages();
            if request.options().on_shortage() == OnShortage::Refuse {
                *limited += request.huge_pages();
            }
        }
        pages.retain(|_, (all, _)| *all > 0);
        for (page_size, (all, _)) in &pages {
            hugetlb::check_pool(*all, *page_size)?;
        }
        for (page_size, (_, limited)) in pages.iter().filter(|(_, (_, limited))| *limited > 0) {
            hugetlb::check_groups(*limited, *page_size)?;
        }
        Ok(())
    }

    /// Creates it, if that is all that is to be created.
    pub(crate) fn create_alone(&self) -> Result<ShmBacking> {
        Request::check_all(std::iter::once(self))?;
        Ok(self.create()?.keep())
    }

    /// Whether the backing is to be created, or opened.
    fn is_new(&self) -> bool {
        !matches!(self.of.object, Object::There(_))
    }

    /// Creates it unless it exists, after all that are to be created were checked.
    pub(crate) fn create(&self) -> Result<Provisional> {
        let Resolved {
            options,
            kind,
            page_size,
            ref object,
            ..
        } = self.of;
        let made = match object {
            Object::There(backing) => {
                let backing = (*backing).clone();
                let is_new = false;
                return Ok(Provisional { backing, is_new });
            }
            Object::At(place) => file::open(options, place.path, self.len)?,
            Object::New if kind == BackingKind::PosixShm => {
                Made::nameless(posix_shm::create(self.len)?, kind, page_size)?
            }
            Object::New => {
                let huge = kind.is_hugetlb().then_some(page_size);
                let file = memfd::create(options, self.len, huge, self.seals)?;
                Made::nameless(file, kind, page_size)?
            }
        };
        let mut notes = notes::of_options(options, made.kind);
        if made.kind.is_on_file_system() && options.is_lazy() {
            let missing = self.len.saturating_sub(made.metadata.blocks() * BLOCK);
            notes.extend(capacity::note(&made.file, missing));
        }
        let mut inner = Inner::new(made, options.clone());
        inner.start = self.of.start();
        inner.end = self.of.start() + self.len;
        inner.notes = notes;
        let backing = ShmBacking::new(inner);
        log_notes(&backing.label(), backing.notes());
        logs::debug!("created {backing:?}");
        let is_new = true;
        Ok(Provisional { backing, is_new })
    }

    /// What it takes from a file system whose size is a limit.
    fn draw(&self) -> Option<Draw<'a>> {
        let options = self.options();
        match &self.of.object {
            _ if options.is_unreserved() => None,
            Object::At(place) => place.draw(options, self.len),
            Object::There(backing) => self.draw_of(backing),
            Object::New if self.of.kind == BackingKind::PosixShm => Some(Draw {
                name: Name::Path(Path::new(capacity::SHM)),
                // If it is not there, creating says so.
                room: Room::at(Path::new(capacity::SHM))?,
                device: fs::metadata(capacity::SHM).ok()?.dev(),
                part: None,
                all: self.len,
                now: if options.is_lazy() { 0 } else { self.len },
            }),
            Object::New => None,
        }
    }

    /// What RAM on a backing that exists takes from its file system, where that is to be promised:
    /// how sparse the file is was the decision of the process that made it.
    fn draw_of(&self, backing: &'a ShmBacking) -> Option<Draw<'a>> {
        let options = self.options();
        let promised = !options.is_lazy() || options.reserve() == Some(Reserve::On);
        let missing = self.missing();
        if !promised || missing == 0 || !self.of.kind.is_on_file_system() {
            return None;
        }
        let file = backing.identity();
        Some(Draw {
            name: Name::Of(backing.file()),
            room: Room::of(backing)?,
            device: file.dev,
            part: Some((Taken::File(file), self.part())),
            all: self.len,
            now: if options.is_lazy() { 0 } else { missing },
        })
    }

    /// Where the RAM is in the backing.
    fn part(&self) -> Range<u64> {
        self.of.start..self.of.start + self.len
    }

    /// How many bytes of it are not there yet, as far as can be told without looking where its
    /// pages are.
    fn missing(&self) -> u64 {
        match self.of.object {
            Object::There(backing) => self.len.saturating_sub(backing.allocated().unwrap_or(0)),
            Object::New | Object::At(_) => self.len,
        }
    }

    /// The note about the file system of an adopted backing, as the others have it since they were
    /// created.
    pub(crate) fn note(&self) -> Option<(&'a ShmBacking, BuildNote)> {
        match self.of.object {
            Object::There(backing)
                if matches!(
                    self.of.kind,
                    BackingKind::AdoptedShm | BackingKind::AdoptedFile
                ) && self.options().is_lazy() =>
            {
                let note = capacity::note(backing.file(), self.missing())?;
                Some((backing, note))
            }
            _ => None,
        }
    }

    /// How many pages it takes from the pool of its page size, at most.
    ///
    /// None if it is a file that has contents: it may have its pages already, or their promise by
    /// another mapping, and only mapping it tells how many are missing.
    fn huge_pages(&self) -> u64 {
        let is_new = self.is_new() && self.of.place().is_none_or(Place::is_new);
        if self.of.kind.is_hugetlb() && is_new && !self.options().is_unreserved() {
            self.len / self.of.page_size
        } else {
            0
        }
    }

    /// What its pages will be made of; nothing that the kernel could not drop, if it is on a disk.
    fn memory(&self) -> Option<Pages> {
        match self.of.kind {
            kind if kind.is_on_disk() => None,
            kind if kind.is_hugetlb() => Some(Pages::Huge {
                page_size: self.of.page_size,
                reserving: true,
            }),
            _ => Some(Pages::Base(NodeSet::new())),
        }
    }
}

impl Provisional {
    pub(crate) fn backing(&self) -> &ShmBacking {
        &self.backing
    }

    /// Whether all of its pages go away when it is dropped: no other process has it, and it has no
    /// name.
    pub(crate) fn takes_pages_along(&self) -> bool {
        self.is_new && self.backing.is_nameless()
    }

    /// Everything that needs it is there: it stays.
    pub(crate) fn keep(self) -> ShmBacking {
        self.backing.keep();
        self.backing
    }
}

/// The notes about limits on memory that RAM may meet when it is used.
pub(crate) fn memory_notes<'r>(requests: impl Iterator<Item = &'r Request<'r>>) -> Vec<BuildNote> {
    let mut demand = Demand::default();
    // Of those that exist, parts may be the same, and what is allocated is known for all together.
    let mut existing: BTreeMap<FileIdentity, (&ShmBacking, Pages, RangeSet)> = BTreeMap::new();
    for request in requests {
        let Some(pages) = request.memory() else {
            continue;
        };
        if let Object::There(backing) = request.of.object {
            let known = existing.entry(backing.identity());
            let (_, _, parts) = known.or_insert((backing, pages, RangeSet::default()));
            parts.insert(request.part());
        } else {
            demand.add(pages, request.len);
        }
    }
    for (backing, pages, parts) in existing.into_values() {
        let there = backing.allocated().unwrap_or(0);
        demand.add(pages, parts.len().saturating_sub(there));
    }
    // Without a descriptor for that nothing can be built either.
    let limits = MemoryLimits::of_this_process().unwrap_or_default();
    let short = limits.too_small_for(&demand).into_iter();
    short
        .map(|short| BuildNote::Shortage(short.into()))
        .collect()
}

/// Refuses a policy of which no node has memory, as mbind(2) would.
pub(super) fn check_nodes(policy: NumaPolicy) -> Result<()> {
    if policy == NumaPolicy::Default {
        return Ok(());
    }
    match nodes::with_memory() {
        Some(present) if !present.intersects(policy.nodes()) => {
            Err(BackingError::NoSuchNodes { policy, present })
        }
        _ => Ok(()),
    }
}
