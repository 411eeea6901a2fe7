//! The device that one front-end sees.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;

use crate::config;
use crate::failure::{OrFail, Result};
use crate::image::{Image, Lane};
use crate::request;

/// Bits of the vhost-user specification: VHOST_F_LOG_ALL and VHOST_USER_F_PROTOCOL_FEATURES.
const LOG_ALL: u32 = 26;
const PROTOCOL_FEATURES: u32 = 30;

/// The largest ring.
const MAX_QUEUE_SIZE: usize = 1024;

/// After so many requests a change of the memory table has its turn.
const BATCH: u32 = 32;

type Memory = GuestMemoryMmap<BitmapMmapRegion>;
type Vring = VringMutex<GuestMemoryAtomic<Memory>>;

/// The state that ends with the connection.
pub(crate) struct Device {
    image: Arc<Image>,
    queues: u16,
    /// The memory that was shared and checked last. Held for reading while requests use it: what
    /// is acknowledged as removed must not be in use any more.
    memory: RwLock<Option<Arc<Memory>>>,
    /// The image, once for each queue.
    lanes: Vec<Mutex<Lane>>,
    /// The guest knows no flushes: its writes are to be on the medium when they are done.
    write_through: AtomicBool,
    /// The connection is over: a guest that keeps its ring full must not keep the threads.
    over: AtomicBool,
}

impl Device {
    pub(crate) fn new(image: &Arc<Image>, queues: u16) -> Result<Self> {
        let lanes = (0..queues).map(|_| Lane::new(image).map(Mutex::new));
        Ok(Self {
            image: Arc::clone(image),
            queues,
            memory: RwLock::new(None),
            lanes: lanes
                .collect::<io::Result<_>>()
                .or_fail(|| "cannot open the image once for each queue")?,
            write_through: AtomicBool::new(true),
            over: AtomicBool::new(false),
        })
    }

    /// Stops after the requests that are under way.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// The token of the event that ends a thread: the first one that vhost-user-backend leaves to
    /// its user.
    pub(crate) fn exit_token(&self) -> u64 {
        u64::from(self.queues) + 1
    }

    /// Carries out what is available in a queue, in its order: a daemon after this one, which
    /// starts where the used ring ends, carries out exactly what this one left undone.
    fn serve_queue(&self, vring: &Vring, lane: &mut Lane) {
        while !self.over.load(Ordering::Relaxed) {
            let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
            let Some(memory) = memory.as_ref() else {
                return;
            };
            if !self.serve_batch(vring, memory, lane) {
                return;
            }
        }
    }

    /// True: there is more to do.
    ///
    /// The queue is locked only to take a request and to give it back, not while the image is
    /// used: the front-end may change or stop it meanwhile.
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
    fn replace_memory(&self, memory: Option<Arc<Memory>>) {
        let mut place = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        *place = memory;
    }
}

/// Refuses regions that are longer than their files: to touch what is missing would kill us.
fn check(memory: &Memory) -> io::Result<()> {
    for region in memory.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        let refuse = |reason: &str| {
            let text = format!("the region of {len} bytes at {start:#x} {reason}");
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        };
        let Some(file) = region.file_offset() else {
            return refuse("has no file");
        };
        let file_len = file.file().metadata()?.len();
        if file
            .start()
            .checked_add(len)
            .is_none_or(|end| end > file_len)
        {
            return refuse(&format!(
                "is beyond the end of its file of {file_len} bytes"
            ));
        }
        log::debug!("region: {len} bytes at {start:#x}");
    }
    Ok(())
}

impl VhostUserBackend for Device {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
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

    fn acked_features(&self, features: u64) {
        log::debug!("the guest takes the features {features:#x}");
        let flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.write_through.store(!flushes, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // REPLY_ACK is offered by the vhost crate.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queues know.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let bytes = config::bytes(&self.image, self.queues);
        let start = offset as usize;
        start
            .checked_add(size as usize)
            .and_then(|end| bytes.get(start..end))
            .map(<[u8]>::to_vec)
            .unwrap_or_default()
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        let memory = memory.memory().into_inner();
        log::debug!("memory table with {} regions", memory.num_regions());
        let checked = check(&memory);
        // After an error the connection is given up: until then no request is carried out.
        self.replace_memory(checked.is_ok().then_some(memory));
        checked.inspect_err(|error| log::warn!("refused a memory table: {error}"))
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        log::debug!("queue {queue_index} stops");
        // It takes no requests any more: wait for the one that it took.
        drop(self.memory.write().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        // An error is how a thread is told to end.
        if u64::from(device_event) == self.exit_token() {
            return Err(io::Error::other("the connection is over"));
        }
        match (
            vrings.get(usize::from(device_event)),
            self.lanes.get(thread_id),
        ) {
            (Some(vring), Some(lane)) => {
                let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
                self.serve_queue(vring, &mut lane);
            }
            _ => log::warn!("event {device_event} belongs to no queue"),
        }
        Ok(())
    }
}
