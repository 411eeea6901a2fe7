//! Guest RAM for rust-vmm based VMMs, shared with vhost-user daemons.
//!
//! [`GuestMemoryShm`] is built from shared-memory descriptors, implements the
//! [`vm-memory`](vm_memory) traits, and advertises the very same descriptors to vhost-user device
//! processes.
//!
//! ```
//! use guest_memory_shm::{GuestMemoryShm, GuestRange, RamOptions, ram_around_hole};
//! use vm_memory::GuestAddress;
//!
//! let pci_hole = GuestRange::new(GuestAddress(3 << 30), 1 << 30)?;
//! let memory = GuestMemoryShm::<()>::builder()
//!     .add_ram(RamOptions::new(), ram_around_hole(4 << 30, pci_hole)?)
//!     .build()?;
//!
//! memory.write_obj(0xcafe_u16, GuestAddress(4 << 30)).expect("there is RAM");
//! println!("{memory}"); // two regions on one sealed memfd
//! # Ok::<(), guest_memory_shm::Error>(())
//! ```
//!
//! # Four ideas
//!
//! - A **backing** ([`ShmBacking`]) is the object that backs RAM: a descriptor of known size, a
//!   sealed memfd unless asked otherwise ([`RamOptions`]). Daemons get this descriptor.
//! - A **region** ([`GuestRegionShm`]) is one mapping of a part of a backing, placed at a guest
//!   address.
//! - A **memory** ([`GuestMemoryShm`]) is an immutable, sorted set of regions with a constant-time
//!   index. Hotplug makes a new one.
//! - An **address space** ([`AddressSpace`]) publishes memories to readers, and tells listeners
//!   (daemons, the hypervisor) of each change: all of them, or none.
//!
#![cfg_attr(
    feature = "vhost-user",
    doc = "With the feature `vhost-user` a memory has a [`MemoryTable`], and a [`VhostUserShare`]",
    doc = "keeps a daemon's view equal to it, by itself or as a listener of an address space."
)]
//!
//! # Map of modules
//!
//! In reading order; each uses only those above it, and has its error beside the code that raises
//! it. A test holds the `use` lines of all files against this table.
//!
//! | module | owns |
//! |---|---|
//! | `units` | sizes and tables for people |
//! | `panics`, `logs` | code of others that panics, the logger included, as an answer |
//! | `range` | [`GuestRange`], sets of ranges, and the walk over regions held and wanted |
//! | `host` | what this machine offers and forbids; the only reader of /proc and /sys |
//! | `shortage` | [`Shortage`]: what is short, by which limit, and what to do; an error and a note |
//! | `options` | [`RamOptions`]: the RAM that is asked for, typed or in QEMU's syntax |
//! | `report` | [`BuildReport`]: what building reports: options without effect, limits that are near |
//! | `backing` | [`ShmBacking`]: a sized descriptor; requested, created, adopted, with the options of RAM on it |
//! | `mapping` | address space, guard pages, alignment, advice: the calls of mmap(2) |
//! | `ram` | the RAM of a region: mapping, backing, and the place in both |
//! | `pool` | one pool of threads that tells how far it is, and can be cancelled |
//! | `populate` | [`PopulateOptions`]: pages allocated and mapped ahead, by several threads |
//! | `region` | [`GuestRegionShm`]: RAM placed at a guest address, with its dirty bitmap |
//! | `rom` | [`GuestRom`]: a file that the guest only reads |
//! | `memory` | [`GuestMemoryShm`]: the set of regions, its index and its builder |
//! | `listener` | [`MemoryListener`]: what is told of the memory, as a whole or by [region](RegionListener) |
//! | `discard` | giving pages back to the host, forbidding it, and collecting balloon reports |
//! | `stats` | [`MemoryStats`], [`Extents`]: which RAM is allocated, where, and by which pages |
//! | `vhost_user::table` | `MemoryTable`: what a daemon is told, as plain data; `TableView`: how much of it |
//! | [`vhost_user::receive`] | the daemon's end: checks and maps a memory table that was sent |
//! | `vhost_user::wire` | messages about memory, on a socket that is never waited on; `DaemonFailure` |
//! | `vhost_user::share` | `VhostUserShare`: one daemon's view kept equal to a table, and its dirty log |
//! | `vhost_user::session` | `VhostUserSession`: all that is agreed with one daemon, across reconnections |
//! | `vhost_user::kernel` | `KernelVhost`: the same for vhost inside the kernel |
//! | `address_space` | [`AddressSpace`]: memory that changes, published to readers and told to listeners |
//! | `kvm` | `KvmSlots`, with the feature `kvm`: the memory slots of KVM, or of any `HypervisorVm`, kept equal to the memory; `SlotNumbers` |
//! | `error` | the root [`Error`], a sum of the errors of the modules above |
//! | `driver` | with the feature `driver`: a driver's end of a virtqueue, for tests |
//! | `mock` | with the feature `mock`: an in-process daemon and a driver, for tests |
//!
//! # Invariants
//!
//! Each with its exceptions.
//!
//! 1. A [`GuestMemoryShm`] never changes once built, and only its [`AddressSpace`] publishes
//!    another: readers get a [`PublishedMemory`], which they cannot replace. *Except* through
//!    [`AddressSpace::atomic`], a mirror in vm-memory's type: what other code publishes there is
//!    seen by the users of the mirror, and is an error at the next change.
//! 2. Every region is `MAP_SHARED`, has a descriptor, and lies inside its backing when it is
//!    mapped. Memory that cannot be shared cannot be expressed, so no daemon is ever sent a
//!    private mapping. A region *stays* inside a sealed backing. POSIX shm, plain files, memfds
//!    made with [`Sealing::Unsealed`] and descriptors adopted without seals can be truncated by
//!    any process that has them: [`Seals`] tells which.
//! 3. A created memfd is sealed (`SHRINK|GROW|SEAL`) before it is first mapped. *Except* with
//!    [`Sealing::Unsealed`]; and a daemon's dirty log is sealed against shrinking only, because it
//!    grows with the memory.
//! 4. No `&[u8]` or `&mut [u8]` over guest RAM, ever: `VolatileSlice`, or an address.
//! 5. What a call can know, it reports as an error: capacity is checked or allocated before RAM is
//!    promised, so no call of this crate raises SIGBUS or SIGXFSZ in its caller, and populating is
//!    refused before the kernel would end the process for it. *Except* with
//!    [`OnShortage::TryAnyway`], and where others take the memory in between: populating looks
//!    again while it runs, as a best effort. RAM that is lazy promises nothing: touching a page
//!    that is not there can still fail, by a signal.
//! 6. Order at creation: size, seal, map, bind to NUMA nodes, advise, populate. Policies and
//!    advice after the first page are silently useless. *Except* that an adopted file may have
//!    pages already: they are moved to the nodes, or it is an error; advice comes too late for
//!    them.
//! 7. Failure leaves nothing: no name in `/dev/shm`, no descriptor, no mapping, no page. *Except*
//!    the pages of a failed populate with [`OnFailure::Keep`], and those that were touched or
//!    cannot be told from older ones; the name of a POSIX shm object if the process is killed
//!    between shm_open(3) and shm_unlink(3), or the kernel refuses the latter; what the kernel or
//!    the hypervisor refuses to unmap; the NUMA policy of an object that was there before. Pages
//!    that others allocated stay.
//! 8. A change of an [`AddressSpace`] reaches all listeners that are there, or none, also when a
//!    listener, a callback or the logger panics. One that is away, and was not attached as
//!    [required](AddressSpace::attach_required), is left out and named ([`ChangeReport::stale`]);
//!    so is one that could not be put back. They are told everything when they are back.
//! 9. No wait for another process without a deadline. A change has one for all messages and all
//!    daemons, and undoing it has another. *Except* for what a listener of the VMM's own does, or
//!    [`AddressSpace::with_listener`] is given to do; and a session that connects anew in a change
//!    has one to connect and agree, one for the memory, and one for its rings.
//! 10. No page that a daemon noted in its dirty log is missing from what is harvested until the
//!     log is stopped, whatever becomes of the daemon or its connection. Too many pages is
//!     allowed, and said.
//! 11. nix and libc types stay out of public signatures; vhost types are only in `share`,
//!     `session`, `receive`, `address_space` and `mock`, those of kvm-ioctls only in `kvm`,
//!     vmm-sys-util's only in `session`, `driver` and `mock`.
//!
//! # Safety model
//!
//! Guest RAM is written by the guest and by other processes at any time, so this crate never makes
//! a reference to it: accesses go through vm-memory's volatile and atomic operations. A mapping
//! inside a sealed file cannot fault. A mapping of an unsealed file (POSIX shm, a file with a
//! path) faults with SIGBUS when another process truncates the file: hand those descriptors to
//! trusted processes only. Unsafe code is in `host` (cachestat(2), which counts pages of files),
//! in `mapping` (mmap and its kin, and the words with a guard that dirty logs are read into), in
//! `region` (the volatile slice that vm-memory wants made from a pointer), in `kvm` (the host
//! addresses that a hypervisor is given, which stay mapped as long as it has them; the calls that
//! read and clear dirty logs; `HypervisorVm`, whose implementations promise the same), in `wire`
//! (the socket of vhost's `Frontend` and eventfds, borrowed by their numbers, and descriptors
//! received from a socket),
//! and in the mock (descriptors received from a socket).
//!
//! # What it does not do
//!
//! It maps no device windows, no private memory, no memory of confidential guests (guest_memfd).
//! KVM is the one hypervisor that it talks to by itself: for another, implement `HypervisorVm`, or
//! a [`RegionListener`].

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "patterns in tests are cut to bytes"
    )
)]

#[cfg(not(target_os = "linux"))]
compile_error!(
    "guest-memory-shm needs Linux: sealed memfds, MADV_REMOVE and huge pages of shared memory \
     exist there only"
);

mod logs;
mod panics;
mod units;

mod range;

mod error;

mod options;
mod report;
mod shortage;

mod host;

mod backing;
mod mapping;
mod ram;

mod pool;
mod populate;
mod region;
mod rom;

mod memory;

mod listener;

mod discard;
mod stats;

mod vhost_user;
pub use vhost_user::receive;

mod address_space;

#[cfg(feature = "kvm")]
mod kvm;

#[cfg(feature = "driver")]
pub mod driver;
#[cfg(feature = "mock")]
pub mod mock;

pub use vm_memory;

pub use address_space::{
    AddressSpace, AddressSpaceError, AttachError, ChangeReport, ListenerId, ListenerStatus,
    PublishedMemory, Transaction,
};
pub use backing::{AdoptPolicy, BackingKind, FileIdentity, Seals, ShmBacking};
pub use discard::{DiscardAccumulator, DiscardInhibitor, Discarded};
pub use error::{
    AdoptError, BackingError, DiscardError, Error, FileError, MapError, MemoryError, OptionsError,
    PopulateError,
};
pub use host::NodeSet;
pub use host::transparent::ThpObstacle;
#[cfg(feature = "kvm")]
pub use kvm::{
    DirtyPages, HypervisorVm, KvmError, KvmSlot, KvmSlots, LogBuffer, SlotChange, SlotFlags,
    SlotMapping, SlotNumber, SlotNumbers,
};
pub use listener::{
    Exchange, ListenerError, MemoryListener, RegionAdapter, RegionListener, WaitFor,
};
pub use memory::{GuestMemoryShm, GuestMemoryShmBuilder};
pub use options::{
    Access, BackingSource, CoreDump, DiscardData, NumaPolicy, OnShortage, PageSize, Populate,
    RamOptions, Reserve, Sealing,
};
pub use pool::{CancelToken, Progress};
pub use populate::{OnFailure, PopulateHandle, PopulateOptions, Populated};
pub use range::{GuestRange, InvalidRange, RangePart, ram_around_hole};
pub use region::GuestRegionShm;
pub use report::{BuildNote, BuildReport};
pub use rom::GuestRom;
pub use shortage::{ResourceLimit, Shortage};
pub use stats::{Extents, MemoryStats, RegionStats, StatsError};
#[cfg(feature = "vhost-user")]
pub use vhost_user::kernel::KernelVhost;
#[cfg(feature = "vhost-user")]
pub use vhost_user::session::{
    SessionError, SessionMessage, SessionOptions, SessionRing, VhostUserSession,
};
#[cfg(feature = "vhost-user")]
pub use vhost_user::share::{FormerDaemon, ShareError, StoppedLog, VhostUserShare};
#[cfg(feature = "vhost-user")]
pub use vhost_user::table::{MemoryTable, SlotLimit, TableError, TableRegion, TableView};
#[cfg(feature = "vhost-user")]
pub use vhost_user::wire::{DaemonFailure, DaemonRequest, DaemonSocket};

/// Pages for those who begin; with the features `kvm` and `mock`, whose types they name.
#[cfg(all(any(doc, doctest), feature = "kvm", feature = "mock"))]
pub mod docs {
    #[allow(unused_imports, reason = "names that the pages link to")]
    use crate::*;

    #[doc = include_str!("../docs/guide.md")]
    pub mod guide {}

    #[doc = include_str!("../docs/porting.md")]
    pub mod porting {}
}

/// README's examples compile and run.
#[cfg(all(doctest, feature = "vhost-user"))]
#[doc = include_str!("../README.md")]
struct Readme;
