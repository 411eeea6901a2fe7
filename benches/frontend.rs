//! vhost's `Frontend`, for the bare messages of the benches.

use std::error::Error;
use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Features};

/// Agrees on what the exchange needs; each message is acknowledged.
pub(crate) fn connect(socket: UnixStream) -> Result<(Frontend, Features), Box<dyn Error>> {
    let mut frontend = Frontend::from_stream(socket, 1);
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    let wanted = Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK;
    assert!(frontend.get_protocol_features()?.contains(wanted));
    frontend.set_protocol_features(wanted)?;
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_features(offered & !(1 << 26))?; // VHOST_F_LOG_ALL
    Ok((frontend, wanted))
}
