//! Which slot numbers of which VM are claimed, in all of this process.
//!
//! KVM does not refuse a slot whose number is in use: it changes the slot that has it. Then memory
//! that one [`SlotNumbers`](super::SlotNumbers) keeps mapped for its slot is not what the guest
//! reaches by it. So two of one VM must not overlap, and they know each other only by this list.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::hypervisor::HypervisorVm;

/// A list, because a process has few VMs. Nothing but this file's own code runs under its lock.
static VMS: Mutex<Vec<Vm>> = Mutex::new(Vec::new());

/// One VM.
struct Vm {
    /// Keeps the address of the VM from being used for another.
    vm: Weak<dyn HypervisorVm>,
    /// What living allocators have. They do not overlap.
    claimed: Vec<Range<u32>>,
    /// Numbers whose slot could not be removed.
    lost: BTreeSet<u32>,
}

/// Claims the numbers of a VM; gives those of them that are lost. Refused, it gives the numbers of
/// another that are in the way.
pub(super) fn claim(
    vm: &Arc<dyn HypervisorVm>,
    numbers: &Range<u32>,
) -> Result<BTreeSet<u32>, Range<u32>> {
    let mut vms = lock();
    vms.retain(|known| known.vm.strong_count() > 0);
    let at = position(&vms, vm).unwrap_or_else(|| {
        vms.push(Vm {
            vm: Arc::downgrade(vm),
            claimed: Vec::new(),
            lost: BTreeSet::new(),
        });
        vms.len() - 1
    });
    let known = &mut vms[at];
    let overlaps = |other: &&Range<u32>| other.start < numbers.end && numbers.start < other.end;
    if let Some(held) = known.claimed.iter().find(overlaps) {
        return Err(held.clone());
    }
    known.claimed.push(numbers.clone());
    Ok(known.lost.range(numbers.clone()).copied().collect())
}

/// Gives up a claim.
pub(super) fn give_up(vm: &Arc<dyn HypervisorVm>, numbers: &Range<u32>) {
    let mut vms = lock();
    if let Some(at) = position(&vms, vm) {
        vms[at].claimed.retain(|claimed| claimed != numbers);
    }
}

/// The number is taken as long as the VM lives.
pub(super) fn lose(vm: &Arc<dyn HypervisorVm>, number: u32) {
    let mut vms = lock();
    if let Some(at) = position(&vms, vm) {
        vms[at].lost.insert(number);
    }
}

fn position(vms: &[Vm], vm: &Arc<dyn HypervisorVm>) -> Option<usize> {
    // By address: two pointers to one VM may name different tables of functions.
    let same = |known: &Vm| std::ptr::addr_eq(known.vm.as_ptr(), Arc::as_ptr(vm));
    vms.iter().position(same)
}

fn lock() -> MutexGuard<'static, Vec<Vm>> {
    VMS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a hypervisor makes promises")]
mod tests {
    use std::io;

    use super::super::{LogBuffer, SlotMapping, SlotNumbers};
    use super::*;

    struct NoHypervisor;

    // SAFETY: it has no guest that could reach anything.
    unsafe impl HypervisorVm for NoHypervisor {
        unsafe fn set_slot(&self, _: &SlotMapping) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn remove_slot(&self, _: &SlotMapping) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn dirty_log(&self, _: &SlotMapping, _: &mut LogBuffer) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn clear_dirty_log(&self, _: &SlotMapping, _: u64, _: &[u64]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn vm() -> Arc<dyn HypervisorVm> {
        Arc::new(NoHypervisor)
    }

    fn is_known(vm: &Weak<dyn HypervisorVm>) -> bool {
        let same = |known: &Vm| std::ptr::addr_eq(known.vm.as_ptr(), vm.as_ptr());
        lock().iter().any(same)
    }

    #[test]
    fn nothing_is_known_of_a_vm_that_is_gone() {
        let gone = vm();
        let weak = Arc::downgrade(&gone);
        let numbers = SlotNumbers::all(gone).unwrap();
        numbers.take().unwrap().lose();
        assert!(is_known(&weak));
        drop(numbers);
        // The next VM may have its address, and must not have its lost numbers.
        let next = SlotNumbers::all(vm()).unwrap();
        assert!(!is_known(&weak));
        assert_eq!(next.free(), 32);
    }
}
