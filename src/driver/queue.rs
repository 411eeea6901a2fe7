//! The queue: chains go out by the avail ring and come back by the used ring.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, AtomicAccess, ByteValued, Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::error::QueueError;
use super::layout::{
    ALIGNMENT, AVAIL_ENTRY_SIZE, DESCRIPTOR_SIZE, INDEX_OFFSET, QueueLayout, RING_HEADER_SIZE,
    USED_ENTRY_SIZE,
};

#[expect(clippy::cast_possible_truncation, reason = "the value is 1")]
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
#[expect(clippy::cast_possible_truncation, reason = "the value is 2")]
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

type Result<T> = std::result::Result<T, QueueError>;

/// A chain of buffers that is or was on a queue.
///
/// ```
/// use guest_memory_shm::driver::DriverQueue;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
/// let mut queue = DriverQueue::new(&memory, GuestAddress(0x1000), 16)?;
/// let head = queue.add(&[(GuestAddress(0x8000), 16)], &[(GuestAddress(0x9000), 512)])?;
/// let chains = queue.reset()?;
/// assert_eq!((chains[0].head, chains[0].writable_bytes()), (head, 512));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Chain {
    /// Its first descriptor, by which both ends name it. No other chain in flight has the same;
    /// chains that come later may.
    pub head: u16,
    /// The buffers that the device reads: guest address and bytes.
    pub readable: Vec<(GuestAddress, u32)>,
    /// The buffers that the device writes, after those that it reads.
    pub writable: Vec<(GuestAddress, u32)>,
}

impl Chain {
    /// Bytes of the buffers that the device writes.
    pub fn writable_bytes(&self) -> u64 {
        let lengths = self.writable.iter().map(|(_, length)| u64::from(*length));
        lengths.sum()
    }
}

/// A chain that the device has completed.
///
/// ```no_run
/// use guest_memory_shm::driver::Completion;
///
/// /// The device may lie: at most as many bytes as it was given room for.
/// fn answer_bytes(done: &Completion) -> u64 {
///     u64::from(done.written).min(done.chain.writable_bytes())
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completion {
    /// What was completed. Its descriptors are free again.
    pub chain: Chain,
    /// Bytes that the device says it wrote to the writable buffers, from their start on. It is not
    /// checked: many devices count wrongly, and most drivers do not look.
    pub written: u32,
}

#[derive(Debug)]
struct InFlight {
    chain: Chain,
    /// One per buffer, in the order of the chain.
    descriptors: Vec<u16>,
    /// How many chains had been added before it.
    order: u64,
}

/// A driver's end of a split virtqueue in guest memory.
///
/// `memory` is anything that leads to a `GuestMemory`: a reference, an `Arc`, or what sees
/// hotplug, a [`PublishedMemory`](crate::PublishedMemory) or a
/// [`GuestMemoryAtomic`](vm_memory::GuestMemoryAtomic).
///
/// The device is told of the [layout](Self::layout), the [size](Self::size), the index where it
/// begins ([`used_index`](Self::used_index)) and the two eventfds.
///
/// ```
/// use guest_memory_shm::driver::DriverQueue;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
/// let mut queue = DriverQueue::new(&memory, GuestAddress(0x1000), 16)?;
/// let head = queue.add(&[], &[(GuestAddress(0x8000), 512)])?;
/// assert!(queue.notify()?); // the device wants to be woken
/// assert_eq!(queue.poll()?, None); // it has not completed anything yet
///
/// // What a device does: one used entry (head, bytes written), then the index.
/// let used = queue.layout().used;
/// memory.write_obj([u32::from(head), 512], GuestAddress(used.0 + 4))?;
/// memory.write_obj(1_u16, GuestAddress(used.0 + 2))?;
/// let done = queue.poll()?.expect("the device has completed the chain");
/// assert_eq!((done.chain.head, done.written, queue.in_flight()), (head, 512, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DriverQueue<S> {
    memory: S,
    /// Wholly in the address space: sums of its addresses and offsets in it do not overflow.
    layout: QueueLayout,
    size: u16,
    kick: EventFd,
    call: EventFd,
    /// Watches `call`.
    epoll: Epoll,
    /// Descriptors that belong to no chain.
    free: Vec<u16>,
    /// By their heads.
    in_flight: BTreeMap<u16, InFlight>,
    /// Chains that were ever added.
    added: u64,
    /// The index that the avail ring gets with the next chain.
    next_avail: u16,
    /// The index of the used ring up to which completions have been taken.
    next_used: u16,
}

impl<S: GuestAddressSpace> DriverQueue<S> {
    /// A queue of `size` descriptors at `addr`, which takes [`QueueLayout::required_size`] bytes
    /// from there on; they are zeroed.
    ///
    /// # Errors
    /// - [`QueueError::Size`]: `size` is no power of two.
    /// - [`QueueError::Place`]: `addr` is not aligned to 16 bytes or the queue is not wholly in
    ///   guest memory.
    /// - [`QueueError::Event`]: no descriptors for the eventfds.
    pub fn new(memory: S, addr: GuestAddress, size: u16) -> Result<Self> {
        if !size.is_power_of_two() {
            return Err(QueueError::Size(size));
        }
        let layout = QueueLayout::at(addr, size);
        let misplaced = QueueError::Place {
            addr,
            size: layout.size,
        };
        if !addr.0.is_multiple_of(ALIGNMENT) || addr.0.checked_add(layout.size).is_none() {
            return Err(misplaced);
        }
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(QueueError::Event);
        let mut queue = DriverQueue {
            memory,
            layout,
            size,
            kick: eventfd()?,
            call: eventfd()?,
            epoll: Epoll::new().map_err(QueueError::Event)?,
            free: Vec::new(),
            in_flight: BTreeMap::new(),
            added: 0,
            next_avail: 0,
            next_used: 0,
        };
        let readable = EpollEvent::new(EventSet::IN, 0);
        queue
            .epoll
            .ctl(ControlOperation::Add, queue.call.as_raw_fd(), readable)
            .map_err(QueueError::Event)?;
        queue.reset().map_err(|_| misplaced)?;
        Ok(queue)
    }

    /// The memory that it lies in.
    pub fn memory(&self) -> &S {
        &self.memory
    }

    /// Where its parts lie.
    pub fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The eventfd by which the driver wakes the device; non-blocking.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd by which the device wakes the driver; non-blocking. For an event loop, which
    /// reads it and then [polls](Self::poll) until there is nothing; [`wait`](Self::wait) does
    /// both by itself.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// How many chains have been added and not taken back.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// How many descriptors belong to no chain.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// The index up to which completions have been taken: where a device that knows nothing of
    /// this queue has to begin.
    pub fn used_index(&self) -> u16 {
        self.next_used
    }

    /// The head that the next chain of `buffers` buffers gets: for those who place a header by it.
    ///
    /// # Errors
    /// [`QueueError::EmptyChain`], [`QueueError::ChainTooLong`], [`QueueError::Full`].
    pub fn next_head(&self, buffers: usize) -> Result<u16> {
        self.next_descriptors(buffers)?
            .first()
            .copied()
            .ok_or(QueueError::EmptyChain)
    }

    /// Makes a chain available to the device: of buffers that it reads, then of those that it
    /// writes, each a guest address and a number of bytes. The result is the chain's
    /// [head](Chain::head). The device is not woken: [`notify`](Self::notify).
    ///
    /// The buffers are not looked at: that they are in guest memory is for the device to check.
    ///
    /// # Errors
    /// The queue is as it was, after any of them.
    /// - As for [`next_head`](Self::next_head), and [`QueueError::EmptyBuffer`].
    /// - [`QueueError::Memory`]: the rings cannot be written.
    pub fn add(
        &mut self,
        readable: &[(GuestAddress, u32)],
        writable: &[(GuestAddress, u32)],
    ) -> Result<u16> {
        let mut buffers = readable.iter().chain(writable);
        if let Some((addr, _)) = buffers.find(|(_, length)| *length == 0) {
            return Err(QueueError::EmptyBuffer(*addr));
        }
        let needed = readable.len() + writable.len();
        let head = self.next_head(needed)?;
        // The descriptors stay free until everything is written: an error must not lose them.
        let added = InFlight {
            chain: Chain {
                head,
                readable: readable.to_vec(),
                writable: writable.to_vec(),
            },
            descriptors: self.next_descriptors(needed)?.to_vec(),
            order: self.added,
        };
        self.write_chain(&added, self.next_avail)?;
        let next_avail = self.next_avail.wrapping_add(1);
        self.publish(next_avail)?;
        self.next_avail = next_avail;
        self.added += 1;
        self.free.truncate(self.free.len() - needed);
        self.in_flight.insert(head, added);
        Ok(head)
    }

    /// Wakes the device for what was added, unless it asks not to be (`VRING_USED_F_NO_NOTIFY`).
    /// The result says whether it was woken.
    ///
    /// # Errors
    /// - [`QueueError::Memory`]: the used ring cannot be read.
    /// - [`QueueError::Event`]: the eventfd cannot be written.
    pub fn notify(&self) -> Result<bool> {
        // The index must be out before the device's wish is read: it writes its wish before it
        // looks at the index for the last time, so that one of the two sees the other.
        fence(Ordering::SeqCst);
        let wish = u16::from_le(self.load(self.layout.used, Ordering::Relaxed)?);
        let wanted = u32::from(wish) & VRING_USED_F_NO_NOTIFY == 0;
        match wanted.then(|| self.kick.write(1)) {
            // A counter that is full wakes the device as well.
            Some(Err(error)) if error.kind() != ErrorKind::WouldBlock => {
                Err(QueueError::Event(error))
            }
            _ => Ok(wanted),
        }
    }

    /// Takes the next chain that the device has completed, if there is one; in the order of the
    /// used ring. Does not wait.
    ///
    /// # Errors
    /// - [`QueueError::UsedIndex`], [`QueueError::UsedHead`]: the device wrote nonsense. Nothing
    ///   more is taken before a [reset](Self::reset).
    /// - [`QueueError::Memory`]: the used ring cannot be read.
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        let index = self.next_used;
        if self.not_taken()? == 0 {
            return Ok(None);
        }
        let slot = u64::from(index % self.size);
        let offset = RING_HEADER_SIZE + slot * USED_ENTRY_SIZE;
        let entry = self.layout.used.unchecked_add(offset);
        let head = u32::from_le(self.load(entry, Ordering::Relaxed)?);
        let written = u32::from_le(self.load(entry.unchecked_add(4), Ordering::Relaxed)?);
        let completed = u16::try_from(head)
            .ok()
            .and_then(|head| self.in_flight.remove(&head))
            .ok_or(QueueError::UsedHead { head, index })?;
        self.next_used = index.wrapping_add(1);
        self.free.extend(completed.descriptors);
        let chain = completed.chain;
        Ok(Some(Completion { chain, written }))
    }

    /// Takes the next completion, for which it waits at most `limit`.
    ///
    /// # Errors
    /// - [`QueueError::TimedOut`]: nothing was completed; it may be waited for again.
    /// - [`QueueError::NothingInFlight`]: nothing can be, at once.
    /// - [`QueueError::Event`]: the eventfd or the epoll failed.
    /// - As for [`poll`](Self::poll).
    pub fn wait(&mut self, limit: Duration) -> Result<Completion> {
        let deadline = Instant::now().checked_add(limit);
        loop {
            if let Some(completion) = self.poll()? {
                return Ok(completion);
            }
            if self.in_flight.is_empty() {
                return Err(QueueError::NothingInFlight);
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(QueueError::TimedOut {
                    limit,
                    in_flight: self.in_flight(),
                });
            }
            self.wait_for_call(left).map_err(QueueError::Event)?;
        }
    }

    /// Makes available again what is in flight, in the order in which it was added, for a device
    /// that begins at [`used_index`](Self::used_index). The result is the number of chains; heads
    /// and indices stay what they are. The device is not woken.
    ///
    /// For a device that died, when its successor is told nothing but that index. A device may
    /// complete chains in any order, so what the avail ring has from there on may be chains that
    /// were completed, and chains that were not may be before it. Only for a queue that no device
    /// serves, and not where the successor is given in-flight buffers: it knows by itself.
    ///
    /// ```
    /// use guest_memory_shm::driver::DriverQueue;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
    /// let mut queue = DriverQueue::new(&memory, GuestAddress(0x1000), 16)?;
    /// let buffer = [(GuestAddress(0x8000), 512)];
    /// let (first, second) = (queue.add(&buffer, &[])?, queue.add(&buffer, &[])?);
    ///
    /// // A device completes the second, and dies. Its successor would begin with the second.
    /// let (avail, used) = (queue.layout().avail, queue.layout().used);
    /// memory.write_obj([u32::from(second), 0], GuestAddress(used.0 + 4))?;
    /// memory.write_obj(1_u16, GuestAddress(used.0 + 2))?;
    /// while queue.poll()?.is_some() {}
    /// assert_eq!((queue.resubmit()?, queue.used_index()), (1, 1));
    /// assert_eq!(memory.read_obj::<u16>(GuestAddress(avail.0 + 4 + 2))?, first);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// It may be tried again after any of them.
    /// - [`QueueError::NotTaken`]: poll first, or what is completed would be carried out again.
    /// - [`QueueError::UsedIndex`]: as for [`poll`](Self::poll).
    /// - [`QueueError::Memory`]: the rings cannot be accessed.
    pub fn resubmit(&mut self) -> Result<usize> {
        match self.not_taken()? {
            0 => {}
            completions => return Err(QueueError::NotTaken(completions)),
        }
        let mut chains: Vec<_> = self.in_flight.values().collect();
        chains.sort_unstable_by_key(|chain| chain.order);
        // As many as there are indices from the one ring's to the other's.
        let mut index = self.next_used;
        for chain in &chains {
            self.write_chain(chain, index)?;
            index = index.wrapping_add(1);
        }
        self.publish(index)?;
        Ok(chains.len())
    }

    /// Zeroes the rings and begins anew at index 0. The result is what was in flight, in the order
    /// in which it was added: to be [added](Self::add) again, or given up.
    ///
    /// Only for a queue that no device serves. Completions that were not [polled](Self::poll)
    /// before count as in flight.
    ///
    /// # Errors
    /// [`QueueError::Memory`] where the rings are not in guest memory any more; what is in flight
    /// stays so.
    pub fn reset(&mut self) -> Result<Vec<Chain>> {
        let zeros = [0; 4096];
        let mut zeroed = 0;
        while zeroed < self.layout.size {
            let left = usize::try_from(self.layout.size - zeroed).unwrap_or(zeros.len());
            let step = &zeros[..left.min(zeros.len())];
            self.put_slice(step, self.layout.descriptors.unchecked_add(zeroed))?;
            zeroed += step.len() as u64;
        }
        let in_flight = std::mem::take(&mut self.in_flight);
        let mut chains: Vec<_> = in_flight.into_values().collect();
        chains.sort_unstable_by_key(|chain| chain.order);
        self.free = (0..self.size).rev().collect();
        self.next_avail = 0;
        self.next_used = 0;
        Ok(chains.into_iter().map(|chain| chain.chain).collect())
    }

    /// The descriptors of the next chain, one per buffer.
    fn next_descriptors(&self, needed: usize) -> Result<&[u16]> {
        let size = self.size;
        if needed > usize::from(size) {
            return Err(QueueError::ChainTooLong { needed, size });
        }
        let free = self.free.len();
        let first = free.checked_sub(needed);
        let first = first.ok_or(QueueError::Full { needed, free })?;
        Ok(&self.free[first..])
    }

    /// Completions on the used ring that have not been taken.
    fn not_taken(&self) -> Result<u16> {
        // Acquire: a reader of the index sees the entries and what the device wrote to buffers.
        let addr = self.layout.used.unchecked_add(INDEX_OFFSET);
        let index = u16::from_le(self.load(addr, Ordering::Acquire)?);
        let completions = index.wrapping_sub(self.next_used);
        match usize::from(completions) > self.in_flight() {
            true => Err(QueueError::UsedIndex {
                index,
                taken: self.next_used,
                in_flight: self.in_flight(),
            }),
            false => Ok(completions),
        }
    }

    /// Writes the descriptors of a chain, and its entry on the avail ring at `index`.
    fn write_chain(&self, added: &InFlight, index: u16) -> Result<()> {
        let readable = added.chain.readable.iter().map(|buffer| (buffer, 0));
        let writable = added.chain.writable.iter().map(|buffer| (buffer, WRITE));
        let mut descriptors = added.descriptors.iter().peekable();
        for ((addr, length), flags) in readable.chain(writable) {
            let Some(at) = descriptors.next() else { break };
            let (flags, next) = match descriptors.peek() {
                Some(next) => (flags | NEXT, **next),
                None => (flags, 0),
            };
            let descriptor = Descriptor::new(addr.0, *length, flags, next);
            let at = self
                .layout
                .descriptors
                .unchecked_add(u64::from(*at) * DESCRIPTOR_SIZE);
            self.put_slice(descriptor.as_slice(), at)?;
        }
        let slot = u64::from(index % self.size);
        let offset = RING_HEADER_SIZE + slot * AVAIL_ENTRY_SIZE;
        let entry = self.layout.avail.unchecked_add(offset);
        self.store(added.chain.head.to_le(), entry, Ordering::Relaxed)
    }

    /// Tells the device that the avail ring has entries up to `index`.
    fn publish(&self, index: u16) -> Result<()> {
        let addr = self.layout.avail.unchecked_add(INDEX_OFFSET);
        // Release: a device that sees the index sees the chain and what the caller wrote before.
        self.store(index.to_le(), addr, Ordering::Release)
    }

    /// Waits until the device signals. The used ring is looked at afterwards, never before: a
    /// completion after the last look leaves the eventfd readable.
    fn wait_for_call(&self, limit: Option<Duration>) -> io::Result<()> {
        // Whole milliseconds, rounded up: a wait of 0 would spin.
        let timeout = limit.map_or(-1, |limit| {
            i32::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let waited = self.epoll.wait(timeout, &mut [EpollEvent::default()]);
        match waited.and_then(|_| self.call.read()) {
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            result => result.map(|_| ()),
        }
    }

    fn put_slice(&self, bytes: &[u8], addr: GuestAddress) -> Result<()> {
        let written = self.memory.memory().write_slice(bytes, addr);
        written.map_err(|source| QueueError::Memory { addr, source })
    }

    fn load<T: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<T> {
        let loaded = self.memory.memory().load(addr, order);
        loaded.map_err(|source| QueueError::Memory { addr, source })
    }

    fn store<T: AtomicAccess>(&self, value: T, addr: GuestAddress, order: Ordering) -> Result<()> {
        let stored = self.memory.memory().store(value, addr, order);
        stored.map_err(|source| QueueError::Memory { addr, source })
    }
}

impl<S> Display for DriverQueue<S> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "queue of {} at {:#x}: {} in flight, used index {}",
            self.size,
            self.layout.descriptors.0,
            self.in_flight.len(),
            self.next_used,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    const BUFFER: (GuestAddress, u32) = (GuestAddress(0x8000), 512);

    #[test]
    fn a_chain_that_cannot_be_written_leaves_the_queue_as_it_was() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x100)]).unwrap();
        let mut queue = DriverQueue::new(&memory, GuestAddress(0), 8).unwrap();
        queue.next_avail = 60;
        queue.layout.avail = GuestAddress(0xff);
        let error = queue.add(&[BUFFER], &[]).unwrap_err();
        assert!(matches!(error, QueueError::Memory { .. }), "{error}");
        assert_eq!((queue.free.len(), queue.in_flight()), (8, 0));
        assert_eq!((queue.next_avail, queue.added), (60, 0));
    }

    #[test]
    fn a_counter_that_is_full_is_no_error() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let queue = DriverQueue::new(&memory, GuestAddress(0), 8).unwrap();
        queue.kick.write(u64::MAX - 1).unwrap();
        assert!(queue.kick.write(1).is_err());
        assert!(queue.notify().unwrap());
    }

    #[test]
    fn texts_name_the_queue_and_what_the_device_wrote() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = DriverQueue::new(&memory, GuestAddress(0x1000), 8).unwrap();
        queue.add(&[BUFFER], &[]).unwrap();
        let text = "queue of 8 at 0x1000: 1 in flight, used index 0";
        assert_eq!(queue.to_string(), text);
        let index = queue.layout.used.unchecked_add(INDEX_OFFSET);
        memory.write_obj(0x8000_u16, index).unwrap();
        let text = "the used index is 32768: completions were taken up to 0, \
                    and 1 in flight could follow";
        assert_eq!(queue.poll().unwrap_err().to_string(), text);
        memory.write_obj(1_u16, index).unwrap();
        memory
            .write_obj(7_u32, queue.layout.used.unchecked_add(RING_HEADER_SIZE))
            .unwrap();
        let text = "used entry 0 is of chain 7, which is not in flight";
        assert_eq!(queue.poll().unwrap_err().to_string(), text);
    }
}
