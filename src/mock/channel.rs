//! The backend channel: requests that the daemon makes of the frontend, on a socket of their own.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserHeaderFlag;

use super::fault::ChannelFault;
use super::lock::lock;
use super::wire::{Message, Receiver};

/// How long a request waits for room: some hundreds of them fit, until the frontend reads.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// A request to send on the backend channel: any number, any body, any descriptors.
///
/// ```
/// use guest_memory_shm::mock::BackendRequest;
/// use vhost::vhost_user::message::BackendReq;
///
/// let uuid = [7; 16];
/// let added = BackendRequest::new(BackendReq::SHARED_OBJECT_ADD).with_body(uuid).with_answer();
/// let unknown = BackendRequest::new(999_u32);
/// ```
#[derive(Debug)]
pub struct BackendRequest {
    message: Message,
}

impl BackendRequest {
    /// The request of this number, as the vhost crate's `BackendReq` or as a `u32`; without a
    /// body.
    pub fn new(code: impl Into<u32>) -> Self {
        Self {
            message: Message::bare(code),
        }
    }

    /// Sets the body. A frontend expects at most 4096 bytes.
    pub fn with_body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.message.body = body.into();
        self
    }

    /// Adds a descriptor to send along, which a frontend expects with some requests, and with
    /// BACKEND_SEND_FD (bit 10) only.
    pub fn add_descriptor(mut self, fd: OwnedFd) -> Self {
        self.message.fds.push(fd);
        self
    }

    /// Asks for an answer (NEED_REPLY), which a frontend gives with REPLY_ACK only: see
    /// [`MockDaemon::backend_answer`](super::MockDaemon::backend_answer).
    pub fn with_answer(mut self) -> Self {
        self.message.flags |= VhostUserHeaderFlag::NEED_REPLY.bits();
        self
    }
}

/// The daemon's end of the channel.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    /// The requests that asked for an answer and have none yet, oldest first.
    asked: Mutex<VecDeque<u32>>,
}

impl Channel {
    /// # Errors
    /// The descriptor is no socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Channel> {
        let socket = UnixStream::from(socket);
        socket.set_write_timeout(Some(SEND_LIMIT))?;
        Ok(Channel {
            socket,
            asked: Mutex::default(),
        })
    }

    /// Sends the request, or plays a fault instead.
    pub(super) fn send(
        &self,
        request: &BackendRequest,
        fault: Option<ChannelFault>,
    ) -> io::Result<()> {
        let message = &request.message;
        match fault {
            None => {
                if message.wants_answer() {
                    lock(&self.asked).push_back(message.request);
                }
                message.send(&self.socket)
            }
            Some(ChannelFault::Nonsense) => (&self.socket).write_all(&[0xff; 12]),
            Some(ChannelFault::CutShort) => {
                (&self.socket).write_all(&message.request.to_ne_bytes())
            }
            Some(ChannelFault::HangUp) => self.socket.shutdown(Shutdown::Both),
        }
    }

    /// The answer to the oldest request that asked for one.
    pub(super) fn answer(&self, limit: Duration) -> io::Result<u64> {
        let asked = lock(&self.asked).front().copied().ok_or_else(|| {
            io::Error::new(ErrorKind::InvalidInput, "no request asked for an answer")
        })?;
        // 0 is no timeout to the kernel.
        let limit = limit.max(Duration::from_millis(1));
        self.socket.set_read_timeout(Some(limit))?;
        let received = Receiver::new().receive(&self.socket);
        let answer = received.map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => io::Error::new(ErrorKind::TimedOut, error),
            _ => error,
        })?;
        let answer = answer.ok_or(ErrorKind::UnexpectedEof)?;
        lock(&self.asked).pop_front();

        let value = answer.u64_at(0).unwrap_or_default();
        let expected = Message::answer(asked, value);
        let form = |message: &Message| (message.request, message.flags, message.fds.len());
        if form(&answer) == form(&expected) && answer.body == expected.body {
            return Ok(value);
        }
        let reason = format!("{answer:?} is none to request {asked}");
        Err(io::Error::new(ErrorKind::InvalidData, reason))
    }
}
