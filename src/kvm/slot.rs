//! One memory slot.
#![expect(
    unsafe_code,
    reason = "a hypervisor is given host addresses, which must stay mapped"
)]

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Weak};

use super::error::{KvmError, Result, SlotChange};
use super::hypervisor::{HypervisorVm, SlotFlags, SlotMapping};
use super::log_buffer::LogBuffer;
use super::numbers::SlotNumber;
use crate::host::base_page_size;
use crate::logs;
use crate::mapping::{HostAddr, Mapping, to_usize};
use crate::panics::caught;
use crate::ram::Ram;
use crate::range::{GuestRange, Placed};
use crate::rom::GuestRom;

/// A memory slot of KVM: a range of guest addresses that KVM maps to RAM or to a ROM.
///
/// [`KvmSlots::slots`](crate::KvmSlots::slots) shows those that there are.
pub struct KvmSlot {
    vm: Arc<dyn HypervisorVm>,
    number: u32,
    /// What keeps the number from others.
    taken: Option<SlotNumber>,
    range: GuestRange,
    read_only: bool,
    logging: bool,
    /// Pages that KVM has given and that were not passed on; empty if there are none.
    pub(super) pending: Vec<u64>,
    /// Whether a log was asked for and did not come, so that what was in it may be lost.
    unanswered: bool,
    /// What keeps the host addresses mapped.
    memory: Memory,
    /// Whether KVM has the slot, and so the host addresses, or may have it.
    in_kvm: bool,
}

/// The memory of a slot. It stays mapped as long as this lives.
#[derive(Clone)]
pub(super) enum Memory {
    Ram(Ram),
    Rom(Arc<GuestRom>),
}

impl KvmSlot {
    /// The memory as this slot, which KVM has not yet.
    pub(super) fn new(
        vm: &Arc<dyn HypervisorVm>,
        number: SlotNumber,
        memory: Memory,
        read_only: bool,
    ) -> Self {
        Self {
            vm: vm.clone(),
            number: number.number(),
            taken: Some(number),
            range: memory.range(),
            read_only,
            logging: false,
            pending: Vec::new(),
            unanswered: false,
            memory,
            in_kvm: false,
        }
    }

    /// Gives it to KVM, which logs the guest's writes or not.
    pub(super) fn make(&mut self, logging: bool) -> Result<()> {
        // Writes to what cannot be written are not worth a bitmap.
        let logging = logging && !self.read_only;
        // Until the answer is known: it may be a panic.
        self.in_kvm = true;
        if let Err(source) = self.set(logging) {
            self.in_kvm = false;
            return Err(self.refused(SlotChange::Add, source));
        }
        self.logging = logging;
        Ok(())
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

    /// The slot as the hypervisor was told of it.
    ///
    /// For calls past the slots, of which they know nothing: pages of a log that is asked for by
    /// this are missing from the next harvest, a slot that is removed by this is not put back.
    pub fn mapping(&self) -> SlotMapping {
        self.with_log(self.logging)
    }

    fn with_log(&self, logging: bool) -> SlotMapping {
        let mut flags = SlotFlags::empty();
        flags.set(SlotFlags::READ_ONLY, self.read_only);
        flags.set(SlotFlags::LOG_DIRTY_PAGES, logging);
        SlotMapping::at(self.number, self.range, self.memory.host_addr(), flags)
    }

    /// Whether the slot is this RAM, at the same place.
    pub(super) fn is(&self, ram: &Ram) -> bool {
        match &self.memory {
            Memory::Ram(own) => own.range == ram.range && Arc::ptr_eq(&own.mapping, &ram.mapping),
            Memory::Rom(_) => false,
        }
    }

    /// What the RAM of the slot is mapped by.
    pub(super) fn ram(&self) -> Option<Weak<Mapping>> {
        match &self.memory {
            Memory::Ram(ram) => Some(Arc::downgrade(&ram.mapping)),
            Memory::Rom(_) => None,
        }
    }

    pub(super) fn pages(&self) -> u64 {
        self.range.size() / base_page_size()
    }

    /// Marks all pages pending.
    pub(super) fn mark_all(&mut self) {
        self.pending = vec![u64::MAX; to_usize(self.pages().div_ceil(64))];
        self.cut();
    }

    /// Forgets pending pages past the last.
    fn cut(&mut self) {
        let partly = self.pages() % 64;
        if let (Some(last), 1..) = (self.pending.last_mut(), partly) {
            *last &= u64::MAX >> (64 - partly);
        }
    }

    /// Takes the slot from KVM. A slot that KVM does not let go is there as before.
    ///
    /// The slot must be dropped afterwards.
    pub(super) fn remove(&mut self) -> Result<()> {
        if self.in_kvm {
            let answer = self.vm.remove_slot(&self.mapping());
            answer.map_err(|source| self.refused(SlotChange::Remove, source))?;
            self.in_kvm = false;
        }
        Ok(())
    }

    /// The number, of a slot that KVM does not have (any more).
    pub(super) fn take_number(&mut self) -> Option<SlotNumber> {
        self.taken.take_if(|_| !self.in_kvm)
    }

    /// Makes KVM log the guest's writes, or no longer. What is logged and was not harvested is
    /// lost when it ends.
    pub(super) fn log(&mut self, logging: bool) -> Result<()> {
        if self.read_only || self.logging == logging {
            return Ok(());
        }
        if let Err(source) = self.set(logging) {
            return Err(self.refused(SlotChange::Log, source));
        }
        self.logging = logging;
        self.pending.clear();
        self.unanswered = false;
        Ok(())
    }

    /// Asks KVM which pages were written since it was last asked, and adds them to those pending.
    ///
    /// KVM clears its log before it gives it. So where no answer came, all pages count as written
    /// as soon as one comes.
    pub(super) fn harvest(&mut self, log: &mut LogBuffer) -> Result<()> {
        if !self.logging {
            return Ok(());
        }
        log.begin(self.pages())?;
        let missed = std::mem::replace(&mut self.unanswered, true);
        let answer = self.vm.dirty_log(&self.mapping(), log);
        answer.map_err(|source| KvmError::NoDirtyLog {
            slot: self.number,
            range: self.range,
            source,
        })?;
        self.unanswered = false;
        let words = log.words();
        // With another buffer in the place of ours nothing is known of the pages.
        if missed || words.len() != to_usize(self.pages().div_ceil(64)) {
            self.mark_all();
        } else if !self.pending.is_empty() {
            for (pending, new) in self.pending.iter_mut().zip(words) {
                *pending |= new;
            }
        } else if words.iter().any(|word| *word != 0) {
            self.pending = words.to_vec();
        }
        self.cut();
        Ok(())
    }

    /// Makes the slot, or changes whether it is logged.
    fn set(&self, logging: bool) -> io::Result<()> {
        // SAFETY: the range is as large as the mapping at the host address, which `self.memory`
        // keeps. That is dropped with the slot only, and dropping the slot takes it from the
        // hypervisor first, or leaves the mapping there indefinitely. The mapping is one of guest
        // RAM, which this crate makes no reference to, so that the guest may write it at any time;
        // or of a ROM, which is mapped for reading only, and whose slot is read-only.
        unsafe { self.vm.set_slot(&self.with_log(logging)) }
    }

    fn refused(&self, change: SlotChange, source: io::Error) -> KvmError {
        KvmError::Refused {
            change,
            slot: self.number,
            range: self.range,
            source,
        }
    }
}

impl Placed for KvmSlot {
    fn range(&self) -> GuestRange {
        self.range
    }
}

impl Drop for KvmSlot {
    /// KVM lets go before the memory is unmapped and the number is free. Where it refuses to, the
    /// memory stays mapped indefinitely, and the number taken: the guest must not reach what the
    /// host puts there next, and no other slot must take the place of this one.
    fn drop(&mut self) {
        // Neither may be dropped by a panic of the hypervisor's.
        let memory = ManuallyDrop::new(self.memory.clone());
        let removed = caught(|| self.remove());
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => logs::error!("its memory stays mapped: {error}"),
            Err(panic) => logs::error!("its memory stays mapped, its removal panicked: {panic}"),
        }
        if self.in_kvm {
            self.taken.take().into_iter().for_each(SlotNumber::lose);
        } else {
            drop(ManuallyDrop::into_inner(memory));
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

    fn host_addr(&self) -> HostAddr {
        match self {
            Self::Ram(ram) => ram.mapping.host_addr(),
            Self::Rom(rom) => rom.host_addr(),
        }
    }
}
