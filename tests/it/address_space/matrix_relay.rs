//! A relay between a share or session and its daemon that does something at one message.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Result, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::ucred;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg, shutdown,
};
use nix::unistd::{Pid, getgid, getuid};
use vhost::vhost_user::message::FrontendReq;

use super::matrix_case::{About, Fault};

/// How late an answer is that is late.
pub(super) const LATE: Duration = Duration::from_millis(15);

const HEADER: usize = 12;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// More than any message has.
const MOST_FILES: usize = 64;

/// When something is done, around the message, which is passed on once all before it are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Before,
    /// Its answer came, if it has one. After that nothing more is passed on.
    After,
}

/// What is done at one message.
pub(super) struct Hook {
    /// Of those about the table, counted from 1 since the hook was set; 0: the question for the
    /// number of slots. Of a session that goes on, of all.
    pub(super) message: usize,
    pub(super) about: About,
    pub(super) moment: Moment,
    pub(super) deed: Deed,
}

pub(super) enum Deed {
    Act(Box<dyn FnOnce() + Send>),
    /// What the daemon is to be seen to do.
    Fault(Fault),
}

/// How a session finds the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    Open,
    /// It listens when it was not found at first.
    OpensLate,
    /// It hangs up on whoever comes.
    Shuts,
}

/// A thread for each direction, until either end hangs up or this is dropped.
pub(super) struct Relay {
    line: Arc<Line>,
    threads: Vec<JoinHandle<()>>,
}

/// What passes the messages on.
struct Line {
    share: OnceLock<UnixStream>,
    /// Where a session connects, until it has.
    listener: OnceLock<UnixListener>,
    daemon: UnixStream,
    /// The daemon's process, which is to be seen as the one that answers, if it is another one.
    process: Option<Pid>,
    state: Mutex<State>,
    /// An answer came, or the line is cut.
    answered: Condvar,
}

#[derive(Default)]
struct State {
    /// All messages, and how many of them are about the table.
    all: Vec<FrontendReq>,
    messages: usize,
    hooks: Vec<Hook>,
    /// The answers to come: to which message.
    expected: VecDeque<Number>,
    /// No answer is passed on any more.
    is_mute: bool,
    is_cut: bool,
}

/// Which message it is, and which of those about the table, if it is one.
type Number = (usize, Option<usize>);

struct Message {
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Relay {
    /// Relays to this daemon; gives the share's end.
    pub(super) fn start(daemon: UnixStream, process: Option<Pid>) -> (Self, UnixStream) {
        let (share, theirs) = UnixStream::pair().unwrap();
        let share = OnceLock::from(share);
        (Self::on(share, daemon, process, |_| Ok(())), theirs)
    }

    /// Relays to this daemon what connects at this path, once.
    pub(super) fn listen(
        path: PathBuf,
        door: Door,
        daemon: UnixStream,
        process: Option<Pid>,
    ) -> Self {
        // Of the one before.
        let _ = std::fs::remove_file(&path);
        let bound = (door != Door::OpensLate).then(|| UnixListener::bind(&path).unwrap());
        let open = move |line: &Line| {
            let listener = match bound {
                Some(listener) => listener,
                None => {
                    thread::sleep(LATE);
                    UnixListener::bind(&path)?
                }
            };
            let theirs = listener.try_clone()?;
            let known = line.listener.set(theirs).is_ok();
            if !known || line.state().is_cut {
                return Ok(());
            }
            let (share, _) = listener.accept()?;
            if door == Door::Open || door == Door::OpensLate {
                drop(line.share.set(share));
            }
            Ok(())
        };
        Self::on(OnceLock::new(), daemon, process, open)
    }

    fn on(
        share: OnceLock<UnixStream>,
        daemon: UnixStream,
        process: Option<Pid>,
        open: impl FnOnce(&Line) -> Result<()> + Send + 'static,
    ) -> Self {
        let line = Arc::new(Line {
            share,
            listener: OnceLock::new(),
            daemon,
            process,
            state: Mutex::default(),
            answered: Condvar::new(),
        });
        let (requests, answers) = (Cut(Arc::clone(&line)), Cut(Arc::clone(&line)));
        // An end that hangs up is what the share or the daemon is about to see.
        let threads = vec![
            thread::spawn(move || {
                let opened = open(&requests.0);
                requests.0.shut();
                drop(opened.and_then(|()| requests.0.pass_requests()));
            }),
            thread::spawn(move || drop(answers.0.pass_answers())),
        ];
        Self { line, threads }
    }

    /// Counts messages from now on.
    pub(super) fn arm(&self, hooks: Vec<Hook>) {
        let mut state = self.line.state();
        (state.all, state.messages) = (Vec::new(), 0);
        state.hooks = hooks;
    }

    /// Waits until both ends know that the other one has hung up.
    pub(super) fn wait_cut(&self) {
        let wait = |state: &mut State| !state.is_cut;
        drop(self.line.answered.wait_while(self.line.state(), wait));
    }

    /// The messages that were counted.
    pub(super) fn messages(&self) -> Vec<FrontendReq> {
        self.line.state().all.clone()
    }

    /// How many hooks have not fired.
    pub(super) fn pending(&self) -> usize {
        self.line.state().hooks.len()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.line.cut();
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "a hook panicked");
        }
    }
}

/// Ends the line when it is dropped.
struct Cut(Arc<Line>);

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.cut();
    }
}

impl Line {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What was passed on before can still be read.
    fn cut(&self) {
        for end in self.share.get().into_iter().chain([&self.daemon]) {
            // It may be the one that was faster.
            let _ = end.shutdown(Shutdown::Both);
        }
        if let Ok(mut state) = self.state.lock() {
            state.is_cut = true;
        }
        self.shut();
        self.answered.notify_all();
    }

    /// Nobody can connect any more.
    fn shut(&self) {
        if let Some(listener) = self.listener.get() {
            let _ = shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }

    fn share(&self) -> Result<&UnixStream> {
        self.share.get().ok_or(ErrorKind::NotConnected.into())
    }

    fn pass_requests(&self) -> Result<()> {
        while let Some(message) = Message::receive(self.share()?)? {
            let number = self.state().number(&message);
            if self.state().has_hook(number) {
                let wait = |state: &mut State| !state.expected.is_empty() && !state.is_cut;
                drop(self.answered.wait_while(self.state(), wait).unwrap());
            }
            let deed = self.state().hook(number, Moment::Before);
            match deed {
                None => {}
                Some(Deed::Act(act)) => act(),
                Some(Deed::Fault(Fault::Late)) => thread::sleep(LATE),
                Some(Deed::Fault(fault)) => match self.misbehave(fault, &message)? {
                    true => continue,
                    false => break,
                },
            }
            let is_answered = message.is_answered();
            if is_answered {
                self.state().expected.push_back(number);
            }
            if message.send(&self.daemon, None).is_err() {
                // It has ended: what it answered before goes first.
                let wait = |state: &mut State| !state.is_cut;
                drop(self.answered.wait_while(self.state(), wait).unwrap());
                break;
            }
            if !is_answered && let Some(deed) = self.state().hook(number, Moment::After) {
                deed.act();
                break;
            }
        }
        Ok(())
    }

    /// Answers a message for the daemon, or does not. Whether the connection goes on.
    fn misbehave(&self, fault: Fault, message: &Message) -> Result<bool> {
        let share = self.share()?;
        let answer = |code, value| Message::answer(code, value).send(share, None);
        match fault {
            Fault::Refuse => answer(message.word(0), 1)?,
            Fault::Nonsense => answer(u32::MAX, u64::MAX)?,
            Fault::CutOff if message.is_answered() => {
                let answer = Message::answer(message.word(0), 0);
                (&mut &*share).write_all(&answer.bytes[..HEADER + 3])?;
            }
            Fault::Silent => while Message::receive(share)?.is_some() {},
            Fault::HangUpAfter => {
                self.state().is_mute = true;
                message.send(&self.daemon, None)?;
            }
            _ => {}
        }
        Ok(matches!(fault, Fault::Refuse | Fault::Nonsense))
    }

    fn pass_answers(&self) -> Result<()> {
        while let Some(mut answer) = Message::receive(&self.daemon)? {
            if self.state().is_mute {
                continue;
            }
            // What was not asked for is passed on as well.
            let number = self.state().expected.front().copied().unwrap_or_default();
            let deed = self.state().hook(number, Moment::After);
            let is_twice = matches!(deed, Some(Deed::Fault(Fault::Twice)));
            let is_last = deed.is_some() && !is_twice;
            match deed {
                // One after the other could be too late to be seen.
                Some(Deed::Fault(Fault::Twice)) => answer.bytes.extend_from_within(..),
                Some(deed) => deed.act(),
                None => {}
            }
            answer.send(self.share()?, self.process)?;
            self.state().expected.pop_front();
            self.answered.notify_all();
            if is_last {
                break;
            }
        }
        Ok(())
    }
}

impl Deed {
    fn act(self) {
        if let Self::Act(act) = self {
            act();
        }
    }
}

impl State {
    /// Counts a message.
    fn number(&mut self, message: &Message) -> Number {
        let code = message.code();
        self.all.push(code);
        let table = match code {
            FrontendReq::GET_MAX_MEM_SLOTS => Some(0),
            FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG => {
                self.messages += 1;
                Some(self.messages)
            }
            _ => None,
        };
        (self.all.len(), table)
    }

    fn has_hook(&self, number: Number) -> bool {
        self.hooks.iter().any(|hook| hook.is_at(number))
    }

    fn hook(&mut self, number: Number, moment: Moment) -> Option<Deed> {
        let fires = |hook: &Hook| hook.is_at(number) && hook.moment == moment;
        let at = self.hooks.iter().position(fires)?;
        Some(self.hooks.remove(at).deed)
    }
}

impl Hook {
    fn is_at(&self, (all, table): Number) -> bool {
        match self.about {
            About::Session => self.message == all,
            _ => Some(self.message) == table,
        }
    }
}

impl Message {
    /// An answer with a number.
    fn answer(code: u32, value: u64) -> Self {
        let mut bytes = [code, VERSION | REPLY, 8].map(u32::to_ne_bytes).concat();
        bytes.extend(value.to_ne_bytes());
        Self {
            bytes,
            files: Vec::new(),
        }
    }

    /// The next one, or `None` if the end has hung up.
    fn receive(mut socket: &UnixStream) -> Result<Option<Self>> {
        let mut bytes = vec![0; HEADER];
        let mut control = nix::cmsg_space!([RawFd; MOST_FILES]);
        let mut files = Vec::new();
        let got = {
            let mut space = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
            let got = recvmsg::<()>(socket.as_raw_fd(), &mut space, Some(&mut control), flags)?;
            for message in got.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = message {
                    files.extend(fds.into_iter().map(own));
                }
            }
            got.bytes
        };
        match got {
            0 => return Ok(None),
            HEADER => {}
            _ => return Err(ErrorKind::UnexpectedEof.into()),
        }
        let mut this = Self { bytes, files };
        this.bytes.resize(HEADER + this.word(2) as usize, 0);
        socket.read_exact(&mut this.bytes[HEADER..])?;
        Ok(Some(this))
    }

    /// Sends it, as from this process if that may be.
    fn send(&self, mut socket: &UnixStream, process: Option<Pid>) -> Result<()> {
        let files: Vec<RawFd> = self.files.iter().map(AsRawFd::as_raw_fd).collect();
        let sender = process.map(|process| {
            UnixCredentials::from(ucred {
                pid: process.as_raw(),
                uid: getuid().as_raw(),
                gid: getgid().as_raw(),
            })
        });
        let rights = (!files.is_empty()).then_some(ControlMessage::ScmRights(&files));
        let sender = sender.as_ref().map(ControlMessage::ScmCredentials);
        let all: Vec<_> = rights.into_iter().chain(sender).collect();
        let send = |beside: &[ControlMessage<'_>]| {
            let bytes = [IoSlice::new(&self.bytes)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(socket.as_raw_fd(), &bytes, beside, flags, None)
        };
        let sent = match send(&all) {
            // Who is not root speaks for itself only; and nobody speaks for one who is gone.
            Err(Errno::EPERM | Errno::ESRCH) if process.is_some() => send(&all[..all.len() - 1])?,
            sent => sent?,
        };
        socket.write_all(&self.bytes[sent..])
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = &self.bytes[4 * at..4 * at + 4];
        u32::from_ne_bytes(bytes.try_into().unwrap())
    }

    fn code(&self) -> FrontendReq {
        FrontendReq::try_from(self.word(0)).expect("a request of the protocol")
    }

    fn is_answered(&self) -> bool {
        let asks = matches!(
            self.code(),
            FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_MAX_MEM_SLOTS
                | FrontendReq::SET_LOG_BASE
                | FrontendReq::GET_INFLIGHT_FD
                | FrontendReq::GET_VRING_BASE
        );
        asks || self.word(1) & NEED_REPLY != 0
    }
}

#[allow(unsafe_code, reason = "descriptors come from a socket as bare numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this message, and nothing else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
