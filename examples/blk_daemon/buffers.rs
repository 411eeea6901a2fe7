//! The pieces of guest RAM that a request names.

use std::fs::File;
use std::io::{self, ErrorKind};

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// Buffers of one direction, in their order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers {
    parts: Vec<(GuestAddress, u32)>,
}

impl Buffers {
    pub(crate) fn push(&mut self, addr: GuestAddress, len: u32) {
        self.parts.push((addr, len));
    }

    /// Bytes in all of them.
    pub(crate) fn len(&self) -> u64 {
        self.parts.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Takes the first `len` bytes away, or all if there are fewer.
    pub(crate) fn take_front(&mut self, len: u64) -> Buffers {
        let mut front = Buffers::default();
        let mut rest = Buffers::default();
        let mut left = len;
        for (addr, len) in self.parts.drain(..) {
            let step = u32::try_from(left).map_or(len, |left| left.min(len));
            left -= u64::from(step);
            if step > 0 {
                front.push(addr, step);
            }
            if step < len {
                // Where it leaves the address space it is not in guest memory, which is checked.
                let addr = GuestAddress(addr.0.wrapping_add(u64::from(step)));
                rest.push(addr, len - step);
            }
        }
        *self = rest;
        front
    }

    /// Takes the last byte away and tells where it is.
    pub(crate) fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let (addr, len) = self.parts.iter_mut().rfind(|(_, len)| *len > 0)?;
        *len -= 1;
        Some(GuestAddress(addr.0.checked_add(u64::from(*len))?))
    }

    /// Whether all of it is guest memory.
    pub(crate) fn are_in(&self, memory: &impl GuestMemory) -> bool {
        self.parts.iter().all(|(addr, len)| {
            addr.0.checked_add(u64::from(*len)).is_some()
                && memory.check_range(*addr, *len as usize, Permissions::ReadWrite)
        })
    }

    /// Fills `target`, which must have as many bytes.
    pub(crate) fn read(&self, memory: &impl GuestMemory, target: &mut [u8]) -> io::Result<()> {
        let mut rest = target;
        for (addr, len) in &self.parts {
            let split = rest.split_at_mut_checked(*len as usize);
            let (part, after) = split.ok_or(ErrorKind::InvalidInput)?;
            memory.read_slice(part, *addr).map_err(io::Error::other)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes `source`, which must have as many bytes.
    pub(crate) fn write(&self, memory: &impl GuestMemory, source: &[u8]) -> io::Result<()> {
        let mut rest = source;
        for (addr, len) in &self.parts {
            let split = rest.split_at_checked(*len as usize);
            let (part, after) = split.ok_or(ErrorKind::InvalidInput)?;
            memory.write_slice(part, *addr).map_err(io::Error::other)?;
            rest = after;
        }
        Ok(())
    }

    /// Fills them from `file`, at its position.
    pub(crate) fn fill_from(&self, memory: &impl GuestMemory, mut file: &File) -> io::Result<()> {
        for (addr, len) in &self.parts {
            memory
                .read_exact_volatile_from(*addr, &mut file, *len as usize)
                .map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Writes them to `file`, at its position.
    pub(crate) fn drain_to(&self, memory: &impl GuestMemory, mut file: &File) -> io::Result<()> {
        for (addr, len) in &self.parts {
            memory
                .write_all_volatile_to(*addr, &mut file, *len as usize)
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
}
