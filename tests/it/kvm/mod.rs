//! `KvmSlots` on a real /dev/kvm: what the guest can reach, told by a guest.
#![cfg(target_arch = "x86_64")]

use std::error::Error as StdError;
use std::sync::{Arc, Mutex};

use guest_memory_shm::{
    AddressSpace, AddressSpaceError, GuestMemoryShm, GuestRange, HypervisorVm, KvmError, KvmSlot,
    KvmSlots, ListenerError, ListenerId, MemoryListener, RegionAdapter, RegionListener,
    SlotNumbers,
};
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::support::ToldAll;

mod clear;
mod dirty;
mod end;
mod example;
mod fake;
mod foreign;
mod guest;
mod hypervisor;
mod numbers;
mod plug;
mod read_only;
mod shared;
mod undo;

pub(crate) use guest::new_vm;
use guest::{Guest, boot, byte_of, region, remove_by_hand, set_by_hand};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Where tests plug.
const PLUG: u64 = 1 << 30;

/// A guest whose memory is an address space with KVM's slots.
struct Machine {
    vm: Arc<VmFd>,
    space: AddressSpace,
    kvm: ListenerId<KvmSlots>,
    guest: Guest,
}

impl Machine {
    /// With 1 MiB at 0. `None`: there is no KVM, and the test is to be skipped.
    fn new() -> Option<Self> {
        let vm = new_vm()?;
        let slots = KvmSlots::new(vm.clone()).unwrap();
        Some(Self::with(vm, slots))
    }

    fn with(vm: Arc<VmFd>, slots: KvmSlots) -> Self {
        let memory = GuestMemoryShm::from_regions(vec![boot()]).unwrap();
        let space = AddressSpace::new(memory);
        let kvm = space.attach("kvm", slots).unwrap();
        let guest = Guest::new(&vm);
        Self {
            vm,
            space,
            kvm,
            guest,
        }
    }

    fn slots<T>(&self, work: impl FnOnce(&mut KvmSlots) -> T) -> T {
        self.space.with_listener(&self.kvm, work).unwrap()
    }

    /// The numbers and guest addresses of the slots.
    fn numbers(&self) -> Vec<(u32, u64)> {
        let row = |slot: &KvmSlot| (slot.number(), slot.range().start_addr().0);
        self.slots(|slots| slots.slots().map(row).collect())
    }

    /// Asserts that the guest reaches RAM at `addr`, the very RAM that the VMM sees there.
    #[track_caller]
    fn reaches(&mut self, addr: u64) {
        let memory = self.space.published().memory().clone();
        for byte in [0x5a, 0xc3] {
            assert!(self.guest.writes(addr, byte), "{addr:#x}");
            assert_eq!(byte_of(&self.space, addr), byte, "{addr:#x}");
            memory.write_obj(!byte, GuestAddress(addr)).unwrap();
            assert_eq!(self.guest.reads(addr), Some(!byte), "{addr:#x}");
        }
    }

    /// Asserts that the guest reaches no RAM at `addr`.
    #[track_caller]
    fn misses(&mut self, addr: u64) {
        assert!(!self.guest.writes(addr, 1), "{addr:#x}");
        assert_eq!(self.guest.reads(addr), None, "{addr:#x}");
    }
}

fn range(start: u64, size: u64) -> GuestRange {
    GuestRange::new(GuestAddress(start), size).unwrap()
}

/// What KVM or `KvmSlots` said in an error of the address space, and the region that it names.
#[track_caller]
fn refusal(error: AddressSpaceError) -> (String, Option<GuestRange>, ListenerError) {
    match error {
        AddressSpaceError::Change {
            listener,
            error,
            stale,
            ..
        } => {
            assert!(!error.is_away() && stale.is_empty(), "{stale:?}");
            (listener, error.range(), error)
        }
        error => panic!("{error}"),
    }
}

/// The cause as `KvmSlots` gave it.
#[track_caller]
fn cause(error: &ListenerError) -> &KvmError {
    let cause = StdError::source(error).and_then(|cause| cause.downcast_ref());
    cause.unwrap_or_else(|| panic!("{error:?}"))
}
