//! A daemon of few lines: it takes all that it is told, notes it, and answers as it is to.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// What it was told by one message.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) code: u32,
    pub(super) body: Vec<u8>,
    pub(super) file: Option<File>,
}

impl Told {
    pub(super) fn is(&self, code: FrontendReq) -> bool {
        self.code == u32::from(code)
    }

    pub(super) fn inode(&self) -> Option<u64> {
        let file = self.file.as_ref()?;
        Some(file.metadata().unwrap().ino())
    }
}

/// An answer: body and descriptors.
pub(super) type Answer = (Vec<u8>, Vec<OwnedFd>);

pub(super) fn number(value: u64) -> Answer {
    (value.to_ne_bytes().to_vec(), Vec::new())
}

/// Its owner's side.
pub(super) struct Peer(Arc<Mutex<Vec<Told>>>);

impl Peer {
    /// One that offers these protocol features, and a connection to it. `answer` answers what it
    /// gives something for, instead of what all daemons answer.
    pub(super) fn new(
        features: Features,
        answer: impl Fn(&Told) -> Option<Answer> + Send + 'static,
    ) -> (Self, UnixStream) {
        Self::living(usize::MAX, features, answer)
    }

    /// One that hangs up after so many messages.
    pub(super) fn living(
        messages: usize,
        features: Features,
        answer: impl Fn(&Told) -> Option<Answer> + Send + 'static,
    ) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Self::on(theirs, messages, features, answer), ours)
    }

    /// One on this socket, which says other things there by itself.
    pub(super) fn on(
        socket: UnixStream,
        messages: usize,
        features: Features,
        answer: impl Fn(&Told) -> Option<Answer> + Send + 'static,
    ) -> Self {
        let told = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&told);
        thread::spawn(move || serve(socket, messages, features, &noted, answer));
        Self(told)
    }

    /// All that was told so far, from then on forgotten.
    pub(super) fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// Those of what it was [told](Self::take) that are this message.
    pub(super) fn take_all(&self, code: FrontendReq) -> Vec<Told> {
        let mut all = self.take();
        all.retain(|told| told.is(code));
        all
    }
}

fn serve(
    mut socket: UnixStream,
    messages: usize,
    features: Features,
    noted: &Mutex<Vec<Told>>,
    answer: impl Fn(&Told) -> Option<Answer>,
) {
    for _ in 0..messages {
        let Some((told, flags)) = receive(&mut socket) else {
            return;
        };
        let answered = answer(&told).or_else(|| common(&told, features));
        let taken = (flags & NEED_REPLY != 0).then(|| number(0));
        let code = told.code;
        noted.lock().unwrap().push(told);
        if let Some((body, fds)) = answered.or(taken) {
            let header = [code, VERSION | REPLY, body.len() as u32].map(u32::to_ne_bytes);
            let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
            let sent = socket.send_with_fds(&[header.as_flattened()], &fds);
            if sent.is_err() || socket.write_all(&body).is_err() {
                return;
            }
        }
    }
}

/// The next message and its flags; `None`: the session has gone.
fn receive(socket: &mut UnixStream) -> Option<(Told, u32)> {
    let mut header = [0; 12];
    let (size, file) = socket.recv_with_fd(&mut header).ok()?;
    socket.read_exact(header.get_mut(size..)?).ok()?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    socket.read_exact(&mut body).ok()?;
    let (code, flags) = (word(0), word(4));
    Some((Told { code, body, file }, flags))
}

/// What all daemons answer to questions.
fn common(told: &Told, features: Features) -> Option<Answer> {
    let is = |code| told.is(code);
    Some(match () {
        () if is(FrontendReq::GET_FEATURES) => number(1 << 32 | 1 << 30 | super::DRIVER),
        () if is(FrontendReq::GET_PROTOCOL_FEATURES) => number(features.bits()),
        () if is(FrontendReq::GET_QUEUE_NUM) => number(2),
        () if is(FrontendReq::GET_MAX_MEM_SLOTS) => number(32),
        () if is(FrontendReq::GET_VRING_BASE) => (told.body.clone(), Vec::new()),
        () if is(FrontendReq::GET_CONFIG) => (told.body.clone(), Vec::new()),
        () if is(FrontendReq::GET_INFLIGHT_FD) => {
            let file = memfd(1 << 20);
            let mut body = told.body.clone();
            body[..8].copy_from_slice(&(1_u64 << 20).to_ne_bytes());
            (body, vec![file.into()])
        }
        () => return None,
    })
}

pub(super) fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("peer", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}
