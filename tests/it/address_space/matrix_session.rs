//! A session of the matrix: its ring, how it finds its daemon, and how it goes on with another.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use guest_memory_shm::mock::{BlkDriver, LoggedRequest, RequestId};
use guest_memory_shm::{
    AddressSpace, AddressSpaceError, GuestRange, MemoryTable, PublishedMemory, SessionMessage,
    SessionOptions, SessionRing, ShareError, StoppedLog, VhostUserSession, VhostUserShare,
    WaitFor,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::GuestAddress;

use super::matrix_case::{About, Case, Fault, GoesOn, Operation, Planned};
use super::matrix_log::PAGES;
use super::matrix_member::{Id, Loose, Member, PATIENCE, limit_for};
use super::matrix_relay::Door;
use super::matrix_restart::messages;
use super::matrix_server::Server;

const PAGE: u64 = 4096;
const SECTOR: u32 = 512;
/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;

/// What a session has beside what a share has.
pub(super) struct Side {
    place: TempDir,
    driver: BlkDriver<PublishedMemory>,
    /// Where the driver's structures are; its buffer is on the next page.
    ring_at: GuestAddress,
    runs: bool,
    /// Requests that may have met a daemon that is gone.
    waiting: Vec<RequestId>,
}

/// A daemon, by what keeps its memory.
pub(super) enum Told<'a> {
    Share(&'a mut VhostUserShare),
    Session(&'a mut VhostUserSession),
}

impl Side {
    /// Of the listener at this place; its ring is in the first region, which stays.
    pub(super) fn new(space: &AddressSpace, at: usize) -> Self {
        let ring_at = GuestAddress((PAGES + 2 * at as u64) * PAGE);
        let driver = BlkDriver::new(space.published(), ring_at, 16).unwrap();
        Self {
            place: tempfile::tempdir().unwrap(),
            driver: driver.with_deadline(PATIENCE),
            ring_at,
            runs: false,
            waiting: Vec::new(),
        }
    }

    fn path(&self) -> PathBuf {
        self.place.path().join("socket")
    }

    fn ring(&self) -> SessionRing {
        let layout = self.driver.ring_layout();
        let parts = [layout.descriptors, layout.avail, layout.used];
        let (kick, call) = (self.driver.kick(), self.driver.call());
        SessionRing::new(self.driver.queue_size(), parts, kick, call).unwrap()
    }

    fn submit(&mut self) -> RequestId {
        let buffer = GuestAddress(self.ring_at.0 + PAGE);
        self.driver.submit_read(0, &[(buffer, SECTOR)]).unwrap()
    }
}

impl Told<'_> {
    pub(super) fn broken(&self) -> Option<&ShareError> {
        match self {
            Self::Share(share) => share.broken(),
            Self::Session(session) => session.broken(),
        }
    }

    pub(super) fn table(&self) -> &MemoryTable {
        match self {
            Self::Share(share) => share.table(),
            Self::Session(session) => session.table(),
        }
    }

    pub(super) fn drain_dirty(self) -> Vec<GuestRange> {
        match self {
            Self::Share(share) => share.drain_dirty(),
            Self::Session(session) => session.drain_dirty(),
        }
    }

    pub(super) fn stop_log(self) -> StoppedLog {
        match self {
            Self::Share(share) => share.stop_log(),
            Self::Session(session) => session.stop_log(),
        }
    }
}

impl Member {
    /// Connects to the daemon that is there.
    pub(super) fn begin_session(&mut self, case: &Case) -> VhostUserSession {
        let limit = limit_for(case, self.at).unwrap_or(PATIENCE);
        let mut options = SessionOptions::new(0).with_deadline(limit);
        if self.kind.goes_on() == Some(GoesOn::InOrder) {
            options = options.with_device_in_order();
        }
        self.listen(Door::Open);
        let path = self.side().path();
        let mut session = VhostUserSession::connect(path, options).unwrap();
        if case.logs {
            session.start_log().unwrap();
        }
        session
    }

    fn side(&mut self) -> &mut Side {
        self.side.as_mut().expect("it is a session")
    }

    /// Has the daemon found by the session, which has let go of the one before.
    pub(super) fn listen(&mut self, door: Door) {
        let path = self.side().path();
        let server = self.server.as_ref().expect("it is a daemon");
        if let Server::Mock(daemon) = server {
            daemon.wait_disconnected(PATIENCE).unwrap();
        }
        self.relay = None;
        self.relay = Some(server.listen(path, door));
        if let Server::Mock(daemon) = server {
            daemon.wait_connected(PATIENCE).unwrap();
        }
    }

    /// Has the daemon of the case found, with this fault to come.
    pub(super) fn listen_armed(&mut self, case: &Case, planned: Option<Planned>, test: &str) {
        let (server, another) = Server::of(case, self.at, test);
        if another {
            self.server = Some(server);
        }
        let at_the_door = planned
            .filter(|planned| planned.about == About::Session && planned.message == 0)
            .map(|planned| planned.fault);
        if at_the_door == Some(Fault::Silent) {
            self.relay = None;
            return;
        }
        self.listen(match at_the_door {
            Some(Fault::Late) => Door::OpensLate,
            Some(Fault::HangUpBefore) => Door::Shuts,
            _ => Door::Open,
        });
        let server = self.server.as_ref().expect("it is a daemon");
        self.writes.add(server);
        let hooks = server.arm(case, planned.as_slice());
        self.relay.as_ref().expect("it listens").arm(hooks);
    }

    /// Has the session go on with the daemon that is found; `meanwhile` is done once while it is
    /// waited for.
    pub(super) fn go_on(
        &self,
        space: &AddressSpace,
        operation: Operation,
        meanwhile: impl FnOnce(),
    ) -> Result<(), AddressSpaceError> {
        let Some(Id::Session(id)) = &self.id else {
            unreachable!("it is an attached session");
        };
        let Operation::Steps(_) = operation else {
            return space.reconnect_session(id);
        };
        let mut meanwhile = Some(meanwhile);
        let wait = |wait: WaitFor<'_>| {
            let fd = wait.fd().map(|fd| fd.try_clone_to_owned().unwrap());
            let writes = wait.is_for_writing().then_some(PollFlags::POLLOUT);
            let reads = wait.is_for_reading().then_some(PollFlags::POLLIN);
            (fd, writes.into_iter().chain(reads).collect(), wait.until())
        };
        while let Some((fd, events, until)) = space.reconnect_in_steps(id, wait)? {
            match meanwhile.take() {
                Some(meanwhile) => meanwhile(),
                None => wait_for(fd, events, until),
            }
        }
        Ok(())
    }

    /// Asserts that the daemon was told all by which a session goes on, and no more.
    pub(super) fn was_told_all(&self, case: &Case) {
        let relay = self.relay.as_ref().expect("it is connected");
        let told = relay.messages().into_iter();
        let told: Vec<_> = told.map(|code| format!("{code:?}")).collect();
        let all: Vec<_> = messages(case).iter().map(|sent| sent.name).collect();
        assert_eq!(told, all, "told to {}", self.name);
        if let Some(Server::Mock(daemon)) = &self.server {
            let requests = daemon.requests();
            let features = requests.iter().rev().find_map(|request| match request {
                LoggedRequest::SetFeatures(bits) => Some(bits & LOG_ALL != 0),
                _ => None,
            });
            assert_eq!(features, Some(case.logs), "whether {} logs", self.name);
        }
    }

    /// Has the session go on with a daemon that does nothing wrong, also if it is not attached.
    pub(super) fn go_on_whole(&mut self, space: &AddressSpace, operation: Operation) {
        self.listen(Door::Open);
        self.writes
            .add(self.server.as_ref().expect("it is a daemon"));
        match &mut self.loose {
            Some(Loose::Session(session)) => session.reconnect().unwrap(),
            _ => self.go_on(space, operation, || ()).unwrap(),
        }
    }

    /// Whether a ring of the session was started.
    pub(super) fn rings_run(&self) -> bool {
        self.side.as_ref().is_some_and(|side| side.runs)
    }

    /// Starts the ring of a session that is attached, unless it runs; after the guest has reset
    /// the device, if it has to.
    pub(super) fn start_ring(&mut self, space: &AddressSpace) {
        let Some(Id::Session(id)) = &self.id else {
            return;
        };
        let side = self.side.as_mut().expect("it is a session");
        let needs_reset = |session: &mut VhostUserSession| session.needs_reset();
        if space.with_listener(id, needs_reset).unwrap() {
            space
                .with_listener(id, VhostUserSession::forget_rings)
                .unwrap();
            side.driver.reset().unwrap();
            (side.runs, side.waiting) = (false, Vec::new());
        }
        if !std::mem::replace(&mut side.runs, true) {
            let ring = side.ring();
            let started = space.with_listener(id, |session| session.start_ring(0, ring));
            started.unwrap().expect("nothing is in the way");
        }
    }

    /// Makes a request that may be completed only after everything is repaired.
    pub(super) fn submit(&mut self) {
        if let Some(side) = self.side.as_mut().filter(|side| side.runs) {
            let request = side.submit();
            side.waiting.push(request);
        }
    }

    /// Makes a request of which the daemon that is gone had heard.
    pub(super) fn submit_unheard(&mut self) {
        self.submit();
        let side = self.side.as_ref().expect("it is a session");
        side.driver.kick().read().expect("it was kicked");
    }

    /// Asserts that requests are completed.
    pub(super) fn serves(&mut self) {
        if let Some(side) = self.side.as_mut().filter(|side| side.runs) {
            let one_more = side.submit();
            side.waiting.push(one_more);
            let first = side.ring_at.0 / PAGE;
            self.writes.writes_at_last([first, first + 1]);
        }
        self.completes();
    }

    /// Asserts that the requests are completed that were made.
    pub(super) fn completes(&mut self) {
        if let Some(side) = &mut self.side {
            for request in std::mem::take(&mut side.waiting) {
                let done = side.driver.wait(request);
                done.unwrap_or_else(|error| panic!("the ring of {}: {error}", self.name));
            }
        }
    }

    /// Stops the ring; what was written is noted then.
    pub(super) fn stop_ring(&mut self, space: &AddressSpace) {
        if let (Some(Id::Session(id)), Some(side)) = (&self.id, &self.side) {
            let stopped = space.with_listener(id, |session| session.stop_ring(0));
            let base = stopped.unwrap().expect("it runs");
            assert_eq!(base, side.driver.used_index(), "{}", self.name);
        }
    }

    /// Has the session notice that its daemon has hung up, or is there.
    pub(super) fn ask(&mut self, space: &AddressSpace) -> bool {
        let question = || SessionMessage::new(FrontendReq::GET_FEATURES);
        match (&mut self.loose, &self.id) {
            (Some(Loose::Session(session)), _) => session.request(question()).is_ok(),
            (_, Some(Id::Session(id))) => {
                let asked = space.with_listener(id, |session| session.request(question()).is_ok());
                asked.unwrap()
            }
            _ => unreachable!("it is a session"),
        }
    }

    pub(super) fn needs_reset(&mut self, space: &AddressSpace) -> bool {
        let needs_reset = self.with_daemon(space, |told| match told {
            Told::Session(session) => session.needs_reset(),
            Told::Share(_) => false,
        });
        needs_reset.unwrap_or(false)
    }
}

/// What a VMM's event loop does.
fn wait_for(fd: Option<OwnedFd>, events: PollFlags, until: Instant) {
    let left = until.saturating_duration_since(Instant::now());
    let Some(fd) = fd else {
        std::thread::sleep(left);
        return;
    };
    let left = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(fd.as_fd(), events)], left).unwrap();
}
