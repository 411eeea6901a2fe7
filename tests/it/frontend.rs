//! What a VMM that has vhost's `Frontend` does with it itself: a disk's features, and its queues.

use std::os::unix::net::UnixStream;

use guest_memory_shm::mock::BlkDriver;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Features};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{GuestAddress, GuestAddressSpace};

/// What [`BlkDriver`] can use: VERSION_1, FLUSH, SEG_MAX, BLK_SIZE, MQ; and 30, for protocol
/// features.
pub(crate) const DISK: u64 = 1 << 32 | 1 << 9 | 1 << 2 | 1 << 6 | 1 << 12 | 1 << 30;

/// Agrees with a daemon, on those of the protocol features that it offers. With REPLY_ACK among
/// them each later request waits for its acknowledgement.
pub(crate) fn agree(stream: UnixStream, wanted: Features) -> vhost::Result<(Frontend, Features)> {
    let mut frontend = Frontend::from_stream(stream, 8);
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    let features = frontend.get_protocol_features()? & wanted;
    frontend.set_protocol_features(features)?;
    // Not before: SET_PROTOCOL_FEATURES itself decides whether it is acknowledged.
    if features.contains(Features::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    frontend.set_features(offered & DISK)?;
    Ok((frontend, features))
}

/// Starts a queue where the driver is with it, and wakes the daemon: what one before it left
/// undone is carried out. `user_address` is what the table that was sent says.
pub(crate) fn start_queue<S: GuestAddressSpace>(
    frontend: &mut Frontend,
    index: usize,
    driver: &BlkDriver<S>,
    user_address: impl Fn(GuestAddress) -> Option<u64>,
) {
    let (size, layout) = (driver.queue_size(), driver.ring_layout());
    let rings = VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr: user_address(layout.descriptors).unwrap(),
        used_ring_addr: user_address(layout.used).unwrap(),
        avail_ring_addr: user_address(layout.avail).unwrap(),
        log_addr: None,
    };
    frontend.set_vring_num(index, size).unwrap();
    frontend.set_vring_base(index, driver.used_index()).unwrap();
    frontend.set_vring_addr(index, &rings).unwrap();
    frontend.set_vring_call(index, driver.call()).unwrap();
    frontend.set_vring_kick(index, driver.kick()).unwrap();
    frontend.set_vring_enable(index, true).unwrap();
    // Without acknowledgements, the answer to a question says that it has come so far: a daemon
    // may drop a kick that comes earlier.
    frontend.get_features().unwrap();
    driver.kick().write(1).unwrap();
}
