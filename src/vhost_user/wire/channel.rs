//! Requests that a daemon makes by itself, on a connection beside the other one
//! ("Back-end message types" in the vhost-user specification).

use std::io::{Error as IoError, ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::message::{HEADER, Header, LONGEST, answer};
use super::socket::{self, Control, MAX_FDS};

/// What a daemon asks or says.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) code: u32,
    /// It waits for an answer.
    pub(crate) asks: bool,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// The frontend's end of the channel.
#[derive(Debug)]
pub(crate) struct IncomingRequests {
    socket: OwnedFd,
    control: Control,
    with_fds: bool,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl IncomingRequests {
    /// On this socket. Descriptors are closed, unless `with_fds`.
    pub(crate) fn new(socket: OwnedFd, with_fds: bool) -> Self {
        Self {
            socket,
            control: Control::new(with_fds),
            with_fds,
            received: Vec::new(),
            fds: Vec::new(),
        }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next one, if all of it is there.
    pub(crate) fn next(&mut self) -> Result<Option<Incoming>> {
        loop {
            let header = self.received.first_chunk().map(Header::decode);
            if let Some(header) = header {
                check(header)?;
            }
            let wanted = HEADER + header.map_or(0, |header| header.size);
            let missing = wanted - self.received.len();
            if let (Some(header), 0) = (header, missing) {
                let mut body = std::mem::take(&mut self.received);
                body.drain(..HEADER);
                return Ok(Some(Incoming {
                    code: header.code,
                    asks: header.asks(),
                    body,
                    fds: std::mem::take(&mut self.fds),
                }));
            }
            if !self.receive(missing)? {
                return Ok(None);
            }
        }
    }

    /// Receives what is there of this many bytes. Whether there was something.
    fn receive(&mut self, missing: usize) -> Result<bool> {
        let mut buffer = [0; LONGEST];
        let room = missing.min(LONGEST);
        let socket = self.socket.as_fd();
        match socket::receive(socket, &mut buffer[..room], &mut self.control) {
            Ok(came) if came.bytes > 0 => {
                self.received.extend(&buffer[..came.bytes]);
                // There is room for a few beside the bytes in any case.
                if self.with_fds {
                    self.fds.extend(came.fds);
                    self.fds.truncate(MAX_FDS);
                }
                Ok(true)
            }
            Ok(_) => Err(ErrorKind::UnexpectedEof.into()),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Answers the request with this number; 0 is yes.
    pub(crate) fn answer(&self, code: u32, value: u64) -> Result<()> {
        let bytes = answer(code, value);
        match socket::send(self.socket.as_fd(), &bytes, &[])? {
            sent if sent == bytes.len() => Ok(()),
            // A daemon that reads its answers leaves more room than that.
            _ => Err(Errno::EAGAIN.into()),
        }
    }
}

fn check(header: Header) -> Result<()> {
    match header.is_request() && header.size <= LONGEST {
        true => Ok(()),
        false => {
            let Header { code, flags, size } = header;
            let what = format!("request {code}, flags {flags:#x}, {size} bytes");
            Err(IoError::new(ErrorKind::InvalidData, what))
        }
    }
}
