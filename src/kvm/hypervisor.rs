//! What the slots ask of a hypervisor.
#![expect(
    unsafe_code,
    reason = "implementations and callers make promises about mapped memory"
)]

use std::fmt;
use std::io;
use std::ptr::NonNull;

use bitflags::bitflags;

use super::log_buffer::LogBuffer;
use crate::mapping::HostAddr;
use crate::range::GuestRange;

/// A virtual machine with memory slots, as [`KvmSlots`](crate::KvmSlots) uses it: four calls.
///
/// kvm-ioctls' [`VmFd`](kvm_ioctls::VmFd) is one. A VMM with a hypervisor layer of its own
/// implements this for its VM, and every change of a slot goes through that layer. Errors are
/// passed on; those with an error number of KVM are explained
/// ([`KvmError::Refused`](crate::KvmError::Refused)).
///
/// | call | for KVM |
/// |---|---|
/// | [`set_slot`](Self::set_slot) | KVM_SET_USER_MEMORY_REGION |
/// | [`remove_slot`](Self::remove_slot) | KVM_SET_USER_MEMORY_REGION with size 0 |
/// | [`dirty_log`](Self::dirty_log) | KVM_GET_DIRTY_LOG |
/// | [`clear_dirty_log`](Self::clear_dirty_log) | KVM_CLEAR_DIRTY_LOG |
///
/// # Safety
///
/// Guest RAM is unmapped on the word of an implementation. It guarantees:
///
/// - When [`remove_slot`](Self::remove_slot) returns `Ok`, the guest reaches the host addresses of
///   that slot no more. The same holds when [`set_slot`](Self::set_slot) fails for a number that
///   had no slot.
/// - A slot gives the guest the bytes of [`SlotMapping::range`] from [`SlotMapping::host_addr`] on
///   and no others, and a slot with [`SlotFlags::READ_ONLY`] only to read.
/// - [`dirty_log`](Self::dirty_log) writes to the words of the buffer. A hypervisor that may write
///   past them, as KVM may, writes at most 256 MiB from the first word on, which fault.
///
/// ```
/// use std::io;
/// use std::sync::Arc;
///
/// use guest_memory_shm::{
///     GuestMemoryShm, HypervisorVm, KvmSlots, LogBuffer, MemoryListener, SlotFlags, SlotMapping,
/// };
/// use vm_memory::GuestAddress;
///
/// /// The VMM's own trait, which several hypervisors implement.
/// trait Vm: Send + Sync {
///     /// # Safety
///     ///
///     /// The memory stays mapped until the slot is removed.
///     unsafe fn map(&self, slot: u32, at: (u64, u64), to: *mut u8, log: bool) -> io::Result<()>;
///     fn unmap(&self, slot: u32) -> io::Result<()>;
///     fn log(&self, slot: u32, pages: usize) -> io::Result<Vec<u64>>;
/// }
///
/// struct ThroughLayer(Box<dyn Vm>);
///
/// // SAFETY: the layer maps what it is told and nothing else, and has forgotten it when `unmap`
/// // says so; its logs are copied by the word.
/// unsafe impl HypervisorVm for ThroughLayer {
///     unsafe fn set_slot(&self, slot: &SlotMapping) -> io::Result<()> {
///         if slot.flags().contains(SlotFlags::READ_ONLY) {
///             return Err(io::ErrorKind::Unsupported.into());
///         }
///         let (start, len) = (slot.range().start_addr().0, slot.range().size());
///         let log = slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES);
///         // SAFETY: the caller keeps the memory mapped until the slot is removed.
///         unsafe { self.0.map(slot.number(), (start, len), slot.host_addr(), log) }
///     }
///     fn remove_slot(&self, slot: &SlotMapping) -> io::Result<()> {
///         self.0.unmap(slot.number())
///     }
///     fn dirty_log(&self, slot: &SlotMapping, log: &mut LogBuffer) -> io::Result<()> {
///         let words = self.0.log(slot.number(), (slot.range().size() / 4096) as usize)?;
///         log.words_mut().iter_mut().zip(words).for_each(|(to, word)| *to = word);
///         Ok(())
///     }
///     fn clear_dirty_log(&self, _: &SlotMapping, _: u64, _: &[u64]) -> io::Result<()> {
///         Err(io::ErrorKind::Unsupported.into())
///     }
///     fn max_slots(&self) -> u32 {
///         509
///     }
/// }
///
/// # struct Nothing;
/// # impl Vm for Nothing {
/// #     unsafe fn map(&self, _: u32, _: (u64, u64), _: *mut u8, _: bool) -> io::Result<()> {
/// #         Ok(())
/// #     }
/// #     fn unmap(&self, _: u32) -> io::Result<()> { Ok(()) }
/// #     fn log(&self, _: u32, _: usize) -> io::Result<Vec<u64>> { Ok(vec![2]) }
/// # }
/// # let layer = Nothing;
/// let mut slots = KvmSlots::new(Arc::new(ThroughLayer(Box::new(layer))))?;
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 16)])?;
/// slots.update(&memory)?;
/// slots.start_dirty_logging()?;
/// assert_eq!(slots.dirty_log()?[0].count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub unsafe trait HypervisorVm: Send + Sync + 'static {
    /// Makes a slot, or changes the [flags](SlotMapping::flags) of one that is otherwise the same.
    ///
    /// A slot with [`SlotFlags::LOG_DIRTY_PAGES`] has nothing in its log at first.
    ///
    /// # Errors
    ///
    /// The hypervisor's answer. The slot is what it was then.
    ///
    /// # Safety
    ///
    /// The bytes of [`SlotMapping::range`] from [`SlotMapping::host_addr`] on are mapped until
    /// [`remove_slot`](Self::remove_slot) has returned `Ok` for this number. They can be read, and
    /// without [`SlotFlags::READ_ONLY`] written, by the guest at any time: this process has no
    /// reference to them.
    unsafe fn set_slot(&self, slot: &SlotMapping) -> io::Result<()>;

    /// Removes a slot. The guest reaches its memory no more when this returns.
    ///
    /// # Errors
    ///
    /// The hypervisor's answer. The memory of the slot stays mapped then, and its number taken.
    fn remove_slot(&self, slot: &SlotMapping) -> io::Result<()>;

    /// Writes to the buffer, which has a bit for each page, which pages the guest wrote.
    ///
    /// KVM clears the log by that, unless `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is enabled.
    ///
    /// # Errors
    ///
    /// The hypervisor's answer. All pages of the slot count as written then, because the log may
    /// have been cleared.
    fn dirty_log(&self, slot: &SlotMapping, log: &mut LogBuffer) -> io::Result<()>;

    /// Clears the log of the pages whose bit is set in `bits`, the lowest bit of the first word
    /// being that of the page `first_page`, and has their next write noted.
    ///
    /// `first_page` is a multiple of 64. The words may reach as far as the last one of the slot's
    /// log; bits past its last page say nothing.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) if these are no words of the slot's log,
    /// otherwise the hypervisor's answer.
    fn clear_dirty_log(&self, slot: &SlotMapping, first_page: u64, bits: &[u64])
    -> io::Result<()>;

    /// How many slots the VM can have (KVM_CAP_NR_MEMSLOTS): their numbers are below that.
    ///
    /// Default: 32, which each KVM has.
    fn max_slots(&self) -> u32 {
        32
    }

    /// Whether it has slots that the guest only reads (KVM_CAP_READONLY_MEM).
    ///
    /// Default: no. Read-only regions and ROMs are refused then.
    fn has_read_only(&self) -> bool {
        false
    }
}

bitflags! {
    /// What a slot is like beyond its place.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct SlotFlags: u32 {
        /// The guest only reads it; its writes exit to the VMM as MMIO.
        #[doc(alias = "KVM_MEM_READONLY")]
        const READ_ONLY = kvm_bindings::KVM_MEM_READONLY;
        /// The guest's writes are logged.
        #[doc(alias = "KVM_MEM_LOG_DIRTY_PAGES")]
        const LOG_DIRTY_PAGES = kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
    }
}

/// A slot as a hypervisor is told of it: a number, guest addresses, and the memory there.
#[doc(alias = "kvm_userspace_memory_region")]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SlotMapping {
    number: u32,
    range: GuestRange,
    host: HostAddr,
    flags: SlotFlags,
}

impl SlotMapping {
    /// Slot `number`: the memory at `host_addr` as guest addresses `range`.
    pub fn new(number: u32, range: GuestRange, host_addr: NonNull<u8>, flags: SlotFlags) -> Self {
        Self::at(number, range, HostAddr::new(host_addr), flags)
    }

    pub(super) fn at(number: u32, range: GuestRange, host: HostAddr, flags: SlotFlags) -> Self {
        Self {
            number,
            range,
            host,
            flags,
        }
    }

    /// The number of the slot.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The guest addresses, as many as there are bytes of memory.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// Where the memory is mapped in this process.
    pub fn host_addr(&self) -> *mut u8 {
        self.host.as_ptr()
    }

    /// What it is like.
    pub fn flags(&self) -> SlotFlags {
        self.flags
    }
}

impl fmt::Debug for SlotMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotMapping")
            .field("number", &self.number)
            .field("range", &format_args!("{}", self.range))
            .field("host_addr", &self.host_addr())
            .field("flags", &self.flags)
            .finish()
    }
}
