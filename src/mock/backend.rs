//! The device: a correct vhost-user-blk backend.

use std::io;
use std::ops::DerefMut;
use std::sync::atomic::{AtomicBool, Ordering};
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
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::blk;
use super::config::BlkConfig;
use super::disk::SECTOR_SIZE;
use super::guest::{Memory, MockRegion};
use super::lock::lock;
use super::state::Shared;
use crate::logs;

/// Bits of `vhost_user::message::VhostUserVirtioFeatures`, as shifts like all the others.
const LOG_ALL: u32 = 26;
pub(super) const PROTOCOL_FEATURES: u32 = 30;

/// The largest ring that the device takes.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// Data buffers per request: what is left of a chain of 128 after header and status.
const MAX_SEGMENTS: u32 = 126;

type Vring = VringMutex<Memory>;

pub(super) struct Backend {
    shared: Arc<Shared>,
    memory: Memory,
    /// Held while requests are carried out. The table's update takes it too: what is
    /// acknowledged as removed must not be in use any more.
    busy: Mutex<()>,
    /// Held by an update that waits for `busy`, so that a busy queue cannot starve it.
    turnstile: Mutex<()>,
    /// The connection is over: a driver that keeps its ring full must not keep the worker.
    over: AtomicBool,
}

impl Backend {
    pub(super) fn new(shared: Arc<Shared>, memory: Memory) -> Backend {
        Backend {
            shared,
            memory,
            busy: Mutex::new(()),
            turnstile: Mutex::new(()),
            over: AtomicBool::new(false),
        }
    }

    /// Stops after the batch that is under way.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
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

    fn serve_queue(&self, vring: &Vring) {
        while self.serve_batch(vring.get_mut().deref_mut()) && !self.over.load(Ordering::Relaxed) {
        }
    }

    /// Carries out what is available, at most one ring full. True: there is more to do.
    fn serve_batch(&self, vring: &mut VringState<Memory>) -> bool {
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

        let mut used = 0;
        while used < queue.size() {
            let chain = match queue.iter(memory.clone()) {
                Ok(mut chains) => chains.next(),
                Err(error) => {
                    logs::warn!("mock daemon: the queue is unusable: {error}");
                    return false;
                }
            };
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let written = blk::serve(chain, &*memory, &self.shared.disk);
            if let Err(error) = queue.add_used(&*memory, head, written) {
                logs::warn!("mock daemon: cannot give chain {head} back: {error}");
            }
            used += 1;
        }

        let notify = used > 0 && queue.needs_notification(&*memory).unwrap_or(true);
        let more = queue.enable_notification(&*memory).unwrap_or(false);
        if notify && let Err(error) = vring.signal_used_queue() {
            logs::warn!("mock daemon: cannot signal the driver: {error}");
        }
        more
    }
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
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            LOG_ALL,
            PROTOCOL_FEATURES,
        ]
        .iter()
        .fold(multiqueue, |bits, bit| bits | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // REPLY_ACK is not ours to offer: the vhost crate does, and the gate may take it away.
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD;
        if self.shared.options.max_mem_slots.is_some() {
            features |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
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

    fn stop_vring(&self, _queue_index: u32) -> io::Result<()> {
        self.settle();
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
            Some(vring) => self.serve_queue(vring),
            // An error is how a worker thread is told to end.
            None if u64::from(device_event) == self.exit_token() => {
                return Err(io::Error::other("the connection is over"));
            }
            None => logs::warn!("mock daemon: event {device_event} belongs to no queue"),
        }
        Ok(())
    }
}
