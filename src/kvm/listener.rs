//! The slots as a listener of an address space.

use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::error::{KvmError, Result};
use super::slot::{KvmSlot, Memory};
use super::slots::{KvmSlots, check_size};
use crate::listener::{ListenerError, MemoryListener};
use crate::memory::GuestMemoryShm;
use crate::ram::Ram;
use crate::range::{Difference, GuestRange, InvalidRange};

/// The hypervisor is asked first whether it has the slots; what else it may refuse, it says only
/// when it is told.
impl<B: Bitmap + Send + Sync + 'static> MemoryListener<B> for KvmSlots {
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        // This is a new change: the last one is over.
        let slots = &self.slots;
        self.assigned.settle(|range| {
            let slot = slots.get(&range.start_addr().0);
            slot.is_some_and(|slot| slot.range() == range)
        });
        let ranges = memory.iter().map(|region| region.range());
        let assigned = ranges.filter(|range| self.assigned.keeps(*range)).count();
        let regions = memory.num_regions();
        if (regions + self.roms) as u64 > self.usable(assigned) {
            return Err(refused(self.out_of_slots(regions, self.roms, assigned)));
        }
        memory.iter().try_for_each(|region| {
            self.check_region(region.ram())
                .map_err(|error| refused(error).at(region.range()))
        })
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let held = self.slots.values().filter(|slot| slot.rom().is_none());
        let Difference {
            removals,
            additions,
        } = Difference::between(held, memory.iter(), |slot, region| slot.is(region.ram()));
        let removals: Vec<GuestRange> = removals.into_iter().map(KvmSlot::range).collect();
        for range in removals {
            self.remove(range.start_addr().0)
                .map_err(|error| refused(error).at(range))?;
        }
        for region in additions {
            let range = region.range();
            self.is_read_only(range)
                .and_then(|read_only| self.add(Memory::Ram(region.ram().clone()), read_only))
                .map_err(|error| refused(error).at(range))?;
        }
        Ok(())
    }
}

impl KvmSlots {
    /// Whether this region could have a slot, whatever other regions there are.
    fn check_region(&self, ram: &Ram) -> Result<()> {
        let region = ram.range;
        ram.check_pages()?;
        check_size(region)?;
        self.is_read_only(region)?;
        self.check_assigned(region)?;
        let roms = self.slots.values().filter_map(KvmSlot::rom);
        let mut ranges = roms.map(|rom| rom.range());
        match ranges.find(|rom| rom.overlaps(&region)) {
            None => Ok(()),
            Some(there) => Err(InvalidRange::Taken {
                range: region,
                there,
            }
            .into()),
        }
    }

    /// Whether what has a number assigned is this region as a whole.
    pub(super) fn check_assigned(&self, region: GuestRange) -> Result<()> {
        match self.assigned.overlapping(region) {
            Some((assigned, number)) if assigned != region => Err(KvmError::PartlyAssigned {
                region,
                assigned,
                number,
            }),
            _ => Ok(()),
        }
    }

    /// Whether the guest may only read `region`.
    fn is_read_only(&self, region: GuestRange) -> Result<bool> {
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
}

/// The cause is always a [`KvmError`].
fn refused(error: KvmError) -> ListenerError {
    ListenerError::refused(error)
}
