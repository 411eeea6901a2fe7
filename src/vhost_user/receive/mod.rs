//! The daemon's end of vhost-user memory: tables that a frontend sends, checked and mapped.
//!
//! A frontend may be broken, or hostile. What it says about its memory is checked before anything
//! is mapped: counts, wraps, overlaps of guest *and* user addresses, alignment, the length of each
//! file, its kind and its seals. A message that is refused changes nothing: the daemon keeps
//! the table that it has, the descriptors of the message are closed, and the error has a
//! [code](ReceiveError::reply_code) for the reply.
//!
//! [`ReceivedTable::set`] is for SET_MEM_TABLE, [`ReceivedTable::add`] for ADD_MEM_REG and
//! [`ReceivedTable::remove`] for REM_MEM_REG; [`ReceivedTable::ring`] translates the addresses in
//! SET_VRING_ADDR. [`ReceivedRegion::decode_table`] and [`ReceivedRegion::decode`] read the
//! payloads for daemons that do not use the vhost crate.
#![cfg_attr(
    feature = "vhost-user",
    doc = "With the feature `vhost-user` the types of the vhost crate are taken as they are, and",
    doc = "[`ReceiveError`] becomes its error by `?`."
)]
//!
//! A file that is not sealed can be truncated by the frontend, and the daemon's next touch is
//! SIGBUS: daemons that do not trust their frontends demand seals, by
//! [`ReceivePolicy::with_descriptors`]. (Of QEMU's backends, `memory-backend-memfd` seals.) Seals
//! keep the file long enough; that there are pages for it, they do not promise. In a sealed file
//! of huge pages the frontend can punch holes, and touching them with an empty pool is SIGBUS,
//! too.
//!
//! Descriptors for which the process has no numbers left are dropped by the kernel, and
//! recvmsg(2) says MSG_CTRUNC. Those that came before them are in the process all the same: a
//! daemon that receives messages by itself takes them out of the control buffer, hands them in
//! with the message, which then has fewer than regions and is refused, and so they are closed.
//!
//! A message without NEED_REPLY has no answer to put the code in: a daemon that refuses such a one
//! must hang up, or the frontend takes it for done.
//!
//! # The handlers of a daemon
//!
//! `examples/daemon_end.rs` has vhost's. A daemon that reads messages by itself:
//!
//! ```
//! use std::os::fd::OwnedFd;
//!
//! use guest_memory_shm::receive::{ReceiveError, ReceivePolicy, ReceivedRegion, ReceivedTable};
//!
//! /// The table after a message. Queues take the memory of it; the old table goes with the last
//! /// thread that still uses it. Descriptors that come with REM_MEM_REG are closed.
//! fn handled(
//!     table: &ReceivedTable,
//!     message: &str,
//!     payload: &[u8],
//!     fds: Vec<OwnedFd>,
//! ) -> Result<ReceivedTable, ReceiveError> {
//!     match message {
//!         "SET_MEM_TABLE" => table.set(ReceivedRegion::decode_table(payload)?, fds),
//!         "ADD_MEM_REG" => table.add(ReceivedRegion::decode(payload)?, fds),
//!         _ => table.remove(ReceivedRegion::decode(payload)?),
//!     }
//! }
//!
//! let table = ReceivedTable::new(ReceivePolicy::new());
//! let refused = handled(&table, "SET_MEM_TABLE", b"nonsense", Vec::new()).unwrap_err();
//! // The answer to a message with NEED_REPLY. Without it, a refusal is a hang-up.
//! assert_ne!(refused.reply_code(), 0);
//! ```

mod check;
mod error;
mod policy;
mod table;
#[cfg(feature = "vhost-user")]
mod vhost;
mod wire;

pub use error::ReceiveError;
pub use policy::ReceivePolicy;
pub use table::ReceivedTable;
pub use wire::ReceivedRegion;
