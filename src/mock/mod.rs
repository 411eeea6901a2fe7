//! A vhost-user daemon to test against, and a driver to put in the guest's place.
//!
//! A VMM that shares guest memory wants to know three things that it cannot tell by itself: which
//! table the *other* side holds, whether the device reads the byte that the guest wrote, and what
//! happens when the other side refuses, stalls or dies. This module answers them without a second
//! process, a kernel image or a root shell.
//!
//! **The daemon.** [`MockDaemon`] is a vhost-user-blk daemon over a RAM disk. It is built on
//! `vhost-user-backend`, as real daemons are, and it is reached through a real Unix socket with
//! real file descriptors: what it maps, it maps a second time, from the descriptor that it was
//! sent. [`MockDaemon::table`] shows the result, [`MockDaemon::requests`] how it came about.
//!
//! **The gate.** Between the socket and that daemon sits a relay, which passes every message on
//! unless a [`Fault`] says otherwise. Misbehaviour lives there alone; the daemon itself is a
//! correct one, and a table that it holds is one that a correct daemon would hold. The relay adds
//! two hand-overs between threads to each request and nothing to the data path.
//!
//! **The rest of a session**, for those who ask for it. With
//! [in-flight buffers](MockDaemonBuilder::with_inflight) a daemon completes what an earlier one
//! took before it died, at [a step](RequestStep) that the test chooses. With a
//! [backend channel](MockDaemonBuilder::with_backend_channel) it makes requests of the frontend.
//! Both have faults of their own: [`InflightFault`], [`ChannelFault`].
//!
//! **The guest.** [`BlkDriver`] makes requests on a [`DriverQueue`](crate::driver::DriverQueue), a
//! virtqueue in guest memory, as a guest's kernel would. It works with real daemons too, such as
//! `qemu-storage-daemon`.
//!
//! ```
//! use guest_memory_shm::mock::{BlkDriver, MockDaemon};
//! use guest_memory_shm::{GuestMemoryShm, SessionOptions, VhostUserSession};
//! use vm_memory::GuestAddress;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
//!
//! // Agree, then send the table.
//! let daemon = MockDaemon::builder().with_disk_size(4096).start_unnamed()?;
//! let mut session = VhostUserSession::on_socket(daemon.connect()?, SessionOptions::new(0))?;
//! session.update_memory(&memory)?;
//! assert_eq!(daemon.table()[0].size, 1 << 20);
//!
//! // Drive the device.
//! let mut driver = BlkDriver::new(&memory, GuestAddress(0x1000), 16)?;
//! session.start_ring(0, driver.session_ring()?)?;
//! memory.write_slice(&[7; 512], GuestAddress(0x8000))?;
//! driver.write(1, &[(GuestAddress(0x8000), 512)])?;
//! let mut sector = [0; 512];
//! daemon.disk().read(512, &mut sector)?;
//! assert_eq!(sector, [7; 512]);
//! # Ok(())
//! # }
//! ```
//!
//! # What it does not do
//! - It is no daemon for production: one frontend at a time, one thread for all queues, a disk
//!   that ends with the process.
//! - It refuses regions and logs that are longer than their files, which not every real daemon
//!   does. A file that is truncated later ends this process with SIGBUS, as it ends real ones:
//!   seal it.
//! - Packed rings, postcopy, and writes to the configuration are not offered; in-flight buffers
//!   and indirect descriptors not both.
//! - It logs as soon as it has a log, whether or not `VHOST_F_LOG_ALL` (bit 26) was acknowledged:
//!   [`MockDaemon::requests`] tells whether your VMM sent SET_FEATURES with it.
//! - Its process is the caller's: after a hang-up it is named as a daemon that may still write.
//! - It has a weakness of `vhost-user-backend`: regions that are added after SET_LOG_BASE are not
//!   logged until the log is set again.
//! - The driver uses neither EVENT_IDX nor indirect descriptors. It notices that a daemon is gone
//!   only by its deadline.
//! - It needs Linux: abstract sockets, eventfd, epoll.

mod backend;
mod blk;
mod blk_error;
mod builder;
mod channel;
mod config;
mod daemon;
mod disk;
mod driver;
mod error;
mod fault;
mod gate;
mod guest;
mod hold;
mod inflight;
mod lock;
mod request;
mod ring;
mod server;
mod state;
mod wire;
mod writer;

pub use blk_error::{BlkError, RequestId};
pub use builder::MockDaemonBuilder;
pub use channel::BackendRequest;
pub use daemon::MockDaemon;
pub use disk::RamDisk;
pub use driver::BlkDriver;
pub use error::MockError;
pub use fault::{ChannelFault, Fault, InflightFault};
pub use guest::MockRegion;
pub use hold::RequestStep;
pub use request::LoggedRequest;
pub use ring::RingLayout;
pub use writer::MockWriter;
