//! All slots of a VM.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use super::assigned::Assigned;
use super::error::{KvmError, Result};
use super::hypervisor::HypervisorVm;
use super::log_buffer::{LogBuffer, MAX_PAGES};
use super::numbers::SlotNumbers;
use super::slot::{KvmSlot, Memory};
use crate::host::base_page_size;
use crate::logs;
use crate::mapping::Mapping;
use crate::range::{GuestRange, InvalidRange};

/// The memory slots of a KVM virtual machine: a [`MemoryListener`](crate::MemoryListener) that
/// gives each region of the guest's memory one (KVM_SET_USER_MEMORY_REGION).
///
/// Attach it before the daemons, so that the hypervisor learns of memory before they put data
/// there.
///
/// - It takes the lowest free slot numbers, and uses them again. A VMM that makes slots of its own
///   takes their numbers from the same [`SlotNumbers`], or gives it
///   ([`with_numbers`](Self::with_numbers)) a part of the numbers only. Regions whose numbers must
///   be what they were are [named](Self::assign_number).
/// - The VM is kvm-ioctls' [`VmFd`](kvm_ioctls::VmFd), or any other [`HypervisorVm`].
/// - Slots that go are removed before new ones are made: slots cannot overlap. What KVM refuses is
///   undone with the change, for all listeners.
/// - As long as KVM has a slot, its memory stays mapped. Dropped, it removes its slots; if KVM
///   refuses even that, the memory stays mapped indefinitely, and the number of the slot taken.
/// - It can have the guest's writes [logged](Self::start_dirty_logging), keep the guest from
///   [writing](Self::add_read_only), and place [ROMs](Self::add_rom).
///
/// For KVM the memory is ordinary memory: what others write to it (the VMM, daemons) is in no
/// dirty log of KVM's.
///
/// # What others do with the VM
///
/// Slot numbers that living [`SlotNumbers`] of the same `Arc` have are refused
/// ([`KvmError::SlotsInUse`]). Code that changes slots past that (by `unsafe` calls, or by another
/// `Arc` of a copy of the VM's descriptor, which cannot be recognised) can make the guest miss RAM
/// and the log miss pages. No memory of this process is reached by that: what KVM maps stays
/// mapped until a removal succeeds, and a log of a slot that has grown faults ([`LogBuffer`]).
///
/// ```no_run
/// use std::sync::Arc;
///
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, GuestRegionShm, KvmSlots, RamOptions};
/// use kvm_ioctls::Kvm;
/// use vm_memory::GuestAddress;
///
/// let vm = Arc::new(Kvm::new()?.create_vm()?);
/// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(boot);
/// let kvm = space.attach("kvm", KvmSlots::new(vm)?)?;
///
/// // Hotplug: the guest can use it when this returns.
/// let region = GuestRegionShm::new((GuestAddress(4 << 30), 1 << 20), &RamOptions::new())?;
/// space.insert(region)?;
///
/// space.with_listener(&kvm, |slots| slots.start_dirty_logging())??;
/// // The guest runs.
/// for region in space.with_listener(&kvm, |slots| slots.dirty_log())?? {
///     region.ranges().for_each(|range| println!("written: {range}"));
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KvmSlots {
    pub(super) numbers: SlotNumbers,
    /// Numbers that are set aside for ranges, or were theirs a moment ago.
    pub(super) assigned: Assigned,
    /// By guest address.
    pub(super) slots: BTreeMap<u64, KvmSlot>,
    pub(super) roms: usize,
    pub(super) read_only: Vec<GuestRange>,
    /// Where logs are read to, while the guest's writes are logged.
    pub(super) log: Option<LogBuffer>,
    /// What was unplugged while it was logged, as long as it is kept elsewhere.
    pub(super) unplugged: Vec<Weak<Mapping>>,
}

impl KvmSlots {
    /// All slots of the VM, none of which may be in use.
    ///
    /// # Errors
    ///
    /// Those of [`SlotNumbers::new`].
    pub fn new(vm: Arc<dyn HypervisorVm>) -> Result<Self> {
        Ok(Self::with_numbers(SlotNumbers::all(vm)?))
    }

    /// Slots with numbers from here, which the VMM and other `KvmSlots` may share. Numbers that
    /// are not here belong to the VMM, which sees to it that their slots overlap no region.
    ///
    /// The numbers of what is unplugged are free at once, but are taken last until the next
    /// change: undoing this one needs them.
    pub fn with_numbers(numbers: SlotNumbers) -> Self {
        Self {
            assigned: Assigned::new(numbers.clone()),
            numbers,
            slots: BTreeMap::new(),
            roms: 0,
            read_only: Vec::new(),
            log: None,
            unplugged: Vec::new(),
        }
    }

    /// Regions in `range` get slots that the guest may only read (`KVM_MEM_READONLY`): its writes
    /// exit to the VMM as MMIO. The VMM and daemons write them as before.
    ///
    /// Default: the guest writes everywhere. A region lies in such a range as a whole or not at
    /// all; others are refused.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// use guest_memory_shm::KvmSlots;
    /// use kvm_ioctls::Kvm;
    /// use vm_memory::GuestAddress;
    ///
    /// let mut slots = KvmSlots::new(Arc::new(Kvm::new()?.create_vm()?))?;
    /// slots.add_read_only((GuestAddress(0xf_0000), 64 << 10))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`KvmError::NoReadOnly`] if the hypervisor does not offer it; [`KvmError::TooLate`] if a
    /// region is there already; [`KvmError::Range`]. Nothing is changed then.
    pub fn add_read_only(
        &mut self,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
    ) -> Result<()> {
        let range = GuestRange::at(range)?;
        self.check_read_only(range)?;
        let there = self
            .slots
            .values()
            .find(|slot| !slot.is_read_only() && slot.range().overlaps(&range));
        if let Some(slot) = there {
            let region = slot.range();
            return Err(KvmError::TooLate { range, region });
        }
        self.read_only.push(range);
        Ok(())
    }

    /// The region or ROM of exactly this range will get slot `number`: after a restore, or where
    /// else numbers must be what they were.
    ///
    /// The number is set aside at once. It stays so until the region is there, also when a change
    /// that adds it is undone; a region that is there keeps its number like all others. Regions
    /// that overlap `range` and are not exactly that are refused until then.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// use guest_memory_shm::KvmSlots;
    /// use kvm_ioctls::Kvm;
    /// use vm_memory::GuestAddress;
    ///
    /// let mut slots = KvmSlots::new(Arc::new(Kvm::new()?.create_vm()?))?;
    /// // What was saved with the guest.
    /// for (number, start, size) in [(0, 0, 1 << 30), (7, 4 << 30, 2 << 30)] {
    ///     slots.assign_number((GuestAddress(start), size), number)?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`KvmError::NoSuchNumber`], [`KvmError::NumberTaken`] and [`KvmError::Range`];
    /// [`KvmError::NumberTooLate`] if the range, or a part of it, has a slot or a number already.
    pub fn assign_number(
        &mut self,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
        number: u32,
    ) -> Result<()> {
        let range = GuestRange::at(range)?;
        let there = self.overlapping(range);
        let there = there.and_then(|there| self.slots.get(&there.start_addr().0));
        let there = there.map(|slot| (slot.range(), slot.number()));
        match there.or_else(|| self.assigned.overlapping(range)) {
            Some(same) if same == (range, number) => Ok(()),
            Some((other, other_number)) => Err(KvmError::NumberTooLate {
                range,
                number,
                other,
                other_number,
            }),
            None => self.assigned.add(range, number),
        }
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<dyn HypervisorVm> {
        self.numbers.vm()
    }

    /// The numbers that its slots have and may have: other slots of the same VM take numbers from
    /// here.
    pub fn numbers(&self) -> &SlotNumbers {
        &self.numbers
    }

    /// The slots that KVM has from here, in the order of their guest addresses.
    pub fn slots(&self) -> impl Iterator<Item = &KvmSlot> {
        self.slots.values()
    }

    pub(super) fn add(&mut self, memory: Memory, read_only: bool) -> Result<()> {
        let range = memory.range();
        if let Memory::Ram(ram) = &memory {
            ram.check_pages()?;
        }
        let Some(number) = self.assigned.number_for(range)? else {
            let rom = usize::from(matches!(memory, Memory::Rom(_)));
            let regions = self.slots.len() - self.roms + (1 - rom);
            return Err(self.out_of_slots(regions, self.roms + rom, 0));
        };
        let mut slot = KvmSlot::new(self.numbers.vm(), number, memory, read_only);
        if let Err(error) = slot.make(self.is_dirty_logging()) {
            self.assigned.put_back(range, slot.take_number());
            return Err(error);
        }
        logs::debug!("memory slot {} is {range}", slot.number());
        self.recall(&mut slot);
        self.slots.insert(range.start_addr().0, slot);
        Ok(())
    }

    /// The slot at `start` must be there.
    pub(super) fn remove(&mut self, start: u64) -> Result<()> {
        if let Some(slot) = self.slots.get_mut(&start) {
            slot.remove()?;
            self.assigned.put_back(slot.range(), slot.take_number());
            let slot = self.slots.remove(&start);
            self.unplugged.retain(|mapping| mapping.strong_count() > 0);
            let logged = slot.filter(KvmSlot::is_logging);
            self.unplugged.extend(logged.and_then(|slot| slot.ram()));
        }
        Ok(())
    }

    /// A region that is put back had a log, which went with its old slot: what the guest wrote
    /// between the last harvest and the removal is known no more, so all of it counts.
    fn recall(&mut self, slot: &mut KvmSlot) {
        let Some(mapping) = slot.ram().filter(|_| slot.is_logging()) else {
            return;
        };
        let known = self.unplugged.len();
        self.unplugged.retain(|other| !other.ptr_eq(&mapping));
        if self.unplugged.len() < known {
            slot.mark_all();
        }
    }

    /// The range of the slot that `range` overlaps, the last if it is several.
    pub(super) fn overlapping(&self, range: GuestRange) -> Option<GuestRange> {
        // Slots do not overlap: the last that starts in or before it is the only one to look at.
        let (_, slot) = self.slots.range(..=range.last_addr().0).next_back()?;
        Some(slot.range()).filter(|there| there.overlaps(&range))
    }

    /// Slots that can be had: the own ones, numbers that are free, and so many that are assigned.
    pub(super) fn usable(&self, assigned: usize) -> u64 {
        (self.slots.len() + assigned) as u64 + u64::from(self.numbers.free())
    }

    pub(super) fn out_of_slots(&self, regions: usize, roms: usize, assigned: usize) -> KvmError {
        KvmError::OutOfSlots {
            regions,
            roms,
            slots: u32::try_from(self.usable(assigned)).unwrap_or(u32::MAX),
            limit: self.vm().max_slots(),
        }
    }

    pub(super) fn check_read_only(&self, range: GuestRange) -> Result<()> {
        match self.vm().has_read_only() {
            true => Ok(()),
            false => Err(KvmError::NoReadOnly { range }),
        }
    }
}

impl fmt::Debug for KvmSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmSlots")
            .field("slots", &self.slots.values().collect::<Vec<_>>())
            .field("numbers", &self.numbers)
            .field("read_only", &self.read_only)
            .field("logging", &self.is_dirty_logging())
            .finish_non_exhaustive()
    }
}

pub(super) fn check_size(range: GuestRange) -> Result<()> {
    let limit = MAX_PAGES * base_page_size();
    match range.size() <= limit {
        true => Ok(()),
        false => Err(KvmError::TooLarge { range, limit }),
    }
}
