//! Building guest memory: everything is checked before anything is created.

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, NewBitmap};

use super::GuestMemoryShm;
#[cfg(doc)]
use crate::backing::BackingError;
use crate::backing::{Request, Resolved, ShmBacking, memory_notes};
use crate::host::transparent;
use crate::options::{Access, RamOptions};
use crate::populate::{OnFailure, populate_mapped};
use crate::range::{GuestRange, InvalidRange, check_disjoint};
use crate::region::{GuestRegionShm, MemoryError, Result, new_bitmap};
use crate::report::{BuildNote, BuildReport, log_notes};

/// The report's name for all RAM that is built.
const ALL: &str = "all RAM";

/// Builds a [`GuestMemoryShm`] of several backings, each of which can carry several ranges.
///
/// ```
/// use guest_memory_shm::{BackingSource, GuestMemoryShm, GuestRange, RamOptions, ram_around_hole};
/// use vm_memory::{GuestAddress, GuestMemoryBackend};
///
/// let hole = GuestRange::new(GuestAddress(3 << 30), 1 << 30)?;
/// let memory = GuestMemoryShm::<()>::builder()
///     // One descriptor carries the RAM below and above the hole.
///     .add_ram(RamOptions::new(), ram_around_hole(4 << 30, hole)?)
///     // Another one, which any process that holds it can truncate, is for a trusted daemon.
///     .add_ram(
///         RamOptions::new().with_backing(BackingSource::PosixShm),
///         [(GuestAddress(1 << 40), 16 << 20)],
///     )
///     .build()?;
/// assert_eq!(memory.num_regions(), 3);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[must_use = "nothing is created before build()"]
pub struct GuestMemoryShmBuilder<B = ()> {
    parts: Vec<Part>,
    bitmaps: Bitmaps<B>,
    sizes: Sizes,
}

/// Which sizes and addresses regions may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sizes {
    /// Whole pages: what memory slots, daemons and discards would refuse later is refused at once.
    Pages,
    /// Any, as code written for vm-memory's type expects.
    Any,
}

/// What makes the bitmap of a region.
enum Bitmaps<B> {
    New(fn(GuestRange) -> B),
    Given(Box<dyn Fn(GuestRange) -> B + Send + Sync>),
}

/// One backing, existing or to be created, and the ranges on it.
#[derive(Debug)]
struct Part {
    source: Source,
    ranges: std::result::Result<Vec<GuestRange>, InvalidRange>,
}

#[derive(Debug)]
enum Source {
    Create(RamOptions),
    Use { backing: ShmBacking, offset: u64 },
}

/// A part whose numbers are checked.
struct Plan<'a> {
    request: Request<'a>,
    ranges: Vec<GuestRange>,
    offsets: Vec<u64>,
}

impl<B: NewBitmap> GuestMemoryShm<B> {
    /// A builder, for RAM of several backings, of other kinds than a memfd, or with bitmaps that
    /// are no `NewBitmap` ([`with_bitmap`](GuestMemoryShmBuilder::with_bitmap)).
    pub fn builder() -> GuestMemoryShmBuilder<B> {
        GuestMemoryShmBuilder {
            parts: Vec::new(),
            bitmaps: Bitmaps::New(new_bitmap),
            sizes: Sizes::Pages,
        }
    }
}

impl<B: NewBitmap> GuestMemoryShmBuilder<B> {
    /// Takes ranges that are not whole pages, as vm-memory does.
    pub(super) fn of_any_size(mut self) -> Self {
        self.sizes = Sizes::Any;
        self
    }
}

impl<B> GuestMemoryShmBuilder<B> {
    /// Has a function make the dirty bitmap of each region, of any type: for bitmaps that are no
    /// `NewBitmap`, such as `Option<AtomicBitmap>`, or that are set up in another way.
    ///
    /// Default: `NewBitmap::with_len`. The function is called during [`build`](Self::build), once
    /// for each region, after all is checked and before anything is created. If it panics, so does
    /// that, and nothing is left.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    ///
    /// use guest_memory_shm::{GuestMemoryShm, RamOptions};
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    ///
    /// let page = NonZeroUsize::new(4096).expect("a page has a size");
    /// let track = true; // as this guest wants it
    /// let bitmap = move |size: u64| track.then(|| AtomicBitmap::new(size as usize, page));
    /// let memory: GuestMemoryShm<Option<AtomicBitmap>> = GuestMemoryShm::<()>::builder()
    ///     .add_ram(RamOptions::new(), [(GuestAddress(0), 1 << 20)])
    ///     .with_bitmap(move |range| bitmap(range.size()))
    ///     .build()?;
    /// memory.write_obj(1u8, GuestAddress(0x3000)).expect("there is RAM");
    /// let region = memory.find_region(GuestAddress(0)).expect("there is RAM");
    /// assert!(region.dirty_bitmap().as_ref().is_some_and(|dirty| dirty.is_bit_set(3)));
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    pub fn with_bitmap<C>(
        self,
        bitmap: impl Fn(GuestRange) -> C + Send + Sync + 'static,
    ) -> GuestMemoryShmBuilder<C> {
        GuestMemoryShmBuilder {
            parts: self.parts,
            bitmaps: Bitmaps::Given(Box::new(bitmap)),
            sizes: self.sizes,
        }
    }

    /// Adds RAM in these ranges (guest address, size in bytes), all on one new backing.
    ///
    /// The ranges lie in the backing one after the other, in the order given, from
    /// [`RamOptions::offset`] on: the second begins where the first ends. Huge pages need a guest
    /// address and an offset that are congruent modulo the size of a huge page.
    pub fn add_ram(
        mut self,
        options: RamOptions,
        ranges: impl IntoIterator<Item: TryInto<GuestRange, Error: Into<InvalidRange>>>,
    ) -> Self {
        self.parts.push(Part {
            source: Source::Create(options),
            ranges: ranges.into_iter().map(GuestRange::at).collect(),
        });
        self
    }

    /// Adds RAM in these ranges on a backing that exists, for example an adopted one, one after
    /// the other from `offset` bytes on.
    ///
    /// It has the options that the backing was created with, adopted with
    /// ([`AdoptPolicy::with_options`](crate::AdoptPolicy::with_options)), or given for this RAM
    /// ([`ShmBacking::with_options`], where there is an example).
    pub fn add_backing(
        mut self,
        backing: &ShmBacking,
        offset: u64,
        ranges: impl IntoIterator<Item: TryInto<GuestRange, Error: Into<InvalidRange>>>,
    ) -> Self {
        self.parts.push(Part {
            source: Source::Use {
                backing: backing.clone(),
                offset,
            },
            ranges: ranges.into_iter().map(GuestRange::at).collect(),
        });
        self
    }
}

impl<B: Bitmap> GuestMemoryShmBuilder<B> {
    /// Creates the backings, maps them, places the regions, and populates them as their options
    /// say: all together, with the largest number of threads that any of the options asks for.
    ///
    /// Costs per region, not per byte, unless RAM is populated: no page is allocated then.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NoRanges`] without any range (or with a backing that has none);
    /// [`MemoryError::Range`], and [`MemoryError::Backing`] with [`BackingError::Outside`] or
    /// [`BackingError::Truncated`], for bad places; those of [`ShmBacking::create`];
    /// [`MemoryError::ReadOnlyRam`] for a file that is opened for reading only;
    /// [`MemoryError::Map`]; and [`MemoryError::Populate`], before the first page if there is not
    /// enough memory. All numbers, and the pools of huge pages, are checked before anything is
    /// created, and a failure leaves nothing behind but the NUMA policy of a backing that was
    /// there before.
    ///
    /// # Panics
    ///
    /// If the function of [`with_bitmap`](Self::with_bitmap) does.
    pub fn build(self) -> Result<GuestMemoryShm<B>> {
        self.build_with_report().map(|(memory, _)| memory)
    }

    /// As [`build`](Self::build), and reports which options have no effect and which limits are
    /// near. (The log has it, too.)
    ///
    /// # Errors
    ///
    /// Those of [`build`](Self::build).
    ///
    /// # Panics
    ///
    /// If the function of [`with_bitmap`](Self::with_bitmap) does.
    pub fn build_with_report(self) -> Result<(GuestMemoryShm<B>, BuildReport)> {
        let plans = self.parts.iter().map(|part| part.plan(self.sizes));
        let plans: Vec<Plan<'_>> = plans.collect::<Result<_>>()?;
        let all: Vec<GuestRange> = plans.iter().flat_map(|plan| plan.ranges.clone()).collect();
        check_disjoint(&all)?;
        Request::check_all(requests(&plans))?;
        // The caller's code, which may panic: nothing has been created yet.
        let bitmaps = all.iter().map(|range| self.bitmaps.make(*range)).collect();
        let mut report = limits(&plans);
        let regions = create(&plans, bitmaps, &mut report)?;
        let regions = regions.into_iter().map(Arc::new).collect();
        Ok((GuestMemoryShm::from_unsorted(regions)?, report))
    }
}

/// Regions by themselves are built in the same way.
impl<B: NewBitmap> GuestRegionShm<B> {
    /// A region with a new backing of its own, populated as the options say.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Range`] for a bad place; those of [`ShmBacking::create`] and
    /// [`from_backing`](Self::from_backing); and [`MemoryError::Populate`].
    pub fn new(
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
        options: &RamOptions,
    ) -> Result<Self> {
        Self::new_with_bitmap(range, options, new_bitmap)
    }

    /// A region on the part of `backing` at `offset`, mapped and populated as the options say that
    /// the backing was created, adopted, or [seen](ShmBacking::with_options) with.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Range`] for a bad place; [`MemoryError::Backing`] with
    /// [`BackingError::Outside`] for a part that the backing does not have, and
    /// [`BackingError::Truncated`] for one that it no longer has; [`MemoryError::ReadOnlyRam`] for
    /// a file that is opened for reading only; [`MemoryError::Backing`] with
    /// [`BackingError::Shortage`], and [`MemoryError::Map`], if it cannot be mapped; and
    /// [`MemoryError::Populate`].
    pub fn from_backing(
        backing: &ShmBacking,
        offset: u64,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
    ) -> Result<Self> {
        Self::from_backing_with_bitmap(backing, offset, range, new_bitmap)
    }
}

impl<B> GuestRegionShm<B> {
    /// A region as [`new`](Self::new), with a dirty bitmap that a function makes for it: for
    /// bitmaps that are no `NewBitmap`, as `Option<AtomicBitmap>` is none, or that are set up
    /// otherwise.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    ///
    /// use guest_memory_shm::{GuestRegionShm, RamOptions};
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
    ///
    /// let page = NonZeroUsize::new(4096).expect("a page has a size");
    /// let track = true;
    /// let region = GuestRegionShm::<Option<AtomicBitmap>>::new_with_bitmap(
    ///     (GuestAddress(4 << 30), 1 << 20),
    ///     &RamOptions::new(),
    ///     |range| track.then(|| AtomicBitmap::new(range.size() as usize, page)),
    /// )?;
    /// region.write_obj(1u8, MemoryRegionAddress(0x3000)).expect("there is RAM");
    /// assert!(region.dirty_bitmap().as_ref().is_some_and(|dirty| dirty.is_bit_set(3)));
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    ///
    /// # Panics
    ///
    /// If `bitmap` does, which is called before anything is created.
    pub fn new_with_bitmap(
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
        options: &RamOptions,
        bitmap: impl FnOnce(GuestRange) -> B,
    ) -> Result<Self> {
        let part = Part {
            source: Source::Create(options.clone()),
            ranges: GuestRange::at(range).map(|range| vec![range]),
        };
        Self::of_part(&part, bitmap, limits)
    }

    /// A region as [`from_backing`](Self::from_backing), with a dirty bitmap that a function makes
    /// for it.
    ///
    /// ```
    /// use guest_memory_shm::{GuestRegionShm, RamOptions, ShmBacking};
    /// use vm_memory::GuestAddress;
    /// use vm_memory::bitmap::AtomicBitmap;
    ///
    /// let backing = ShmBacking::create(&RamOptions::new(), 1 << 20)?;
    /// let untracked = GuestRegionShm::<Option<AtomicBitmap>>::from_backing_with_bitmap(
    ///     &backing,
    ///     0,
    ///     (GuestAddress(0), 1 << 20),
    ///     |_| None,
    /// )?;
    /// assert!(untracked.dirty_bitmap().is_none());
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`from_backing`](Self::from_backing).
    ///
    /// # Panics
    ///
    /// If `bitmap` does, which is called before anything is mapped.
    pub fn from_backing_with_bitmap(
        backing: &ShmBacking,
        offset: u64,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
        bitmap: impl FnOnce(GuestRange) -> B,
    ) -> Result<Self> {
        let part = Part {
            source: Source::Use {
                backing: backing.clone(),
                offset,
            },
            ranges: GuestRange::at(range).map(|range| vec![range]),
        };
        // Others make regions of the same RAM, too: what it is to all of them was looked at when
        // it was created, and a daemon that maps hundreds does not look for each.
        Self::of_part(&part, bitmap, |_| BuildReport::default())
    }

    /// The only region of a part; `look` is how limits that are near are looked for.
    fn of_part(
        part: &Part,
        bitmap: impl FnOnce(GuestRange) -> B,
        look: impl FnOnce(&[Plan<'_>]) -> BuildReport,
    ) -> Result<Self> {
        let plans = [part.plan(Sizes::Pages)?];
        Request::check_all(requests(&plans))?;
        let bitmaps = vec![bitmap(plans[0].ranges[0])];
        let mut regions = create(&plans, bitmaps, &mut look(&plans))?;
        regions.pop().ok_or(MemoryError::NoRanges)
    }
}

impl<B> Bitmaps<B> {
    fn make(&self, range: GuestRange) -> B {
        match self {
            Self::New(make) => make(range),
            Self::Given(make) => make(range),
        }
    }
}

impl<B> fmt::Debug for GuestMemoryShmBuilder<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemoryShmBuilder")
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

impl Part {
    fn plan(&self, sizes: Sizes) -> Result<Plan<'_>> {
        let access = match &self.source {
            Source::Create(options) => options.access(),
            Source::Use { backing, .. } => backing.map_options().access,
        };
        if access == Access::ReadOnly {
            return Err(MemoryError::ReadOnlyRam);
        }
        let resolved = match &self.source {
            Source::Create(options) => Resolved::new(options)?,
            Source::Use { backing, offset } => Resolved::existing(backing, *offset),
        };
        let ranges = self.ranges(resolved.page_size(), sizes)?;
        let start = resolved.start();
        let Some((offsets, end)) = pack(start, resolved.page_size(), &ranges) else {
            let sizes = ranges.iter().map(GuestRange::size);
            return Err(resolved.too_long(sizes.fold(0, u64::saturating_add)).into());
        };
        let len = end - start;
        Ok(Plan {
            request: resolved.with_len(len)?,
            ranges,
            offsets,
        })
    }

    fn ranges(&self, page_size: u64, sizes: Sizes) -> Result<Vec<GuestRange>> {
        let ranges = self.ranges.clone()?;
        if ranges.is_empty() {
            return Err(MemoryError::NoRanges);
        }
        if sizes == Sizes::Pages {
            let mut ranges = ranges.iter();
            ranges.try_for_each(|range| range.check_aligned(page_size))?;
        }
        Ok(ranges)
    }
}

fn requests<'p>(plans: &'p [Plan<'p>]) -> impl Iterator<Item = &'p Request<'p>> + Clone {
    plans.iter().map(|plan| &plan.request)
}

/// The limits that are near. Files are read for them; what a discard needs to know is read along,
/// because a thread that discards may not be allowed to open any.
fn limits(plans: &[Plan<'_>]) -> BuildReport {
    transparent::page_size();
    let mut report = BuildReport::default();
    let mut add = |name: &str, notes: Vec<BuildNote>| {
        log_notes(name, &notes);
        report.add(name, notes);
    };
    add(ALL, memory_notes(requests(plans)));
    for (backing, note) in requests(plans).filter_map(Request::note) {
        add(&backing.label(), vec![note]);
    }
    report
}

/// Creates, maps and populates what was planned and checked, with these bitmaps for the ranges in
/// their order. A failure leaves nothing behind.
fn create<B>(
    plans: &[Plan<'_>],
    bitmaps: Vec<B>,
    report: &mut BuildReport,
) -> Result<Vec<GuestRegionShm<B>>> {
    let mut bitmaps = bitmaps.into_iter();
    let mut regions = Vec::with_capacity(bitmaps.len());
    let mut made = Vec::with_capacity(plans.len());
    let mut on_failure = OnFailure::Keep;
    for plan in plans {
        let provisional = plan.request.create()?;
        let backing = provisional.backing();
        report.add(&backing.label(), backing.notes().iter().cloned());
        let places = plan.ranges.iter().zip(&plan.offsets);
        for ((range, offset), bitmap) in places.zip(bitmaps.by_ref()) {
            let region = GuestRegionShm::place(backing, *offset, *range, bitmap)?;
            let notes = region.ram().mapping.notes();
            report.add(&backing.label(), notes.iter().cloned());
            regions.push(region);
        }
        if !provisional.takes_pages_along() && !plan.request.options().is_lazy() {
            on_failure = OnFailure::GiveBack;
        }
        made.push(provisional);
    }
    let rams = regions.iter().map(|region| region.ram().clone());
    populate_mapped(rams.collect(), on_failure)?;
    for provisional in made {
        provisional.keep();
    }
    Ok(regions)
}

/// The offsets at which the pages of `ranges`, in this order, lie one after the other in a backing
/// from `start` on, and the end of the last; none if no file can be that long.
fn pack(start: u64, page_size: u64, ranges: &[GuestRange]) -> Option<(Vec<u64>, u64)> {
    let mut end = start;
    let mut offsets = Vec::with_capacity(ranges.len());
    for range in ranges {
        offsets.push(end);
        let pages = range.size().checked_next_multiple_of(page_size)?;
        end = end.checked_add(pages)?;
        // The offset of a file is signed (off_t).
        i64::try_from(end).ok()?;
    }
    Some((offsets, end))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn ranges(all: [(u64, u64); 2]) -> [GuestRange; 2] {
        all.map(|(start, size)| GuestRange::new(GuestAddress(start), size).unwrap())
    }

    #[test]
    fn packed_ranges_follow_each_other() {
        let (offsets, end) = pack(4096, 4096, &ranges([(1 << 32, 8192), (0, 4096)])).unwrap();
        assert_eq!((offsets, end), (vec![4096, 12288], 16384));
        assert_eq!(
            pack(0, 4096, &ranges([(0, 1 << 62), (1 << 63, 1 << 62)])),
            None
        );
    }
}
