//! The device that one frontend sees: what it offers, and the requests in its queues.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use guest_memory_shm::GuestMemoryShm;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VringMutex, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryAtomic;

use crate::config;
use crate::dirty_log::Marks;
use crate::image::{Image, Lane};
use crate::request;

/// Bits of the vhost-user specification: VHOST_F_LOG_ALL and VHOST_USER_F_PROTOCOL_FEATURES.
const LOG_ALL: u32 = 26;
const PROTOCOL_FEATURES: u32 = 30;

/// The largest ring.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;

/// After so many requests a change of the memory table has its turn.
const BATCH: u32 = 32;

pub(crate) type Memory = GuestMemoryShm<Marks>;
pub(crate) type Vring = VringMutex<GuestMemoryAtomic<Memory>>;

/// The state that ends with the connection.
pub(crate) struct Device {
    image: Arc<Image>,
    queues: u16,
    /// The memory that was shared and checked last. Held for reading while requests use it: what
    /// is acknowledged as removed must not be in use any more.
    memory: RwLock<Arc<Memory>>,
    /// The guest knows no flushes: its writes are to be on the medium when they are done.
    write_through: AtomicBool,
    /// The connection is over: a guest that keeps its ring full must not keep the threads.
    over: AtomicBool,
}

impl Device {
    pub(crate) fn new(image: &Arc<Image>, queues: u16) -> Self {
        Self {
            image: Arc::clone(image),
            queues,
            memory: RwLock::default(),
            write_through: AtomicBool::new(true),
            over: AtomicBool::new(false),
        }
    }

    /// Stops after the requests that are under way.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    /// Carries out what is available in a queue, in its order: a daemon after this one, which
    /// starts where the used ring ends, carries out exactly what this one left undone.
    pub(crate) fn serve_queue(&self, vring: &Vring, lane: &mut Lane) {
        while !self.is_over() {
            let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
            if !self.serve_batch(vring, &memory, lane) {
                return;
            }
        }
    }

    /// True: there is more to do.
    ///
    /// The queue is locked only to take a request and to give it back, not while the image is
    /// used: the frontend may change or stop it meanwhile.
    fn serve_batch(&self, vring: &Vring, memory: &Arc<Memory>, lane: &mut Lane) -> bool {
        let write_through = self.write_through.load(Ordering::Relaxed);
        for _ in 0..BATCH {
            let chain = {
                let mut vring = vring.get_mut();
                if !vring.is_enabled() || !vring.get_queue().ready() {
                    return false;
                }
                let queue = vring.get_queue_mut();
                if !queue.is_valid(&**memory) || queue.disable_notification(&**memory).is_err() {
                    log::warn!("a queue lies outside of the memory that is shared");
                    return false;
                }
                match queue.iter(Arc::clone(memory)) {
                    Ok(mut chains) => chains.next(),
                    Err(error) => {
                        log::warn!("a queue is unusable: {error}");
                        return false;
                    }
                }
            };
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let written = request::serve(chain, &**memory, lane, write_through);

            let mut vring = vring.get_mut();
            let queue = vring.get_queue_mut();
            if let Err(error) = queue.add_used(&**memory, head, written) {
                log::warn!("cannot give chain {head} back: {error}");
            }
            if queue.needs_notification(&**memory).unwrap_or(true)
                && let Err(error) = vring.signal_used_queue()
            {
                log::warn!("cannot signal the guest: {error}");
            }
        }
        let mut vring = vring.get_mut();
        let more = vring.get_queue_mut().enable_notification(&**memory);
        more.unwrap_or(false)
    }

    /// Puts `memory` in the place of what there was, when nothing uses that any more.
    pub(crate) fn replace_memory(&self, memory: Memory) {
        let mut place = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        *place = Arc::new(memory);
    }

    /// Waits for the requests that were taken.
    pub(crate) fn settle(&self) {
        drop(self.memory.write().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_SEG_MAX,
            LOG_ALL,
            PROTOCOL_FEATURES,
        ];
        match self.image.read_only() {
            true => bits.push(VIRTIO_BLK_F_RO),
            false => bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]),
        }
        if self.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        bits.iter().fold(0, |set, bit| set | 1 << bit)
    }

    pub(crate) fn acked_features(&self, features: u64) {
        log::debug!("the guest takes the features {features:#x}");
        let flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.write_through.store(!flushes, Ordering::Relaxed);
    }

    pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
        // REPLY_ACK is offered by the vhost crate.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    /// A part of the configuration space, empty where there is none.
    pub(crate) fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        let bytes = config::bytes(&self.image, self.queues);
        let start = offset as usize;
        start
            .checked_add(size as usize)
            .and_then(|end| bytes.get(start..end))
            .map(<[u8]>::to_vec)
            .unwrap_or_default()
    }
}
