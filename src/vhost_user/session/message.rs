//! Messages of the caller's own, and those that a daemon makes by itself.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::BackendReq;

use crate::vhost_user::wire::{DaemonRequest, Descriptor, Message, Reply};

/// A message of the vhost-user protocol that the session knows nothing about: one of the caller's
/// own ([`VhostUserSession::request`](crate::VhostUserSession::request)), its answer, or one that
/// the daemon sent by itself ([`VhostUserSession::receive`](crate::VhostUserSession::receive)).
///
/// ```
/// use guest_memory_shm::SessionMessage;
/// use vhost::vhost_user::message::FrontendReq;
///
/// let advise = SessionMessage::new(FrontendReq::POSTCOPY_ADVISE);
/// let own = SessionMessage::new(1000_u32).with_body(7_u64.to_ne_bytes());
/// assert_eq!(own.body().len(), 8);
/// ```
#[derive(Debug)]
pub struct SessionMessage {
    code: u32,
    body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    /// On which channel the daemon waits for an answer.
    pub(super) asked_on: Option<u64>,
}

impl SessionMessage {
    /// The message with this number (vhost's `FrontendReq`, or another), without a body.
    pub fn new(code: impl Into<u32>) -> Self {
        Self::received(code.into(), Vec::new(), Vec::new())
    }

    pub(super) fn received(code: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Self {
        Self {
            code,
            body,
            fds,
            asked_on: None,
        }
    }

    /// Sets the body, in the byte order of the machine.
    #[must_use]
    pub fn with_body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// Adds a descriptor, to be sent with it.
    #[must_use]
    pub fn with_descriptor(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.fds.push(fd.into());
        self
    }

    /// Its number.
    pub fn code(&self) -> u32 {
        self.code
    }

    /// Its body.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Takes the descriptors out that came with it.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// Whether it is the daemon's word that the configuration space of its device has changed.
    pub fn is_config_change(&self) -> bool {
        self.code == u32::from(BackendReq::CONFIG_CHANGE_MSG)
    }

    /// Whether the daemon waits for an answer:
    /// [`VhostUserSession::answer`](crate::VhostUserSession::answer).
    pub fn is_asking(&self) -> bool {
        self.asked_on.is_some()
    }

    pub(super) fn into_message(self, reply: Reply) -> Message {
        let fds = self.fds.into_iter().map(|fd| Arc::new(fd) as Descriptor);
        Message::new(DaemonRequest::Own(self.code), self.code, self.body, reply).with_fds(fds)
    }
}
