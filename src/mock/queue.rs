//! The driver's side of a split virtqueue: descriptors, the avail ring and the used ring.

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::{RawDescriptor, split};
use vm_memory::{AtomicAccess, ByteValued, Bytes, GuestAddress, GuestAddressSpace};

use super::blk_error::BlkError;
use super::ring::{
    AVAIL_HEADER_SIZE, DESCRIPTOR_SIZE, INDEX_OFFSET, RingLayout, USED_ENTRY_SIZE,
    USED_HEADER_SIZE,
};

#[expect(clippy::cast_possible_truncation, reason = "the value is 1")]
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The flag of a buffer that the device writes.
#[expect(clippy::cast_possible_truncation, reason = "the value is 2")]
pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;

type Result<T> = std::result::Result<T, BlkError>;

/// One buffer of a chain: address, length in bytes, flags.
pub(super) type Part = (GuestAddress, u32, u16);

#[derive(Debug)]
pub(super) struct DriverQueue<S> {
    memory: S,
    layout: RingLayout,
    size: u16,
    /// Descriptors that belong to no chain.
    free: Vec<u16>,
    /// The descriptors of the chains in flight, by the first of them.
    chains: BTreeMap<u16, Vec<u16>>,
    /// The index that the avail ring gets with the next chain.
    next_avail: u16,
    /// The index of the used ring up to which completions have been taken.
    next_used: u16,
}

impl<S: GuestAddressSpace> DriverQueue<S> {
    /// A queue of `size` descriptors at `layout`, neither checked nor zeroed yet.
    pub(super) fn new(memory: S, layout: RingLayout, size: u16) -> DriverQueue<S> {
        DriverQueue {
            memory,
            layout,
            size,
            free: Vec::new(),
            chains: BTreeMap::new(),
            next_avail: 0,
            next_used: 0,
        }
    }

    pub(super) fn layout(&self) -> RingLayout {
        self.layout
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn used_index(&self) -> u16 {
        self.next_used
    }

    pub(super) fn in_flight(&self) -> usize {
        self.chains.len()
    }

    /// Zeroes the whole layout and forgets the chains.
    pub(super) fn reset(&mut self) -> Result<()> {
        let mut addr = self.layout.descriptors;
        let end = addr.0 + self.layout.size;
        while addr.0 < end {
            let step = (end - addr.0).min(DESCRIPTOR_SIZE);
            let zeros = &[0; 16][..usize::try_from(step).unwrap_or(16)];
            self.put_slice(zeros, addr)?;
            addr.0 += step;
        }
        self.free = (0..self.size).rev().collect();
        self.chains.clear();
        self.next_avail = 0;
        self.next_used = 0;
        Ok(())
    }

    /// The first descriptor of the next chain, which will have `needed` parts.
    pub(super) fn next_head(&self, needed: usize) -> Result<u16> {
        let free = self.free.len();
        let first = free.checked_sub(needed);
        first
            .and_then(|first| self.free.get(first).copied())
            .ok_or(BlkError::QueueFull { needed, free })
    }

    /// Makes a chain of `parts` available. Its first descriptor is `next_head`'s answer.
    pub(super) fn publish(&mut self, parts: &[Part]) -> Result<()> {
        let head = self.next_head(parts.len())?;
        // They stay free until everything is written: an error must not lose them.
        let first = self.free.len() - parts.len();
        let descriptors = self.free[first..].to_vec();
        for (index, (addr, length, flags)) in parts.iter().enumerate() {
            let (flags, next) = match descriptors.get(index + 1) {
                Some(next) => (flags | NEXT, *next),
                None => (*flags, 0),
            };
            let descriptor = split::Descriptor::new(addr.0, *length, flags, next);
            let at = u64::from(descriptors[index]) * DESCRIPTOR_SIZE;
            let raw = RawDescriptor::from(descriptor);
            self.put_slice(raw.as_slice(), place(self.layout.descriptors, at))?;
        }

        let slot = u64::from(self.next_avail % self.size);
        let entry = place(self.layout.avail, AVAIL_HEADER_SIZE + slot * 2);
        self.store(head.to_le(), entry, Ordering::Relaxed)?;
        let next_avail = self.next_avail.wrapping_add(1);
        let index = place(self.layout.avail, INDEX_OFFSET);
        // Release: a device that sees the index sees the chain and what the caller wrote before.
        self.store(next_avail.to_le(), index, Ordering::Release)?;
        self.next_avail = next_avail;
        self.free.truncate(first);
        self.chains.insert(head, descriptors);
        Ok(())
    }

    /// Whether the device asks to be woken for what was published.
    pub(super) fn wants_kick(&self) -> Result<bool> {
        // The index must be out before the device's wish is read: it writes its wish before it
        // looks at the index for the last time, so that one of the two sees the other.
        fence(Ordering::SeqCst);
        let wish = u16::from_le(self.load(self.layout.used, Ordering::Relaxed)?);
        Ok(u32::from(wish) & VRING_USED_F_NO_NOTIFY == 0)
    }

    /// The first descriptor of the next chain that the device has completed.
    pub(super) fn take_completed(&mut self) -> Result<Option<u16>> {
        // Acquire: a reader of the index sees the entries, the status bytes and the data.
        let index_addr = place(self.layout.used, INDEX_OFFSET);
        let index = u16::from_le(self.load(index_addr, Ordering::Acquire)?);
        let completed = usize::from(index.wrapping_sub(self.next_used));
        if completed == 0 {
            return Ok(None);
        }
        if completed > self.chains.len() {
            return Err(BlkError::BrokenRing(format!(
                "it completed {completed} requests, {} are in flight",
                self.chains.len()
            )));
        }
        let slot = u64::from(self.next_used % self.size);
        let entry = place(self.layout.used, USED_HEADER_SIZE + slot * USED_ENTRY_SIZE);
        let id = u32::from_le(self.load(entry, Ordering::Relaxed)?);
        let chain = u16::try_from(id)
            .ok()
            .and_then(|head| self.chains.remove_entry(&head));
        let Some((head, descriptors)) = chain else {
            return Err(BlkError::BrokenRing(format!(
                "it completed chain {id}, which is not in flight"
            )));
        };
        self.next_used = self.next_used.wrapping_add(1);
        self.free.extend(descriptors);
        Ok(Some(head))
    }

    pub(super) fn put_slice(&self, bytes: &[u8], addr: GuestAddress) -> Result<()> {
        let memory = self.memory.memory();
        let written = memory.write_slice(bytes, addr);
        written.map_err(|source| BlkError::Memory { addr, source })
    }

    pub(super) fn load<T: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<T> {
        let memory = self.memory.memory();
        let loaded = memory.load(addr, order);
        loaded.map_err(|source| BlkError::Memory { addr, source })
    }

    fn store<T: AtomicAccess>(&self, value: T, addr: GuestAddress, order: Ordering) -> Result<()> {
        let memory = self.memory.memory();
        let stored = memory.store(value, addr, order);
        stored.map_err(|source| BlkError::Memory { addr, source })
    }
}

/// The driver's constructor has checked that the whole layout fits the address space.
pub(super) fn place(base: GuestAddress, offset: u64) -> GuestAddress {
    GuestAddress(base.0 + offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    const LENGTH: u32 = 512;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn queue(memory: &GuestMemoryMmap) -> DriverQueue<&GuestMemoryMmap> {
        let layout = RingLayout::at(GuestAddress(0), 8);
        let mut queue = DriverQueue::new(memory, layout, 8);
        queue.reset().unwrap();
        queue
    }

    /// Writes a completion of chain `id` to the used ring as a device would.
    fn complete(queue: &DriverQueue<&GuestMemoryMmap>, index: u16, id: u32) {
        let slot = u64::from(index % queue.size);
        let entry = place(queue.layout.used, 4 + slot * 8);
        queue.put_slice(&id.to_le_bytes(), entry).unwrap();
        let next = index.wrapping_add(1);
        queue
            .store(next, place(queue.layout.used, 2), Ordering::Release)
            .unwrap();
    }

    #[test]
    fn the_indices_wrap_around() {
        let memory = memory();
        let mut queue = queue(&memory);
        let start = u16::MAX - 2;
        queue.next_avail = start;
        queue.next_used = start;
        let used_index = place(queue.layout.used, 2);
        queue.store(start, used_index, Ordering::Relaxed).unwrap();
        for round in 0..10 {
            let index = start.wrapping_add(round);
            let head = queue.next_head(2).unwrap();
            let part = (GuestAddress(0x8000), LENGTH, 0);
            queue.publish(&[part, part]).unwrap();
            let published: u16 = memory
                .load(place(queue.layout.avail, 2), Ordering::Relaxed)
                .unwrap();
            assert_eq!(published, index.wrapping_add(1));
            assert_eq!(queue.take_completed().unwrap(), None);
            complete(&queue, index, u32::from(head));
            assert_eq!(queue.take_completed().unwrap(), Some(head));
        }
        assert_eq!(queue.used_index(), 7);
        assert_eq!((queue.in_flight(), queue.free.len()), (0, 8));
    }

    #[test]
    fn a_device_that_asks_for_no_kick_gets_none() {
        let memory = memory();
        let queue = queue(&memory);
        assert!(queue.wants_kick().unwrap());
        memory.write_obj(1u16, queue.layout.used).unwrap();
        assert!(!queue.wants_kick().unwrap());
    }

    #[test]
    fn a_lying_device_is_an_error_and_not_a_panic() {
        let memory = memory();
        for (index, id) in [(1, 7), (0, 5), (0, 0x1_0000), (0x8000, 7)] {
            let mut queue = queue(&memory);
            queue.publish(&[(GuestAddress(0x8000), LENGTH, 0)]).unwrap();
            complete(&queue, index, id);
            let error = queue.take_completed().unwrap_err();
            assert!(matches!(error, BlkError::BrokenRing(_)), "{error}");
        }
    }

    #[test]
    fn a_chain_that_cannot_be_written_leaves_the_queue_as_it_was() {
        let small: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x100)]).unwrap();
        let layout = RingLayout::at(GuestAddress(0), 8);
        let mut queue = DriverQueue::new(&small, layout, 8);
        queue.free = (0..8).collect();
        queue.next_avail = 60;
        queue.layout.avail = GuestAddress(0xff);
        let error = queue.publish(&[(GuestAddress(0), 1, 0)]).unwrap_err();
        assert!(matches!(error, BlkError::Memory { .. }), "{error}");
        assert_eq!((queue.free.len(), queue.in_flight()), (8, 0));
        assert_eq!(queue.next_avail, 60);
    }
}
