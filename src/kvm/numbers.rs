//! Which slot numbers are taken.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::claims;
use super::error::{KvmError, Result};
use super::hypervisor::HypervisorVm;
use crate::range::RangeSet;

/// Slot numbers of a VM, for all that make slots of it: [`KvmSlots`](crate::KvmSlots), and the
/// VMM's own devices. Clones share them.
///
/// No number is given to two: neither by one of these, nor by two of the same VM, whose numbers
/// cannot overlap as long as both live. (The same VM is the same `Arc`. Two of different `Arc`s
/// on copies of one descriptor cannot be told from those of two VMs: share one.) The lowest free
/// number is given first, so that KVM's table of slots stays as small as what is in it.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, KvmSlots, SlotNumbers};
/// use kvm_ioctls::Kvm;
/// use vm_memory::GuestAddress;
///
/// let numbers = SlotNumbers::all(Arc::new(Kvm::new()?.create_vm()?))?;
/// // A device of the VMM maps a window into the guest.
/// let window = numbers.take()?;
/// println!("the window is slot {}", window.number());
///
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 30)])?;
/// let space = AddressSpace::new(memory);
/// space.attach("kvm", KvmSlots::with_numbers(numbers.clone()))?;
/// // Its slot is gone, so its number may be used again.
/// drop(window);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct SlotNumbers(Arc<Shared>);

/// A slot number that nothing else has: [`SlotNumbers::take`]. Dropped, it is free again, so drop
/// it after its slot is gone.
///
/// It keeps the VM alive.
#[must_use = "dropped, it is free again"]
pub struct SlotNumber {
    number: u32,
    numbers: SlotNumbers,
    then: Then,
}

/// What becomes of a number when it is dropped.
#[derive(Clone, Copy)]
enum Then {
    Free,
    Resting,
    Lost,
}

struct Shared {
    vm: Arc<dyn HypervisorVm>,
    all: Range<u32>,
    untaken: Mutex<Untaken>,
}

/// Numbers that are free. They may be billions, which take no room: a hypervisor need not have a
/// limit that is worth mentioning.
#[derive(Debug)]
struct Untaken {
    free: RangeSet,
    /// Those that may be wanted back, and are given to others last.
    resting: BTreeSet<u32>,
}

impl SlotNumbers {
    /// All numbers that the VM can have.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn all(vm: Arc<dyn HypervisorVm>) -> Result<Self> {
        let limit = vm.max_slots();
        Self::new(vm, 0..limit)
    }

    /// These numbers. Others of the VM belong to others.
    ///
    /// A number whose slot the hypervisor did not let go stays taken as long as the VM lives.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoSuchSlots`] if there are none, or the VM has not all of them;
    /// [`KvmError::SlotsInUse`] if living `SlotNumbers` of this VM have some.
    pub fn new(vm: Arc<dyn HypervisorVm>, numbers: Range<u32>) -> Result<Self> {
        let limit = vm.max_slots();
        if numbers.is_empty() || numbers.end > limit {
            return Err(KvmError::NoSuchSlots { numbers, limit });
        }
        let lost = claims::claim(&vm, &numbers).map_err(|held| KvmError::SlotsInUse {
            numbers: numbers.clone(),
            held,
        })?;
        let mut untaken = Untaken::new(&numbers);
        for number in lost {
            untaken.take_this(number);
        }
        Ok(Self(Arc::new(Shared {
            vm,
            all: numbers,
            untaken: Mutex::new(untaken),
        })))
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<dyn HypervisorVm> {
        &self.0.vm
    }

    /// The numbers, taken or not.
    pub fn range(&self) -> Range<u32> {
        self.0.all.clone()
    }

    /// How many can be taken.
    pub fn free(&self) -> u32 {
        self.lock().count()
    }

    /// Takes the lowest that is free.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoFreeNumber`] if all are taken.
    pub fn take(&self) -> Result<SlotNumber> {
        let lowest = self.lock().take();
        let numbers = self.range();
        lowest
            .map(|number| self.taken(number))
            .ok_or(KvmError::NoFreeNumber { numbers })
    }

    /// Takes this one.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoSuchNumber`] if it is none of these, [`KvmError::NumberTaken`].
    pub fn take_number(&self, number: u32) -> Result<SlotNumber> {
        let numbers = self.range();
        if !numbers.contains(&number) {
            return Err(KvmError::NoSuchNumber { number, numbers });
        }
        let taken = self.lock().take_this(number);
        match taken {
            true => Ok(self.taken(number)),
            false => Err(KvmError::NumberTaken { number }),
        }
    }

    /// A number that rests is as free as others.
    pub(super) fn wake(&self, number: u32) {
        let mut untaken = self.lock();
        if untaken.resting.remove(&number) {
            untaken.insert(number);
        }
    }

    fn taken(&self, number: u32) -> SlotNumber {
        SlotNumber {
            number,
            numbers: self.clone(),
            then: Then::Free,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Untaken> {
        // Nothing panics under it.
        self.0
            .untaken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotNumber {
    /// The number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Leaves it taken as long as the VM lives: its slot could not be removed.
    pub fn lose(mut self) {
        self.then = Then::Lost;
    }

    /// Frees it, but has it taken last: its user may want it back.
    pub(super) fn rest(mut self) {
        self.then = Then::Resting;
    }
}

impl Drop for SlotNumber {
    fn drop(&mut self) {
        let number = self.number;
        match self.then {
            Then::Free => self.numbers.lock().insert(number),
            Then::Resting => drop(self.numbers.lock().resting.insert(number)),
            Then::Lost => claims::lose(self.numbers.vm(), number),
        }
    }
}

impl Untaken {
    fn new(all: &Range<u32>) -> Self {
        Self {
            free: RangeSet::from(u64::from(all.start)..u64::from(all.end)),
            resting: BTreeSet::new(),
        }
    }

    fn count(&self) -> u32 {
        let count = self.free.len() + self.resting.len() as u64;
        // Each is one of the numbers, which are fewer than 2^32.
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn take(&mut self) -> Option<u32> {
        let lowest = self.free.iter().next().map(|range| range.start);
        match lowest.and_then(|lowest| u32::try_from(lowest).ok()) {
            Some(lowest) => self.take_this(lowest).then_some(lowest),
            None => self.resting.pop_first(),
        }
    }

    /// Whether it was there to be taken.
    fn take_this(&mut self, number: u32) -> bool {
        let is_free = self.free.contains(only(number));
        self.free.remove(only(number));
        is_free || self.resting.remove(&number)
    }

    /// It is free again.
    fn insert(&mut self, number: u32) {
        self.free.insert(only(number));
    }
}

fn only(number: u32) -> Range<u64> {
    u64::from(number)..u64::from(number) + 1
}

impl Drop for Shared {
    fn drop(&mut self) {
        claims::give_up(&self.vm, &self.all);
    }
}

impl fmt::Debug for SlotNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotNumbers")
            .field("range", &self.0.all)
            .field("free", &self.free())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for SlotNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SlotNumber").field(&self.number).finish()
    }
}

impl fmt::Display for SlotNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number.fmt(f)
    }
}
