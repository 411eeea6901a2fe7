//! What both sides know: the messages by which they find out, and what the answers mean.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vhost::vhost_user::message::FrontendReq;

use super::error::{Result, SessionError};
use super::options::{LOG_ALL, PROTOCOL_FEATURES, SessionOptions};
use crate::vhost_user::wire::{DaemonRequest, Message, NUMBER, Reply, numbers};

/// The most rings: the messages with a ring's descriptors have 8 bits for its index.
const MAX_RINGS: u64 = 1 << 8;

/// What was agreed, or, before anything was, what is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreed {
    /// The virtio features that were acknowledged last.
    pub(super) features: u64,
    /// Those without which there is no session.
    required: u64,
    pub(super) protocol: Features,
    pub(super) rings: u64,
    /// The daemon offers `VHOST_F_LOG_ALL`.
    pub(super) logs: bool,
}

impl Agreed {
    pub(super) fn new(options: &SessionOptions) -> Self {
        Self {
            features: options.features,
            required: options.required,
            protocol: Features::empty(),
            rings: 1,
            logs: false,
        }
    }

    /// Those that the guest's driver decides about.
    pub(super) fn driver_features(&self) -> u64 {
        self.features & !(LOG_ALL | PROTOCOL_FEATURES)
    }

    /// How a message is answered that has no answer of its own.
    pub(super) fn reply(&self) -> Reply {
        match self.protocol.contains(Features::REPLY_ACK) {
            true => Reply::Ack,
            false => Reply::None,
        }
    }

    /// What the daemon offers of the features that are to be.
    pub(super) fn take_offer(&mut self, offered: u64) -> Result<()> {
        let missing = self.required & !offered;
        if missing != 0 {
            return Err(SessionError::Features { missing, offered });
        }
        if offered & PROTOCOL_FEATURES == 0 {
            let what = "VHOST_USER_F_PROTOCOL_FEATURES";
            return Err(SessionError::NotOffered { what });
        }
        self.features = offered & self.driver_features() | PROTOCOL_FEATURES;
        self.logs = offered & LOG_ALL != 0;
        Ok(())
    }

    /// They are agreed on: the guest's driver has them from now on, no more and no less.
    pub(super) fn settle(&mut self, rings: u64) {
        self.required = self.driver_features();
        self.rings = rings.min(MAX_RINGS);
    }

    pub(super) fn set_features(&self) -> Message {
        let body = numbers([self.features]);
        message(FrontendReq::SET_FEATURES, body, self.reply())
    }

    /// Whether the daemon says how many rings it has.
    pub(super) fn counts_rings(&self) -> bool {
        self.protocol.contains(Features::MQ)
    }

    /// What says what was agreed. The last answer is the number of rings, if the daemon
    /// [says it](Self::counts_rings).
    pub(super) fn messages(&self, channel: Option<OwnedFd>) -> Vec<Message> {
        let bits = numbers([self.protocol.bits()]);
        let mut all = vec![
            // Not acknowledged: it decides whether others are.
            message(FrontendReq::SET_PROTOCOL_FEATURES, bits, Reply::None),
            self.set_features(),
        ];
        all.extend(channel.map(|socket| {
            let code = FrontendReq::SET_BACKEND_REQ_FD;
            message(code, Vec::new(), self.reply()).with_fds([Arc::new(socket) as _])
        }));
        all.push(match self.counts_rings() {
            true => message(FrontendReq::GET_QUEUE_NUM, Vec::new(), NUMBER),
            false => Message::barrier(DaemonRequest::Negotiate),
        });
        all
    }
}

/// Who we are, and the question what the daemon offers.
pub(super) fn ask_offer() -> Vec<Message> {
    let owner = message(FrontendReq::SET_OWNER, Vec::new(), Reply::None);
    vec![owner, Message::barrier(DaemonRequest::Negotiate)]
}

/// The question which protocol features the daemon offers.
pub(super) fn ask_protocol() -> Vec<Message> {
    let code = FrontendReq::GET_PROTOCOL_FEATURES;
    vec![message(code, Vec::new(), NUMBER)]
}

fn message(code: FrontendReq, body: Vec<u8>, reply: Reply) -> Message {
    Message::new(DaemonRequest::Negotiate, code, body, reply)
}
