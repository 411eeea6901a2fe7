//! A new connection to a daemon that is a listener.

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

#[cfg(doc)]
use super::error::AddressSpaceError;
use super::error::Result;
use super::space::AddressSpace;
use super::status::ListenerId;
use crate::listener::ListenerError;
use crate::vhost_user::session::VhostUserSession;
use crate::vhost_user::share::VhostUserShare;
use crate::vhost_user::wire::DaemonSocket;

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// Goes on with a new connection to a daemon, and tells it the present memory.
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
    /// answer on the new one. So drop its frontend first: of a daemon that is away nobody else has
    /// it.
    ///
    /// # Errors
    ///
    /// Those of [`refresh`](Self::refresh): the daemon is away, as before. With
    /// [`AddressSpaceError::NoSuchListener`] and [`AddressSpaceError::Reentrant`] the daemon is
    /// what it was.
    pub fn reconnect(
        &self,
        id: &ListenerId<VhostUserShare>,
        socket: impl DaemonSocket,
        features: Features,
    ) -> Result<()> {
        self.refresh_after(
            id,
            |share| {
                share
                    .reconnect(socket, features)
                    .map_err(ListenerError::away)
            },
            |share, error| share.give_up(error.reason().to_owned()),
        )
    }

    /// Connects to the daemon of a session anew ([`VhostUserSession::reconnect`]), and tells it
    /// all that it was told before: features, the present memory, its log, the rings that ran.
    ///
    /// # Errors
    ///
    /// Those of [`refresh`](Self::refresh): the daemon is away, as before.
    pub fn reconnect_session(&self, id: &ListenerId<VhostUserSession>) -> Result<()> {
        self.refresh_after(
            id,
            |session| session.reconnect().map_err(ListenerError::away),
            |session, error| session.give_up(error.reason()),
        )
    }
}
