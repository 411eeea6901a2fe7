//! The device: a correct vhost-user-blk backend.

use std::io;
use std::ops::DerefMut;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VHOST_USER_CONFIG_SIZE, VhostUserProtocolFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemory};
use vmm_sys_util::epoll::EventSet;

use super::blk;
use super::config::BlkConfig;
use super::disk::SECTOR_SIZE;
use super::guest::{Memory, MockRegion};
use super::hold::RequestStep;
use super::inflight::InflightQueue;
use super::lock::lock;
use super::state::Shared;
use crate::logs;

/// Bits of `vhost_user::message::VhostUserVirtioFeatures`, as shifts like all the others.
const LOG_ALL: u32 = 26;
const PROTOCOL_FEATURES: u32 = 30;

/// The largest ring that the device takes.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// Data buffers per request: what is left of a chain of 128 after header and status.
const MAX_SEGMENTS: u32 = 126;

type Vring = VringMutex<Memory>;

/// The guest's memory of one moment.
type Present = <Memory as GuestAddressSpace>::T;

/// A request that was taken: the first descriptor's number, and all of its descriptors.
type Taken = (u16, Vec<Descriptor>);

pub(super) struct Backend {
    shared: Arc<Shared>,
    memory: Memory,
    /// Held while requests are carried out. The table's update takes it too: what is
    /// acknowledged as removed must not be in use any more.
    busy: Mutex<()>,
    /// Held by an update that waits for `busy`, so that a busy queue cannot starve it.
    turnstile: Mutex<()>,
}

impl Backend {
    pub(super) fn new(shared: Arc<Shared>, memory: Memory) -> Backend {
        Backend {
            shared,
            memory,
            busy: Mutex::new(()),
            turnstile: Mutex::new(()),
        }
    }

    /// Stops after the batch that is under way, or where a request is held.
    pub(super) fn end(&self) {
        self.shared.hold.end();
    }

    /// The token of the event that ends the worker thread: the first one that vhost-user-backend
    /// leaves to its user.
    pub(super) fn exit_token(&self) -> u64 {
        u64::from(self.shared.options.queues) + 1
    }

    /// Waits until no request is under way that began before.
    fn settle(&self) {
        let _turn = lock(&self.turnstile);
        let _idle = lock(&self.busy);
    }

    fn serve_queue(&self, index: u16, vring: &Vring) {
        while self.serve_batch(index, vring.get_mut().deref_mut()) && !self.shared.hold.is_over() {
        }
    }

    /// Carries out what is available, at most one ring full. True: there is more to do.
    fn serve_batch(&self, index: u16, vring: &mut VringState<Memory>) -> bool {
        drop(lock(&self.turnstile));
        let _busy = lock(&self.busy);
        // The table of this moment, for the whole batch: an update waits for its end.
        let memory = self.memory.memory();
        if !vring.is_enabled() || !vring.get_queue().ready() {
            return false;
        }
        let queue = vring.get_queue_mut();
        if !queue.is_valid(&*memory) || queue.disable_notification(&*memory).is_err() {
            return false;
        }

        let buffer = self.shared.inflight();
        let inflight = buffer.as_ref().and_then(|buffer| buffer.queue(index));
        let Some(used) = self.serve_requests(queue, &memory, inflight) else {
            return false;
        };

        let notify = used > 0 && queue.needs_notification(&*memory).unwrap_or(true);
        let more = queue.enable_notification(&*memory).unwrap_or(false);
        if notify && let Err(error) = vring.signal_used_queue() {
            logs::warn!("mock daemon: cannot signal the driver: {error}");
        }
        more
    }

    /// Carries out requests and returns how many. None: the queue is broken, or the daemon ended
    /// on the way, as if it had been killed.
    ///
    /// With an in-flight buffer it takes all that there is at once, and completes the latest
    /// first, as devices may.
    fn serve_requests(
        &self,
        queue: &mut Queue,
        memory: &Present,
        inflight: Option<InflightQueue<'_>>,
    ) -> Option<u16> {
        let mut used = 0;
        let (mut requests, at_once) = match inflight {
            Some(inflight) => (resume(queue, &**memory, inflight)?, queue.size()),
            None => (Vec::new(), 1),
        };
        loop {
            if requests.is_empty() && used < queue.size() {
                requests = self.take(queue, memory, inflight, at_once)?;
            }
            let Some((head, chain)) = requests.pop() else {
                return Some(used);
            };
            let reach = |step, queue: &Queue| self.reach(step, head, queue, inflight);
            let written = blk::serve(chain, &**memory, &self.shared.disk);
            reach(RequestStep::CarriedOut, queue)?;
            reach(RequestStep::Listed, queue)?;
            if let Err(error) = queue.add_used(&**memory, head, written) {
                logs::warn!("mock daemon: cannot give chain {head} back: {error}");
            }
            reach(RequestStep::Used, queue)?;
            reach(RequestStep::Unmarked, queue)?;
            reach(RequestStep::Counted, queue)?;
            used += 1;
        }
    }

    /// Takes what is available, at most `at_once` requests, the first one first.
    fn take(
        &self,
        queue: &mut Queue,
        memory: &Present,
        inflight: Option<InflightQueue<'_>>,
        at_once: u16,
    ) -> Option<Vec<Taken>> {
        let mut taken = Vec::new();
        while taken.len() < usize::from(at_once) {
            let chain = match queue.iter(memory.clone()) {
                Ok(mut chains) => chains.next(),
                Err(error) => {
                    logs::warn!("mock daemon: the queue is unusable: {error}");
                    return None;
                }
            };
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            self.reach(RequestStep::Taken, head, queue, inflight)?;
            self.reach(RequestStep::Marked, head, queue, inflight)?;
            taken.push((head, chain.collect()));
        }
        Some(taken)
    }

    /// The request comes to `step`, which is noted, and may be where it is held. None: the daemon
    /// ended there.
    fn reach(
        &self,
        step: RequestStep,
        head: u16,
        queue: &Queue,
        inflight: Option<InflightQueue<'_>>,
    ) -> Option<()> {
        if let Some(inflight) = inflight {
            inflight.note(step, head, queue.next_used());
        }
        self.shared.hold.pass(step)
    }
}

/// What an earlier daemon took and did not complete, the latest first. The queue goes on after
/// it: what was taken is what is on the used ring and what is in flight.
fn resume<M: GuestMemory>(
    queue: &mut Queue,
    memory: &M,
    inflight: InflightQueue<'_>,
) -> Option<Vec<Taken>> {
    let ring_idx = queue.used_idx(memory, Ordering::Acquire).ok()?.0;
    let Some(heads) = inflight.resume(ring_idx) else {
        return Some(Vec::new());
    };
    let taken = u16::try_from(heads.len()).ok()?;
    queue.set_next_avail(ring_idx.wrapping_add(taken));
    let requests = heads
        .into_iter()
        .map(|head| (head, chain_at(queue, memory, head)));
    Some(requests.collect())
}

/// The descriptors from `head` on, of a request whose place in the avail ring may have another's.
fn chain_at<M: GuestMemory>(queue: &Queue, memory: &M, head: u16) -> Vec<Descriptor> {
    let size = queue.size();
    let load = |index: u16| {
        let offset = u64::from(index) * size_of::<Descriptor>() as u64;
        let addr = GuestAddress(queue.desc_table()).checked_add(offset)?;
        let loaded = (index < size).then(|| memory.read_obj::<Descriptor>(addr))?;
        loaded.ok()
    };
    let chain = std::iter::successors(load(head), |last| match last.has_next() {
        true => load(last.next()),
        false => None,
    });
    chain.take(usize::from(size)).collect()
}

impl VhostUserBackend for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.shared.options.queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        let multiqueue = match self.shared.options.queues {
            0 | 1 => 0,
            _ => 1 << VIRTIO_BLK_F_MQ,
        };
        // The descriptors of a request that an earlier daemon took are found without it.
        let indirect = match self.shared.options.inflight {
            true => 0,
            false => 1 << VIRTIO_RING_F_INDIRECT_DESC,
        };
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            LOG_ALL,
            PROTOCOL_FEATURES,
        ]
        .iter()
        .fold(multiqueue | indirect, |bits, bit| bits | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // REPLY_ACK is not ours to offer: the vhost crate does, and the gate may take it away.
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD;
        if self.shared.options.max_mem_slots.is_some() {
            features |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        }
        if self.shared.options.inflight {
            features |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        if self.shared.options.backend_channel {
            features |= VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD;
        }
        features
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queues know.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = BlkConfig {
            capacity_sectors: self.shared.disk.size() / SECTOR_SIZE,
            max_segments: MAX_SEGMENTS,
            block_size: SECTOR_SIZE.try_into().unwrap_or(u32::MAX),
            queues: self.shared.options.queues,
        };
        // A frontend may ask for the fields of features that this device lacks: they read zero.
        let mut bytes = config.to_bytes().to_vec();
        bytes.resize(VHOST_USER_CONFIG_SIZE as usize, 0);
        let start = offset as usize;
        start
            .checked_add(size as usize)
            .and_then(|end| bytes.get(start..end))
            .map(<[u8]>::to_vec)
            .unwrap_or_default()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.settle();
        let table = MockRegion::table_of(&*memory.memory())?;
        self.shared.state().table = table;
        Ok(())
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        self.settle();
        if let Some(buffer) = self.shared.inflight() {
            buffer.stop(queue_index);
        }
        Ok(())
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        match vrings.get(usize::from(device_event)) {
            Some(vring) => self.serve_queue(device_event, vring),
            // An error is how a worker thread is told to end.
            None if u64::from(device_event) == self.exit_token() => {
                return Err(io::Error::other("the connection is over"));
            }
            None => logs::warn!("mock daemon: event {device_event} belongs to no queue"),
        }
        Ok(())
    }
}
