//! The daemon's owner's side: how it is watched, told to fail, and ended.

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
use super::disk::RamDisk;
use super::error::{MockError, Result};
use super::fault::{ChannelFault, Fault, FaultPlan, InflightFault};
use super::guest::MockRegion;
use super::hold::RequestStep;
use super::request::LoggedRequest;
use super::server;
use super::state::{Listening, Options, Shared};
use super::writer::MockWriter;
use crate::logs;

pub(super) const STARTING: &str = "start the mock daemon";

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
/// use guest_memory_shm::mock::{LoggedRequest, MockDaemon};
/// use guest_memory_shm::{SessionOptions, VhostUserSession};
///
/// let daemon = MockDaemon::builder().with_disk_size(1 << 20).start_unnamed()?;
/// let session = VhostUserSession::on_socket(daemon.connect()?, SessionOptions::new(0))?;
/// assert!(daemon.is_connected());
/// assert!(daemon.requests().contains(&LoggedRequest::SetOwner));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MockDaemon {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    file: Option<SocketFile>,
    /// The process that its threads run in: a child of fork(2) has no copy of them.
    pid: u32,
}

impl MockDaemon {
    /// Starts its threads.
    pub(super) fn run(
        listener: UnixListener,
        file: Option<SocketFile>,
        (options, disk, faults): (Options, RamDisk, FaultPlan),
    ) -> Result<Self> {
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared::new(options, disk, faults, Arc::clone(&listener)));
        let spare = server::Spare::new().map_err(MockError::io(STARTING))?;
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("mock-gate".into())
                .spawn(move || server::run(&listener, spare, &shared))
                .map_err(MockError::io(STARTING))?
        };
        Ok(Self {
            pid: std::process::id(),
            shared,
            thread: Some(thread),
            file,
        })
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
    /// [`with_inflight`](super::MockDaemonBuilder::with_inflight) has an example.
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
    /// [offers no channel](super::MockDaemonBuilder::with_backend_channel).
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

/// The socket's file, removed with the daemon.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode: another daemon's socket at the same path is not ours to remove.
    identity: (u64, u64),
}

impl SocketFile {
    pub(super) fn at(path: &Path) -> io::Result<SocketFile> {
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
