//! What RAM is asked for: the kind of backing, the page size, and what a core dump holds.

/// The kind of object behind RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backing {
    /// A memfd, sealed against any change of its size (`memory-backend-memfd` with `seal=on`).
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
}

/// The pages that RAM consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageSize {
    /// The base pages of the system, 4 KiB on x86-64.
    #[default]
    Base,
    /// Base pages that the kernel may gather into huge ones (`MADV_HUGEPAGE`).
    ///
    /// Has effect only where `/sys/kernel/mm/transparent_hugepage/shmem_enabled` (or the mount
    /// option `huge=` of the tmpfs) allows it. Without effect elsewhere.
    Transparent,
    /// Pages from a hugetlb pool, of this size in bytes, or of the default size if `None`.
    ///
    /// Only with [`Backing::Memfd`]. The pool is filled by the administrator
    /// (`/proc/sys/vm/nr_hugepages`); the pages are reserved when the RAM is mapped, so that
    /// touching it never fails.
    #[doc(alias = "MFD_HUGETLB")]
    Huge(Option<u64>),
}

/// Whether guest RAM is part of a core dump of the VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CoreDump {
    /// Left out (`MADV_DONTDUMP`): a dump of the VMM stays small and does not leak the guest.
    #[default]
    #[doc(alias = "MADV_DONTDUMP")]
    Exclude,
    /// Part of the dump (QEMU's `dump=on`).
    Include,
}

/// What the kernel is told about a mapping before any page of it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Advice {
    pub(crate) transparent_huge: bool,
    pub(crate) core_dump: CoreDump,
}

impl From<&RamOptions> for Advice {
    fn from(options: &RamOptions) -> Self {
        Self {
            transparent_huge: options.page_size == PageSize::Transparent,
            core_dump: options.core_dump,
        }
    }
}

/// The options of one backing of guest RAM.
///
/// The default is a sealed memfd of base pages that core dumps leave out.
///
/// ```
/// use guest_memory_shm::{Backing, CoreDump, GuestMemoryShm, PageSize, RamOptions};
/// use vm_memory::GuestAddress;
///
/// let options = RamOptions::new()
///     .with_backing(Backing::PosixShm)
///     .with_page_size(PageSize::Transparent)
///     .with_core_dump(CoreDump::Include);
/// let memory = GuestMemoryShm::<()>::builder()
///     .with_ram(options, [(GuestAddress(0), 64 << 20)])
///     .build()?;
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RamOptions {
    backing: Backing,
    page_size: PageSize,
    core_dump: CoreDump,
}

impl RamOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the kind of object behind the RAM; a memfd unless set.
    #[must_use]
    pub fn with_backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Sets the pages of the RAM; base pages unless set.
    ///
    /// [`PageSize::Huge`] goes with [`Backing::Memfd`] only: building fails with
    /// [`Error::HugePosixShm`](crate::Error::HugePosixShm) otherwise.
    #[must_use]
    pub fn with_page_size(mut self, page_size: PageSize) -> Self {
        self.page_size = page_size;
        self
    }

    /// Sets whether core dumps of this process hold the RAM; left out unless set.
    #[must_use]
    pub fn with_core_dump(mut self, core_dump: CoreDump) -> Self {
        self.core_dump = core_dump;
        self
    }

    /// The kind of object behind the RAM.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The pages of the RAM.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Whether core dumps hold the RAM.
    pub fn core_dump(&self) -> CoreDump {
        self.core_dump
    }
}
