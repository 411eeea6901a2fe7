//! What a session is to agree on with a daemon.

use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;

use crate::vhost_user::table::TableView;

/// `VHOST_F_LOG_ALL`.
pub(super) const LOG_ALL: u64 = 1 << 26;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Those that no driver decides about.
const OWN_BITS: u64 = LOG_ALL | PROTOCOL_FEATURES;

/// The protocol features that a session knows how to use.
const KNOWN: Features = Features::MQ
    .union(Features::REPLY_ACK)
    .union(Features::CONFIGURE_MEM_SLOTS)
    .union(Features::LOG_SHMFD)
    .union(Features::CONFIG)
    .union(Features::INFLIGHT_SHMFD)
    .union(Features::RESET_DEVICE);
/// What a backend channel needs.
const CHANNEL: Features = Features::BACKEND_REQ.union(Features::BACKEND_SEND_FD);

/// The largest ring with an in-flight buffer, unless set: QEMU's largest.
const RING_SIZE: u16 = 1024;

/// `VIRTIO_F_VERSION_1` (virtio 1.3, "Reserved Feature Bits").
const VERSION_1: u64 = 1 << 32;

/// What a [`VhostUserSession`](crate::VhostUserSession) is to agree on with its daemon, and how
/// long it waits.
///
/// ```
/// use std::time::Duration;
///
/// use guest_memory_shm::SessionOptions;
///
/// const VIRTIO_BLK_F_FLUSH: u64 = 1 << 9;
/// let options = SessionOptions::new(VIRTIO_BLK_F_FLUSH).with_deadline(Duration::from_secs(5));
/// ```
#[derive(Clone, Debug)]
pub struct SessionOptions {
    pub(super) features: u64,
    pub(super) required: u64,
    pub(super) protocol: Features,
    pub(super) deadline: Duration,
    pub(super) drain_deadline: Duration,
    pub(super) in_order: bool,
    pub(super) max_ring_size: u16,
    pub(super) rings: Option<u16>,
    pub(super) channel: bool,
    pub(super) view: TableView,
}

impl SessionOptions {
    /// For a driver that knows these virtio features: of what the daemon offers no other is
    /// acknowledged. `VIRTIO_F_VERSION_1` is among them and required; bits of vhost-user itself
    /// (26, `VHOST_F_LOG_ALL`, and 30) are the session's business, and left out.
    pub fn new(features: u64) -> Self {
        Self {
            features: features & !OWN_BITS | VERSION_1,
            required: VERSION_1,
            protocol: KNOWN,
            deadline: Duration::from_secs(10),
            drain_deadline: Duration::from_secs(60),
            in_order: false,
            max_ring_size: RING_SIZE,
            rings: None,
            channel: false,
            view: TableView::default(),
        }
    }

    /// Demands these virtio features, too: a daemon that does not offer them is refused.
    #[must_use]
    pub fn with_required(mut self, features: u64) -> Self {
        self.features |= features & !OWN_BITS;
        self.required |= features & !OWN_BITS;
        self
    }

    /// Leaves protocol features out that the session would use.
    #[must_use]
    pub fn without_protocol_features(mut self, features: Features) -> Self {
        self.protocol.remove(features);
        self
    }

    /// Acknowledges these protocol features, too, where the daemon offers them: for messages that
    /// the caller sends by itself, [`VhostUserSession::request`].
    ///
    /// [`VhostUserSession::request`]: crate::VhostUserSession::request
    #[must_use]
    pub fn with_protocol_features(mut self, features: Features) -> Self {
        self.protocol |= features;
        self
    }

    /// Has the daemon make requests of its own on a channel beside the connection, if it can:
    /// [`VhostUserSession::receive`](crate::VhostUserSession::receive).
    #[must_use]
    pub fn with_backend_channel(mut self) -> Self {
        self.protocol |= CHANNEL;
        self.channel = true;
        self
    }

    /// Sets how many rings the device has; unless set, as many as the daemon says (GET_QUEUE_NUM),
    /// one if it has no such message. A network daemon counts pairs of rings: it says 1 for a
    /// device with two. Others do not count, and have several all the same (vsock: 2).
    #[must_use]
    pub fn with_rings(mut self, rings: u16) -> Self {
        self.rings = Some(rings);
        self
    }

    /// Sets the largest ring that can be started with a daemon that notes what is in flight (its
    /// buffer has 16 bytes for each descriptor of each ring); 1024 descriptors unless set.
    #[must_use]
    pub fn with_max_ring_size(mut self, descriptors: u16) -> Self {
        self.max_ring_size = descriptors;
        self
    }

    /// Sets how long the daemon may take to connect and agree, for a change of the memory
    /// ([`VhostUserShare::with_deadline`](crate::VhostUserShare::with_deadline)), and for each
    /// other call; 10 seconds unless set.
    #[must_use]
    pub fn with_deadline(mut self, limit: Duration) -> Self {
        self.deadline = limit;
        self
    }

    /// Sets how long a ring may take to stop, in which the daemon completes what it has begun; 60
    /// seconds unless set.
    #[must_use]
    pub fn with_drain_deadline(mut self, limit: Duration) -> Self {
        self.drain_deadline = limit;
        self
    }

    /// Says that the device completes requests in the order in which they were made available.
    /// Then a daemon that was restarted can go on at the used index; otherwise requests that were
    /// completed out of order would be lost or carried out twice, and the device needs a reset.
    #[must_use]
    pub fn with_device_in_order(mut self) -> Self {
        self.in_order = true;
        self
    }

    /// Sets what the daemon gets to see of the memory; everything unless set.
    #[must_use]
    pub fn with_view(mut self, view: TableView) -> Self {
        self.view = view;
        self
    }
}
