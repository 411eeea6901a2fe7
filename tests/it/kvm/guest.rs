//! A guest of one vCPU that reads and writes the bytes that it is told to.
#![expect(
    unsafe_code,
    reason = "tests give KVM slots of their own, which kvm-ioctls calls unsafe"
)]

use std::sync::Arc;

use guest_memory_shm::{AddressSpace, GuestRegionShm, RamOptions};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryRegion};

use super::{MIB, PAGE};
use crate::support::skip;

/// Where the guest's code is: in the first region of every test.
const CODE: GuestAddress = GuestAddress(0x1000);

/// The guest's code, in 32-bit mode with flat segments: routines that the vCPU is sent to.
const PROGRAM: [u8; 14] = [
    // WRITE: [ebx] = al
    0x88, 0x03, // mov [ebx], al
    0xf4, // hlt
    0x90, // nop
    // READ: al = [ebx]
    0x8a, 0x03, // mov al, [ebx]
    0xf4, // hlt
    0x90, // nop
    // COUNT: ecx times [ebx] += 1
    0xff, 0x03, // inc dword [ebx]
    0x49, // dec ecx
    0x75, 0xfb, // jnz COUNT
    0xf4, // hlt
];
const WRITE: u64 = 0;
const READ: u64 = 4;
const COUNT: u64 = 8;

/// A new virtual machine, or `None` after saying why the test is skipped.
pub(crate) fn new_vm() -> Option<Arc<VmFd>> {
    match Kvm::new().and_then(|kvm| kvm.create_vm()) {
        Ok(vm) => Some(Arc::new(vm)),
        Err(error) => {
            skip(&format!("/dev/kvm cannot be used: {error}"));
            None
        }
    }
}

/// RAM of `size` bytes at `start`.
pub(crate) fn region(start: u64, size: u64) -> GuestRegionShm {
    GuestRegionShm::new((GuestAddress(start), size), &RamOptions::new()).unwrap()
}

/// The region that the guest's code is in.
pub(crate) fn boot() -> GuestRegionShm {
    let region = region(0, MIB);
    let code = vm_memory::MemoryRegionAddress(CODE.0);
    region.write_slice(&PROGRAM, code).unwrap();
    region
}

/// The byte at `addr`, as the VMM sees it.
pub(crate) fn byte_of(space: &AddressSpace, addr: u64) -> u8 {
    space
        .published()
        .memory()
        .read_obj(GuestAddress(addr))
        .unwrap()
}

pub(crate) struct Guest(VcpuFd);

impl Guest {
    pub(crate) fn new(vm: &VmFd) -> Self {
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        let flat = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 8,
            // Code that can be read and was accessed.
            type_: 0xb,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat;
        let data = kvm_segment {
            selector: 16,
            // Data that can be written and was accessed.
            type_: 3,
            ..flat
        };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        // Protected mode, without paging.
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).unwrap();
        Self(vcpu)
    }

    /// Writes a byte. `false`: there is no RAM that it may write, and the VMM was asked.
    #[must_use]
    pub(crate) fn writes(&mut self, addr: u64, byte: u8) -> bool {
        self.enter(WRITE, addr, byte.into(), 0);
        match self.0.run().unwrap() {
            VcpuExit::Hlt => true,
            VcpuExit::MmioWrite(to, data) => {
                assert_eq!((to, data), (addr, &[byte][..]));
                assert!(matches!(self.0.run(), Ok(VcpuExit::Hlt)));
                false
            }
            exit => panic!("{exit:?}"),
        }
    }

    /// Reads a byte. `None`: there is no RAM, and the VMM was asked.
    pub(crate) fn reads(&mut self, addr: u64) -> Option<u8> {
        self.enter(READ, addr, 0, 0);
        match self.0.run().unwrap() {
            VcpuExit::Hlt => Some((self.0.get_regs().unwrap().rax & 0xff) as u8),
            VcpuExit::MmioRead(from, data) => {
                assert_eq!((from, data.len()), (addr, 1));
                data[0] = 0xff;
                assert!(matches!(self.0.run(), Ok(VcpuExit::Hlt)));
                None
            }
            exit => panic!("{exit:?}"),
        }
    }

    /// Adds `times` to the number at `addr`, one by one.
    pub(crate) fn counts(&mut self, addr: u64, times: u32) {
        self.enter(COUNT, addr, 0, times.into());
        let exit = self.0.run().unwrap();
        assert!(matches!(exit, VcpuExit::Hlt), "{exit:?}");
    }

    fn enter(&self, routine: u64, rbx: u64, rax: u64, rcx: u64) {
        let regs = kvm_regs {
            rip: CODE.0 + routine,
            // The bit that is always set.
            rflags: 2,
            rax,
            rbx,
            rcx,
            ..Default::default()
        };
        self.0.set_regs(&regs).unwrap();
    }
}

/// Makes a slot by hand, of this region, as a part of the VMM that knows nothing of `KvmSlots`;
/// says KVM's answer.
pub(crate) fn set_by_hand(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionShm,
    flags: u32,
) -> Result<(), i32> {
    set(vm, slot, region, region.len(), flags)
}

/// Removes a slot by hand, wherever it comes from.
pub(crate) fn remove_by_hand(vm: &VmFd, slot: u32, region: &GuestRegionShm) -> Result<(), i32> {
    set(vm, slot, region, 0, 0)
}

fn set(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionShm,
    memory_size: u64,
    flags: u32,
) -> Result<(), i32> {
    assert!(region.len().is_multiple_of(PAGE));
    let slot = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().0,
        memory_size,
        userspace_addr: region.as_ptr().addr() as u64,
    };
    // SAFETY: the slot is inside the region's mapping, which is guest RAM. The tests keep the
    // region as long as the VM runs.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|error| error.errno())
}
