//! The guest: a vCPU in 32-bit mode, and the code that it runs.

use guest_memory_shm::{GuestRange, InvalidRange};
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestAddress;

use crate::failure::{Failure, OrFail, Result};

/// Where the code is put.
pub(crate) const CODE: GuestAddress = GuestAddress(0x1000);

/// Fills pages with a pattern: each 4 bytes hold the complement of their own address.
///
/// edi: the first page; edx: bytes from one page to the next; esi: how many pages.
pub(crate) const PROGRAM: [u8; 25] = [
    0xb9, 0x00, 0x04, 0x00, 0x00, // page: mov ecx, 1024 (words of a page)
    0x89, 0xfb, //       mov ebx, edi
    0x89, 0xd8, // word: mov eax, ebx
    0xf7, 0xd0, //       not eax
    0x89, 0x03, //       mov [ebx], eax
    0x83, 0xc3, 0x04, //       add ebx, 4
    0x49, //       dec ecx
    0x75, 0xf4, //       jnz word
    0x01, 0xd7, //       add edi, edx
    0x4e, //       dec esi
    0x75, 0xe8, //       jnz page
    0xf4, //       hlt
];

/// The size of a page, for the guest and for KVM's dirty log.
pub(crate) const PAGE: u32 = 4096;

/// The pages that the guest is to write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages {
    pub(crate) first: u32,
    pub(crate) stride: u32,
    pub(crate) count: u32,
}

impl Pages {
    /// The guest addresses of the pages.
    pub(crate) fn starts(self) -> impl Iterator<Item = u32> {
        (0..self.count).map(move |page| self.first + page * self.stride)
    }

    /// Neighbours together.
    pub(crate) fn ranges(self) -> Result<Vec<GuestRange>> {
        let mut sizes: Vec<(u32, u32)> = Vec::new();
        for start in self.starts() {
            match sizes.last_mut() {
                Some((last, size)) if *last + *size == start => *size += PAGE,
                _ => sizes.push((start, PAGE)),
            }
        }
        let range =
            |(start, size): (u32, u32)| GuestRange::new(GuestAddress(start.into()), size.into());
        let ranges: std::result::Result<_, InvalidRange> = sizes.into_iter().map(range).collect();
        ranges.or_fail(|| "the guest has no such pages")
    }

    /// What the guest's code makes of the page at `start`, computed here once more.
    pub(crate) fn pattern(start: u32) -> Vec<u8> {
        let words = (start..start + PAGE).step_by(4);
        words.flat_map(|addr| (!addr).to_le_bytes()).collect()
    }
}

/// Why the guest's code came back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It has written all pages.
    Done,
    /// It wrote where it has no RAM that it may write.
    NoRam(GuestAddress),
}

/// The vCPU.
pub(crate) struct Guest(VcpuFd);

impl Guest {
    /// A vCPU in protected mode without paging, its segments flat: it reaches 4 GiB.
    pub(crate) fn new(vm: &VmFd) -> Result<Self> {
        let doing = || "cannot make a vCPU";
        let vcpu = vm.create_vcpu(0).or_fail(doing)?;
        let mut sregs = vcpu.get_sregs().or_fail(doing)?;
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            // Code that can be read, present, of 32 bits, the limit in pages.
            type_: 0xb,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: 16,
            // Data that can be written.
            type_: 3,
            ..code
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        // Protection enable.
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).or_fail(doing)?;
        Ok(Self(vcpu))
    }

    /// Runs the code until it is done, or misses RAM.
    pub(crate) fn write(&mut self, pages: Pages) -> Result<Exit> {
        let doing = || "cannot run the guest";
        let regs = kvm_regs {
            rip: CODE.0,
            rdi: pages.first.into(),
            rdx: pages.stride.into(),
            rsi: pages.count.into(),
            // The bit that is always set.
            rflags: 2,
            ..Default::default()
        };
        self.0.set_regs(&regs).or_fail(doing)?;
        match self.0.run().or_fail(doing)? {
            VcpuExit::Hlt => Ok(Exit::Done),
            VcpuExit::MmioWrite(addr, _) => {
                self.complete();
                Ok(Exit::NoRam(GuestAddress(addr)))
            }
            exit => Err(Failure::new(format!("the guest came back with {exit:?}"))),
        }
    }

    /// For KVM a write by MMIO is over when the vCPU is entered again: enters it and comes
    /// straight back (EINTR).
    fn complete(&mut self) {
        self.0.set_kvm_immediate_exit(1);
        let _ = self.0.run();
        self.0.set_kvm_immediate_exit(0);
    }
}
