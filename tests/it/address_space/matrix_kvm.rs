//! KVM's memory slots as a listener of the matrix: too few of them, or a guest address that
//! another slot has.

use std::sync::Arc;

use guest_memory_shm::SlotNumbers;
use guest_memory_shm::{GuestMemoryShm, KvmSlots, MemoryListener};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestAddress;

use super::matrix_case::{BOOT, Case, Fault, OPERATIONS, Region};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Enough for all regions of a case.
const ENOUGH: u32 = 32;

/// A virtual machine, and slots of it that are not the listener's.
pub(super) struct Machine {
    vm: Arc<VmFd>,
    others: KvmSlots,
}

/// Whether this machine has KVM; says why not.
pub(super) fn has_kvm() -> bool {
    Kvm::new()
        .and_then(|kvm| kvm.create_vm())
        .map_err(|error| crate::support::skip(&format!("/dev/kvm cannot be used: {error}")))
        .is_ok()
}

impl Machine {
    pub(super) fn new() -> Self {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        let others =
            KvmSlots::with_numbers(SlotNumbers::new(vm.clone(), ENOUGH..ENOUGH + 1).unwrap());
        Self { vm, others }
    }

    /// The listener: with as few slots as the case says, or enough.
    pub(super) fn slots(&self, few: Option<usize>) -> KvmSlots {
        let end = few.map_or(ENOUGH, |few| few.try_into().unwrap());
        KvmSlots::with_numbers(SlotNumbers::new(self.vm.clone(), 0..end).unwrap())
    }

    /// Has KVM refuse the region of a message.
    pub(super) fn arm(&mut self, case: &Case, at: usize) {
        for planned in case.faults_of(at) {
            if planned.fault == Fault::Refuse {
                let (start, size) = added_at(case, planned.message);
                assert!(self.takes((start + size) * MIB - PAGE), "{planned}");
            }
        }
    }

    /// Whether the last page before a MiB is free for one more slot, which is there then.
    fn takes(&mut self, start: u64) -> bool {
        let page = [(GuestAddress(start), PAGE as usize)];
        let page = GuestMemoryShm::<()>::from_ranges(&page).unwrap();
        self.others.update(&page).is_ok()
    }

    pub(super) fn heal(&mut self) {
        self.others.update(&GuestMemoryShm::<()>::new()).unwrap();
    }

    /// Asserts that, of all regions that there ever are, KVM has slots where `table` has regions
    /// and nowhere else.
    pub(super) fn holds(&mut self, table: &[Region]) {
        let plugged = OPERATIONS
            .iter()
            .flat_map(|operation| operation.changes().1);
        for (start, size) in BOOT.iter().chain(plugged) {
            let last = (start + size) * MIB - PAGE;
            let is_there =
                |(start, size): &Region| (start * MIB..(start + size) * MIB).contains(&last);
            self.heal();
            assert_eq!(self.takes(last), !table.iter().any(is_there), "{last:#x}");
        }
        self.heal();
    }
}

/// The region that is added by a message.
fn added_at(case: &Case, message: usize) -> Region {
    let (removed, added) = case.operation.changes();
    match case.subject() {
        Some(_) => case.after()[message - 1],
        None => added[message - 1 - removed.len()],
    }
}
