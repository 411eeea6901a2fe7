//! The RAM that is asked for: [`RamOptions`] and its parts.

use std::num::NonZeroU32;

mod check;
mod error;
mod kinds;
mod numa;
mod qemu;

pub use error::OptionsError;
pub use kinds::{
    Access, BackingSource, CoreDump, DiscardData, OnShortage, PageSize, Populate, Reserve, Sealing,
};
pub use numa::NumaPolicy;

/// The options of one backing of guest RAM.
///
/// The default is a sealed memfd of base pages, populated lazily, that core dumps leave out. Most
/// of them are options of RAM on a descriptor that came from elsewhere, too
/// ([`ShmBacking::with_options`](crate::ShmBacking::with_options)). They can be read from and
/// written in the syntax of QEMU's `-object`:
///
/// ```
/// use guest_memory_shm::{
///     BackingSource, CoreDump, GuestMemoryShm, PageSize, Populate, RamOptions,
/// };
/// use vm_memory::GuestAddress;
///
/// let options = RamOptions::new()
///     .with_backing(BackingSource::PosixShm)
///     .with_page_size(PageSize::Transparent)
///     .with_populate(Populate::Prefault)
///     .with_core_dump(CoreDump::Include);
/// let memory = GuestMemoryShm::<()>::builder()
///     .add_ram(options, [(GuestAddress(0), 64 << 20)])
///     .build()?;
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
///
/// # QEMU's syntax
///
/// A string begins with `memory-backend-memfd`, `memory-backend-shm` or `memory-backend-file` (or
/// has it anywhere as `qom-type=`), and goes on with properties, `key=value` or the switches `key`
/// and `nokey`, separated by commas; a comma in a value is doubled. Of a property given several
/// times the last counts, of `id` the first, of `host-nodes` all. JSON is not read.
///
/// | property | value | typed | where |
/// |---|---|---|---|
/// | `id` | a letter, then letters, digits, `-`, `.`, `_`; optional here | [`with_name`](Self::with_name) | |
/// | `size` | a size, required | [`with_size`](Self::with_size) | |
/// | `share` | a switch that must be on; `memory-backend-file` needs it written | all RAM is shared | |
/// | `reserve` | a switch | [`with_reserve`](Self::with_reserve) | |
/// | `prealloc` | a switch, off by default | [`Populate::Prefault`], [`Populate::Lazy`] | |
/// | `prealloc-threads` | a number | [`with_populate_threads`](Self::with_populate_threads) | |
/// | `prealloc-context` | refused, unless empty: there are no objects to name | | |
/// | `policy` | `default`, `preferred`, `bind`, `interleave` | [`with_numa`](Self::with_numa) | |
/// | `host-nodes` | a node or a range, `0-3`, below 128 | [`with_numa`](Self::with_numa) | |
/// | `merge` | a switch without effect | | |
/// | `dump` | a switch, **on** by default | [`with_core_dump`](Self::with_core_dump) | |
/// | `x-use-canonical-path-for-ramblock-id` | a switch without effect | | |
/// | `hugetlb` | a switch | [`PageSize::Huge`] | memfd |
/// | `hugetlbsize` | a size, a power of two | [`PageSize::Huge`] | memfd |
/// | `seal` | a switch, on by default | [`with_sealing`](Self::with_sealing) | memfd |
/// | `mem-path` | a path, required | [`BackingSource::File`] | file |
/// | `align`, `offset` | sizes, multiples of the page size | [`with_align`](Self::with_align), [`with_offset`](Self::with_offset) | file |
/// | `discard-data` | a switch | [`with_discard_data`](Self::with_discard_data) | file |
/// | `readonly` | a switch | [`with_access`](Self::with_access) | file |
/// | `rom` | `on`, `off` or `auto`, which must agree with `readonly` | [`with_access`](Self::with_access) | file |
/// | `pmem` | a switch that must be off | | file |
/// | `thp` | a switch that QEMU does not have | [`PageSize::Transparent`] | |
/// | `populate` | `lazy`, `allocate`, `prefault`, which QEMU does not have | [`with_populate`](Self::with_populate) | |
/// | `on-shortage` | `refuse`, `try-anyway`, which QEMU does not have | [`with_on_shortage`](Self::with_on_shortage) | |
///
/// Switches are `on`, `true`, `yes`, `y` and `off`, `false`, `no`, `n`. Sizes are numbers of bytes
/// with the suffixes `K`, `M`, `G`, `T`, `P`, `E` for powers of 1024, with a fraction if they have
/// a suffix (`1.5G`), or hexadecimal without one.
///
/// A whole program that reads and writes such strings: `examples/option_strings.rs`.
///
/// # Serialized
///
/// With the feature `serde` options are a structure with the names of the setters; what is left
/// out is as in [`new`](Self::new), and a field that is not known is an error. They are not
/// [checked](Self::check) when they are read.
///
/// ```json
/// { "backing": { "file": "/dev/shm/ram" }, "size": 1073741824, "page_size": "transparent" }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct RamOptions {
    name: Option<String>,
    size: Option<u64>,
    backing: BackingSource,
    page_size: PageSize,
    sealing: Sealing,
    reserve: Option<Reserve>,
    populate: Populate,
    populate_threads: Option<NonZeroU32>,
    on_shortage: OnShortage,
    numa: NumaPolicy,
    core_dump: CoreDump,
    align: Option<u64>,
    offset: u64,
    access: Access,
    discard_data: DiscardData,
    unused: Unused,
}

/// Properties of QEMU that are accepted and mean nothing here, kept to be reported and written
/// back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub(crate) struct Unused {
    /// `merge`.
    pub(crate) merge: Option<bool>,
    /// `hugetlbsize` without `hugetlb=on`, in bytes.
    pub(crate) hugetlb_size: Option<u64>,
    /// `x-use-canonical-path-for-ramblock-id`.
    pub(crate) canonical_path: Option<bool>,
}

impl RamOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a name (QEMU's `id`); a general one unless set.
    ///
    /// It is the name of a memfd (memfd_create(2)), which `/proc/PID/maps` shows as far as the
    /// kernel takes it, 249 bytes. Reports and stats call every backing by it. QEMU's rule holds:
    /// it begins with a letter, and has letters, digits, `-`, `.` and `_`.
    ///
    /// ```
    /// use guest_memory_shm::{RamOptions, ShmBacking};
    ///
    /// let backing = ShmBacking::create(&RamOptions::new().with_name("ram0"), 1 << 20)?;
    /// assert_eq!(backing.name(), Some("ram0"));
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    #[must_use]
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the size in bytes (QEMU's `size`); any size unless set.
    ///
    /// The ranges of a region or a memory say how large the RAM is; a size that is set must be
    /// theirs.
    ///
    /// ```
    /// use guest_memory_shm::{RamOptions, ShmBacking};
    ///
    /// let options = RamOptions::new().with_size(1 << 20);
    /// assert!(ShmBacking::create(&options, 1 << 20).is_ok());
    /// assert!(ShmBacking::create(&options, 2 << 20).is_err());
    /// ```
    #[must_use]
    pub fn with_size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// Sets where the object that backs the RAM comes from (memfd_create(2), shm_open(3) or
    /// open(2)); a memfd unless set.
    #[must_use]
    pub fn with_backing(mut self, backing: BackingSource) -> Self {
        self.backing = backing;
        self
    }

    /// Sets the pages of the RAM (`MFD_HUGETLB`, `MADV_HUGEPAGE`); base pages unless set.
    ///
    /// [`PageSize::Huge`] goes with [`BackingSource::Memfd`] only.
    #[must_use]
    pub fn with_page_size(mut self, page_size: PageSize) -> Self {
        self.page_size = page_size;
        self
    }

    /// Sets whether the size of a memfd is sealed (`F_ADD_SEALS`, QEMU's `seal`); sealed unless
    /// set.
    ///
    /// Other objects cannot be sealed: [`Sealing::Sealed`] has no effect there, and
    /// [`Sealing::Unsealed`] is refused.
    #[must_use]
    pub fn with_sealing(mut self, sealing: Sealing) -> Self {
        self.sealing = sealing;
        self
    }

    /// Sets whether what the RAM needs is set aside (`MAP_NORESERVE` if not, QEMU's `reserve`);
    /// done unless set.
    ///
    /// Only huge pages of a pool can be reserved: [`Reserve::On`] has no effect on others, and the
    /// [report](crate::BuildReport) says so.
    #[must_use]
    pub fn with_reserve(mut self, reserve: Reserve) -> Self {
        self.reserve = Some(reserve);
        self
    }

    /// Sets how much of the RAM is allocated before it is first used (fallocate(2),
    /// `MADV_POPULATE_WRITE`, QEMU's `prealloc`); nothing unless set. What exceeds the memory is
    /// [refused](Self::with_on_shortage).
    #[must_use]
    pub fn with_populate(mut self, populate: Populate) -> Self {
        self.populate = populate;
        self
    }

    /// Sets how many threads populate (QEMU's `prealloc-threads`); as many as there are CPUs, at
    /// most one for 64 MiB, unless set. It has no effect with [`Populate::Lazy`]. There may be
    /// fewer: see [`PopulateOptions::with_threads`](crate::PopulateOptions::with_threads).
    ///
    /// ```
    /// use std::num::NonZeroU32;
    ///
    /// use guest_memory_shm::{GuestRegionShm, Populate, RamOptions};
    /// use vm_memory::GuestAddress;
    ///
    /// let options = RamOptions::new()
    ///     .with_populate(Populate::Prefault)
    ///     .with_populate_threads(NonZeroU32::MIN);
    /// let region = GuestRegionShm::<()>::new((GuestAddress(0), 1 << 20), &options)?;
    /// assert_eq!(region.backing().allocated()?, 1 << 20);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    #[must_use]
    pub fn with_populate_threads(mut self, threads: NonZeroU32) -> Self {
        self.populate_threads = Some(threads);
        self
    }

    /// Sets what happens if there is not enough memory to populate it (`on-shortage` in strings);
    /// populating is refused unless set. It has no effect with [`Populate::Lazy`], but on huge
    /// pages of a pool.
    #[must_use]
    pub fn with_on_shortage(mut self, on_shortage: OnShortage) -> Self {
        self.on_shortage = on_shortage;
        self
    }

    /// Sets on which NUMA nodes pages are allocated (mbind(2), QEMU's `policy` and `host-nodes`);
    /// the default policy unless set.
    ///
    /// It has no effect on a machine with one node, which the [report](crate::BuildReport) says.
    #[must_use]
    pub fn with_numa(mut self, numa: NumaPolicy) -> Self {
        self.numa = numa;
        self
    }

    /// Sets whether core dumps of this process hold the RAM (`MADV_DONTDUMP` if not, QEMU's
    /// `dump`); left out unless set.
    #[must_use]
    pub fn with_core_dump(mut self, core_dump: CoreDump) -> Self {
        self.core_dump = core_dump;
        self
    }

    /// Sets a power of two, in bytes, that the host address of a [`BackingSource::File`] is a
    /// multiple of (QEMU's `align`); what suits huge pages unless set, or if it is 0.
    ///
    /// ```
    /// use guest_memory_shm::{BackingSource, GuestRegionShm, RamOptions};
    /// use vm_memory::GuestAddress;
    ///
    /// let options = RamOptions::new()
    ///     .with_backing(BackingSource::File("/dev/shm".into()))
    ///     .with_align(1 << 30);
    /// let region = GuestRegionShm::<()>::new((GuestAddress(0), 1 << 20), &options)?;
    /// assert_eq!(region.as_ptr().addr() % (1 << 30), 0);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    #[must_use]
    pub fn with_align(mut self, align: u64) -> Self {
        self.align = Some(align);
        self
    }

    /// Sets where in a [`BackingSource::File`] the RAM starts, in bytes (the offset of mmap(2),
    /// QEMU's `offset`); at its start unless set.
    ///
    /// An example is at [`ShmBacking::size`](crate::ShmBacking::size).
    #[must_use]
    pub fn with_offset(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// Sets whether a [`BackingSource::File`] is RAM or a ROM (`O_RDONLY` and `PROT_READ`, QEMU's
    /// `readonly` and `rom`); RAM unless set.
    #[must_use]
    pub fn with_access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Sets what becomes of the contents of a [`BackingSource::File`] at the end
    /// (`FALLOC_FL_PUNCH_HOLE` of fallocate(2), QEMU's `discard-data`); they are kept unless set.
    #[must_use]
    pub fn with_discard_data(mut self, discard_data: DiscardData) -> Self {
        self.discard_data = discard_data;
        self
    }

    /// The name, if one is set.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The size in bytes, if one is set.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Where the object that backs the RAM comes from.
    pub fn backing(&self) -> &BackingSource {
        &self.backing
    }

    /// The pages of the RAM.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Whether the size of a memfd is sealed.
    pub fn sealing(&self) -> Sealing {
        self.sealing
    }

    /// Whether what the RAM needs is set aside, if that is set.
    pub fn reserve(&self) -> Option<Reserve> {
        self.reserve
    }

    /// How much of the RAM is allocated before it is first used.
    pub fn populate(&self) -> Populate {
        self.populate
    }

    /// How many threads populate, if that is set.
    pub fn populate_threads(&self) -> Option<NonZeroU32> {
        self.populate_threads
    }

    /// What happens if there is not enough memory to populate it.
    pub fn on_shortage(&self) -> OnShortage {
        self.on_shortage
    }

    /// On which NUMA nodes pages are allocated.
    pub fn numa(&self) -> NumaPolicy {
        self.numa
    }

    /// Whether core dumps hold the RAM.
    pub fn core_dump(&self) -> CoreDump {
        self.core_dump
    }

    /// Whether equal pages are to be merged, if a string says so. The kernel does that with
    /// private pages only (KSM), so that it has no effect.
    pub fn merge(&self) -> Option<bool> {
        self.unused.merge
    }

    /// The alignment of the host address in bytes, if one is set.
    pub fn align(&self) -> Option<u64> {
        self.align
    }

    /// Where in a file the RAM starts, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether a file is RAM or a ROM.
    pub fn access(&self) -> Access {
        self.access
    }

    /// What becomes of the contents of a file at the end.
    pub fn discard_data(&self) -> DiscardData {
        self.discard_data
    }

    /// Properties that are set and mean nothing here.
    pub(crate) fn unused(&self) -> &Unused {
        &self.unused
    }

    /// Whether no page is to be allocated before it is used.
    pub(crate) fn is_lazy(&self) -> bool {
        self.populate == Populate::Lazy
    }

    /// Whether what the RAM needs must not be set aside or checked.
    pub(crate) fn is_unreserved(&self) -> bool {
        self.reserve == Some(Reserve::Off)
    }
}

/// What holds for every mapping of a backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapOptions {
    pub(crate) transparent_huge: bool,
    pub(crate) core_dump: CoreDump,
    pub(crate) numa: NumaPolicy,
    pub(crate) unreserved: bool,
    pub(crate) align: Option<u64>,
    pub(crate) access: Access,
}

impl From<&RamOptions> for MapOptions {
    fn from(options: &RamOptions) -> Self {
        Self {
            transparent_huge: options.page_size == PageSize::Transparent,
            core_dump: options.core_dump,
            numa: options.numa,
            unreserved: options.is_unreserved(),
            align: options.align,
            access: options.access,
        }
    }
}
