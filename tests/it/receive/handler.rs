//! A daemon's handlers, as its author writes them with the vhost crate and `receive`.

use vhost::vhost_user::message::{
    self, VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
};
use vhost::vhost_user::{
    Result as ProtocolResult, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures as Features, VhostUserVirtioFeatures,
};
use vm_memory::GuestMemoryAtomic;

use self::not_offered::not_offered;
use super::*;

#[path = "../../../examples/common/not_offered.rs"]
mod not_offered;

/// The protocol features that it offers.
pub(super) const PROTOCOL: Features = Features::REPLY_ACK.union(Features::CONFIGURE_MEM_SLOTS);

/// What a daemon's author writes.
pub(super) struct Handler {
    pub(super) table: ReceivedTable,
    /// What the threads that serve queues would look at.
    pub(super) memory: GuestMemoryAtomic<GuestMemoryShm>,
    queue_size: u64,
    /// The descriptor table, the available ring and the used ring of the queue.
    pub(super) rings: Option<[GuestAddress; 3]>,
}

impl Handler {
    pub(super) fn new(policy: ReceivePolicy) -> Self {
        Self {
            table: ReceivedTable::new(policy),
            memory: GuestMemoryAtomic::new(GuestMemoryShm::new()),
            queue_size: 0,
            rings: None,
        }
    }

    fn publish(&mut self, table: ReceivedTable) {
        let memory = table.memory().clone();
        self.memory.lock().unwrap().replace(memory);
        self.table = table;
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> ProtocolResult<Option<Vec<u64>>> {
        let table = self.table.set(regions, files)?;
        self.publish(table);
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> ProtocolResult<Option<u64>> {
        let table = self.table.add(region, [file])?;
        self.publish(table);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> ProtocolResult<()> {
        let table = self.table.remove(region)?;
        self.publish(table);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> ProtocolResult<u64> {
        Ok(self.table.policy().mem_slots() as u64)
    }

    fn set_vring_num(&mut self, _index: u32, num: u32) -> ProtocolResult<()> {
        self.queue_size = num.into();
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        _index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> ProtocolResult<()> {
        let n = self.queue_size;
        self.rings = Some([
            self.table.ring(descriptors, 16 * n)?,
            self.table.ring(available, 6 + 2 * n)?,
            self.table.ring(used, 6 + 8 * n)?,
        ]);
        Ok(())
    }

    fn set_owner(&mut self) -> ProtocolResult<()> {
        Ok(())
    }

    fn get_features(&mut self) -> ProtocolResult<u64> {
        Ok(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, _features: u64) -> ProtocolResult<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> ProtocolResult<Features> {
        Ok(PROTOCOL)
    }

    fn set_protocol_features(&mut self, _features: u64) -> ProtocolResult<()> {
        Ok(())
    }

    // Nothing else is asked of it.
    not_offered!(reset_owner, reset_device, get_queue_num, others);
    not_offered!(
        set_vring_base,
        get_vring_base,
        set_vring_kick,
        set_vring_call
    );
    not_offered!(set_vring_err, set_vring_enable);
}
