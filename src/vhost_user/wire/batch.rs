//! Messages on their way into the socket, as bytes.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;

use super::message::{Descriptor, Message};
use super::socket;

/// How many bytes are sent by one call, if there are as many: few messages are longer.
const BATCH: usize = 4096;

/// Messages that are sent by one call, if there is room. Descriptors go with the first byte, so
/// only the first message can have any.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    sent: usize,
    /// Where the first message begins that is not sent to its last byte.
    start: usize,
    /// Where that one ends, and those after it.
    ends: VecDeque<usize>,
    fds: Vec<Descriptor>,
}

impl Batch {
    /// Whether there is nothing to send.
    pub(super) fn is_sent(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether there is room for this message, too.
    pub(super) fn takes(&self, message: &Message) -> bool {
        match message.fds.is_empty() {
            true => self.bytes.len() < BATCH,
            false => self.bytes.is_empty(),
        }
    }

    /// Takes a message, and its descriptors from it.
    pub(super) fn add(&mut self, message: &mut Message) {
        message.encode(&mut self.bytes);
        self.ends.push_back(self.bytes.len());
        self.fds.append(&mut message.fds);
    }

    /// Sends what there is room for. Gives the number of messages that are sent to their last byte
    /// by that, and why it was not all.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> (usize, Result<(), Errno>) {
        let result = self.send_all(socket);
        let count = self.ends.partition_point(|end| *end <= self.sent);
        self.start = self.ends.drain(..count).next_back().unwrap_or(self.start);
        if self.is_sent() {
            self.clear();
        }
        (count, result)
    }

    fn send_all(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        while self.sent < self.bytes.len() {
            let fds: Vec<RawFd> = match self.sent {
                0 => self.fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect(),
                _ => Vec::new(),
            };
            self.sent += socket::send(socket, &self.bytes[self.sent..], &fds)?;
        }
        Ok(())
    }

    /// Lets go of the messages of which no byte was sent; gives their number.
    pub(super) fn cut(&mut self) -> usize {
        let kept = usize::from(self.start < self.sent);
        let cut = self.ends.len().saturating_sub(kept);
        self.ends.truncate(kept);
        match self.ends.back() {
            Some(end) => self.bytes.truncate(*end),
            None => self.clear(),
        }
        cut
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
        self.start = 0;
        self.ends.clear();
        self.fds.clear();
    }
}
