//! The in-flight buffer: which requests a daemon has taken and not completed, in a file that the
//! frontend keeps. See "Inflight I/O tracking" in the vhost-user specification; split rings only.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{AtomicAccess, ByteValued, Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::fault::InflightFault;
use super::hold::RequestStep;

/// The fields of a queue's region, by their place in it.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// Bytes of a region before its entries, and of an entry.
const ENTRIES: usize = 16;
const ENTRY_SIZE: usize = 16;
/// The fields of an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Which buffer a GET_INFLIGHT_FD or SET_INFLIGHT_FD is about, with the padding at its end that
/// QEMU sends too. None: it has no queues, or more than `max_queues` of `max_size` each.
pub(super) fn shape_in(body: &[u8], max_queues: u16, max_size: u16) -> Option<VhostUserInflight> {
    let mut shape = VhostUserInflight::default();
    if body.len() != size_of_val(&shape) {
        return None;
    }
    shape.as_mut_slice().copy_from_slice(body);
    let fits =
        (1..=max_queues).contains(&shape.num_queues) && (1..=max_size).contains(&shape.queue_size);
    fits.then_some(shape)
}

/// The answer to GET_INFLIGHT_FD: its body, and the file of a new buffer.
pub(super) fn create(
    mut shape: VhostUserInflight,
    fault: Option<InflightFault>,
) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    (shape.mmap_offset, shape.mmap_size) = (0, needed(&shape) as u64);
    if fault == Some(InflightFault::TooSmall) {
        shape.mmap_size /= 2;
    }
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("mock-inflight", flags)?);
    file.set_len(match fault {
        Some(InflightFault::ShortFile) => shape.mmap_size / 2,
        _ => shape.mmap_size,
    })?;
    if fault != Some(InflightFault::Unsealed) {
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    }
    let mut body = [shape.mmap_size, shape.mmap_offset]
        .map(u64::to_ne_bytes)
        .concat();
    body.extend(
        [shape.num_queues, shape.queue_size, 0, 0]
            .map(u16::to_ne_bytes)
            .concat(),
    );
    let is_sent = fault != Some(InflightFault::NoDescriptor);
    Ok((body, is_sent.then(|| file.into())))
}

/// Bytes of the whole buffer.
fn needed(shape: &VhostUserInflight) -> usize {
    usize::from(shape.num_queues) * entry(shape.queue_size)
}

/// Where the entry of a descriptor is in a region; past the last one is the region's end.
fn entry(head: u16) -> usize {
    ENTRIES + ENTRY_SIZE * usize::from(head)
}

/// A buffer that the frontend sent, as the daemon of one connection uses it.
#[derive(Debug)]
pub(super) struct InflightBuffer {
    mapping: MmapRegion<()>,
    queue_size: u16,
    queues: Vec<QueueState>,
}

/// What the daemon knows of a queue besides.
#[derive(Debug, Default)]
struct QueueState {
    /// What an earlier daemon left was looked at since the queue was started.
    is_resumed: AtomicBool,
    counter: AtomicU64,
}

impl InflightBuffer {
    /// Maps the buffer in `file`.
    ///
    /// # Errors
    /// It is too small for its queues, its file is shorter than it, or it cannot be mapped.
    pub(super) fn map(shape: VhostUserInflight, file: OwnedFd) -> io::Result<InflightBuffer> {
        let file = File::from(file);
        let needed = needed(&shape);
        let end = shape.mmap_offset.checked_add(shape.mmap_size);
        // What is missing of the file would end this process with SIGBUS.
        let len = file.metadata()?.len();
        if shape.mmap_size < needed as u64 || end.is_none_or(|end| end > len) {
            let reason = format!(
                "{needed} bytes are needed, it has {} from {:#x} on, and its file has {len}",
                shape.mmap_size, shape.mmap_offset
            );
            return Err(io::Error::new(ErrorKind::InvalidData, reason));
        }
        let place = FileOffset::new(file, shape.mmap_offset);
        let queues = 0..shape.num_queues;
        Ok(InflightBuffer {
            mapping: MmapRegion::from_file(place, needed).map_err(io::Error::other)?,
            queue_size: shape.queue_size,
            queues: queues.map(|_| QueueState::default()).collect(),
        })
    }

    /// The region of a queue; none if the buffer is for fewer queues.
    pub(super) fn queue(&self, index: u16) -> Option<InflightQueue<'_>> {
        Some(InflightQueue {
            buffer: self,
            start: usize::from(index) * entry(self.queue_size),
            state: self.queues.get(usize::from(index))?,
        })
    }

    /// The queue was stopped: when it is started again, the buffer is looked at again.
    pub(super) fn stop(&self, index: u32) {
        if let Some(state) = self.queues.get(index as usize) {
            state.is_resumed.store(false, Ordering::Relaxed);
        }
    }
}

/// The region of one queue. Its fields are stored in the order of the specification: where the
/// process ends in between, the next daemon knows what to make of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct InflightQueue<'a> {
    buffer: &'a InflightBuffer,
    start: usize,
    state: &'a QueueState,
}

impl InflightQueue<'_> {
    /// What an earlier daemon took and did not complete, the latest first, where the used ring's
    /// index is `ring_idx`. None: no daemon used the buffer, or this one has asked since the queue
    /// was started.
    pub(super) fn resume(self, ring_idx: u16) -> Option<Vec<u16>> {
        if self.state.is_resumed.swap(true, Ordering::Relaxed) {
            return None;
        }
        let queue_size = self.buffer.queue_size;
        if self.load::<u16>(VERSION) == 0 {
            self.store(DESC_NUM, queue_size);
            self.store(USED_IDX, ring_idx);
            self.store(VERSION, 1_u16);
            return None;
        }
        // The last batch is on the used ring. How far its daemon came after that is unknown.
        let batch = ring_idx.wrapping_sub(self.load(USED_IDX));
        let mut head = self.load(LAST_BATCH_HEAD);
        for _ in 0..batch.min(queue_size) {
            self.note(RequestStep::Unmarked, head, ring_idx);
            head = self.load(entry(head) + NEXT);
        }
        self.note(RequestStep::Counted, head, ring_idx);

        let marked = (0..queue_size).filter(|head| self.load::<u8>(entry(*head) + INFLIGHT) == 1);
        let mut left: Vec<(u64, u16)> = marked
            .map(|head| (self.load(entry(head) + COUNTER), head))
            .collect();
        left.sort_unstable_by(|a, b| b.cmp(a));
        let next = left.first().map_or(0, |(last, _)| last.wrapping_add(1));
        self.state.counter.store(next, Ordering::Relaxed);
        Some(left.into_iter().map(|(_, head)| head).collect())
    }

    /// Notes that a request has come to `step`; `ring_idx` is the used ring's index.
    pub(super) fn note(self, step: RequestStep, head: u16, ring_idx: u16) {
        match step {
            RequestStep::Marked => {
                let counter = self.state.counter.fetch_add(1, Ordering::Relaxed);
                self.store(entry(head) + COUNTER, counter);
                self.store(entry(head) + INFLIGHT, 1_u8);
            }
            RequestStep::Listed => {
                self.store(entry(head) + NEXT, self.load::<u16>(LAST_BATCH_HEAD));
                self.store(LAST_BATCH_HEAD, head);
            }
            RequestStep::Unmarked => self.store(entry(head) + INFLIGHT, 0_u8),
            RequestStep::Counted => self.store(USED_IDX, ring_idx),
            RequestStep::Taken | RequestStep::CarriedOut | RequestStep::Used => {}
        }
    }

    /// What is past the region, of a head that is no descriptor's number, is read as 0 ...
    fn load<T: AtomicAccess + Default>(self, at: usize) -> T {
        let bytes = self.buffer.mapping.as_volatile_slice();
        let loaded = (at < entry(self.buffer.queue_size))
            .then(|| bytes.load(self.start + at, Ordering::Acquire));
        loaded.and_then(Result::ok).unwrap_or_default()
    }

    /// ... and not written. Release: who sees it sees all that was stored before.
    fn store<T: AtomicAccess>(self, at: usize, value: T) {
        let bytes = self.buffer.mapping.as_volatile_slice();
        if at < entry(self.buffer.queue_size) {
            let _ = bytes.store(value, self.start + at, Ordering::Release);
        }
    }
}
