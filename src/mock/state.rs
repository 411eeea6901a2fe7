//! What the daemon's threads and its owner share.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::channel::Channel;
use super::disk::RamDisk;
use super::fault::FaultPlan;
use super::guest::{Memory, MockRegion};
use super::hold::Hold;
use super::inflight::InflightBuffer;
use super::lock::lock;
use super::request::LoggedRequest;

/// How the device looks to a frontend; fixed at the start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub(super) queues: u16,
    /// `None`: CONFIGURE_MEM_SLOTS is not offered.
    pub(super) max_mem_slots: Option<u64>,
    pub(super) reply_ack: bool,
    pub(super) inflight: bool,
    pub(super) backend_channel: bool,
}

/// The two sockets of a connection: the frontend's, and the daemon's.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) front: UnixStream,
    pub(super) inner: UnixStream,
}

impl Link {
    /// Ends the connection on both sides, which wakes every thread that waits for either.
    pub(super) fn hang_up(&self) {
        for socket in [&self.front, &self.inner] {
            // An error says that the peer was faster.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) disk: RamDisk,
    pub(super) hold: Hold,
    state: Mutex<State>,
    /// Signalled when a connection begins or ends, and with each request.
    changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) table: Vec<MockRegion>,
    pub(super) requests: Vec<LoggedRequest>,
    pub(super) faults: FaultPlan,
    /// What the daemon of the current connection maps.
    pub(super) memory: Mapped,
    pub(super) link: Option<Arc<Link>>,
    /// What the frontend of the current connection sent for requests in flight.
    pub(super) inflight: Option<Arc<InflightBuffer>>,
    /// Where the daemon of the current connection makes requests of the frontend.
    pub(super) channel: Option<Arc<Channel>>,
    /// Where it failed, the socket is closed as soon as its last user is done.
    pub(super) listener: Listening,
    pub(super) stopping: bool,
}

/// The socket that clients connect to. The one that takes it out of here closes it, and with it
/// all connections that wait there.
#[derive(Debug, Default)]
pub(super) enum Listening {
    /// There is none yet, or it was taken.
    #[default]
    No,
    Yes(Arc<UnixListener>),
    /// It was closed, for this reason.
    Failed(io::Error),
}

/// What a daemon maps, if there is one.
#[derive(Default)]
pub(super) struct Mapped(pub(super) Option<Memory>);

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Some(..)" } else { "None" })
    }
}

impl Shared {
    pub(super) fn new(
        options: Options,
        disk: RamDisk,
        faults: FaultPlan,
        listener: Arc<UnixListener>,
    ) -> Shared {
        Shared {
            options,
            disk,
            hold: Hold::default(),
            state: Mutex::new(State {
                faults,
                listener: Listening::Yes(listener),
                ..State::default()
            }),
            changed: Condvar::new(),
        }
    }

    /// What changes without a word to those that wait is changed here.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Makes `link` the current connection, with an empty table. False: the daemon is being
    /// dropped, and nothing may start any more.
    pub(super) fn connect(&self, link: &Arc<Link>) -> bool {
        let mut state = self.state();
        if state.stopping {
            return false;
        }
        state.table.clear();
        state.link = Some(Arc::clone(link));
        self.hold.begin();
        self.changed.notify_all();
        true
    }

    /// Notes that the current connection is over and its threads are gone.
    pub(super) fn disconnect(&self) {
        let mut state = self.state();
        state.link = None;
        state.memory = Mapped(None);
        (state.inflight, state.channel) = (None, None);
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn inflight(&self) -> Option<Arc<InflightBuffer>> {
        match self.options.inflight {
            true => self.state().inflight.clone(),
            false => None,
        }
    }

    pub(super) fn memory(&self) -> Option<Memory> {
        let state = self.state();
        state.link.as_ref().and(state.memory.0.clone())
    }

    /// Waits until `is_connected` says `wanted`; false after `limit`.
    pub(super) fn wait_connected(&self, wanted: bool, limit: Duration) -> bool {
        self.wait(limit, |state| state.link.is_some() == wanted)
    }

    /// Waits until `count` requests are in the log; false after `limit`.
    pub(super) fn wait_requests(&self, count: usize, limit: Duration) -> bool {
        self.wait(limit, |state| state.requests.len() >= count)
    }

    fn wait(&self, limit: Duration, holds: impl Fn(&State) -> bool) -> bool {
        let (_state, wait) = self
            .changed
            .wait_timeout_while(self.state(), limit, |state| !holds(state))
            .unwrap_or_else(PoisonError::into_inner);
        !wait.timed_out()
    }

    pub(super) fn hang_up(&self) {
        if let Some(link) = &self.state().link {
            // First: what is held shall not notice that the connection is over, and go on.
            self.hold.end();
            link.hang_up();
        }
    }

    /// Forbids new connections, ends the current one, and takes the listening socket.
    pub(super) fn stop(&self) -> Listening {
        let listener = {
            let mut state = self.state();
            state.stopping = true;
            std::mem::take(&mut state.listener)
        };
        self.changed.notify_all();
        self.hang_up();
        listener
    }

    /// Waits until the daemon is stopped, or for `limit`.
    pub(super) fn wait_stopping(&self, limit: Duration) {
        self.wait(limit, |state| state.stopping);
    }

    /// The listening socket.
    ///
    /// # Errors
    /// Why there is none any more.
    pub(super) fn listener(&self) -> io::Result<Arc<UnixListener>> {
        match &self.state().listener {
            Listening::Yes(listener) => Ok(Arc::clone(listener)),
            Listening::No => Err(ErrorKind::NotConnected.into()),
            Listening::Failed(reason) => Err(io::Error::new(
                ErrorKind::ConnectionRefused,
                format!("it stopped listening, it could not accept: {reason}"),
            )),
        }
    }

    pub(super) fn log(&self, request: LoggedRequest) {
        self.state().requests.push(request);
        self.changed.notify_all();
    }
}
