//! One memory slot of KVM.
#![expect(
    unsafe_code,
    reason = "KVM is given host addresses, which must stay mapped"
)]

use std::fmt;
use std::io;
use std::sync::{Arc, Weak};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::error::KvmError;
use crate::layout::{GuestRange, base_page_size};
use crate::logs;
use crate::mapping::{Mapping, to_usize};
use crate::ram::Ram;
use crate::rom::GuestRom;

/// A memory slot of KVM: a range of guest addresses that KVM maps to RAM or to a ROM.
///
/// [`KvmSlots::slots`](crate::KvmSlots::slots) shows those that there are.
pub struct KvmSlot {
    vm: Arc<VmFd>,
    number: u32,
    range: GuestRange,
    read_only: bool,
    logging: bool,
    /// Pages that KVM has given and that were not passed on; empty if there are none.
    pub(super) pending: Vec<u64>,
    /// What keeps the host addresses mapped.
    memory: Memory,
    /// Whether KVM has the slot, and so the host addresses.
    in_kvm: bool,
}

/// What is behind a slot. It stays mapped as long as this lives.
#[derive(Clone)]
pub(super) enum Memory {
    Ram(Ram),
    Rom(Arc<GuestRom>),
}

/// What the guest may do in a slot, and what is noted of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags {
    pub(super) read_only: bool,
    pub(super) logging: bool,
}

impl KvmSlot {
    /// Gives KVM the memory as slot `number`, which must be free.
    pub(super) fn new(
        vm: &Arc<VmFd>,
        number: u32,
        memory: Memory,
        flags: Flags,
    ) -> Result<Self, KvmError> {
        let mut slot = Self {
            vm: vm.clone(),
            number,
            range: memory.range(),
            read_only: flags.read_only,
            // Writes to what cannot be written are not worth a bitmap.
            logging: flags.logging && !flags.read_only,
            pending: Vec::new(),
            memory,
            in_kvm: false,
        };
        match slot.tell(slot.range.size(), slot.logging) {
            Ok(()) => {
                slot.in_kvm = true;
                Ok(slot)
            }
            Err(source) => Err(slot.refused("add", source)),
        }
    }

    /// The number of the slot.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The guest addresses of the slot.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// Whether the guest may only read it (`KVM_MEM_READONLY`): its writes exit as MMIO.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether KVM logs the guest's writes (`KVM_MEM_LOG_DIRTY_PAGES`).
    pub fn is_logging(&self) -> bool {
        self.logging
    }

    /// The ROM, if it is one.
    pub fn rom(&self) -> Option<&Arc<GuestRom>> {
        match &self.memory {
            Memory::Ram(_) => None,
            Memory::Rom(rom) => Some(rom),
        }
    }

    /// Whether the slot is this RAM, at the same place.
    pub(super) fn is(&self, ram: &Ram) -> bool {
        match &self.memory {
            Memory::Ram(own) => own.range == ram.range && Arc::ptr_eq(&own.mapping, &ram.mapping),
            Memory::Rom(_) => false,
        }
    }

    /// What the RAM of the slot is mapped by.
    pub(super) fn mapping(&self) -> Option<Weak<Mapping>> {
        match &self.memory {
            Memory::Ram(ram) => Some(Arc::downgrade(&ram.mapping)),
            Memory::Rom(_) => None,
        }
    }

    /// Has all pages be pending.
    pub(super) fn mark_all(&mut self) {
        let pages = self.range.size() / base_page_size();
        self.pending = vec![u64::MAX; to_usize(pages.div_ceil(64))];
        if let (Some(last), partly @ 1..) = (self.pending.last_mut(), pages % 64) {
            *last = u64::MAX >> (64 - partly);
        }
    }

    /// Takes the slot from KVM. A slot that KVM does not let go is there as before.
    ///
    /// The slot must be dropped afterwards.
    pub(super) fn remove(&mut self) -> Result<(), KvmError> {
        if self.in_kvm {
            self.tell(0, self.logging)
                .map_err(|source| self.refused("remove", source))?;
            self.in_kvm = false;
        }
        Ok(())
    }

    /// Makes KVM log the guest's writes, or no longer. What is logged and was not harvested is
    /// lost when it ends.
    pub(super) fn log(&mut self, logging: bool) -> Result<(), KvmError> {
        if self.read_only || self.logging == logging {
            return Ok(());
        }
        if let Err(source) = self.tell(self.range.size(), logging) {
            return Err(self.refused("change the dirty logging of", source));
        }
        self.logging = logging;
        self.pending.clear();
        Ok(())
    }

    /// Asks KVM which pages were written since it was last asked, and adds them to what is pending.
    pub(super) fn harvest(&mut self) -> Result<(), KvmError> {
        if !self.logging {
            return Ok(());
        }
        let size = to_usize(self.range.size());
        let answer = self.vm.get_dirty_log(self.number, size);
        let words = answer.map_err(|error| KvmError::NoDirtyLog {
            slot: self.number,
            range: self.range,
            source: error.into(),
        })?;
        if self.pending.is_empty() {
            self.pending = words;
        } else {
            for (pending, new) in self.pending.iter_mut().zip(words) {
                *pending |= new;
            }
        }
        Ok(())
    }

    /// KVM_SET_USER_MEMORY_REGION: creates the slot, changes its flags, or removes it (size 0).
    fn tell(&self, size: u64, logging: bool) -> io::Result<()> {
        let mut flags = 0;
        if self.read_only {
            flags |= KVM_MEM_READONLY;
        }
        if logging {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: self.number,
            flags,
            guest_phys_addr: self.range.start_addr().0,
            memory_size: size,
            userspace_addr: self.memory.host_addr(),
        };
        // SAFETY: `size` is 0, or that of the mapping at `userspace_addr`, which `self.memory`
        // keeps. That is dropped with the slot only, and dropping the slot takes it from KVM first,
        // or leaves the mapping there for ever. The mapping is one of guest RAM, which this crate
        // makes no reference to, so that the guest may write it at any time; or of a ROM, which is
        // mapped for reading only, and whose slot is read-only.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }

    fn refused(&self, doing: &'static str, source: io::Error) -> KvmError {
        KvmError::Refused {
            doing,
            slot: self.number,
            range: self.range,
            source,
        }
    }
}

impl Drop for KvmSlot {
    /// KVM lets go before the memory is unmapped. Where it refuses to, the memory stays mapped for
    /// ever: the guest must not reach what the host puts there next.
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            logs::error!("its memory stays mapped: {error}");
            std::mem::forget(self.memory.clone());
        }
    }
}

impl fmt::Debug for KvmSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmSlot")
            .field("number", &self.number)
            .field("range", &format_args!("{}", self.range))
            .field("read_only", &self.read_only)
            .field("logging", &self.logging)
            .finish_non_exhaustive()
    }
}

impl Memory {
    pub(super) fn range(&self) -> GuestRange {
        match self {
            Self::Ram(ram) => ram.range,
            Self::Rom(rom) => rom.range(),
        }
    }

    fn host_addr(&self) -> u64 {
        let start = match self {
            Self::Ram(ram) => ram.mapping.host_addr().as_ptr().cast_const(),
            Self::Rom(rom) => rom.as_ptr(),
        };
        start.addr() as u64
    }
}
