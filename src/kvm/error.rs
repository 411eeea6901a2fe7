//! Why KVM's memory slots are not what they should be.

use std::fmt;
use std::io;
use std::ops::Range;

use nix::errno::Errno;
use vm_memory::GuestAddress;

use crate::range::{GuestRange, InvalidRange};
use crate::units::HumanSize;

pub(super) type Result<T, E = KvmError> = std::result::Result<T, E>;

/// Why KVM's memory slots are not what they should be. Unless the variant says otherwise, they are
/// what they were.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// A range is not what it should be: a region or a ROM is there, or it is not whole pages.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// The slot numbers that [`KvmSlots`](crate::KvmSlots) may use are none, or KVM has not all of
    /// them.
    #[error(
        "the slot numbers {numbers:?} cannot be had: KVM has 0..{limit} (KVM_CAP_NR_MEMSLOTS), \
         choose at least one of those"
    )]
    #[non_exhaustive]
    NoSuchSlots {
        /// What was asked for.
        numbers: Range<u32>,
        /// How many slots the VM can have.
        limit: u32,
    },

    /// Slot numbers belong to living [`SlotNumbers`](crate::SlotNumbers) of the same VM already.
    #[error(
        "the slot numbers {numbers:?} cannot be had: {held:?} belong to other SlotNumbers or \
         KvmSlots of this VM, as long as these live: share one SlotNumbers \
         (KvmSlots::with_numbers), or choose other numbers"
    )]
    #[non_exhaustive]
    SlotsInUse {
        /// What was asked for.
        numbers: Range<u32>,
        /// What others have that overlap it.
        held: Range<u32>,
    },

    /// All slot numbers are taken.
    #[error(
        "all slot numbers of {numbers:?} are taken: use fewer slots, or make SlotNumbers with \
         more numbers"
    )]
    #[non_exhaustive]
    NoFreeNumber {
        /// The numbers that there are.
        numbers: Range<u32>,
    },

    /// A slot number is none of those that there are.
    #[error("there is no slot number {number}: the numbers are {numbers:?}, choose one of those")]
    #[non_exhaustive]
    NoSuchNumber {
        /// What was asked for.
        number: u32,
        /// The numbers that there are.
        numbers: Range<u32>,
    },

    /// A slot number is taken.
    #[error(
        "the slot number {number} is taken: by a region or a ROM, by a device of the VMM, or by a \
         slot that KVM did not let go; take numbers that must be what they were before others"
    )]
    #[non_exhaustive]
    NumberTaken {
        /// What was asked for.
        number: u32,
    },

    /// A range has a slot or a slot number already.
    #[error(
        "{range} cannot be given slot number {number}: {other} has number {other_number} already; \
         assign numbers before the memory is attached, and each range once"
    )]
    #[non_exhaustive]
    NumberTooLate {
        /// The range.
        range: GuestRange,
        /// The number that it was to have.
        number: u32,
        /// What is there.
        other: GuestRange,
        /// The number of that.
        other_number: u32,
    },

    /// A part of a region has a slot number assigned, and a region has one as a whole.
    #[error(
        "the region {region} is not {assigned}, to which slot number {number} is assigned: let \
         the region be what it was when it had that number, or assign no number"
    )]
    #[non_exhaustive]
    PartlyAssigned {
        /// The range of the region.
        region: GuestRange,
        /// The range with a number.
        assigned: GuestRange,
        /// The number.
        number: u32,
    },

    /// The memory needs more slots than there are; KVM was not asked.
    #[error(
        "{regions} regions and {roms} ROMs need a memory slot each, and {slots} of KVM's {limit} \
         (KVM_CAP_NR_MEMSLOTS) may be used: use fewer and larger regions, or give KvmSlots more \
         slot numbers"
    )]
    #[non_exhaustive]
    OutOfSlots {
        /// Regions that the memory has.
        regions: usize,
        /// ROMs that are there, and that were to be added.
        roms: usize,
        /// How many slots may be used: its own, and numbers that are free.
        slots: u32,
        /// How many slots the VM can have.
        limit: u32,
    },

    /// A region has more pages than a slot can have; KVM was not asked.
    #[error(
        "the region {range} is too large for a memory slot of KVM, which has at most {}: split it \
         into several regions on one backing",
        HumanSize(*.limit)
    )]
    #[non_exhaustive]
    TooLarge {
        /// The range of the region.
        range: GuestRange,
        /// The most that a slot can have, in bytes.
        limit: u64,
    },

    /// KVM offers no read-only slots on this machine.
    #[error(
        "{range} cannot be read-only for the guest: KVM does not offer it here \
         (KVM_CAP_READONLY_MEM)"
    )]
    #[non_exhaustive]
    NoReadOnly {
        /// What was to be read-only.
        range: GuestRange,
    },

    /// A part of a region is read-only for the guest, and a slot is so or not as a whole.
    #[error(
        "the region {region} is partly in {read_only}, which the guest may only read: let regions \
         begin and end where that range does"
    )]
    #[non_exhaustive]
    PartlyReadOnly {
        /// The range of the region.
        region: GuestRange,
        /// The read-only range.
        read_only: GuestRange,
    },

    /// A range was to become read-only while a region in it has a slot already.
    #[error(
        "{range} cannot become read-only for the guest: {region} has a writable memory slot there \
         already; say so before the memory is attached"
    )]
    #[non_exhaustive]
    TooLate {
        /// What was to be read-only.
        range: GuestRange,
        /// What is there.
        region: GuestRange,
    },

    /// No ROM starts at this address.
    #[error("no ROM starts at guest address {:#x}", .start.0)]
    #[non_exhaustive]
    NoSuchRom {
        /// The address that was looked for.
        start: GuestAddress,
    },

    /// KVM refuses a change of a slot (KVM_SET_USER_MEMORY_REGION).
    #[error("KVM refuses to {change} memory slot {slot} ({range}): {}", Meaning(.source))]
    #[non_exhaustive]
    Refused {
        /// The change.
        change: SlotChange,
        /// The number of the slot.
        slot: u32,
        /// The guest addresses of the slot.
        range: GuestRange,
        /// KVM's answer.
        source: io::Error,
    },

    /// The dirty log was asked for while nothing is logged.
    #[error("KVM logs no writes of the guest: start it with KvmSlots::start_dirty_logging")]
    NotLogging,

    /// There is no room to read a dirty log to.
    #[error(
        "no room for the dirty log of {pages} pages: a log needs 256 MiB of address space, which \
         RLIMIT_AS and vm.max_map_count limit, and memory for a bit per page"
    )]
    #[non_exhaustive]
    NoLogBuffer {
        /// How many pages the slot has.
        pages: u64,
        /// The system's answer.
        source: io::Error,
    },

    /// KVM does not give the dirty log of a slot (KVM_GET_DIRTY_LOG). What other slots gave comes
    /// with the next answer, and of this one all pages count as written as soon as KVM gives it.
    #[error(
        "KVM does not give the dirty log of memory slot {slot} ({range}): {}",
        LogMeaning(.source)
    )]
    #[non_exhaustive]
    NoDirtyLog {
        /// The number of the slot.
        slot: u32,
        /// The guest addresses of the slot.
        range: GuestRange,
        /// KVM's answer.
        source: io::Error,
    },
}

/// A change of a memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotChange {
    /// To make it.
    Add,
    /// To take it away.
    Remove,
    /// To begin or end the logging of what the guest writes.
    Log,
}

impl fmt::Display for SlotChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Log => "change the dirty logging of",
        })
    }
}

/// What an answer to KVM_SET_USER_MEMORY_REGION means, and what to do.
struct Meaning<'a>(&'a io::Error);

impl fmt::Display for Meaning<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match errno(self.0) {
            Errno::EEXIST => {
                "another slot of the VM overlaps it, of another KvmSlots or of the VMM itself: \
                 remove that one, or place the RAM elsewhere"
            }
            Errno::EINVAL => {
                "the guest address is past what this machine's CPU can address, or another part \
                 of the VMM uses this slot number: place the RAM lower, and have all slots take \
                 their numbers from one SlotNumbers"
            }
            Errno::ENOMEM | Errno::ENOSPC => {
                "the kernel has no memory left for what it notes per page, or too many pages are \
                 in slots already: free memory on the host, or use fewer or smaller regions"
            }
            Errno::EIO => {
                "the VM belongs to another process (fork), or KVM has given it up: use it where \
                 it was made, or start it anew"
            }
            _ => "see the cause",
        })
    }
}

/// What an answer to KVM_GET_DIRTY_LOG means, and what to do.
struct LogMeaning<'a>(&'a io::Error);

impl fmt::Display for LogMeaning<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match errno(self.0) {
            Errno::ENXIO => {
                "the VM has a dirty ring (KVM_CAP_DIRTY_LOG_RING) in its place: harvest that"
            }
            Errno::ENOENT => {
                "the slot is not logged any more, another part of the VMM has changed it: have \
                 all slots take their numbers from one SlotNumbers; to go on, stop the log, \
                 start it again, and count all pages as written"
            }
            Errno::EFAULT => {
                "the slot is larger than this region, another part of the VMM has put its own \
                 there: have all slots take their numbers from one SlotNumbers"
            }
            _ => return Meaning(self.0).fmt(f),
        })
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}
