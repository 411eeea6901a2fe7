//! The memory part of the vhost-user protocol, without ever waiting in a call.
//!
//! A [`Wire`] has messages to send and answers to come. [`Wire::advance`] does what can be done at
//! once; [`Wire::waits_for`] says what to wait for. Several messages are under way at the same
//! time. What limits them:
//! - the send buffer: a daemon that reads nothing fills it, and then there is room by answers, or
//!   by the deadline of the exchange;
//! - descriptors on their way, which the kernel counts for a user over all sockets: where it says
//!   that there are too many (ETOOMANYREFS), those of others have to arrive first;
//! - [`WINDOW`], so that one daemon does not use up what others need.
//!
//! Answers come in the order of the requests, and each is checked against its request. No byte is
//! received that does not belong to an expected answer: the socket may be one that others use
//! before and after. Only what was sent to its last byte has an answer, and nothing is sent as
//! long as something is there that nothing asked for: it could pass for the first answer.

use std::collections::VecDeque;
use std::io::{Error as IoError, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::host::process::Sender;
use crate::listener::WaitFor;
use crate::logs;

mod batch;
mod channel;
mod failure;
mod message;
mod socket;
#[cfg(test)]
mod tests;

use batch::Batch;
pub(crate) use channel::IncomingRequests;
pub use failure::{DaemonFailure, DaemonRequest};
pub(crate) use message::{Descriptor, Message, NUMBER, Reply, bases, number, numbers};
use message::{HEADER, Header};
pub use socket::DaemonSocket;
use socket::{Control, Seen};
pub(crate) use socket::{MAX_FDS, check_connected, copy_of};

/// The most messages with descriptors that are under way on one connection. A daemon takes
/// hundreds of regions as fast with 32 under way as with all of them.
const WINDOW: usize = 32;

/// How many bytes are received by one call, if there are as many.
const PIECE: usize = 4096;

/// When to try again where descriptors of other connections are in the way.
const RETRY: Duration = Duration::from_millis(1);

/// A connection to a daemon.
pub(crate) struct Wire {
    /// Absent once nothing is to be said any more.
    socket: Option<OwnedFd>,
    control: Control,
    keeps_fds: bool,
    /// What is not sent yet.
    queue: VecDeque<Message>,
    /// What is being sent.
    batch: Batch,
    /// What was sent, or is in the batch, and is not known to have been handled.
    under_way: VecDeque<Message>,
    /// How many of those, from the first on, were sent to their last byte.
    sent: usize,
    /// How many bytes the answers to these have at least.
    awaited: usize,
    /// How many of those under way came with descriptors.
    with_fds: usize,
    /// What has arrived of the next answer, and of those after it.
    received: VecDeque<u8>,
    /// Which process sent the last of that.
    process: Sender,
    fds: Vec<OwnedFd>,
    blocked: Blocked,
}

/// Why nothing more can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blocked {
    Not,
    /// The buffer is full.
    Full,
    /// Too many descriptors of this user are on their way, or the kernel has no memory: until this
    /// moment, when it is tried again.
    Short(Instant),
    /// The daemon has hung up. What it said before that can still be read.
    HungUp(Errno),
}

/// An answer that fits its request.
#[derive(Debug)]
pub(crate) struct Answer {
    /// What it is the answer to.
    pub(crate) request: Message,
    pub(crate) body: Vec<u8>,
    /// The process that sent it, if that was wanted and is known.
    pub(crate) process: Sender,
    /// Those that came with it, if they were [wanted](Wire::keep_fds).
    pub(crate) fds: Vec<OwnedFd>,
}

impl Wire {
    /// A connection on this socket.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            ..Self::closed()
        }
    }

    /// No connection.
    pub(crate) fn closed() -> Self {
        Self {
            socket: None,
            control: Control::new(false),
            keeps_fds: false,
            queue: VecDeque::new(),
            batch: Batch::default(),
            under_way: VecDeque::new(),
            sent: 0,
            awaited: 0,
            with_fds: 0,
            received: VecDeque::new(),
            process: Sender::default(),
            fds: Vec::new(),
            blocked: Blocked::Not,
        }
    }

    /// Has descriptors in answers come with them, which are closed otherwise.
    pub(crate) fn keep_fds(&mut self, wanted: bool) {
        if self.keeps_fds != wanted {
            self.control = Control::new(wanted);
            self.keeps_fds = wanted;
        }
    }

    /// The socket, as long as anything is said.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Has a message sent after all that were pushed before, by the next calls of
    /// [`advance`](Self::advance). That it was handled is known by an answer, its own or one to a
    /// message after it: so one must follow, and before 32 with descriptors are under way.
    pub(crate) fn push(&mut self, message: Message) {
        self.queue.push_back(message);
    }

    /// Lets go of messages of which no byte was sent.
    pub(crate) fn cancel_unsent(&mut self) {
        self.queue.clear();
        let kept = self.under_way.len() - self.batch.cut();
        let cut = self.under_way.drain(kept..);
        self.with_fds -= cut.filter(|message| message.came_with_fds).count();
    }

    /// Whether nothing is to be sent, and no answer to come.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.under_way.is_empty()
    }

    /// What the oldest message without an answer is about.
    pub(crate) fn pending(&self) -> Option<DaemonRequest> {
        let mut all = self.under_way.iter().chain(&self.queue);
        all.next().map(|message| message.about)
    }

    /// Sends and receives what can be sent and received at once. Gives the next answer, or nothing
    /// if there is something to [wait for](Self::waits_for), or the wire [is idle](Self::is_idle).
    pub(crate) fn advance(&mut self) -> Result<Option<Answer>, DaemonFailure> {
        loop {
            self.send()?;
            if let Some(answer) = self.take_answer()? {
                return Ok(Some(answer));
            }
            if !self.receive()? {
                return Ok(None);
            }
        }
    }

    /// What to wait for, until the deadline, after [`advance`](Self::advance) gave no answer.
    pub(crate) fn waits_for(&self, deadline: Instant) -> WaitFor<'_> {
        let Some(socket) = &self.socket else {
            return WaitFor::moment(Instant::now());
        };
        let mut wait = WaitFor::moment(match self.blocked {
            Blocked::Short(until) => deadline.min(until),
            _ => deadline,
        });
        // An answer is the sign of room that comes first, if one is to come. Otherwise nothing is
        // received: what were there all the same would end each wait at once.
        if self.missing() > 0 {
            wait = wait.or_readable(socket.as_fd());
        }
        if self.blocked == Blocked::Full {
            wait = wait.or_writable(socket.as_fd());
        }
        wait
    }

    /// Lets go of the socket, and of all that was to be sent or had come.
    pub(crate) fn close(&mut self) {
        self.socket = None;
        self.queue.clear();
        self.batch.clear();
        self.under_way.clear();
        self.sent = 0;
        self.awaited = 0;
        self.with_fds = 0;
        self.received.clear();
        self.process = Sender::default();
        self.fds.clear();
    }

    /// Has answers come with the process that sent them, or not.
    pub(crate) fn pass_credentials(&self, wanted: bool) {
        if let Some(socket) = &self.socket {
            socket::pass_credentials(socket.as_fd(), wanted);
        }
    }

    /// Whether the daemon has hung up, as far as that can be seen without a word.
    pub(crate) fn has_hung_up(&self) -> bool {
        let socket = self.socket.as_ref();
        socket.is_none_or(|socket| matches!(socket::look(socket.as_fd()), Seen::End(_)))
    }

    /// Whether nothing can be asked, as far as that can be seen without a word, while nothing is
    /// asked: the daemon has hung up, or said what nothing asked for.
    pub(crate) fn is_useless(&self) -> bool {
        self.check_nothing_came().is_err()
    }

    fn send(&mut self) -> Result<(), DaemonFailure> {
        while !matches!(self.blocked, Blocked::HungUp(_)) {
            if self.batch.is_sent() {
                self.fill_batch()?;
            }
            if self.batch.is_sent() {
                self.blocked = Blocked::Not;
                break;
            }
            let Some(socket) = &self.socket else {
                return Err(is_closed());
            };
            let (count, result) = self.batch.send(socket.as_fd());
            let sent = self.under_way.range(self.sent..self.sent + count);
            self.awaited += sent.map(Message::least_answer).sum::<usize>();
            self.sent += count;
            match result {
                Ok(()) => self.blocked = Blocked::Not,
                Err(errno) => {
                    self.blocked = self.blocked_by(errno)?;
                    break;
                }
            }
        }
        Ok(())
    }

    fn blocked_by(&self, errno: Errno) -> Result<Blocked, DaemonFailure> {
        match errno {
            Errno::EAGAIN => Ok(Blocked::Full),
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => Ok(Blocked::HungUp(errno)),
            Errno::ETOOMANYREFS | Errno::ENOBUFS | Errno::ENOMEM => {
                if !matches!(self.blocked, Blocked::Short(_)) {
                    logs::debug!("a message to a daemon waits: {errno}");
                }
                Ok(Blocked::Short(Instant::now() + RETRY))
            }
            _ => Err(DaemonFailure::protocol(IoError::from(errno))),
        }
    }

    /// Takes the next messages out of the queue.
    fn fill_batch(&mut self) -> Result<(), DaemonFailure> {
        if self.under_way.is_empty() && !self.queue.is_empty() {
            self.check_nothing_came()?;
        }
        while let Some(next) = self.queue.front() {
            let has_fds = !next.fds.is_empty();
            if !self.batch.takes(next) || has_fds && self.with_fds == WINDOW {
                break;
            }
            let Some(mut message) = self.queue.pop_front() else {
                break;
            };
            message.came_with_fds = has_fds;
            self.with_fds += usize::from(has_fds);
            self.batch.add(&mut message);
            self.under_way.push_back(message);
        }
        Ok(())
    }

    /// Refuses what came before anything was asked: it may be the answer to a question that
    /// somebody gave up waiting for, or one that came twice.
    fn check_nothing_came(&self) -> Result<(), DaemonFailure> {
        match self
            .socket
            .as_ref()
            .map(|socket| socket::look(socket.as_fd()))
        {
            Some(Seen::Nothing) => Ok(()),
            Some(Seen::Bytes) => Err(DaemonFailure::protocol(
                "there is an answer that nothing asked for: it came twice, or is one to another \
                 user of the connection, who did not wait for it",
            )),
            Some(Seen::End(error)) => Err(DaemonFailure::hung_up(error)),
            None => Err(is_closed()),
        }
    }

    /// How many bytes may be received: what is missing of the next answer, and what the others
    /// have at least.
    fn missing(&self) -> usize {
        if self.awaited == 0 {
            return 0;
        }
        let next = HEADER + self.received_header().map_or(0, |header| header.size);
        let wanted = match self.keeps_fds {
            // Descriptors come with bytes: those of one answer only, to know whose they are.
            true => next,
            false => next.max(self.awaited),
        };
        wanted.saturating_sub(self.received.len())
    }

    /// Receives what is there of expected answers. Whether there was something.
    fn receive(&mut self) -> Result<bool, DaemonFailure> {
        let missing = self.missing();
        if missing == 0 {
            return match self.blocked {
                Blocked::HungUp(errno) => Err(DaemonFailure::hung_up(IoError::from(errno))),
                _ => Ok(false),
            };
        }
        let Some(socket) = &self.socket else {
            return Err(is_closed());
        };
        let mut buffer = [0; PIECE];
        let room = missing.min(PIECE);
        let came = match socket::receive(socket.as_fd(), &mut buffer[..room], &mut self.control) {
            Ok(came) if came.bytes > 0 => came,
            Ok(_) => {
                let error = match self.blocked {
                    Blocked::HungUp(errno) => errno.into(),
                    _ => IoError::from(ErrorKind::UnexpectedEof),
                };
                return Err(DaemonFailure::hung_up(error));
            }
            Err(Errno::EAGAIN) => return Ok(false),
            Err(errno @ (Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN)) => {
                return Err(DaemonFailure::hung_up(IoError::from(errno)));
            }
            Err(errno) => return Err(DaemonFailure::protocol(IoError::from(errno))),
        };
        self.received.extend(&buffer[..came.bytes]);
        // The kernel gives no bytes of two processes by one call.
        self.process = came.sender;
        if self.keeps_fds {
            // A daemon can send some with each byte: no more than one message has.
            self.fds.extend(came.fds);
            self.fds.truncate(MAX_FDS);
        }
        Ok(true)
    }

    fn received_header(&self) -> Option<Header> {
        let mut bytes = [0; HEADER];
        if self.received.len() < HEADER {
            return None;
        }
        for (into, byte) in bytes.iter_mut().zip(&self.received) {
            *into = *byte;
        }
        Some(Header::decode(&bytes))
    }

    /// Takes the next answer, if all of it has arrived.
    fn take_answer(&mut self) -> Result<Option<Answer>, DaemonFailure> {
        let Some(header) = self.received_header() else {
            return Ok(None);
        };
        let mut sent = self.under_way.range(..self.sent);
        let Some(at) = sent.position(|sent| sent.reply != Reply::None) else {
            return Ok(None);
        };
        self.check(header, at)?;
        if self.received.len() < HEADER + header.size {
            return Ok(None);
        }
        // Those before it have no answers, and were handled before it.
        let before = self.under_way.drain(..at);
        let with_fds = before.filter(|message| message.came_with_fds).count();
        let Some(request) = self.under_way.pop_front() else {
            return Ok(None);
        };
        self.with_fds -= with_fds + usize::from(request.came_with_fds);
        self.sent -= at + 1;
        self.awaited -= request.least_answer();
        let body = self.received.drain(..HEADER + header.size);
        let body = body.skip(HEADER).collect();
        Ok(Some(Answer {
            body,
            process: match self.received.is_empty() {
                // It may have a descriptor, which is not kept longer than it is of use.
                true => std::mem::take(&mut self.process),
                false => self.process.clone(),
            },
            fds: std::mem::take(&mut self.fds),
            request,
        }))
    }

    /// Checks the header of the answer to what is under way at this place.
    fn check(&self, header: Header, at: usize) -> Result<(), DaemonFailure> {
        let Header { code, flags, size } = header;
        let request = &self.under_way[at];
        let expected = request.code;
        if header.is_reply() && code == expected && request.allows(size) {
            return Ok(());
        }
        let is_to = |sent: &Message| header.is_reply() && code == sent.code;
        let is_with_bases =
            |sent: &Message| is_to(sent) && sent.is_table_change() && size == sent.body.len();
        if self.under_way.range(..=at).any(is_with_bases) {
            return Err(DaemonFailure::NoPostcopy);
        }
        let what = match header.is_reply() && !self.under_way.iter().any(is_to) {
            true => format!(
                "the answer to request {code}, which another user of the connection made, or one \
                 that came twice: no other request may be under way meanwhile"
            ),
            false => {
                format!(
                    "to request {expected} came request {code}, flags {flags:#x}, {size} bytes"
                )
            }
        };
        Err(DaemonFailure::protocol(what))
    }
}

fn is_closed() -> DaemonFailure {
    DaemonFailure::hung_up("the connection is closed")
}
