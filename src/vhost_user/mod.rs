//! All that talks vhost-user: memory tables, the daemon's end that maps them, and the frontend's
//! end that keeps a daemon's view equal to one.

pub mod receive;

#[cfg(feature = "vhost-user")]
pub(crate) mod kernel;
#[cfg(feature = "vhost-user")]
pub(crate) mod session;
#[cfg(feature = "vhost-user")]
pub(crate) mod share;
#[cfg(feature = "vhost-user")]
pub(crate) mod table;
#[cfg(feature = "vhost-user")]
pub(crate) mod wire;
