//! The options of a daemon, and how it is started.

use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::daemon::{MockDaemon, STARTING, SocketFile};
use super::disk::{RamDisk, SECTOR_SIZE};
use super::error::{MockError, Result};
use super::fault::{Fault, FaultPlan};
use super::server;
use super::state::Options;

/// What vhost-user-backend and libvhost-user offer.
const DEFAULT_MEM_SLOTS: u64 = 509;
/// One worker thread serves all queues, and the crate's mask of its queues has 32 bits set.
const MAX_QUEUES: u16 = 32;

/// The options of a [`MockDaemon`].
#[derive(Clone, Debug)]
pub struct MockDaemonBuilder {
    disk: Disk,
    options: Options,
    faults: FaultPlan,
}

#[derive(Clone, Debug)]
enum Disk {
    Zeros(u64),
    Contents(Vec<u8>),
}

impl MockDaemon {
    /// The options of a daemon, all at their defaults.
    pub fn builder() -> MockDaemonBuilder {
        MockDaemonBuilder::default()
    }
}

impl Default for MockDaemonBuilder {
    fn default() -> MockDaemonBuilder {
        MockDaemonBuilder {
            disk: Disk::Zeros(1 << 20),
            options: Options {
                queues: 1,
                max_mem_slots: Some(DEFAULT_MEM_SLOTS),
                reply_ack: true,
                inflight: false,
                backend_channel: false,
            },
            faults: FaultPlan::default(),
        }
    }
}

impl MockDaemonBuilder {
    /// A disk of `bytes` zero bytes, a multiple of 512. Default: 1 MiB. Pages that were
    /// never written take no memory.
    pub fn with_disk_size(mut self, bytes: u64) -> Self {
        self.disk = Disk::Zeros(bytes);
        self
    }

    /// A disk with these contents, a multiple of 512 bytes.
    pub fn with_disk_contents(mut self, contents: Vec<u8>) -> Self {
        self.disk = Disk::Contents(contents);
        self
    }

    /// The number of queues, from 1 to 32. Default: 1. With more than one the device offers
    /// VIRTIO_BLK_F_MQ; one thread serves them all.
    pub fn with_queues(mut self, queues: u16) -> Self {
        self.options.queues = queues;
        self
    }

    /// Answers GET_MAX_MEM_SLOTS with `slots` and refuses an ADD_MEM_REG beyond it. Default: 509.
    /// Undoes [`without_mem_slots`](Self::without_mem_slots).
    pub fn with_max_mem_slots(mut self, slots: u64) -> Self {
        self.options.max_mem_slots = Some(slots);
        self
    }

    /// Does not offer CONFIGURE_MEM_SLOTS: the table can only be set as a whole.
    pub fn without_mem_slots(mut self) -> Self {
        self.options.max_mem_slots = None;
        self
    }

    /// Does not offer REPLY_ACK: a change that fails shows as a hang-up, as with real daemons.
    pub fn without_reply_ack(mut self) -> Self {
        self.options.reply_ack = false;
        self
    }

    /// Offers INFLIGHT_SHMFD: which requests are in flight is noted in a buffer that the frontend
    /// keeps, so that the next daemon completes what this one took. Default: not offered.
    ///
    /// The buffer is made at GET_INFLIGHT_FD and used from SET_INFLIGHT_FD on, which each
    /// connection needs: what is marked in it then is carried out when its queue is started, in
    /// the order of `counter`. As devices may, the daemon takes all that is available at once, and
    /// completes the latest first. It does not offer indirect descriptors.
    ///
    /// Where a queue starts, the buffer and the used ring say; SET_VRING_BASE counts for a buffer
    /// that was not used yet. A daemon that is killed between a completion and the guest's
    /// eventfd leaves it to the frontend to wake the guest.
    ///
    /// ```
    /// # use guest_memory_shm::{GuestMemoryShm, SessionOptions, VhostUserSession};
    /// use guest_memory_shm::mock::{BlkDriver, MockDaemon, RequestStep};
    /// # use std::time::Duration;
    /// # use vm_memory::GuestAddress;
    ///
    /// # let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// const FLUSH: u64 = 1 << 9;
    /// let first = MockDaemon::builder().with_inflight().start_unnamed()?;
    /// first.hold_requests(2, RequestStep::Marked);
    /// let options = SessionOptions::new(FLUSH);
    /// let mut session = VhostUserSession::on_socket(first.connect()?, options)?;
    /// session.update_memory(&memory)?;
    /// let mut driver = BlkDriver::new(&memory, GuestAddress(0x1000), 16)?;
    /// driver.submit_flush()?;
    /// driver.submit_flush()?;
    /// session.start_ring(0, driver.session_ring()?)?;
    /// first.wait_held(Duration::from_secs(20))?;
    /// drop(first); // as if it was killed, with two requests in flight
    ///
    /// let second = MockDaemon::builder().with_inflight().start_unnamed()?;
    /// session.reconnect_on(second.connect()?);
    /// session.update_memory(&memory)?; // and the buffer, and the ring
    /// driver.wait_all()?;
    /// assert_eq!(second.disk().flush_count(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_inflight(mut self) -> Self {
        self.options.inflight = true;
        self
    }

    /// Offers BACKEND_REQ and BACKEND_SEND_FD: a socket for requests of the daemon's own, see
    /// [`MockDaemon::send_backend_request`]. Default: not offered.
    ///
    /// ```
    /// use guest_memory_shm::mock::{BackendRequest, MockDaemon};
    /// # use guest_memory_shm::{SessionOptions, VhostUserSession};
    /// # use std::time::Duration;
    /// use vhost::vhost_user::message::BackendReq;
    ///
    /// let daemon = MockDaemon::builder().with_backend_channel().start_unnamed()?;
    /// let options = SessionOptions::new(0).with_backend_channel();
    /// let mut session = VhostUserSession::on_socket(daemon.connect()?, options)?;
    ///
    /// let changed = BackendRequest::new(BackendReq::CONFIG_CHANGE_MSG).with_answer();
    /// daemon.send_backend_request(&changed)?;
    /// let message = session.receive()?.ok_or("it was sent")?;
    /// assert!(message.is_config_change());
    /// session.answer(message, 0)?; // which asks for the configuration first, in a VMM
    /// assert_eq!(daemon.backend_answer(Duration::from_secs(20))?, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_backend_channel(mut self) -> Self {
        self.options.backend_channel = true;
        self
    }

    /// Misbehaves at a change of the memory table, as [`MockDaemon::inject`]; changes are counted
    /// from the start of the daemon.
    pub fn with_fault(mut self, change: u64, fault: Fault) -> Self {
        self.faults.table.push(change, fault);
        self
    }

    /// Starts the daemon on a new socket at `path`. A file that is there already is left alone.
    ///
    /// # Errors
    /// [`MockError`] with the cause: options out of range (see the setters), `bind(2)` on
    /// `path`, above all [`ErrorKind::AddrInUse`], or no thread or descriptor to be had.
    pub fn start(self, path: impl AsRef<Path>) -> Result<MockDaemon> {
        let path = path.as_ref();
        self.check()?;
        let listener =
            UnixListener::bind(path).map_err(MockError::io("listen on the mock's socket"))?;
        let file = SocketFile::at(path).map_err(MockError::io("find the mock's socket"))?;
        self.run(listener, Some(file))
    }

    /// Starts the daemon without a path; [`MockDaemon::connect`] leads to it.
    ///
    /// # Errors
    /// [`MockError`] with the cause: options out of range (see the setters), or no thread,
    /// socket or descriptor to be had.
    pub fn start_unnamed(self) -> Result<MockDaemon> {
        self.check()?;
        let listener =
            server::listen_unnamed().map_err(MockError::io("listen on an abstract socket"))?;
        self.run(listener, None)
    }

    fn check(&self) -> Result<()> {
        let refuse = |reason| Err(MockError::new(STARTING, ErrorKind::InvalidInput, reason));
        let size = match &self.disk {
            Disk::Zeros(size) => *size,
            Disk::Contents(contents) => contents.len() as u64,
        };
        if !size.is_multiple_of(SECTOR_SIZE) {
            return refuse(format!(
                "a disk of {size} bytes has no whole sectors of 512"
            ));
        }
        let queues = self.options.queues;
        if !(1..=MAX_QUEUES).contains(&queues) {
            return refuse(format!("{queues} queues: it must be 1 to {MAX_QUEUES}"));
        }
        Ok(())
    }

    fn run(self, listener: UnixListener, file: Option<SocketFile>) -> Result<MockDaemon> {
        let contents = match self.disk {
            Disk::Zeros(size) => {
                vec![0; usize::try_from(size).map_err(MockError::at(STARTING))?]
            }
            Disk::Contents(contents) => contents,
        };
        let disk = RamDisk::new(contents);
        MockDaemon::run(listener, file, (self.options, disk, self.faults))
    }
}
