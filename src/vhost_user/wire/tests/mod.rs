//! A wire and its peer, in one thread, at the two ends of a socket pair.

use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::SndBuf;
use nix::sys::socket::{MsgFlags, recv, setsockopt};
use nix::sys::stat::fstat;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::GuestAddress;

use super::message::numbers;
use super::*;
use crate::memory::GuestMemoryShm;
use crate::vhost_user::table::{MemoryTable, TableRegion};

mod answers;
mod channel;
mod crowded;
mod cut;
mod ends;
mod full;
mod messages;
mod pieces;
mod random;
mod window;

const PAGE: u64 = 4096;
/// Bytes of an answer that no one has asked for.
const OTHERS: &[u8] = b"of another user";

/// A wire, and what its peer is to get.
struct Pair {
    wire: Wire,
    /// The wire's end once more, to look into it.
    ours: UnixStream,
    peer: Peer,
    expected: Expected,
}

impl Pair {
    fn new() -> Self {
        Self::keeping(false)
    }

    /// Its wire keeps the descriptors of answers, or not.
    fn keeping(with_fds: bool) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut wire = Wire::new(ours.try_clone().unwrap().into());
        wire.keep_fds(with_fds);
        Self {
            wire,
            ours,
            peer: Peer::new(theirs),
            expected: Expected::default(),
        }
    }

    /// Has so little room in its send buffer as the kernel allows.
    fn narrow() -> Self {
        let pair = Self::new();
        setsockopt(&pair.ours, SndBuf, &1).unwrap();
        pair
    }

    /// Has asked this.
    fn asking(message: Message) -> Self {
        let mut pair = Self::new();
        pair.push(message);
        assert!(pair.advance().is_none());
        pair
    }

    fn push(&mut self, message: Message) {
        self.expected.add(&message);
        self.wire.push(message);
    }

    fn advance(&mut self) -> Option<Answer> {
        let answer = self.wire.advance().unwrap();
        // Whatever there was to do is done: it does not spin.
        assert!(answer.is_some() || self.wire.is_idle() || !self.is_ready());
        answer
    }

    /// All answers that are there.
    fn answers(&mut self) -> Vec<Answer> {
        std::iter::from_fn(|| self.advance()).collect()
    }

    fn failure(&mut self) -> DaemonFailure {
        self.wire.advance().unwrap_err()
    }

    fn waits_for(&self) -> WaitFor<'_> {
        self.wire.waits_for(far_off())
    }

    /// Whether what the wire waits for is there.
    fn is_ready(&self) -> bool {
        let wait = self.waits_for();
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, wait.is_for_reading());
        events.set(PollFlags::POLLOUT, wait.is_for_writing());
        let Some(fd) = wait.fd() else {
            return false;
        };
        poll(&mut [PollFd::new(fd, events)], PollTimeout::ZERO).unwrap() > 0
    }

    /// What is in the socket and was not taken.
    fn rest(&self) -> Vec<u8> {
        rest_of(&self.ours)
    }

    /// The peer got what was pushed, as far as it has read, each descriptor with its message.
    fn check_peer(&self) {
        let Expected { bytes, fds } = &self.expected;
        assert!(bytes.starts_with(&self.peer.bytes));
        for call in &self.peer.calls {
            let began = fds.iter().filter(|(at, _)| call.place.contains(at));
            let expected: Vec<u64> = began.flat_map(|(_, files)| files.clone()).collect();
            assert_eq!(call.files, expected, "{:?}", call.place);
        }
    }

    fn check_peer_got_all(&self) {
        self.check_peer();
        assert_eq!(self.peer.bytes.len(), self.expected.bytes.len());
    }
}

/// Bytes, and the descriptors that come with them.
#[derive(Default)]
struct Expected {
    bytes: Vec<u8>,
    /// The places of first bytes, and the files that come with them.
    fds: Vec<(usize, Vec<u64>)>,
}

impl Expected {
    fn add(&mut self, message: &Message) {
        if !message.fds.is_empty() {
            let files = message.fds.iter().map(|fd| file(fd.as_fd())).collect();
            self.fds.push((self.bytes.len(), files));
        }
        message.encode(&mut self.bytes);
    }
}

/// The daemon's end, which does nothing of itself.
struct Peer {
    socket: UnixStream,
    control: Control,
    bytes: Vec<u8>,
    calls: Vec<Call>,
}

/// What came by one call.
struct Call {
    place: Range<usize>,
    files: Vec<u64>,
}

impl Peer {
    fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).unwrap();
        Self {
            socket,
            control: Control::new(true),
            bytes: Vec::new(),
            calls: Vec::new(),
        }
    }

    /// Reads by one call; gives the number of bytes.
    fn read(&mut self, most: usize) -> usize {
        let mut buffer = vec![0; most];
        let socket = self.socket.as_fd();
        let Ok(came) = socket::receive(socket, &mut buffer, &mut self.control) else {
            return 0;
        };
        let start = self.bytes.len();
        self.bytes.extend(&buffer[..came.bytes]);
        self.calls.push(Call {
            place: start..self.bytes.len(),
            files: came.fds.iter().map(|fd| file(fd.as_fd())).collect(),
        });
        came.bytes
    }

    fn read_all(&mut self) -> usize {
        std::iter::from_fn(|| Some(self.read(1 << 16)).filter(|count| *count > 0)).sum()
    }

    /// Says all of it.
    fn say(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Says it with these descriptors.
    fn say_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = socket::send(self.socket.as_fd(), bytes, &fds);
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn answer(&mut self, code: FrontendReq, body: &[u8]) {
        self.say(&answer(code, body));
    }
}

/// An answer as specified: header and body.
fn answer(code: impl Into<u32>, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let header = [code.into(), 0b101, size].map(u32::to_ne_bytes);
    [header.as_flattened(), body].concat()
}

fn acknowledgement(code: FrontendReq) -> Vec<u8> {
    answer(code, &[0; 8])
}

/// What is there to be received; it stays there.
fn rest_of(socket: &UnixStream) -> Vec<u8> {
    let mut rest = vec![0; 1 << 16];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let count = recv(socket.as_raw_fd(), &mut rest, flags).unwrap_or(0);
    rest.truncate(count);
    rest
}

/// The file that a descriptor is of.
fn file(fd: BorrowedFd<'_>) -> u64 {
    fstat(fd).unwrap().st_ino
}

/// A deadline that is not what a test is about.
fn far_off() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// 8 regions, each on a file of its own.
fn regions() -> &'static [TableRegion] {
    static TABLE: OnceLock<MemoryTable> = OnceLock::new();
    let table = || {
        let starts = (0..8).map(|at| GuestAddress(at * 2 * PAGE));
        let ranges: Vec<_> = starts.map(|start| (start, 4096)).collect();
        let memory = GuestMemoryShm::<()>::from_ranges(&ranges).unwrap();
        memory.memory_table()
    };
    TABLE.get_or_init(table).regions()
}

/// One of them: neighbours differ, so that a wrong one is noticed.
fn region(at: usize) -> &'static TableRegion {
    &regions()[at % regions().len()]
}

fn barrier() -> Message {
    Message::barrier(DaemonRequest::Other)
}

/// A message that has no answer, and a body of this size.
fn filler(size: usize) -> Message {
    let body = (0..size)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    let code = FrontendReq::SET_VRING_ADDR;
    Message::new(DaemonRequest::Other, code, body, Reply::None)
}

/// A log of its own.
fn log() -> Descriptor {
    std::sync::Arc::new(region(0).backing().clone())
}

fn bodies(answers: &[Answer]) -> Vec<&[u8]> {
    answers.iter().map(|answer| &answer.body[..]).collect()
}

#[track_caller]
fn assert_hung_up(failure: &DaemonFailure) {
    assert!(matches!(failure, DaemonFailure::HungUp(_)), "{failure:?}");
}

#[track_caller]
fn assert_protocol(failure: &DaemonFailure, text: &str) {
    match failure {
        DaemonFailure::Protocol(cause) => assert!(cause.to_string().contains(text), "{cause}"),
        _ => panic!("{failure:?}"),
    }
}
