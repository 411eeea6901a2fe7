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
//! ```
//! use std::os::fd::OwnedFd;
//!
//! use guest_memory_shm::GuestMemoryShm;
//! use guest_memory_shm::receive::{ReceiveError, ReceivePolicy, ReceivedRegion, ReceivedTable};
//! use vm_memory::{GuestAddress, GuestMemoryAtomic};
//!
//! type Result<T> = std::result::Result<T, ReceiveError>;
//!
//! struct Daemon {
//!     /// What the frontend was told that we have.
//!     table: ReceivedTable,
//!     /// What the threads that serve queues look at.
//!     memory: GuestMemoryAtomic<GuestMemoryShm>,
//! }
//!
//! impl Daemon {
//!     fn set_mem_table(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<()> {
//!         let table = self.table.set(ReceivedRegion::decode_table(payload)?, fds)?;
//!         self.publish(table);
//!         Ok(())
//!     }
//!
//!     fn add_mem_reg(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<()> {
//!         let table = self.table.add(ReceivedRegion::decode(payload)?, fds)?;
//!         self.publish(table);
//!         Ok(())
//!     }
//!
//!     /// A descriptor that comes with it is closed.
//!     fn rem_mem_reg(&mut self, payload: &[u8], _fds: Vec<OwnedFd>) -> Result<()> {
//!         let table = self.table.remove(ReceivedRegion::decode(payload)?)?;
//!         self.publish(table);
//!         Ok(())
//!     }
//!
//!     fn descriptors_at(&self, user_addr: u64, queue_size: u64) -> Result<GuestAddress> {
//!         self.table.ring(user_addr, 16 * queue_size)
//!     }
//!
//!     /// Only now does the old table go, with the last thread that still uses it.
//!     fn publish(&mut self, table: ReceivedTable) {
//!         let memory = table.memory().clone();
//!         self.memory.lock().expect("no handler panics").replace(memory);
//!         self.table = table;
//!     }
//! }
//!
//! /// The answer to a message with NEED_REPLY. Without it, a refusal is a hang-up.
//! fn reply(result: Result<()>) -> u64 {
//!     result.map_or_else(|refused| refused.reply_code(), |()| 0)
//! }
//!
//! let mut daemon = Daemon {
//!     table: ReceivedTable::new(ReceivePolicy::new()),
//!     memory: GuestMemoryAtomic::new(GuestMemoryShm::new()),
//! };
//! let nonsense = daemon.set_mem_table(b"nonsense", Vec::new());
//! assert_ne!(reply(nonsense), 0);
//! ```
//!
//! A whole program, with vhost's handler of requests: `examples/daemon_end.rs`.

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
