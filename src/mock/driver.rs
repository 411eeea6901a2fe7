//! The guest's half: a virtio-blk driver over one split virtqueue.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use super::blk::REQUEST_HEADER_SIZE;
use super::blk_error::{BlkError, RequestId};
use super::ring::RingLayout;
use crate::driver::{Completion, DriverQueue, QueueError};
use crate::vhost_user::session::SessionRing;

/// A request needs its header, its status and at least one buffer; a power of two holds them.
const MIN_QUEUE_SIZE: u16 = 4;

const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// What the status byte holds until the device writes it.
const NO_STATUS: u8 = 0xff;

type Result<T> = std::result::Result<T, BlkError>;

/// A virtio-blk driver over one split virtqueue in guest memory, in the place of a guest.
///
/// The rings, the request headers and the status bytes lie in guest memory, see
/// [`ring_layout`](Self::ring_layout); data buffers are wherever the caller says. Several requests
/// may be in flight, and one request may have several buffers. EVENT_IDX and indirect descriptors
/// are not used.
///
/// `memory` is anything that leads to a `GuestMemory`: a reference, an `Arc`, or what sees
/// hotplug, a [`PublishedMemory`](crate::PublishedMemory) or a
/// [`GuestMemoryAtomic`](vm_memory::GuestMemoryAtomic).
/// [`session_ring`](Self::session_ring) is for its daemon.
///
/// ```
/// use guest_memory_shm::mock::{BlkDriver, BlkError};
/// use std::time::Duration;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
/// let mut driver = BlkDriver::new(&memory, GuestAddress(0x1000), 16)?
///     .with_deadline(Duration::from_millis(1));
/// // There is no device yet.
/// let error = driver.read(0, &[(GuestAddress(0x8000), 512)]).unwrap_err();
/// assert!(matches!(error, BlkError::TimedOut { in_flight: 1, .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct BlkDriver<S> {
    queue: DriverQueue<S>,
    layout: RingLayout,
    deadline: Duration,
    /// The requests in flight, by the first descriptor of their chains.
    requests: BTreeMap<u16, RequestId>,
    /// The status of requests that are complete and have not been waited for.
    finished: BTreeMap<RequestId, u8>,
    next_id: u64,
}

impl<S: GuestAddressSpace> BlkDriver<S> {
    /// A driver whose structures are at `ring_addr`, which takes
    /// [`RingLayout::required_size`] bytes from there on; they are zeroed.
    ///
    /// # Errors
    /// - [`BlkError::QueueSize`]: `queue_size` is no power of two from 4 on.
    /// - [`BlkError::RingAddress`]: `ring_addr` is not aligned to 16 bytes or the queue is not
    ///   wholly in guest memory.
    /// - [`BlkError::Event`]: no descriptors for the eventfds.
    pub fn new(memory: S, ring_addr: GuestAddress, queue_size: u16) -> Result<BlkDriver<S>> {
        if !queue_size.is_power_of_two() || queue_size < MIN_QUEUE_SIZE {
            return Err(BlkError::QueueSize(queue_size));
        }
        let layout = RingLayout::at(ring_addr, queue_size);
        let misplaced = || BlkError::RingAddress {
            addr: ring_addr,
            size: layout.size,
        };
        let end = ring_addr.0.checked_add(layout.size);
        end.ok_or_else(misplaced)?;
        let queue = DriverQueue::new(memory, ring_addr, queue_size);
        let mut driver = BlkDriver {
            queue: queue.map_err(|error| match error {
                QueueError::Place { .. } => misplaced(),
                other => other.into(),
            })?,
            layout,
            deadline: DEFAULT_DEADLINE,
            requests: BTreeMap::new(),
            finished: BTreeMap::new(),
            next_id: 0,
        };
        driver.reset().map_err(|_| misplaced())?;
        Ok(driver)
    }

    /// How long [`wait`](Self::wait) and what builds on it wait for the device. Default: 10 s.
    pub fn with_deadline(mut self, limit: Duration) -> Self {
        self.deadline = limit;
        self
    }

    /// Where the driver's structures lie.
    pub fn ring_layout(&self) -> RingLayout {
        self.layout
    }

    /// The ring, for [`VhostUserSession::start_ring`](crate::VhostUserSession::start_ring).
    ///
    /// # Errors
    /// No descriptor is left for copies of the eventfds.
    pub fn session_ring(&self) -> std::io::Result<SessionRing> {
        let layout = self.layout;
        let parts = [layout.descriptors, layout.avail, layout.used];
        SessionRing::new(self.queue_size(), parts, self.kick(), self.call())
    }

    /// The number of descriptors.
    pub fn queue_size(&self) -> u16 {
        self.queue.size()
    }

    /// The eventfd by which the driver wakes the device; non-blocking.
    pub fn kick(&self) -> &EventFd {
        self.queue.kick()
    }

    /// The eventfd by which the device wakes the driver; non-blocking.
    pub fn call(&self) -> &EventFd {
        self.queue.call()
    }

    /// How many requests the device has not completed, as far as the driver has looked.
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// The index up to which the driver has taken completions: where a device that knows nothing
    /// of this queue has to begin, so that it carries out what an earlier one left undone.
    pub fn used_index(&self) -> u16 {
        self.queue.used_index()
    }

    /// Makes the requests in flight available again, for a device that begins at
    /// [`used_index`](Self::used_index): after a daemon died, and before its successor's queue is
    /// started. Their number; they are waited for as before. Only for a queue that no device
    /// serves, and not where the successor is given in-flight buffers; see
    /// [`DriverQueue::resubmit`].
    ///
    /// # Errors
    /// - [`BlkError::BrokenRing`]: the daemon left nonsense; [`reset`](Self::reset) forgets it.
    /// - [`BlkError::Memory`] where the rings are not in guest memory any more.
    pub fn resubmit(&mut self) -> Result<usize> {
        self.take_completions()?;
        for head in self.requests.keys() {
            // The daemon may have written its status, and died before it said so.
            self.put(&[NO_STATUS], self.status_of(*head))?;
        }
        Ok(self.queue.resubmit()?)
    }

    /// Forgets all requests and zeroes the rings. Only for a queue that no device serves.
    ///
    /// # Errors
    /// [`BlkError::Memory`] where the rings are not in guest memory any more.
    pub fn reset(&mut self) -> Result<()> {
        let requests = self.layout.size - (self.layout.headers.0 - self.layout.descriptors.0);
        let zeros = vec![0; usize::try_from(requests).unwrap_or_default()];
        self.put(&zeros, self.layout.headers)?;
        self.queue.reset()?;
        self.requests.clear();
        self.finished.clear();
        Ok(())
    }

    /// Submits a read of the disk from `sector` (512 bytes each) on into `buffers`, and kicks.
    ///
    /// # Errors
    /// - [`BlkError::QueueFull`], [`BlkError::EmptyBuffer`].
    /// - [`BlkError::Memory`] and [`BlkError::Event`]: the rings or the eventfd cannot be used.
    pub fn submit_read(
        &mut self,
        sector: u64,
        buffers: &[(GuestAddress, u32)],
    ) -> Result<RequestId> {
        self.submit(VIRTIO_BLK_T_IN, sector, &[], buffers)
    }

    /// Submits a write of `buffers` to the disk from `sector` (512 bytes each) on, and kicks.
    ///
    /// # Errors
    /// As for [`submit_read`](Self::submit_read).
    pub fn submit_write(
        &mut self,
        sector: u64,
        buffers: &[(GuestAddress, u32)],
    ) -> Result<RequestId> {
        self.submit(VIRTIO_BLK_T_OUT, sector, buffers, &[])
    }

    /// Submits a flush, and kicks.
    ///
    /// # Errors
    /// As for [`submit_read`](Self::submit_read).
    pub fn submit_flush(&mut self) -> Result<RequestId> {
        self.submit(VIRTIO_BLK_T_FLUSH, 0, &[], &[])
    }

    /// Reads and waits: [`submit_read`](Self::submit_read), [`wait`](Self::wait).
    ///
    /// # Errors
    /// As for these two.
    pub fn read(&mut self, sector: u64, buffers: &[(GuestAddress, u32)]) -> Result<()> {
        let request = self.submit_read(sector, buffers)?;
        self.wait(request)
    }

    /// Writes and waits: [`submit_write`](Self::submit_write), [`wait`](Self::wait).
    ///
    /// # Errors
    /// As for these two.
    pub fn write(&mut self, sector: u64, buffers: &[(GuestAddress, u32)]) -> Result<()> {
        let request = self.submit_write(sector, buffers)?;
        self.wait(request)
    }

    /// Flushes and waits: [`submit_flush`](Self::submit_flush), [`wait`](Self::wait).
    ///
    /// # Errors
    /// As for these two.
    pub fn flush(&mut self) -> Result<()> {
        let request = self.submit_flush()?;
        self.wait(request)
    }

    /// Waits until the device has completed `request`. Others may complete meanwhile, in any
    /// order; their status is kept until they are waited for.
    ///
    /// # Errors
    /// - [`BlkError::TimedOut`]: not by the deadline; it may be waited for again.
    /// - [`BlkError::Status`]: the device could not carry it out.
    /// - [`BlkError::UnknownRequest`]: it is not in flight.
    /// - [`BlkError::BrokenRing`], [`BlkError::Memory`], [`BlkError::Event`]: the queue cannot be
    ///   used any more.
    pub fn wait(&mut self, request: RequestId) -> Result<()> {
        let deadline = Instant::now().checked_add(self.deadline);
        self.take_completions()?;
        loop {
            if let Some(status) = self.finished.remove(&request) {
                return match u32::from(status) {
                    VIRTIO_BLK_S_OK => Ok(()),
                    _ => Err(BlkError::Status { request, status }),
                };
            }
            if !self.requests.values().any(|id| *id == request) {
                return Err(BlkError::UnknownRequest(request));
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            match self.queue.wait(left.unwrap_or(Duration::MAX)) {
                Ok(completion) => self.finish(&completion)?,
                Err(QueueError::TimedOut { in_flight, .. }) => {
                    return Err(BlkError::TimedOut {
                        limit: self.deadline,
                        in_flight,
                    });
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for every request that has not been waited for, oldest first. The deadline holds
    /// for each.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait); with the first error the rest is not waited for.
    pub fn wait_all(&mut self) -> Result<()> {
        let in_flight = self.requests.values();
        let mut requests: Vec<_> = in_flight.chain(self.finished.keys()).copied().collect();
        requests.sort_unstable();
        requests
            .into_iter()
            .try_for_each(|request| self.wait(request))
    }

    /// Submits a request whose data the device takes from `readable` or puts into `writable`.
    fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &[(GuestAddress, u32)],
        writable: &[(GuestAddress, u32)],
    ) -> Result<RequestId> {
        let needed = readable.len() + writable.len() + 2;
        let head = self.queue.next_head(needed).map_err(|error| match error {
            QueueError::ChainTooLong { needed, .. } => BlkError::QueueFull {
                needed,
                free: self.queue.free_descriptors(),
            },
            other => other.into(),
        })?;
        let mut header = [0; REQUEST_HEADER_SIZE];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let offset = u64::from(head) * REQUEST_HEADER_SIZE as u64;
        let header_addr = self.layout.headers.unchecked_add(offset);
        let status_addr = self.status_of(head);
        self.put(&header, header_addr)?;
        self.put(&[NO_STATUS], status_addr)?;

        let readable = [&[(header_addr, 16)], readable].concat();
        let writable = [writable, &[(status_addr, 1)]].concat();
        self.queue.add(&readable, &writable)?;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.requests.insert(head, id);
        self.queue.notify()?;
        Ok(id)
    }

    fn take_completions(&mut self) -> Result<()> {
        while let Some(completion) = self.queue.poll()? {
            self.finish(&completion)?;
        }
        Ok(())
    }

    /// Keeps the status of a request until it is waited for.
    fn finish(&mut self, completion: &Completion) -> Result<()> {
        let head = completion.chain.head;
        let addr = self.status_of(head);
        let id = self.requests.remove(&head);
        let status = self.queue.memory().memory().read_obj(addr);
        let status = status.map_err(|source| BlkError::Memory { addr, source })?;
        self.finished.extend(id.map(|id| (id, status)));
        Ok(())
    }

    fn put(&self, bytes: &[u8], addr: GuestAddress) -> Result<()> {
        let written = self.queue.memory().memory().write_slice(bytes, addr);
        written.map_err(|source| BlkError::Memory { addr, source })
    }

    fn status_of(&self, head: u16) -> GuestAddress {
        self.layout.statuses.unchecked_add(u64::from(head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn a_status_is_kept_until_it_is_asked_for_and_a_reset_forgets() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut driver = BlkDriver::new(&memory, GuestAddress(0), 8)
            .unwrap()
            .with_deadline(Duration::from_millis(1));
        let first = driver.submit_flush().unwrap();
        let second = driver.submit_flush().unwrap();
        assert_eq!(driver.kick().read().unwrap(), 2);

        // A device that completes the first one only.
        let layout = driver.ring_layout();
        let head: u16 = memory.read_obj(layout.avail.unchecked_add(4)).unwrap();
        memory.write_obj(2u8, driver.status_of(head)).unwrap();
        memory
            .write_obj(u32::from(head), layout.used.unchecked_add(4))
            .unwrap();
        memory
            .write_obj(1u16, layout.used.unchecked_add(2))
            .unwrap();

        let error = driver.wait(second).unwrap_err();
        assert!(matches!(error, BlkError::TimedOut { in_flight: 1, .. }));
        let error = driver.wait(first).unwrap_err();
        assert!(matches!(error, BlkError::Status { status: 2, .. }));
        driver.reset().unwrap();
        let error = driver.wait(second).unwrap_err();
        assert!(matches!(error, BlkError::UnknownRequest(_)));
        assert_eq!(driver.in_flight(), 0);
    }
}
