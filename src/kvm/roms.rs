//! ROMs in slots of their own.

use std::sync::Arc;

use vm_memory::GuestAddress;

use super::error::{KvmError, Result};
use super::slot::{KvmSlot, Memory};
use super::slots::{KvmSlots, check_size};
use crate::range::InvalidRange;
use crate::rom::GuestRom;

impl KvmSlots {
    /// Adds a ROM in a read-only slot: the guest's writes exit to the VMM as MMIO. It is kept as
    /// long as it has the slot.
    ///
    /// It is in no memory and no memory table: only the guest sees it.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoReadOnly`] if the hypervisor does not offer it, [`KvmError::Range`] if a
    /// region or a ROM is there, [`KvmError::OutOfSlots`], [`KvmError::TooLarge`],
    /// [`KvmError::PartlyAssigned`], and [`KvmError::Refused`].
    pub fn add_rom(&mut self, rom: impl Into<Arc<GuestRom>>) -> Result<()> {
        let rom = rom.into();
        let range = rom.range();
        self.check_read_only(range)?;
        check_size(range)?;
        self.check_assigned(range)?;
        if let Some(there) = self.overlapping(range) {
            return Err(InvalidRange::Taken { range, there }.into());
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
        self.assigned.forget(rom.range());
        Ok(rom)
    }
}
