//! Where a hypervisor writes a dirty log.

use std::fmt;

use super::error::{KvmError, Result};
use crate::mapping::{GuardedWords, to_usize};

/// The most pages that a slot can have: KVM_MEM_MAX_NR_PAGES of linux/kvm_host.h.
pub(super) const MAX_PAGES: u64 = (1 << 31) - 1;

/// Where a hypervisor writes the dirty log of one slot: a bit per page, in 64-bit words, the
/// lowest bit of the first word for the first page.
///
/// KVM_GET_DIRTY_LOG is not told how large the bitmap is: KVM writes a bit for each page that the
/// slot has, and the last change of the slot decides how many these are. So the words of a
/// buffer end where 256 MiB of inaccessible address space begin, which is as much as KVM ever
/// writes. A log that is longer than the buffer is EFAULT, and reaches nothing else of this
/// process.
///
/// ```no_run
/// # use std::sync::Arc;
/// use guest_memory_shm::{KvmSlots, LogBuffer};
/// use kvm_ioctls::Kvm;
///
/// let slots = KvmSlots::new(Arc::new(Kvm::new()?.create_vm()?))?;
/// for slot in slots.slots() {
///     let mut log = LogBuffer::new(slot.range().size() / 4096)?;
///     slots.vm().dirty_log(&slot.mapping(), &mut log)?;
///     println!("{:?}", log.words());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LogBuffer {
    memory: GuardedWords,
    /// How many words there are for the slot.
    count: usize,
}

/// The most that KVM writes: a bit for each page of the largest slot.
const GUARD: usize = to_usize((MAX_PAGES + 1) / 8);

impl LogBuffer {
    /// For a slot with so many pages. No page counts as written.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoLogBuffer`] if there is no address space or no memory for it.
    pub fn new(pages: u64) -> Result<Self> {
        let count = to_usize(pages.div_ceil(64));
        let memory = GuardedWords::new(count, GUARD);
        let memory = memory.map_err(|source| KvmError::NoLogBuffer { pages, source })?;
        Ok(Self { memory, count })
    }

    /// Makes it one for a slot with so many pages, none of which counts as written.
    ///
    /// If that is refused, it is what it was.
    pub(super) fn begin(&mut self, pages: u64) -> Result<()> {
        let count = to_usize(pages.div_ceil(64));
        if count > self.memory.capacity() {
            *self = Self::new(pages)?;
            return Ok(());
        }
        self.count = count;
        self.words_mut().fill(0);
        Ok(())
    }

    /// The words: one per 64 pages, the last for the rest.
    pub fn words(&self) -> &[u64] {
        self.memory.last(self.count)
    }

    /// The words, to be written. The memory past them is inaccessible for 256 MiB.
    pub fn words_mut(&mut self) -> &mut [u64] {
        self.memory.last_mut(self.count)
    }
}

impl fmt::Debug for LogBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogBuffer")
            .field("words", &self.count)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_a_bit_per_page_and_forgets_what_was_in_it() {
        let mut log = LogBuffer::new(1).unwrap();
        for pages in [1, 64, 65, 1 << 20, 3, 512 * 64, 512 * 64 + 1] {
            log.begin(pages).unwrap();
            assert_eq!(log.words().len() as u64, pages.div_ceil(64));
            assert!(log.words().iter().all(|word| *word == 0), "{pages}");
            log.words_mut().fill(u64::MAX);
        }
    }

    #[test]
    fn a_buffer_that_cannot_be_had_leaves_the_old_one() {
        let mut log = LogBuffer::new(100).unwrap();
        log.words_mut().copy_from_slice(&[1, 2]);
        let error = log.begin(u64::MAX).unwrap_err();
        assert!(error.to_string().contains("RLIMIT_AS"), "{error}");
        assert!(matches!(
            error,
            KvmError::NoLogBuffer {
                pages: u64::MAX,
                ..
            }
        ));
        assert_eq!(log.words(), [1, 2]);
    }

    #[test]
    fn the_guard_is_as_long_as_the_longest_log() {
        assert_eq!(GUARD, 256 << 20);
    }
}
