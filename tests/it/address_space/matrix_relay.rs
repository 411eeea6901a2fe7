//! A relay between a share and its daemon that does something at one message.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Result, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::libc::ucred;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg,
};
use nix::unistd::{Pid, getgid, getuid};
use vhost::vhost_user::message::FrontendReq;

const HEADER: usize = 12;
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
    /// number of slots.
    pub(super) message: usize,
    pub(super) moment: Moment,
    pub(super) act: Box<dyn FnOnce() + Send>,
}

/// A thread for each direction, until either end hangs up or this is dropped.
pub(super) struct Relay {
    line: Arc<Line>,
    threads: Vec<JoinHandle<()>>,
}

/// What passes the messages on.
struct Line {
    share: UnixStream,
    daemon: UnixStream,
    /// The daemon's process, which is to be seen as the one that answers, if it is another one.
    process: Option<Pid>,
    state: Mutex<State>,
    /// An answer came, or the line is cut.
    answered: Condvar,
}

#[derive(Default)]
struct State {
    /// Messages about the table.
    messages: usize,
    hooks: Vec<Hook>,
    /// The answers to come: to which message about the table, if to one.
    expected: VecDeque<Option<usize>>,
    is_cut: bool,
}

struct Message {
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Relay {
    /// Relays to this daemon; gives the share's end.
    pub(super) fn start(daemon: UnixStream, process: Option<Pid>) -> (Self, UnixStream) {
        let (share, theirs) = UnixStream::pair().unwrap();
        let line = Arc::new(Line {
            share,
            daemon,
            process,
            state: Mutex::default(),
            answered: Condvar::new(),
        });
        let directions: [fn(&Line) -> Result<()>; 2] = [Line::pass_requests, Line::pass_answers];
        let threads = directions.map(|pass| {
            let cut = Cut(Arc::clone(&line));
            // An end that hangs up is what the share or the daemon is about to see.
            thread::spawn(move || drop(pass(&cut.0)))
        });
        let threads = threads.into();
        (Self { line, threads }, theirs)
    }

    /// Counts messages from now on.
    pub(super) fn arm(&self, hooks: Vec<Hook>) {
        let mut state = self.line.state();
        state.messages = 0;
        state.hooks = hooks;
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
        for end in [&self.share, &self.daemon] {
            // It may be the one that was faster.
            let _ = end.shutdown(Shutdown::Both);
        }
        if let Ok(mut state) = self.state.lock() {
            state.is_cut = true;
        }
        self.answered.notify_all();
    }

    fn pass_requests(&self) -> Result<()> {
        while let Some(message) = Message::receive(&self.share)? {
            let number = self.state().number(&message);
            if number.is_some_and(|at| self.state().has_hook(at)) {
                let wait = |state: &mut State| !state.expected.is_empty() && !state.is_cut;
                drop(self.answered.wait_while(self.state(), wait).unwrap());
            }
            if let Some(act) = number.and_then(|at| self.state().hook(at, Moment::Before)) {
                act();
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
            let last = number.filter(|_| !is_answered);
            if let Some(act) = last.and_then(|at| self.state().hook(at, Moment::After)) {
                act();
                break;
            }
        }
        Ok(())
    }

    fn pass_answers(&self) -> Result<()> {
        while let Some(answer) = Message::receive(&self.daemon)? {
            let number = self.state().expected.front().copied();
            let number = number.expect("it was asked");
            let act = number.and_then(|at| self.state().hook(at, Moment::After));
            let is_last = act.is_some();
            if let Some(act) = act {
                act();
            }
            answer.send(&self.share, self.process)?;
            self.state().expected.pop_front();
            self.answered.notify_all();
            if is_last {
                break;
            }
        }
        Ok(())
    }
}

impl State {
    /// Which message it is, if it is one that hooks count.
    fn number(&mut self, message: &Message) -> Option<usize> {
        match message.code() {
            FrontendReq::GET_MAX_MEM_SLOTS => Some(0),
            FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG => {
                self.messages += 1;
                Some(self.messages)
            }
            _ => None,
        }
    }

    fn has_hook(&self, message: usize) -> bool {
        self.hooks.iter().any(|hook| hook.message == message)
    }

    fn hook(&mut self, message: usize, moment: Moment) -> Option<Box<dyn FnOnce() + Send>> {
        let fires = |hook: &Hook| (hook.message, hook.moment) == (message, moment);
        let at = self.hooks.iter().position(fires)?;
        Some(self.hooks.remove(at).act)
    }
}

impl Message {
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
                | FrontendReq::GET_MAX_MEM_SLOTS
                | FrontendReq::SET_LOG_BASE
        );
        asks || self.word(1) & NEED_REPLY != 0
    }
}

#[allow(unsafe_code, reason = "descriptors come from a socket as bare numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this message, and nothing else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
