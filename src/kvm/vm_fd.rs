//! KVM as the hypervisor.
#![expect(
    unsafe_code,
    reason = "KVM is given host addresses, and KVM_CLEAR_DIRTY_LOG is not in kvm-ioctls"
)]

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};

use super::hypervisor::{HypervisorVm, SlotMapping};
use super::log_buffer::LogBuffer;
use crate::host::base_page_size;

/// linux/kvm.h's requests, which the macros make functions of.
mod ioctls {
    use super::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log};

    // kvm-ioctls has this one too, with a bitmap as large as its caller believes the slot to be.
    nix::ioctl_write_ptr!(get, KVMIO, 0x42, kvm_dirty_log);
    // _IOWR, though nothing is written.
    nix::ioctl_readwrite!(clear, KVMIO, 0xc0, kvm_clear_dirty_log);
}

// SAFETY: KVM_SET_USER_MEMORY_REGION waits until no vCPU uses the translations of what it removes,
// and a refused one changes nothing. KVM maps the range that it is told; KVM_MEM_READONLY maps it
// for reading. KVM_GET_DIRTY_LOG writes a bit per page of the slot, of which KVM has at most
// 2^31 - 1: 256 MiB.
unsafe impl HypervisorVm for VmFd {
    unsafe fn set_slot(&self, slot: &SlotMapping) -> io::Result<()> {
        let region = region(slot, slot.range().size());
        // SAFETY: the caller keeps the memory mapped and makes no reference to it.
        unsafe { self.set_user_memory_region(region) }.map_err(io::Error::from)
    }

    fn remove_slot(&self, slot: &SlotMapping) -> io::Result<()> {
        // SAFETY: size 0 takes memory away from the guest, and gives it none.
        unsafe { self.set_user_memory_region(region(slot, 0)) }.map_err(io::Error::from)
    }

    fn dirty_log(&self, slot: &SlotMapping, log: &mut LogBuffer) -> io::Result<()> {
        let bitmap = log.words_mut().as_mut_ptr().cast();
        let request = kvm_dirty_log {
            slot: slot.number(),
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bitmap,
            },
        };
        // SAFETY: the descriptor is open as long as `self` lives, and the request is what this
        // call reads. KVM writes to the bitmap as many bits as the slot has pages, which the
        // caller may be wrong about: at most 256 MiB, and past the words of the buffer all of that
        // faults.
        unsafe { ioctls::get(self.as_raw_fd(), &raw const request) }?;
        Ok(())
    }

    fn clear_dirty_log(
        &self,
        slot: &SlotMapping,
        first_page: u64,
        bits: &[u64],
    ) -> io::Result<()> {
        let pages = cleared_pages(slot, first_page, bits.len())?;
        let mut request = kvm_clear_dirty_log {
            slot: slot.number(),
            num_pages: pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the descriptor is open as long as `self` lives. KVM reads `num_pages` bits in
        // whole words, which `bits` has, and writes nothing, neither there nor to the request.
        unsafe { ioctls::clear(self.as_raw_fd(), &raw mut request) }?;
        Ok(())
    }

    fn max_slots(&self) -> u32 {
        u32::try_from(self.check_extension_int(Cap::NrMemslots)).unwrap_or(0)
    }

    fn has_read_only(&self) -> bool {
        self.check_extension(Cap::ReadonlyMem)
    }
}

fn region(slot: &SlotMapping, memory_size: u64) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot: slot.number(),
        flags: slot.flags().bits(),
        guest_phys_addr: slot.range().start_addr().0,
        memory_size,
        userspace_addr: slot.host_addr().addr() as u64,
    }
}

/// How many pages so many words are about: KVM wants a multiple of 64, or all up to the last page.
fn cleared_pages(slot: &SlotMapping, first_page: u64, words: usize) -> io::Result<u32> {
    let rest = (slot.range().size() / base_page_size()).checked_sub(first_page);
    let words = words as u64;
    let fits = |rest: &u64| first_page.is_multiple_of(64) && words <= rest.div_ceil(64);
    let pages = rest.filter(fits).map(|rest| rest.min(words * 64));
    let pages = pages.and_then(|pages| u32::try_from(pages).ok());
    pages.ok_or_else(|| {
        let problem = format!(
            "{words} words from page {first_page} on are not in the log of {slot:?}: begin at a \
             multiple of 64, and end with the slot"
        );
        io::Error::new(io::ErrorKind::InvalidInput, problem)
    })
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::kvm::SlotFlags;
    use crate::range::GuestRange;

    #[test]
    fn what_is_cleared_are_whole_words_or_all_up_to_the_end() {
        let range = GuestRange::new(GuestAddress(0), 130 * base_page_size()).unwrap();
        let slot = SlotMapping::new(0, range, NonNull::dangling(), SlotFlags::empty());
        let pages = |first, words| cleared_pages(&slot, first, words).ok();
        assert_eq!(pages(0, 1), Some(64));
        assert_eq!(pages(0, 2), Some(128));
        assert_eq!(pages(0, 3), Some(130));
        assert_eq!(pages(64, 2), Some(66));
        assert_eq!(pages(128, 1), Some(2));
        assert_eq!(pages(128, 0), Some(0));
        for (first, words) in [
            (0, 4),
            (1, 1),
            (63, 1),
            (64, 3),
            (128, 2),
            (192, 1),
            (u64::MAX, 1),
        ] {
            let error = cleared_pages(&slot, first, words).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(error.to_string().contains("multiple of 64"), "{error}");
        }
    }
}
