//! What else a session says: configuration space, status, reset, and messages of the caller's own.

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vhost::vhost_user::message::FrontendReq;

use super::VhostUserSession;
use super::error::{Result, SessionError};
use super::message::SessionMessage;
use crate::vhost_user::wire::{
    Answer, DaemonRequest, MAX_FDS, Message, NUMBER, Reply, number, numbers,
};

/// The longest configuration space (vhost-user specification, "Virtio device config space").
const MAX_CONFIG: usize = 256;

/// Messages that change what the session knows of the daemon.
const OWN: [FrontendReq; 24] = [
    FrontendReq::SET_FEATURES,
    FrontendReq::SET_OWNER,
    FrontendReq::RESET_OWNER,
    FrontendReq::SET_MEM_TABLE,
    FrontendReq::SET_LOG_BASE,
    FrontendReq::SET_LOG_FD,
    FrontendReq::SET_VRING_NUM,
    FrontendReq::SET_VRING_ADDR,
    FrontendReq::SET_VRING_BASE,
    FrontendReq::GET_VRING_BASE,
    FrontendReq::SET_VRING_KICK,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_ERR,
    FrontendReq::SET_PROTOCOL_FEATURES,
    FrontendReq::SET_VRING_ENABLE,
    FrontendReq::SET_BACKEND_REQ_FD,
    FrontendReq::GET_INFLIGHT_FD,
    FrontendReq::SET_INFLIGHT_FD,
    FrontendReq::RESET_DEVICE,
    FrontendReq::GET_MAX_MEM_SLOTS,
    FrontendReq::ADD_MEM_REG,
    FrontendReq::REM_MEM_REG,
    FrontendReq::SET_STATUS,
    FrontendReq::GET_STATUS,
];

impl VhostUserSession {
    /// Reads `len` bytes of the device's configuration space.
    ///
    /// It is read from its beginning: QEMU's daemons (libvhost-user) give what is there, whatever
    /// offset they are asked for.
    ///
    /// # Errors
    ///
    /// [`SessionError::NotOffered`] without the protocol feature CONFIG, or where the daemon has
    /// no such part; [`SessionError::Share`].
    pub fn config(&mut self, offset: u32, len: usize) -> Result<Vec<u8>> {
        let (start, end) = self.check_config(offset, len)?;
        let message = config_message(FrontendReq::GET_CONFIG, 0, &vec![0; end]);
        let body = self.answer_to(message)?.map(|answer| answer.body);
        let bytes = body.as_deref().and_then(|body| body.get(12 + start..));
        bytes.map(<[u8]>::to_vec).ok_or(SessionError::NotOffered {
            what: "this part of its configuration",
        })
    }

    /// Writes to the device's configuration space. A daemon may hang up at a byte that the device
    /// does not let the guest write, as QEMU's do: so check what a guest writes before.
    ///
    /// # Errors
    ///
    /// Those of [`config`](Self::config).
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.check_config(offset, bytes.len())?;
        let message = config_message(FrontendReq::SET_CONFIG, offset, bytes);
        let message = message.with_reply(self.reply());
        self.tell(vec![message], DaemonRequest::Config)
    }

    /// Where this part begins and ends.
    fn check_config(&self, offset: u32, len: usize) -> Result<(usize, usize)> {
        self.check_feature(Features::CONFIG, "CONFIG")?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match start.checked_add(len) {
            Some(end) if len > 0 && end <= MAX_CONFIG => Ok((start, end)),
            _ => Err(SessionError::NotOffered {
                what: "configuration past byte 256, or of no bytes",
            }),
        }
    }

    /// Has the daemon reset the device (RESET_DEVICE), as the guest did: all rings are stopped,
    /// and forgotten, and so are what was in flight and the [status](Self::set_status).
    ///
    /// # Errors
    ///
    /// [`SessionError::NotOffered`] without the protocol feature RESET_DEVICE: stop each ring
    /// instead, and [forget](Self::forget_rings) them. [`SessionError::Share`].
    pub fn reset_device(&mut self) -> Result<()> {
        self.check_feature(Features::RESET_DEVICE, "RESET_DEVICE")?;
        let code = FrontendReq::RESET_DEVICE;
        let reset = Message::new(DaemonRequest::Reset, code, Vec::new(), self.reply());
        self.tell(vec![reset], DaemonRequest::Reset)?;
        self.forget_rings();
        Ok(())
    }

    /// Tells the daemon the device status that the guest has written (SET_STATUS; virtio 1.3,
    /// "Device Status Field"). It is told again after a reconnection.
    ///
    /// Daemons that know of the status start the device once `DRIVER_OK` is set: so the protocol
    /// feature STATUS is agreed on only if the caller says that it sets it, by
    /// [`with_protocol_features`](crate::SessionOptions::with_protocol_features).
    ///
    /// # Errors
    ///
    /// [`SessionError::NotOffered`] without STATUS; [`SessionError::Share`].
    pub fn set_status(&mut self, status: u8) -> Result<()> {
        self.check_feature(Features::STATUS, "STATUS")?;
        let before = self.status.replace(status);
        let told: Vec<Message> = self.status_message().into_iter().collect();
        let told = self.tell(told, DaemonRequest::Status);
        if told.is_err() {
            self.status = before;
        }
        told
    }

    /// The device status, as the daemon knows it (GET_STATUS): it may have cleared
    /// `FEATURES_OK`, or set `DEVICE_NEEDS_RESET`.
    ///
    /// # Errors
    ///
    /// Those of [`set_status`](Self::set_status).
    pub fn status(&mut self) -> Result<u8> {
        self.check_feature(Features::STATUS, "STATUS")?;
        let code = FrontendReq::GET_STATUS;
        let question = Message::new(DaemonRequest::Status, code, Vec::new(), NUMBER);
        let answer = self.answer_to(question)?;
        let status = answer.map_or(0, |answer| number(&answer.body));
        Ok(u8::try_from(status & 0xff).unwrap_or_default())
    }

    /// The status that is to be, where there is one and the daemon takes it.
    pub(super) fn status_message(&self) -> Option<Message> {
        let status = self.status.filter(|_| self.has(Features::STATUS))?;
        let (code, body) = (FrontendReq::SET_STATUS, numbers([u64::from(status)]));
        Some(Message::new(
            DaemonRequest::Status,
            code,
            body,
            self.reply(),
        ))
    }

    /// Sends a message of the caller's own that has no answer of its own, and waits until the
    /// daemon has handled it. A daemon that does not know it may hang up, which breaks the
    /// session: [protocol features](crate::SessionOptions::with_protocol_features) say what it
    /// knows.
    ///
    /// # Errors
    ///
    /// [`SessionError::OwnMessage`] for one of those by which the session itself would no longer
    /// know what the daemon knows; [`SessionError::TooManyDescriptors`]; [`SessionError::Share`].
    pub fn send(&mut self, message: SessionMessage) -> Result<()> {
        let message = self.own_message(message, self.reply())?;
        let about = message.about();
        self.tell(vec![message], about)
    }

    /// Sends a message of the caller's own, and gives its answer: at most 4096 bytes, and
    /// descriptors.
    ///
    /// ```
    /// use guest_memory_shm::{SessionMessage, SessionOptions, VhostUserSession};
    /// use vhost::vhost_user::message::FrontendReq;
    /// # use guest_memory_shm::mock::MockDaemon;
    /// # let daemon = MockDaemon::builder().with_queues(4).start_unnamed()?;
    /// # let socket = daemon.connect()?;
    ///
    /// let mut session = VhostUserSession::on_socket(socket, SessionOptions::new(0))?;
    /// let question = SessionMessage::new(FrontendReq::GET_QUEUE_NUM);
    /// let answer = session.request(question)?;
    /// assert_eq!(answer.body(), 4_u64.to_ne_bytes());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`send`](Self::send).
    pub fn request(&mut self, message: SessionMessage) -> Result<SessionMessage> {
        let code = message.code();
        let message = self.own_message(message, Reply::Any)?;
        let answer = self.answer_to(message)?;
        let (body, fds) = answer.map_or_else(Default::default, |answer| (answer.body, answer.fds));
        Ok(SessionMessage::received(code, body, fds))
    }

    fn own_message(&self, message: SessionMessage, reply: Reply) -> Result<Message> {
        let (code, count, limit) = (message.code(), message.fds.len(), MAX_FDS);
        if OWN.iter().any(|own| u32::from(*own) == code) {
            return Err(SessionError::OwnMessage { code });
        }
        match count <= limit {
            true => Ok(message.into_message(reply)),
            false => Err(SessionError::TooManyDescriptors { count, limit }),
        }
    }

    pub(super) fn answer_to(&mut self, message: Message) -> Result<Option<Answer>> {
        let answers = self.ask(vec![message], self.options.deadline)?;
        Ok(answers.into_iter().next())
    }
}

fn config_message(code: FrontendReq, offset: u32, bytes: &[u8]) -> Message {
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut body = [offset, size, 0].map(u32::to_ne_bytes).concat();
    body.extend(bytes);
    Message::new(DaemonRequest::Config, code, body, Reply::Like)
}
