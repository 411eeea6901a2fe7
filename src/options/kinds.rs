//! The choices that options are made of, each a type of its own.

use std::path::PathBuf;

/// Where the object that backs RAM comes from; what it turns out to be is its
/// [`BackingKind`](crate::BackingKind).
///
/// ```
/// use guest_memory_shm::{BackingSource, RamOptions};
///
/// let file = RamOptions::new().with_backing(BackingSource::File("/dev/shm/guest".into()));
/// assert_eq!(file.backing(), &BackingSource::File("/dev/shm/guest".into()));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum BackingSource {
    /// A memfd, sealed against any change of its size (`memory-backend-memfd`).
    ///
    /// Not capped by the size of `/dev/shm`, and no daemon that holds the descriptor can truncate
    /// it under the VMM. Linux only.
    #[default]
    #[doc(alias = "memfd_create")]
    Memfd,
    /// A nameless POSIX shared memory object (`memory-backend-shm`).
    ///
    /// Portable, but it cannot be sealed: any process that holds the descriptor can truncate it,
    /// and the next touch is then SIGBUS. Hand it to trusted daemons only.
    #[doc(alias = "shm_open")]
    PosixShm,
    /// A file, or a nameless file in a directory (`memory-backend-file`).
    ///
    /// An existing file must be as long as the RAM, and is never made longer; a file that does not
    /// exist or is empty is made as long as the RAM; if the path is a directory, the file has no
    /// name and goes away with its last user. On a hugetlbfs its pages are huge pages of that file
    /// system's pool. Files cannot be sealed: see [`PosixShm`](Self::PosixShm).
    #[doc(alias = "mem-path")]
    File(PathBuf),
}

/// The pages that RAM consists of.
///
/// ```
/// use guest_memory_shm::{PageSize, RamOptions};
///
/// let huge = RamOptions::new().with_page_size(PageSize::Huge(Some(2 << 20)));
/// assert_eq!(huge.page_size(), PageSize::Huge(Some(2 << 20)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum PageSize {
    /// The base pages of the system, 4 KiB on x86-64.
    #[default]
    Base,
    /// Base pages that the kernel may gather into huge ones (`MADV_HUGEPAGE`).
    ///
    /// Has effect only where `/sys/kernel/mm/transparent_hugepage/shmem_enabled` (or the mount
    /// option `huge=` of the tmpfs) allows it; where it has none, the
    /// [report](crate::BuildReport) of building says why.
    Transparent,
    /// Pages from a hugetlb pool, of this size in bytes, or of the default size if `None`.
    ///
    /// Only with [`BackingSource::Memfd`] (a [`BackingSource::File`] has the pages of its file
    /// system). The pool is filled by the administrator (`/proc/sys/vm/nr_hugepages`); the pages
    /// are reserved when the RAM is mapped, so that touching it never fails, unless
    /// [`Reserve::Off`] is set.
    #[doc(alias = "MFD_HUGETLB")]
    Huge(Option<u64>),
}

/// Whether the size of a memfd is sealed.
///
/// ```
/// use guest_memory_shm::{RamOptions, Sealing, Seals, ShmBacking};
///
/// let open = RamOptions::new().with_sealing(Sealing::Unsealed);
/// let backing = ShmBacking::create(&open, 1 << 20)?;
/// assert!(!backing.seals().contains(Seals::SHRINK));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Sealing {
    /// Sealed before it is first mapped: no process can change its size any more (QEMU's
    /// `seal=on`).
    #[default]
    #[doc(alias = "F_ADD_SEALS")]
    Sealed,
    /// Every process that holds the descriptor can truncate it, and the next touch is then SIGBUS
    /// (`seal=off`): for peers that must resize it.
    Unsealed,
}

/// Whether what RAM needs is set aside when it is mapped.
///
/// Of the backings of this crate only huge pages of a pool can be reserved. For all others it
/// decides about the check of the capacity: see each variant. On an object that exists
/// ([`ShmBacking::with_options`](crate::ShmBacking::with_options)) it is only checked where this
/// is set to [`On`](Self::On), or all is populated.
///
/// ```
/// use guest_memory_shm::{BackingSource, RamOptions, Reserve};
///
/// // More than /dev/shm can ever hold, on purpose: the guest is known to touch little of it.
/// let sparse = RamOptions::new()
///     .with_backing(BackingSource::PosixShm)
///     .with_reserve(Reserve::Off);
/// assert_eq!(sparse.reserve(), Some(Reserve::Off));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Reserve {
    /// Huge pages are reserved; POSIX shm and files that their file system can never hold are
    /// refused. What is done unless set otherwise.
    On,
    /// Nothing is reserved and no capacity is checked (`MAP_NORESERVE`): touching RAM that cannot
    /// be had later is SIGBUS. Not together with a [`Populate`] mode other than lazy.
    #[doc(alias = "MAP_NORESERVE")]
    Off,
}

/// How much of the RAM is allocated before it is first used.
///
/// ```
/// use guest_memory_shm::{Populate, RamOptions, ShmBacking, GuestMemoryShm};
/// use vm_memory::{GuestAddress, GuestMemoryBackend};
///
/// let memory = GuestMemoryShm::<()>::builder()
///     .add_ram(
///         RamOptions::new().with_populate(Populate::Allocate),
///         [(GuestAddress(0), 16 << 20)],
///     )
///     .build()?;
/// let region = memory.iter().next().expect("there is one");
/// assert_eq!(region.backing().allocated()?, 16 << 20);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Populate {
    /// Nothing: pages come when they are touched. If there are none then, that is SIGBUS.
    #[default]
    Lazy,
    /// Every page is allocated, none is mapped: no touch is SIGBUS any more, but each first touch
    /// is still a page fault. Takes about a third of the time of [`Prefault`](Self::Prefault).
    ///
    /// Huge pages, transparent ones or of a pool, only come through the mapping: they are mapped,
    /// too, which costs next to nothing.
    #[doc(alias = "fallocate")]
    Allocate,
    /// Every page is allocated and mapped: no touch is a page fault (QEMU's `prealloc=on`).
    #[doc(alias = "MADV_POPULATE_WRITE")]
    #[doc(alias = "prealloc")]
    Prefault,
}

/// What happens when there is not enough memory to populate RAM.
///
/// The kernel refuses nothing by itself: it ends a process (the OOM killer's SIGKILL), this one or
/// another. So this crate looks at what limits memory before it populates, and repeatedly while it
/// does: the control groups of this process (cgroups(7)), the machine (proc_meminfo(5)), and the
/// NUMA nodes that the pages must come from.
///
/// ```
/// use guest_memory_shm::{OnShortage, Populate, PopulateOptions, RamOptions};
///
/// assert_eq!(RamOptions::new().on_shortage(), OnShortage::Refuse);
/// // The VMM knows that another process in its control group is about to end.
/// let hopeful = PopulateOptions::new(Populate::Prefault).with_on_shortage(OnShortage::TryAnyway);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum OnShortage {
    /// It is an error: before the first page if it can be known then, and later if others take the
    /// memory meanwhile.
    ///
    /// This is as accurate as what the kernel reports, and as fast: if others take memory faster
    /// than this process looks, the kernel may still end one.
    #[default]
    Refuse,
    /// Nothing is checked (`on-shortage=try-anyway`). Where memory is short, a process is ended.
    TryAnyway,
}

/// Whether guest RAM is part of a core dump of the VMM.
///
/// ```
/// use guest_memory_shm::{CoreDump, RamOptions};
///
/// assert_eq!(RamOptions::new().core_dump(), CoreDump::Exclude);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum CoreDump {
    /// Left out (`MADV_DONTDUMP`): a dump of the VMM stays small and does not leak the guest.
    #[default]
    #[doc(alias = "MADV_DONTDUMP")]
    Exclude,
    /// Part of the dump (QEMU's `dump=on`, its default).
    Include,
}

/// Whether a file is RAM, or a ROM, which is never written.
///
/// ```
/// use guest_memory_shm::{Access, BackingSource, RamOptions};
///
/// let firmware = RamOptions::new()
///     .with_backing(BackingSource::File("/usr/share/firmware.bin".into()))
///     .with_access(Access::ReadOnly);
/// assert_eq!(firmware.access(), Access::ReadOnly);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Access {
    /// Read and written: RAM.
    #[default]
    ReadWrite,
    /// Opened and mapped for reading only (QEMU's `readonly=on`, with `rom=on`). It is no RAM, so
    /// no part of a memory: [`GuestRom`](crate::GuestRom) maps it.
    ReadOnly,
}

/// What becomes of the contents of a file when its last user in this process lets go of it.
///
/// ```
/// use guest_memory_shm::{BackingSource, DiscardData, RamOptions};
///
/// let scratch = RamOptions::new()
///     .with_backing(BackingSource::File("/var/tmp/guest-ram".into()))
///     .with_discard_data(DiscardData::OnDrop);
/// assert_eq!(scratch.discard_data(), DiscardData::OnDrop);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum DiscardData {
    /// They stay in the file.
    #[default]
    Keep,
    /// They are freed, and changed pages are not written back (QEMU's `discard-data=on`); the file
    /// keeps its name and its length.
    OnDrop,
}
