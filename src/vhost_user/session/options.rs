//! What a session is to agree on with a daemon.

use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;

use crate::vhost_user::table::TableView;

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
    pub(super) view: TableView,
}

impl SessionOptions {
    /// For a driver that knows these virtio features: of what the daemon offers no other is
    /// acknowledged. `VIRTIO_F_VERSION_1` is among them and required; bits of vhost-user itself
    /// (26, `VHOST_F_LOG_ALL`, and 30) are the session's business, and left out.
    pub fn new(features: u64) -> Self {
        Self {
            features: features & !super::OWN_BITS | VERSION_1,
            required: VERSION_1,
            protocol: super::KNOWN,
            deadline: Duration::from_secs(10),
            drain_deadline: Duration::from_secs(60),
            in_order: false,
            view: TableView::default(),
        }
    }

    /// Demands these virtio features, too: a daemon that does not offer them is refused.
    #[must_use]
    pub fn with_required(mut self, features: u64) -> Self {
        self.features |= features & !super::OWN_BITS;
        self.required |= features & !super::OWN_BITS;
        self
    }

    /// Leaves protocol features out that the session would use.
    #[must_use]
    pub fn without_protocol_features(mut self, features: Features) -> Self {
        self.protocol.remove(features);
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
