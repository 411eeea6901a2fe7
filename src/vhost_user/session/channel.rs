//! The channel for what a daemon asks and says by itself.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;

use super::error::{Result, SessionError};
use super::message::SessionMessage;
use crate::vhost_user::wire::IncomingRequests;

/// Our end of it.
#[derive(Debug)]
pub(super) struct Channel {
    requests: IncomingRequests,
    answers: bool,
    /// Which one of the session's it is.
    number: u64,
}

impl Channel {
    /// Both ends.
    pub(super) fn new(agreed: Features, number: u64) -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let with_fds = agreed.contains(Features::BACKEND_SEND_FD);
        let ours = Self {
            requests: IncomingRequests::new(ours.into(), with_fds),
            answers: agreed.contains(Features::REPLY_ACK),
            number,
        };
        Ok((ours, theirs.into()))
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.requests.socket()
    }

    /// Which one of the session's it is.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Answers the request with this number.
    pub(super) fn answer(&self, code: u32, value: u64) -> io::Result<()> {
        self.requests.answer(code, value)
    }

    /// What came, if all of it is there. Changes of the configuration are answered.
    pub(super) fn next(&mut self) -> io::Result<Option<SessionMessage>> {
        let Some(came) = self.requests.next()? else {
            return Ok(None);
        };
        let mut message = SessionMessage::received(came.code, came.body, came.fds);
        let asks = came.asks && self.answers;
        match message.is_config_change() {
            true if asks => self.requests.answer(message.code(), 0)?,
            _ => message.asked_on = asks.then_some(self.number),
        }
        Ok(Some(message))
    }
}

pub(super) fn failed(source: io::Error) -> SessionError {
    SessionError::Channel { source }
}
