//! Guest RAM for rust-vmm based VMMs, shared with vhost-user daemons.
//!
//! [`GuestMemoryShm`] is built from shared-memory descriptors, implements the
//! [`vm-memory`](vm_memory) traits, and advertises the very same descriptors to vhost-user device
//! processes.
//!
//! ```
//! use guest_memory_shm::{GuestMemoryShm, GuestRange, RamOptions, ram_around_hole};
//! use vm_memory::{Bytes, GuestAddress};
//!
//! let pci_hole = GuestRange::new(GuestAddress(3 << 30), 1 << 30)?;
//! let memory = GuestMemoryShm::<()>::builder()
//!     .with_ram(RamOptions::new(), ram_around_hole(4 << 30, pci_hole)?)
//!     .build()?;
//!
//! memory.write_obj(0xcafe_u16, GuestAddress(4 << 30)).expect("there is RAM");
//! println!("{memory}"); // two regions on one sealed memfd
//! # Ok::<(), guest_memory_shm::Error>(())
//! ```
//!
//! # Four ideas
//!
//! - A **backing** ([`ShmBacking`]) is the object behind RAM: a descriptor of known size, a sealed
//!   memfd unless asked otherwise ([`RamOptions`]). Daemons get this descriptor.
//! - A **region** ([`GuestRegionShm`]) is one mapping of a part of a backing, placed at a guest
//!   address.
//! - A **memory** ([`GuestMemoryShm`]) is an immutable, sorted set of regions with a constant-time
//!   index. Hotplug makes a new one.
//! - An **address space** ([`AddressSpace`]) publishes memories, through vm-memory's
//!   `GuestMemoryAtomic`, and tells listeners (daemons, the hypervisor) of each change: all of
//!   them, or none.
//!
#![cfg_attr(
    feature = "vhost-user",
    doc = "With the feature `vhost-user` a memory has a [`MemoryTable`], and a [`VhostUserShare`]",
    doc = "keeps a daemon's view equal to it, by itself or as a listener of an address space."
)]
//!
//! # Map of modules
//!
//! In reading order; each uses only those above it.
//!
//! | module | owns |
//! |---|---|
//! | `error` | the one [`Error`] type, which names ranges and seals of the modules below |
//! | `units` | sizes for people |
//! | `layout` | guest ranges: alignment, overlap, holes, offsets in a backing |
//! | `options` | [`RamOptions`]: what RAM is asked for, typed or in QEMU's syntax |
//! | `report` | [`BuildReport`]: what building has to say: options without effect, limits that are near |
//! | `host` | what this machine offers and forbids: NUMA nodes, huge pages, mounts, limits |
//! | `backing` | [`ShmBacking`]: a sized descriptor, its seals, page size, allocation; adoption |
//! | `mapping` | address space, guard pages, alignment, advice: the calls of mmap(2) |
//! | `ram` | the RAM of a region: mapping, backing, and the place in both |
//! | `populate` | [`PopulateOptions`]: pages allocated and mapped ahead, by several threads |
//! | `region` | [`GuestRegionShm`]: RAM placed at a guest address, with its dirty bitmap |
//! | `rom` | [`GuestRom`]: a file that the guest only reads |
//! | `memory` | [`GuestMemoryShm`]: the set of regions, its index and its builder |
//! | `discard` | giving pages back to the host, forbidding it, and collecting balloon reports |
//! | `stats` | [`MemoryStats`], [`Extents`]: what of the RAM exists, where, and by which pages |
//! | [`receive`] | the daemon's end: a memory table that was sent is checked and mapped |
//! | `table` | `MemoryTable`: what a daemon is told, as plain data, and differences of it; `TableView`: how much of it |
//! | `share` | `VhostUserShare`: one daemon's view kept equal to a table, its dirty log, and in-kernel vhost |
//! | `address_space` | [`AddressSpace`]: memory that changes, published to readers and told to listeners |
//! | `kvm` | `KvmSlots`, with the feature `kvm`: KVM's memory slots kept equal to the memory |
//! | `mock` | with the feature `mock`: an in-process daemon and a driver, for tests |
//!
//! # Invariants
//!
//! 1. A [`GuestMemoryShm`] never changes once built.
//! 2. Every region is `MAP_SHARED`, has a descriptor, and lies inside its backing's size when it is
//!    mapped (for ever, if the backing is sealed). Memory that cannot be shared cannot be expressed,
//!    so no daemon is ever sent a private mapping.
//! 3. A created memfd is sealed (`SHRINK|GROW|SEAL`) before it is first mapped. POSIX shm and plain
//!    files cannot be sealed: [`Seals`] says so, nothing pretends.
//! 4. No `&[u8]` or `&mut [u8]` over guest RAM, ever: `VolatileSlice`, or an address.
//! 5. No call of this crate raises SIGBUS or SIGXFSZ in its caller: capacity is checked or
//!    allocated by calls that return an error.
//! 6. Order at creation: size, seal, map, bind to NUMA nodes, advise, populate. Policies and advice
//!    after the first page are silently useless.
//! 7. Failure leaves nothing: no name in `/dev/shm`, no descriptor, no mapping, no page.
//! 8. A change of an [`AddressSpace`] reaches all listeners or none. A listener that could not be put
//!    back, or was away and may be, is stale, and is told everything later.
//! 9. nix and libc types stay out of public signatures; vhost types are only in `share`, `receive`,
//!    `address_space` and `mock`, those of kvm-ioctls only in `kvm`.
//!
//! # Safety model
//!
//! Guest RAM is written by the guest and by other processes at any time, so this crate never makes
//! a reference to it: accesses go through vm-memory's volatile and atomic operations. A mapping
//! inside a sealed file cannot fault. A mapping of an unsealed file (POSIX shm, a file with a path)
//! faults with SIGBUS when somebody truncates the file: hand those descriptors to trusted
//! processes only. Unsafe code is in `mapping` (mmap and its kin), in `region` (the volatile slice
//! that vm-memory wants made from a pointer), in `kvm` (the host addresses that KVM is given, which
//! stay mapped as long as it has them), and in the mock (descriptors received from a socket).
//!
//! # What it does not do
//!
//! It maps no device windows, no private memory, no memory of confidential guests (guest_memfd).
//! KVM is the one hypervisor that it talks to: for another, the address and the size of each region
//! are there, and a [`RegionListener`] is told of them.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "patterns in tests are cut to bytes"
    )
)]

mod error;
mod layout;
mod units;

mod options;
mod report;

mod host;

mod backing;
mod mapping;
mod ram;

mod populate;
mod region;
mod rom;

mod memory;

mod discard;
mod stats;

pub mod receive;

#[cfg(feature = "vhost-user")]
mod share;
#[cfg(feature = "vhost-user")]
mod table;

mod address_space;

#[cfg(feature = "kvm")]
mod kvm;

#[cfg(feature = "mock")]
pub mod mock;

pub use address_space::{
    AddressSpace, Attendance, ChangeReport, ListenerError, ListenerId, ListenerStatus,
    MemoryListener, PerRegion, RegionListener, Transaction,
};
pub use backing::{AdoptPolicy, BackingKind, FileIdentity, SealPolicy, Seals, ShmBacking};
pub use discard::{Collected, DiscardAccumulator, DiscardInhibitor, Discarded};
#[cfg(feature = "kvm")]
pub use error::KvmError;
pub use error::{
    AddressSpaceError, AdoptError, AttachError, DiscardError, Error, FileError, MemTableChange,
    NumaError, Occasion, OptionsError, PopulateError, ReceiveError, RegionError, RegionSpace,
    Result, SlotLimit, StaleListener,
};
#[cfg(feature = "kvm")]
pub use kvm::{DirtyPages, KvmSlot, KvmSlots};
pub use layout::{GuestRange, ram_around_hole};
pub use memory::{GuestMemoryShm, GuestMemoryShmBuilder};
pub use options::{
    Access, Backing, CoreDump, DiscardData, Merge, NodeSet, NumaPolicy, PageSize, Populate,
    RamOptions, Reserve, Sealing,
};
pub use populate::{
    CancelToken, OnFailure, PopulateHandle, PopulateOptions, PopulateProgress, Populated,
};
pub use region::GuestRegionShm;
pub use report::{BuildReport, NotHuge, Note, ReportLine};
pub use rom::GuestRom;
#[cfg(feature = "vhost-user")]
pub use share::{
    DaemonLog, DaemonProcess, FormerDaemon, HangUp, KernelVhost, MemTableSink, ShareReport,
    SinkError, StoppedLog, TimeLimit, VhostUserShare,
};
pub use stats::{Extents, MemoryStats, NodeStats, RegionStats};
#[cfg(feature = "vhost-user")]
pub use table::{MemoryTable, TableChange, TableRegion, TableView, UserAddresses};

/// README's examples compile and run.
#[cfg(all(doctest, feature = "vhost-user"))]
#[doc = include_str!("../README.md")]
struct Readme;
