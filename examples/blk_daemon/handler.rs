//! What the daemon does at each message of a frontend, every word of which may be wrong.

use std::fs::File;
use std::io;
use std::sync::Arc;

use guest_memory_shm::receive::{ReceivePolicy, ReceivedTable};
use vhost::vhost_user::message::{
    self, VhostUserConfigFlags, VhostUserLog, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
    VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures};
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestMemoryAtomic, GuestMemoryBackend};

use crate::device::{Device, MAX_QUEUE_SIZE, Memory, Vring};
use crate::dirty_log::{Log, Marks};
use crate::image::{Image, Lane};
use crate::not_offered::not_offered;
use crate::queue::QueueThread;

/// How many regions a frontend may share: what others offer.
const MEM_SLOTS: usize = 509;

/// All that one frontend was told, and has told.
pub(crate) struct Handler {
    device: Arc<Device>,
    image: Arc<Image>,
    owned: bool,
    acked_features: u64,
    table: ReceivedTable<Marks>,
    log: Option<Arc<Log>>,
    /// The same memory for the rings.
    memory: GuestMemoryAtomic<Memory>,
    queues: Vec<Queue>,
}

/// A queue, which has a thread from when it is first used.
struct Queue {
    vring: Vring,
    size: u64,
    thread: Option<QueueThread>,
}

impl Handler {
    pub(crate) fn new(image: &Arc<Image>, device: Arc<Device>) -> io::Result<Self> {
        let memory = GuestMemoryAtomic::new(Memory::new());
        let queue = |_| {
            let vring = Vring::new(memory.clone(), MAX_QUEUE_SIZE).map_err(io::Error::other)?;
            Ok(Queue {
                vring,
                size: MAX_QUEUE_SIZE.into(),
                thread: None,
            })
        };
        Ok(Self {
            queues: (0..device.queues()).map(queue).collect::<io::Result<_>>()?,
            image: Arc::clone(image),
            device,
            owned: false,
            acked_features: 0,
            table: ReceivedTable::new(ReceivePolicy::new().with_mem_slots(MEM_SLOTS)),
            log: None,
            memory,
        })
    }

    /// Puts a table in the place of the one that was there, when nothing uses that any more.
    fn publish(&mut self, table: ReceivedTable<Marks>) {
        let memory = table.memory();
        log::debug!("memory table with {} regions", memory.num_regions());
        for region in memory.iter() {
            log::debug!("region: {}", region.range());
        }
        self.table = table;
        self.mark_in_log();
        let memory = self.table.memory().clone();
        match self.memory.lock() {
            Ok(place) => place.replace(memory.clone()),
            Err(poisoned) => poisoned.into_inner().replace(memory.clone()),
        }
        self.device.replace_memory(memory);
    }

    /// Has the writes to all regions leave marks in the log, if there is one.
    fn mark_in_log(&self) {
        if let Some(log) = &self.log {
            for region in self.table.memory().iter() {
                region
                    .dirty_bitmap()
                    .go_to(log, region.range().start_addr());
            }
        }
    }

    fn queue(&mut self, index: impl TryInto<usize>) -> Result<&mut Queue> {
        let index = index.try_into().ok();
        let queue = index.and_then(|index| self.queues.get_mut(index));
        queue.ok_or(Error::InvalidParam)
    }

    /// Changes whether a queue has a descriptor to be kicked by, and begins to wait for it.
    fn set_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let (device, image) = (Arc::clone(&self.device), Arc::clone(&self.image));
        let queue = self.queue(index)?;
        let thread = match &mut queue.thread {
            Some(thread) => thread,
            none => {
                let lane = Lane::new(&image).map_err(Error::ReqHandlerError)?;
                let thread = QueueThread::start(&device, queue.vring.clone(), lane);
                none.insert(thread.map_err(Error::ReqHandlerError)?)
            }
        };
        thread.ignore_kicks();
        let starts = kick.is_some();
        queue.vring.set_kick(kick);
        if starts {
            queue.vring.set_queue_ready(true);
        }
        thread.follow_state().map_err(Error::ReqHandlerError)
    }

    fn set_enabled(queue: &mut Queue, enabled: bool) -> Result<()> {
        queue.vring.set_enabled(enabled);
        match &mut queue.thread {
            Some(thread) => thread.follow_state().map_err(Error::ReqHandlerError),
            None => Ok(()),
        }
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        if self.owned {
            return Err(Error::InvalidOperation("already claimed"));
        }
        self.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.acked_features = 0;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.acked_features = 0;
        let mut queues = self.queues.iter_mut();
        queues.try_for_each(|queue| Self::set_enabled(queue, false))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.device.features() != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked_features = features;
        self.device.acked_features(features);
        for queue in &mut self.queues {
            let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            queue.vring.set_queue_event_idx(event_idx);
            // Without protocol features there is no message that enables a queue.
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                Self::set_enabled(queue, true)?;
            }
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(Device::protocol_features())
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        // vhost's part of the protocol depends on them, ours does not.
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.queues().into())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEM_SLOTS as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.publish(self.table.set(regions, files)?);
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        self.publish(self.table.add(region, [file])?);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.publish(self.table.remove(region)?);
        Ok(())
    }

    /// No answer to this message is a refusal: the frontend is hung up on.
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let (offset, size) = (log.mmap_offset, log.mmap_size);
        let log = Log::map(file, offset, size).map_err(Error::ReqHandlerError)?;
        let last = self.table.memory().last_addr();
        if !log.covers(last) {
            let end = last.0;
            let text = format!("a dirty log of {size} bytes does not reach to {end:#x}");
            return Err(Error::ReqHandlerError(io::Error::other(text)));
        }
        self.log = Some(Arc::new(log));
        self.mark_in_log();
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let queue = self.queue(index)?;
        let size = u16::try_from(num).ok();
        let size = size.filter(|size| (1..=MAX_QUEUE_SIZE).contains(size));
        let size = size.ok_or(Error::InvalidParam)?;
        queue.vring.set_queue_size(size);
        queue.size = size.into();
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let size = self.queue(index)?.size;
        let descriptors = self.table.ring(descriptors, 16 * size)?;
        let available = self.table.ring(available, 6 + 2 * size)?;
        let used = self.table.ring(used, 6 + 8 * size)?;
        let vring = &self.queue(index)?.vring;
        let set = vring.set_queue_info(descriptors.0, available.0, used.0);
        set.map_err(|_| Error::InvalidParam)?;
        // SET_VRING_BASE says where the available ring goes on; the used ring says itself.
        let used = vring.queue_used_idx();
        vring.set_queue_next_used(used.map_err(|_| Error::BackendInternalError)?);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.queue(index)?.vring.set_queue_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let device = Arc::clone(&self.device);
        let queue = self.queue(index)?;
        log::debug!("queue {index} stops");
        queue.vring.set_queue_ready(false);
        if let Some(thread) = &mut queue.thread {
            thread.ignore_kicks();
        }
        // It takes no requests any more: wait for those that it took.
        device.settle();
        let next = queue.vring.queue_next_avail();
        queue.vring.set_kick(None);
        queue.vring.set_call(None);
        Ok(VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.set_kick(index, file)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(index)?.vring.set_call(file);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(index)?.vring.set_err(file);
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let needed = VhostUserVirtioFeatures::PROTOCOL_FEATURES;
        if self.acked_features & needed.bits() == 0 {
            return Err(Error::InactiveFeature(needed));
        }
        Self::set_enabled(self.queue(index)?, enable)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        Ok(self.device.config(offset, size))
    }

    not_offered!(
        set_config,
        set_gpu_socket,
        get_shared_object,
        get_shmem_config
    );
    not_offered!(
        get_inflight_fd,
        set_inflight_fd,
        set_device_state_fd,
        check_device_state
    );
}
