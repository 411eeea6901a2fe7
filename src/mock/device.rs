//! The frontend's steps around the memory table: negotiation before it, the queue after it.

use std::io::ErrorKind;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::backend::PROTOCOL_FEATURES;
use super::config::{BlkConfig, CONFIG_SIZE};
use super::disk::SECTOR_SIZE;
use super::driver::BlkDriver;
use super::error::{MockError, Result};

/// A vhost-user-blk daemon whose features have been negotiated.
///
/// It works with the mock and with real daemons. What lies between
/// [`negotiate`](Self::negotiate) and [`start_queue`](Self::start_queue) is the memory table,
/// which the caller sends: a queue can only be started where its rings are in the table.
#[derive(Clone, Debug)]
pub struct BlkDevice {
    features: u64,
    protocol_features: VhostUserProtocolFeatures,
    config: Option<BlkConfig>,
    queues: u64,
}

impl BlkDevice {
    /// Takes ownership of the daemon and negotiates what [`BlkDriver`] can use.
    ///
    /// Of the protocol features, those in `wanted` that the daemon offers are acknowledged;
    /// REPLY_ACK among them makes every later request of `frontend` wait for its acknowledgement,
    /// and CONFIG has the configuration read. Of the virtio features: VERSION_1, FLUSH, SEG_MAX,
    /// BLK_SIZE and MQ as offered.
    ///
    /// # Errors
    /// [`MockError`] with the failed request, or where the daemon lacks VIRTIO_F_VERSION_1 or
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub fn negotiate(
        frontend: &mut Frontend,
        wanted: VhostUserProtocolFeatures,
    ) -> Result<BlkDevice> {
        frontend
            .set_owner()
            .map_err(MockError::at("take the daemon"))?;
        let offered = frontend
            .get_features()
            .map_err(MockError::at("ask for the daemon's features"))?;
        let required = 1 << VIRTIO_F_VERSION_1 | 1 << PROTOCOL_FEATURES;
        if offered & required != required {
            return Err(unsupported(format!(
                "the daemon offers {offered:#x}, and {required:#x} are needed"
            )));
        }

        let doing = "negotiate protocol features";
        let protocol_features = frontend
            .get_protocol_features()
            .map_err(MockError::at(doing))?
            & wanted;
        frontend
            .set_protocol_features(protocol_features)
            .map_err(MockError::at(doing))?;
        // Not before: SET_PROTOCOL_FEATURES itself decides whether it is acknowledged.
        if protocol_features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }

        let optional = [
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_MQ,
        ];
        let usable = optional.iter().fold(required, |bits, bit| bits | 1 << bit);
        let features = offered & usable;
        frontend
            .set_features(features)
            .map_err(MockError::at("acknowledge virtio features"))?;

        let queues = match protocol_features.contains(VhostUserProtocolFeatures::MQ) {
            true => frontend
                .get_queue_num()
                .map_err(MockError::at("ask for the number of queues"))?,
            false => 1,
        };
        let config = match protocol_features.contains(VhostUserProtocolFeatures::CONFIG) {
            true => Some(read_config(frontend)?),
            false => None,
        };
        Ok(BlkDevice {
            features,
            protocol_features,
            config,
            queues,
        })
    }

    /// The virtio features that were acknowledged.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features that were acknowledged.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol_features
    }

    /// The disk's size in bytes, where CONFIG was negotiated.
    pub fn capacity(&self) -> Option<u64> {
        let config = self.config.as_ref()?;
        Some(config.capacity_sectors.saturating_mul(SECTOR_SIZE))
    }

    /// How many data buffers a request may have, where the daemon says so.
    pub fn max_segments(&self) -> Option<u32> {
        let config = self.config.as_ref()?;
        (self.features & 1 << VIRTIO_BLK_F_SEG_MAX != 0).then_some(config.max_segments)
    }

    /// The number of queues that may be started: what GET_QUEUE_NUM says, 1 without MQ.
    pub fn queues(&self) -> u64 {
        self.queues
    }

    /// Starts queue `index` with `driver` on the other side, and kicks it once: requests that a
    /// daemon before this one left undone are carried out.
    ///
    /// `user_address` translates a guest address to the user address by which the memory table
    /// that was sent names it.
    ///
    /// # Errors
    /// [`MockError`] with the failed request, or where `user_address` knows no address for a
    /// ring.
    pub fn start_queue<S: GuestAddressSpace>(
        &self,
        frontend: &mut Frontend,
        index: usize,
        driver: &BlkDriver<S>,
        user_address: impl Fn(GuestAddress) -> Option<u64>,
    ) -> Result<()> {
        let translate = |what: &str, addr: GuestAddress| {
            user_address(addr).ok_or_else(|| {
                let reason = format!("its {what} at {:#x} is not in the memory table", addr.0);
                MockError::new("start the queue", ErrorKind::InvalidInput, reason)
            })
        };
        let layout = driver.ring_layout();
        let rings = VringConfigData {
            queue_max_size: driver.queue_size(),
            queue_size: driver.queue_size(),
            flags: 0,
            desc_table_addr: translate("descriptor table", layout.descriptors)?,
            used_ring_addr: translate("used ring", layout.used)?,
            avail_ring_addr: translate("avail ring", layout.avail)?,
            log_addr: None,
        };
        frontend
            .set_vring_num(index, driver.queue_size())
            .map_err(MockError::at("set the size of the queue"))?;
        frontend
            .set_vring_base(index, driver.used_index())
            .map_err(MockError::at("set the first index of the queue"))?;
        frontend
            .set_vring_addr(index, &rings)
            .map_err(MockError::at("set the addresses of the queue"))?;
        frontend
            .set_vring_call(index, driver.call())
            .map_err(MockError::at("set the call eventfd of the queue"))?;
        frontend
            .set_vring_kick(index, driver.kick())
            .map_err(MockError::at("set the kick eventfd of the queue"))?;
        frontend
            .set_vring_enable(index, true)
            .map_err(MockError::at("enable the queue"))?;
        // A daemon may drop a kick that comes before it has enabled the queue. Messages are
        // handled in order: without acknowledgements, the answer to a question says that it has.
        if !self
            .protocol_features
            .contains(VhostUserProtocolFeatures::REPLY_ACK)
        {
            frontend
                .get_features()
                .map_err(MockError::at("wait until the queue is enabled"))?;
        }
        driver
            .kick()
            .write(1)
            .map_err(MockError::io("kick the queue"))
    }

    /// Stops queue `index`: the daemon has let go of its rings and buffers when this returns. The
    /// result is the index of the avail ring at which it would go on.
    ///
    /// # Errors
    /// [`MockError`] with the failed request.
    pub fn stop_queue(&self, frontend: &mut Frontend, index: usize) -> Result<u32> {
        frontend
            .get_vring_base(index)
            .map_err(MockError::at("stop the queue"))
    }
}

fn read_config(frontend: &mut Frontend) -> Result<BlkConfig> {
    let doing = "read the device's configuration";
    let size = u32::try_from(CONFIG_SIZE).map_err(MockError::at(doing))?;
    let (_, bytes) = frontend
        .get_config(0, size, VhostUserConfigFlags::empty(), &[0; CONFIG_SIZE])
        .map_err(MockError::at(doing))?;
    BlkConfig::from_bytes(&bytes)
        .ok_or_else(|| unsupported(format!("its configuration has only {} bytes", bytes.len())))
}

fn unsupported(reason: String) -> MockError {
    let doing = "use the daemon as a block device";
    MockError::new(doing, ErrorKind::Unsupported, reason)
}
