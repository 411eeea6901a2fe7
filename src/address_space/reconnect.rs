//! A new connection to a daemon that is a listener.

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

#[cfg(doc)]
use super::error::AddressSpaceError;
use super::error::Result;
use super::space::AddressSpace;
use super::status::ListenerId;
use crate::vhost_user::share::{DaemonConnection, VhostUserShare};

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// Goes on with a new connection to a daemon, and tells it the present memory; gives back the
    /// old connection.
    ///
    /// It is told the memory only. The VMM tells it the rest again: before this call the virtio
    /// features (but `VHOST_F_LOG_ALL` after it, as the log comes with the memory), after it the
    /// rings, and that they are enabled.
    ///
    /// `features` are the protocol features that were acknowledged on the new connection, and the
    /// daemon's limits are asked for anew: it may be another program by now. The daemon gets the
    /// memory as at first, one region after the other where it takes them so: it does not matter
    /// how far the memory has grown. Where it maps the regions while postcopy listens, the
    /// [handler](VhostUserShare::with_base_handler) is told.
    ///
    /// Most daemons serve one frontend at a time: the old connection must have ended before they
    /// answer on the new one. That of a daemon that is away has.
    ///
    /// # Errors
    ///
    /// Those of [`refresh`](Self::refresh); the new connection is closed then, and so is the old
    /// one: the daemon is away, as before. With [`AddressSpaceError::NoSuchListener`] and
    /// [`AddressSpaceError::Reentrant`] only the new one is closed, and the daemon is what it was.
    pub fn reconnect<F: DaemonConnection + Send + 'static>(
        &self,
        id: &ListenerId<VhostUserShare<F>>,
        sink: F,
        features: Features,
    ) -> Result<F> {
        self.refresh_after(
            id,
            |share| share.reconnect(sink, features),
            |share, error| share.give_up(error.reason().to_owned()),
        )
    }
}
