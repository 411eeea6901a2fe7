//! KVM's memory slots, kept equal to the guest's memory.
//!
//! A [`KvmSlot`] is one slot and keeps its memory mapped; [`KvmSlots`] is all of them, as a
//! listener of an [`AddressSpace`](crate::AddressSpace).

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Weak};

use kvm_ioctls::{Cap, VmFd};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::address_space::{ListenerError, MemoryListener};
use crate::error::{Error, KvmError, Result};
use crate::layout::{GuestRange, base_page_size};
use crate::logs;
use crate::mapping::Mapping;
use crate::memory::GuestMemoryShm;
use crate::rom::GuestRom;

mod dirty;
mod numbers;
mod slot;

pub use dirty::DirtyPages;
use numbers::Numbers;
pub use slot::KvmSlot;
use slot::{Flags, Memory};

/// The memory slots of a KVM virtual machine: a [`MemoryListener`] that gives each region of the
/// guest's memory one (KVM_SET_USER_MEMORY_REGION).
///
/// Attach it before the daemons, so that the hypervisor learns of memory before those who put
/// data there.
///
/// - It takes the lowest free slot numbers, and uses them again. A VMM that makes slots of its own
///   keeps numbers for itself ([`with_slots`](Self::with_slots)).
/// - Slots that go are removed before new ones are made: slots cannot overlap. What KVM refuses is
///   undone with the change, for all listeners.
/// - As long as KVM has a slot, what is behind it stays mapped. Dropped, it removes its slots; if
///   KVM refuses even that, the memory stays mapped for ever.
/// - It can have the guest's writes [logged](Self::start_dirty_logging), keep the guest from
///   [writing](Self::with_read_only), and place [ROMs](Self::add_rom).
///
/// For KVM the memory is ordinary memory: what others write to it (the VMM, daemons) is in no
/// dirty log of KVM's.
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
/// let region = GuestRegionShm::new(GuestAddress(4 << 30), 1 << 20, &RamOptions::new())?;
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
    vm: Arc<VmFd>,
    /// How many slots the VM can have.
    limit: u32,
    numbers: Numbers,
    /// By guest address.
    slots: BTreeMap<u64, KvmSlot>,
    roms: usize,
    read_only: Vec<GuestRange>,
    logging: bool,
    /// What was unplugged while it was logged, as long as somebody else keeps it.
    unplugged: Vec<Weak<Mapping>>,
}

/// The most pages that a slot can have: KVM_MEM_MAX_NR_PAGES of linux/kvm_host.h.
const MAX_PAGES: u64 = (1 << 31) - 1;

impl KvmSlots {
    /// All slots of the VM, none of which may be in use.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoSuchSlots`] if KVM has none.
    pub fn new(vm: Arc<VmFd>) -> Result<Self> {
        let limit = limit_of(&vm);
        Self::with_slots(vm, 0..limit)
    }

    /// The slots with these numbers, none of which may be in use. The others belong to the VMM,
    /// which sees to it that they overlap no region.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoSuchSlots`] if there are none, or KVM has not all of them.
    pub fn with_slots(vm: Arc<VmFd>, numbers: Range<u32>) -> Result<Self> {
        let limit = limit_of(&vm);
        if numbers.is_empty() || numbers.end > limit {
            return Err(KvmError::NoSuchSlots {
                first: numbers.start,
                end: numbers.end,
                limit,
            }
            .into());
        }
        Ok(Self {
            vm,
            limit,
            numbers: Numbers::new(numbers),
            slots: BTreeMap::new(),
            roms: 0,
            read_only: Vec::new(),
            logging: false,
            unplugged: Vec::new(),
        })
    }

    /// Regions in `range` get slots that the guest may only read (`KVM_MEM_READONLY`): its writes
    /// exit to the VMM as MMIO. The VMM and daemons write them as before.
    ///
    /// Default: the guest writes everywhere. A region lies in such a range as a whole or not at
    /// all; others are refused.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoReadOnly`] if KVM does not offer it; [`KvmError::TooLate`] if a region is
    /// there already.
    pub fn with_read_only(mut self, range: GuestRange) -> Result<Self> {
        self.check_read_only(range)?;
        let there = self
            .slots
            .values()
            .find(|slot| !slot.is_read_only() && slot.range().overlaps(&range));
        if let Some(slot) = there {
            let region = slot.range();
            return Err(KvmError::TooLate { range, region }.into());
        }
        self.read_only.push(range);
        Ok(self)
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The slots that KVM has from here, in the order of their guest addresses.
    pub fn slots(&self) -> impl Iterator<Item = &KvmSlot> {
        self.slots.values()
    }

    /// How many slots there may be, for regions and ROMs together.
    pub fn max_slots(&self) -> u32 {
        self.numbers.count()
    }

    /// Adds a ROM in a read-only slot: the guest's writes exit to the VMM as MMIO. It is kept as
    /// long as it has the slot.
    ///
    /// It is in no memory and no memory table: only the guest sees it.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoReadOnly`] if KVM does not offer it, [`Error::Overlap`] if a region or a ROM
    /// is there, [`KvmError::OutOfSlots`], [`KvmError::TooLarge`], and [`KvmError::Refused`].
    pub fn add_rom(&mut self, rom: impl Into<Arc<GuestRom>>) -> Result<()> {
        let rom = rom.into();
        let range = rom.range();
        self.check_read_only(range)?;
        check_size(range)?;
        if let Some(there) = self.overlapping(range) {
            let (first, second) = (there.min(range), there.max(range));
            return Err(Error::Overlap { first, second });
        }
        self.add(Memory::Rom(rom), true)?;
        self.roms += 1;
        Ok(())
    }

    /// Removes the ROM that starts at `start`, and gives it back.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoSuchRom`], and [`KvmError::Refused`]: it is there as before.
    pub fn remove_rom(&mut self, start: GuestAddress) -> Result<Arc<GuestRom>> {
        let rom = self.slots.get(&start.0).and_then(KvmSlot::rom).cloned();
        let rom = rom.ok_or(KvmError::NoSuchRom { start })?;
        self.remove(start.0)?;
        self.roms -= 1;
        Ok(rom)
    }

    fn add(&mut self, memory: Memory, read_only: bool) -> Result<(), Error> {
        let Some(number) = self.numbers.take() else {
            let rom = usize::from(matches!(memory, Memory::Rom(_)));
            let regions = self.slots.len() - self.roms + (1 - rom);
            return Err(self.out_of_slots(regions, self.roms + rom).into());
        };
        let flags = Flags {
            read_only,
            logging: self.logging,
        };
        match KvmSlot::new(&self.vm, number, memory, flags) {
            Ok(mut slot) => {
                logs::debug!("memory slot {number} is {}", slot.range());
                self.recall(&mut slot);
                self.slots.insert(slot.range().start_addr().0, slot);
                Ok(())
            }
            Err(error) => {
                self.numbers.give_back(number);
                Err(error.into())
            }
        }
    }

    /// The slot at `start` must be there.
    fn remove(&mut self, start: u64) -> Result<(), KvmError> {
        if let Some(slot) = self.slots.get_mut(&start) {
            slot.remove()?;
            self.numbers.give_back(slot.number());
            let slot = self.slots.remove(&start);
            self.unplugged.retain(|mapping| mapping.strong_count() > 0);
            let logged = slot.filter(KvmSlot::is_logging);
            self.unplugged
                .extend(logged.and_then(|slot| slot.mapping()));
        }
        Ok(())
    }

    /// A region that is put back had a log, which went with its old slot: what the guest wrote
    /// between the last harvest and the removal is known no more, so all of it counts.
    fn recall(&mut self, slot: &mut KvmSlot) {
        let Some(mapping) = slot.mapping().filter(|_| slot.is_logging()) else {
            return;
        };
        let known = self.unplugged.len();
        self.unplugged.retain(|other| !other.ptr_eq(&mapping));
        if self.unplugged.len() < known {
            slot.mark_all();
        }
    }

    /// The range of the slot that `range` overlaps.
    fn overlapping(&self, range: GuestRange) -> Option<GuestRange> {
        // Slots do not overlap: the last that starts in or before it is the only one to look at.
        let (_, slot) = self.slots.range(..=range.last_addr().0).next_back()?;
        Some(slot.range()).filter(|there| there.overlaps(&range))
    }

    fn out_of_slots(&self, regions: usize, roms: usize) -> KvmError {
        KvmError::OutOfSlots {
            regions,
            roms,
            slots: self.max_slots(),
            limit: self.limit,
        }
    }

    fn check_read_only(&self, range: GuestRange) -> Result<(), KvmError> {
        match self.vm.check_extension(Cap::ReadonlyMem) {
            true => Ok(()),
            false => Err(KvmError::NoReadOnly { range }),
        }
    }

    /// Whether the guest may only read `region`.
    fn is_read_only(&self, region: GuestRange) -> Result<bool, KvmError> {
        let near = |range: &&GuestRange| range.overlaps(&region);
        let Some(read_only) = self.read_only.iter().find(near).copied() else {
            return Ok(false);
        };
        let whole = read_only.start_addr() <= region.start_addr()
            && region.last_addr() <= read_only.last_addr();
        match whole {
            true => Ok(true),
            false => Err(KvmError::PartlyReadOnly { region, read_only }),
        }
    }

    /// Whether this region could have a slot, whatever other regions there are.
    fn check_region(&self, region: GuestRange) -> Result<()> {
        check_size(region)?;
        self.is_read_only(region)?;
        let roms = self.slots.values().filter_map(KvmSlot::rom);
        let mut ranges = roms.map(|rom| rom.range());
        match ranges.find(|rom| rom.overlaps(&region)) {
            None => Ok(()),
            Some(rom) => Err(Error::Overlap {
                first: rom.min(region),
                second: rom.max(region),
            }),
        }
    }
}

/// KVM is asked first whether it has the slots; what else it may refuse, it says only when it is
/// told.
impl<B: Bitmap + Send + Sync + 'static> MemoryListener<B> for KvmSlots {
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let (regions, slots) = (memory.num_regions(), self.max_slots());
        if (regions + self.roms) as u64 > u64::from(slots) {
            return Err(refused(self.out_of_slots(regions, self.roms)));
        }
        memory.iter().try_for_each(|region| {
            let range = region.range();
            self.check_region(range)
                .map_err(|error| refused(error).at(range))
        })
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let gone = |slot: &&KvmSlot| {
            let there = memory.find_region(slot.range().start_addr());
            slot.rom().is_none() && !there.is_some_and(|region| slot.is(region.ram()))
        };
        let gone = self.slots.values().filter(gone);
        let gone: Vec<GuestRange> = gone.map(KvmSlot::range).collect();
        for range in gone.into_iter().rev() {
            self.remove(range.start_addr().0)
                .map_err(|error| refused(error).at(range))?;
        }
        for region in memory.iter() {
            let range = region.range();
            let there = self.slots.get(&range.start_addr().0);
            if there.is_some_and(|slot| slot.is(region.ram())) {
                continue;
            }
            self.is_read_only(range)
                .map_err(Error::from)
                .and_then(|read_only| self.add(Memory::Ram(region.ram().clone()), read_only))
                .map_err(|error| refused(error).at(range))?;
        }
        Ok(())
    }
}

impl fmt::Debug for KvmSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmSlots")
            .field("slots", &self.slots.values().collect::<Vec<_>>())
            .field("max_slots", &self.max_slots())
            .field("read_only", &self.read_only)
            .field("logging", &self.logging)
            .finish_non_exhaustive()
    }
}

/// How many slots the VM can have (KVM_CAP_NR_MEMSLOTS).
fn limit_of(vm: &VmFd) -> u32 {
    u32::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(0)
}

/// The cause is always an [`Error`].
fn refused(error: impl Into<Error>) -> ListenerError {
    ListenerError::refused(error.into())
}

fn check_size(range: GuestRange) -> Result<(), KvmError> {
    let limit = MAX_PAGES * base_page_size();
    match range.size() <= limit {
        true => Ok(()),
        false => Err(KvmError::TooLarge { range, limit }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_as_many_pages_as_kvm_counts() {
        let range = |pages| GuestRange::new(GuestAddress(0), pages * base_page_size()).unwrap();
        assert!(check_size(range((1 << 31) - 1)).is_ok());
        let error = check_size(range(1 << 31)).unwrap_err();
        assert!(matches!(error, KvmError::TooLarge { .. }), "{error}");
    }
}
