//! Memory for answers of the kernel whose length the kernel chooses.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;

use nix::errno::Errno;
use nix::sys::mman::{ProtFlags, mprotect};

use super::span::{Span, to_usize};
use crate::backing::base_page_size;

/// Words of private memory, and inaccessible address space from the end of the last word on: a
/// kernel that writes more than the words gets a fault (EFAULT), and reaches nothing of ours.
pub(crate) struct GuardedWords {
    /// The words, in whole pages, and the guard.
    reserved: Span,
    /// The part with the words.
    window: Span,
}

// SAFETY: it owns its range of the address space, which belongs to the process, not to a thread.
// The words are reached through references to it only.
unsafe impl Send for GuardedWords {}
// SAFETY: as above; a shared reference gives shared access to plain integers.
unsafe impl Sync for GuardedWords {}

impl GuardedWords {
    /// Room for `words` words, all 0, and a guard of `guard` bytes, a multiple of the page size.
    ///
    /// # Errors
    ///
    /// The system's answer, if there is no address space or no memory for it.
    pub(crate) fn new(words: usize, guard: usize) -> io::Result<Self> {
        let page = to_usize(base_page_size());
        let len = words.max(1).checked_mul(size_of::<u64>());
        let len = len.and_then(|len| len.checked_next_multiple_of(page));
        let all = len
            .and_then(|len| len.checked_add(guard))
            .and_then(NonZeroUsize::new);
        let (Some(len), Some(all)) = (len, all) else {
            return Err(Errno::ENOMEM.into());
        };
        let reserved = Span::reserve(all)?;
        let this = Self {
            reserved,
            window: reserved.part(0, len),
        };
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: these are pages of the reservation, which nothing else knows of.
        unsafe { mprotect(reserved.start, len, access) }?;
        Ok(this)
    }

    /// How many words there are.
    pub(crate) fn capacity(&self) -> usize {
        self.window.len.get() / size_of::<u64>()
    }

    /// The last `count` words, which end where the guard begins; all, if there are no more.
    pub(crate) fn last(&self, count: usize) -> &[u64] {
        let count = count.min(self.capacity());
        // SAFETY: the last `count` words of the window, which is readable and writable, page
        // aligned, as long as `self` lives, and was zeroed by the kernel. `&self` rules out a
        // writer.
        unsafe { std::slice::from_raw_parts(self.address_of(count), count) }
    }

    /// As [`last`](Self::last), to write them.
    pub(crate) fn last_mut(&mut self, count: usize) -> &mut [u64] {
        let count = count.min(self.capacity());
        // SAFETY: as in `last`; `&mut self` rules out all other references.
        unsafe { std::slice::from_raw_parts_mut(self.address_of(count), count) }
    }

    /// The first of the last `count` words, of which there are so many.
    fn address_of(&self, count: usize) -> *mut u64 {
        let words = self.window.start.as_ptr().cast::<u64>();
        words.wrapping_add(self.capacity() - count)
    }
}

impl Drop for GuardedWords {
    fn drop(&mut self) {
        self.reserved.unmap();
    }
}

impl fmt::Debug for GuardedWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuardedWords({})", self.capacity())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::libc;

    use super::*;

    const GUARD: usize = 1 << 20;

    /// Has the kernel write `len` zeroes to the last words from `count` on.
    fn kernel_writes(words: &mut GuardedWords, count: usize, len: usize) -> io::Result<usize> {
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let to = words.last_mut(count).as_mut_ptr();
        // SAFETY: the words are ours, and what lies past them is inaccessible for 1 MiB.
        let answer = unsafe { libc::read(zero.as_raw_fd(), to.cast(), len) };
        usize::try_from(answer).map_err(|_| io::Error::last_os_error())
    }

    #[test]
    fn the_kernel_can_write_the_words_and_nothing_past_them() {
        for count in [1, 7, 511, 512, 513, 5000] {
            let mut words = GuardedWords::new(count, GUARD).unwrap();
            assert!(words.capacity() >= count);
            assert!(words.last(count).iter().all(|word| *word == 0));
            words.last_mut(count).fill(u64::MAX);
            assert_eq!(
                kernel_writes(&mut words, count, count * 8).unwrap(),
                count * 8
            );
            assert!(words.last(count).iter().all(|word| *word == 0));
            // It stops at the last word, however much it was to write.
            words.last_mut(count).fill(u64::MAX);
            let written = kernel_writes(&mut words, count, GUARD);
            assert!(written.is_err() || written.unwrap() <= count * 8);
        }
    }

    #[test]
    fn what_is_too_large_is_refused() {
        for (words, guard) in [(usize::MAX, GUARD), (1, usize::MAX), (1 << 58, GUARD)] {
            let error = GuardedWords::new(words, guard).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        }
    }
}
