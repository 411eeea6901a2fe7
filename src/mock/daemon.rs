//! The daemon's owner's side: how it is started, watched, told to fail, and ended.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use vhost::vhost_user::message::BackendReq;

use super::channel::{BackendRequest, Channel};
use super::disk::{RamDisk, SECTOR_SIZE};
use super::error::{MockError, Result};
use super::fault::{ChannelFault, Fault, FaultPlan, InflightFault};
use super::guest::MockRegion;
use super::hold::RequestStep;
use super::request::LoggedRequest;
use super::server;
use super::state::{Listening, Options, Shared};
use super::writer::MockWriter;
use crate::logs;

/// What vhost-user-backend and libvhost-user offer.
const DEFAULT_MEM_SLOTS: u64 = 509;
/// One worker thread serves all queues, and the crate's mask of its queues has 32 bits set.
const MAX_QUEUES: u16 = 32;

const STARTING: &str = "start the mock daemon";

/// A vhost-user-blk daemon inside this process, with a RAM disk.
///
/// It listens on a Unix socket and serves one frontend after the other; while one is connected,
/// the next one waits. While this process has no descriptors left, it hangs up on clients, and on
/// those whose message lost descriptors that way. Every connection begins with an empty table of
/// guest memory; the disk, the log of requests and the faults to come belong to the daemon and
/// outlive connections.
///
/// Dropping it hangs up, ends all its threads, closes what it opened and removes the socket file.
///
/// ```
/// use guest_memory_shm::mock::MockDaemon;
/// use vhost::VhostBackend;
/// use vhost::vhost_user::Frontend;
///
/// # fn main() -> Result<(), guest_memory_shm::mock::MockError> {
/// let daemon = MockDaemon::builder().with_disk_size(1 << 20).start_unnamed()?;
/// let frontend = Frontend::from_stream(daemon.connect()?, 1);
/// assert!(frontend.get_features().is_ok());
/// assert_eq!(daemon.requests().len(), 1);
/// # Ok(())
/// # }
/// ```
pub struct MockDaemon {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    file: Option<SocketFile>,
    /// The process that its threads run in: a child of fork(2) has no copy of them.
    pid: u32,
}

impl MockDaemon {
    /// The options of a daemon, all at their defaults.
    pub fn builder() -> MockDaemonBuilder {
        MockDaemonBuilder::default()
    }

    /// A new connection to the daemon, also to one without a path.
    ///
    /// # Errors
    /// [`MockError`] with the cause of `connect(2)`; with [`ErrorKind::ConnectionRefused`] and
    /// the reason, if the daemon could not accept connections any more and has stopped listening.
    pub fn connect(&self) -> Result<UnixStream> {
        let listener = self.shared.listener();
        let connected = listener.and_then(|listener| server::connect_to(&listener));
        connected.map_err(MockError::io("connect to the mock daemon"))
    }

    /// The path of the socket, if it has one.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// The table that the daemon's backend holds, ascending by guest address.
    ///
    /// The end of a connection leaves it as it was, so that a test can see what a daemon that hung
    /// up had applied; the next connection begins with an empty one.
    /// [`is_connected`](Self::is_connected) tells the two apart.
    pub fn table(&self) -> Vec<MockRegion> {
        self.shared.state().table.clone()
    }

    /// Whether a frontend is being served. False once the threads of the connection are gone.
    pub fn is_connected(&self) -> bool {
        self.shared.state().link.is_some()
    }

    /// Waits until a frontend is being served.
    ///
    /// # Errors
    /// [`MockError`] with [`ErrorKind::TimedOut`] after `limit`.
    pub fn wait_connected(&self, limit: Duration) -> Result<()> {
        in_time(
            self.shared.wait_connected(true, limit),
            limit,
            "wait for a frontend to connect",
        )
    }

    /// Waits until no frontend is being served.
    ///
    /// # Errors
    /// [`MockError`] with [`ErrorKind::TimedOut`] after `limit`.
    pub fn wait_disconnected(&self, limit: Duration) -> Result<()> {
        in_time(
            self.shared.wait_connected(false, limit),
            limit,
            "wait for the end of the connection",
        )
    }

    /// Waits until the log holds `count` requests, answered or not.
    ///
    /// # Errors
    /// [`MockError`] with [`ErrorKind::TimedOut`] after `limit`.
    pub fn wait_requests(&self, count: usize, limit: Duration) -> Result<()> {
        in_time(
            self.shared.wait_requests(count, limit),
            limit,
            "wait for requests of the frontend",
        )
    }

    /// The frontends' requests in the order of their arrival, of all connections so far, with
    /// those that a fault kept from the daemon.
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.state().requests.clone()
    }

    /// Forgets the requests so far.
    pub fn clear_requests(&self) {
        self.shared.state().requests.clear();
    }

    /// The guest's memory as the daemon of the current connection maps it, for writes that it
    /// notes in its log; none if no frontend is being served.
    pub fn writer(&self) -> Option<MockWriter> {
        self.shared.memory().map(MockWriter::new)
    }

    /// The contents of the disk.
    pub fn disk(&self) -> &RamDisk {
        &self.shared.disk
    }

    /// Misbehaves at a change of the memory table, once: changes are counted from now on, the next
    /// one is 1, and across reconnects. Change 0 never comes.
    pub fn inject(&self, change: u64, fault: Fault) {
        self.shared.state().faults.table.push(change, fault);
    }

    /// Misbehaves at a SET_LOG_BASE, once, as [`inject`](Self::inject) at a change of the table.
    pub fn inject_at_log(&self, log: u64, fault: Fault) {
        self.shared.state().faults.log.push(log, fault);
    }

    /// Misbehaves at a GET_INFLIGHT_FD, once, as [`inject`](Self::inject) at a change.
    ///
    /// ```
    /// use guest_memory_shm::mock::{InflightFault, MockDaemon};
    ///
    /// # fn main() -> Result<(), guest_memory_shm::mock::MockError> {
    /// let daemon = MockDaemon::builder().with_inflight().start_unnamed()?;
    /// daemon.inject_at_inflight(1, InflightFault::ShortFile);
    /// assert_eq!(daemon.pending_faults(), 1);
    /// # Ok(())
    /// # }
    /// ```
    pub fn inject_at_inflight(&self, buffer: u64, fault: InflightFault) {
        self.shared.state().faults.inflight.push(buffer, fault);
    }

    /// Misbehaves on the backend channel, once, instead of sending a request: counted as
    /// [`inject`](Self::inject) counts changes, the next request that is to be sent is 1.
    pub fn inject_at_channel(&self, request: u64, fault: ChannelFault) {
        self.shared.state().faults.channel.push(request, fault);
    }

    /// How many faults have not fired yet.
    pub fn pending_faults(&self) -> usize {
        self.shared.state().faults.len()
    }

    /// Drops the faults that have not fired yet.
    pub fn clear_faults(&self) {
        self.shared.state().faults = FaultPlan::default();
    }

    /// Holds the device at the request that is the `count`th from now on to come to `step`, of all
    /// queues and connections; 0 never comes. Replaces what was asked for before.
    ///
    /// While one is held, nothing is carried out, and messages wait that change the memory, or
    /// that are about its queue. [`release_requests`](Self::release_requests) lets it go on. The
    /// end of the connection is to the device what SIGKILL is to a process: guest memory, disk and
    /// in-flight buffer stay as they are at that step.
    ///
    /// [`with_inflight`](MockDaemonBuilder::with_inflight) has an example.
    pub fn hold_requests(&self, count: u64, step: RequestStep) {
        self.shared.hold.arm(count, step);
    }

    /// Waits until a request is held.
    ///
    /// # Errors
    /// [`MockError`] with [`ErrorKind::TimedOut`] after `limit`.
    pub fn wait_held(&self, limit: Duration) -> Result<()> {
        let held = self.shared.hold.wait_held(limit);
        in_time(held, limit, "wait for a request to be held")
    }

    /// Lets the request go on that is held, if one is, and holds no more.
    pub fn release_requests(&self) {
        self.shared.hold.release();
    }

    /// Tells the frontend that the configuration space has changed: CONFIG_CHANGE_MSG on the
    /// backend channel, without a wish for an answer.
    ///
    /// # Errors
    /// As for [`send_backend_request`](Self::send_backend_request).
    pub fn notify_config_change(&self) -> Result<()> {
        self.send_backend_request(&BackendRequest::new(BackendReq::CONFIG_CHANGE_MSG))
    }

    /// Sends a request on the backend channel, or plays a
    /// [fault](Self::inject_at_channel) instead.
    ///
    /// # Errors
    /// [`MockError`] with the cause; [`ErrorKind::NotConnected`]: the frontend of the current
    /// connection has sent no SET_BACKEND_REQ_FD, or the daemon
    /// [offers no channel](MockDaemonBuilder::with_backend_channel).
    pub fn send_backend_request(&self, request: &BackendRequest) -> Result<()> {
        let doing = "send a request on the backend channel";
        let channel = self.channel(doing)?;
        let fault = self.shared.state().faults.channel.next();
        channel.send(request, fault).map_err(MockError::io(doing))
    }

    /// The frontend's answer to the oldest request that
    /// [asked for one](BackendRequest::with_answer) and has none yet: by the protocol 0 for
    /// success, all else for failure.
    ///
    /// # Errors
    /// [`MockError`] with the cause; [`ErrorKind::TimedOut`] after `limit`;
    /// [`ErrorKind::InvalidData`]: what came is no answer to that request;
    /// [`ErrorKind::InvalidInput`]: no request asked for one.
    pub fn backend_answer(&self, limit: Duration) -> Result<u64> {
        let doing = "receive an answer on the backend channel";
        let answer = self.channel(doing)?.answer(limit);
        answer.map_err(MockError::io(doing))
    }

    fn channel(&self, doing: &'static str) -> Result<Arc<Channel>> {
        let channel = self.shared.state().channel.clone();
        let reason = "the frontend has sent no socket for it".to_owned();
        channel.ok_or_else(|| MockError::new(doing, ErrorKind::NotConnected, reason))
    }

    /// Ends the current connection, if there is one, and returns at once. A request that is
    /// [held](Self::hold_requests) does not go on.
    pub fn hang_up(&self) {
        self.shared.hang_up();
    }
}

impl Drop for MockDaemon {
    fn drop(&mut self) {
        if std::process::id() != self.pid {
            // What is shared with the parent, the listening and the file, is the parent's.
            std::mem::forget(self.file.take());
            return;
        }
        // On Linux this wakes accept(), which then fails: nothing but the drop needs to end it.
        if let Listening::Yes(listener) = self.shared.stop()
            && let Err(errno) = shutdown(listener.as_raw_fd(), Shutdown::Both)
        {
            logs::error!("mock daemon: cannot stop listening: {errno}");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            logs::error!("mock daemon: its thread panicked");
        }
    }
}

impl fmt::Debug for MockDaemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MockDaemon")
            .field("path", &self.path())
            .field("connected", &self.is_connected())
            .field("table", &self.table())
            .finish_non_exhaustive()
    }
}

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
    /// # use guest_memory_shm::GuestMemoryShm;
    /// use guest_memory_shm::mock::{BlkDevice, BlkDriver, MockDaemon, RequestStep};
    /// # use std::os::fd::AsRawFd;
    /// # use std::time::Duration;
    /// use vhost::vhost_user::message::VhostUserInflight;
    /// # use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
    /// # use guest_memory_shm::VhostUserShare;
    /// # use vm_memory::{Bytes, GuestAddress};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// # let connect = |daemon: &MockDaemon| -> Result<_, Box<dyn std::error::Error>> {
    /// #     let mut frontend = Frontend::from_stream(daemon.connect()?, 1);
    /// #     let features = VhostUserProtocolFeatures::all();
    /// #     let device = BlkDevice::negotiate(&mut frontend, features)?;
    /// #     let mut share = VhostUserShare::new(&frontend, features)?;
    /// #     share.update_table(&memory.memory_table())?;
    /// #     Ok((frontend, device, share))
    /// # };
    /// let first = MockDaemon::builder().with_inflight().start_unnamed()?;
    /// first.hold_requests(2, RequestStep::Marked);
    /// # let (mut frontend, device, share) = connect(&first)?;
    /// let wanted = VhostUserInflight::new(0, 0, 1, 16); // one queue of 16
    /// let (shape, buffer) = frontend.get_inflight_fd(&wanted)?;
    /// frontend.set_inflight_fd(&shape, buffer.as_raw_fd())?;
    /// let mut driver = BlkDriver::new(&memory, GuestAddress(0x1000), 16)?;
    /// driver.submit_flush()?;
    /// driver.submit_flush()?;
    /// # let table = share.table().clone();
    /// # device.start_queue(&mut frontend, 0, &driver, |addr| table.user_addr(addr))?;
    /// first.wait_held(Duration::from_secs(20))?;
    /// drop(first); // as if it was killed, with two requests in flight
    ///
    /// let second = MockDaemon::builder().with_inflight().start_unnamed()?;
    /// # let (mut frontend, device, share) = connect(&second)?;
    /// frontend.set_inflight_fd(&shape, buffer.as_raw_fd())?;
    /// # let table = share.table().clone();
    /// # device.start_queue(&mut frontend, 0, &driver, |addr| table.user_addr(addr))?;
    /// driver.wait_all()?;
    /// assert_eq!(second.disk().flush_count(), 2);
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_inflight(mut self) -> Self {
        self.options.inflight = true;
        self
    }

    /// Offers BACKEND_REQ and BACKEND_SEND_FD: a socket for requests of the daemon's own, see
    /// [`MockDaemon::send_backend_request`]. Default: not offered.
    ///
    /// ```
    /// # use guest_memory_shm::mock::BlkDevice;
    /// use guest_memory_shm::mock::{BackendRequest, MockDaemon};
    /// # use std::sync::{Arc, Mutex};
    /// # use std::time::Duration;
    /// use vhost::vhost_user::message::BackendReq;
    /// use vhost::vhost_user::{FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandlerMut};
    /// # use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
    ///
    /// struct Vmm;
    /// impl VhostUserFrontendReqHandlerMut for Vmm {
    ///     fn handle_config_change(&mut self) -> HandlerResult<u64> {
    ///         Ok(0) // and it asks for the configuration
    ///     }
    /// }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let daemon = MockDaemon::builder().with_backend_channel().start_unnamed()?;
    /// # let mut frontend = Frontend::from_stream(daemon.connect()?, 1);
    /// # BlkDevice::negotiate(&mut frontend, VhostUserProtocolFeatures::all())?;
    /// let mut handler = FrontendReqHandler::new(Arc::new(Mutex::new(Vmm)))?;
    /// handler.set_reply_ack_flag(true);
    /// frontend.set_backend_request_fd(&handler.get_tx_raw_fd())?;
    ///
    /// let changed = BackendRequest::new(BackendReq::CONFIG_CHANGE_MSG).with_answer();
    /// daemon.send_backend_request(&changed)?;
    /// handler.handle_request()?;
    /// assert_eq!(daemon.backend_answer(Duration::from_secs(20))?, 0);
    /// # Ok(())
    /// # }
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
        let listener = Arc::new(listener);
        let disk = RamDisk::new(contents);
        let shared = Shared::new(self.options, disk, self.faults, Arc::clone(&listener));
        let shared = Arc::new(shared);
        let spare = server::Spare::new().map_err(MockError::io(STARTING))?;
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("mock-gate".into())
                .spawn(move || server::run(&listener, spare, &shared))
                .map_err(MockError::io(STARTING))?
        };
        Ok(MockDaemon {
            pid: std::process::id(),
            shared,
            thread: Some(thread),
            file,
        })
    }
}

/// The socket's file, removed with the daemon.
struct SocketFile {
    path: PathBuf,
    /// Device and inode: another daemon's socket at the same path is not ours to remove.
    identity: (u64, u64),
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<SocketFile> {
        Ok(SocketFile {
            path: path.to_owned(),
            identity: Self::identity_at(path)?,
        })
    }

    fn identity_at(path: &Path) -> io::Result<(u64, u64)> {
        let metadata = fs::symlink_metadata(path)?;
        Ok((metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if Self::identity_at(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            logs::warn!(
                "mock daemon: cannot remove {}: {error}",
                self.path.display()
            );
        }
    }
}

fn in_time(came: bool, limit: Duration, doing: &'static str) -> Result<()> {
    match came {
        true => Ok(()),
        false => {
            let reason = format!("nothing came within {limit:?}");
            Err(MockError::new(doing, ErrorKind::TimedOut, reason))
        }
    }
}
