//! Guest memory that changes while the guest runs, and the listeners that must know of it.
//!
//! An [`AddressSpace`] publishes memories to the threads that read and write them, and tells
//! listeners (daemons, the hypervisor) of each change: all of them, or none.

mod attached;
mod busy;
mod error;
mod members;
mod published;
#[cfg(feature = "vhost-user")]
mod reconnect;
mod space;
mod status;
mod transaction;

pub use error::{AddressSpaceError, AttachError};
pub use published::PublishedMemory;
pub use space::AddressSpace;
pub use status::{ListenerId, ListenerStatus};
pub use transaction::{ChangeReport, Transaction};
