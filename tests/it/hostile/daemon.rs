//! A daemon that answers anything, early, late, twice, or not at all.

use std::io::{IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use guest_memory_shm::{
    AddressSpace, Error, GuestMemoryShm, GuestRegionShm, ListenerId, RamOptions, VhostUserShare,
};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::{GuestAddress, GuestAddressSpace};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Random;

use crate::frontend::agree;
use crate::support::attach_as;

const MIB: u64 = 1 << 20;
/// What a silent daemon costs. Whether an answer comes in time does not matter here.
const LIMIT: Duration = Duration::from_millis(100);
/// More than all calls of an operation may take together, each within its limit, a hundred times.
const MOST: Duration = Duration::from_secs(30);

const GET_FEATURES: u32 = 1;
const SET_LOG_BASE: u32 = 6;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_MAX_MEM_SLOTS: u32 = 36;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// What it does in the place of an answer.
#[derive(Clone, Copy)]
enum Trick {
    OtherValue,
    OtherRequest,
    OtherFlags,
    OtherSize,
    OtherLength,
    Half,
    Garbage,
    Flood,
    Twice,
    Early,
    Descriptors,
    Late,
    Drop,
    Never,
    HangUp,
    AnswerAndHangUp,
}

const TRICKS: [Trick; 16] = [
    Trick::OtherValue,
    Trick::OtherRequest,
    Trick::OtherFlags,
    Trick::OtherSize,
    Trick::OtherLength,
    Trick::Half,
    Trick::Garbage,
    Trick::Flood,
    Trick::Twice,
    Trick::Early,
    Trick::Descriptors,
    Trick::Late,
    Trick::Drop,
    Trick::Never,
    Trick::HangUp,
    Trick::AnswerAndHangUp,
];

struct Hostile {
    socket: UnixStream,
    random: Random,
    /// Of 100 messages, how many are not answered as they should be.
    tricks: u64,
}

impl Hostile {
    /// A connection to a new one.
    fn start(random: &mut Random) -> (UnixStream, JoinHandle<()>) {
        let (ours, socket) = UnixStream::pair().unwrap();
        let tricks = random.of(&[2, 5, 10, 30]);
        let random = Random(random.next());
        let this = Self {
            socket,
            random,
            tricks,
        };
        (ours, std::thread::spawn(move || drop(this.serve())))
    }

    /// Until it or the frontend hangs up.
    fn serve(mut self) -> std::io::Result<()> {
        loop {
            let Some(header) = self.receive()? else {
                return Ok(());
            };
            let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let mut body = vec![0; word(8) as usize];
            self.socket.read_exact(&mut body)?;
            let (request, flags) = (word(0), word(4));
            let answer = self.answer(request, flags);
            match self.random.below(100) < self.tricks {
                true => {
                    let trick = self.random.of(&TRICKS);
                    let answer = answer.unwrap_or_else(|| vec![0; 8]);
                    if !self.play(trick, request, answer)? {
                        return Ok(());
                    }
                }
                false => {
                    if let Some(body) = answer {
                        self.send(request, VERSION | REPLY, body.len(), &body)?;
                    }
                }
            }
        }
    }

    /// The next header; what comes with it is closed.
    fn receive(&self) -> std::io::Result<Option<[u8; 12]>> {
        let mut header = [0; 12];
        let mut control = nix::cmsg_space!([RawFd; 64]);
        let mut space = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
        let fd = self.socket.as_raw_fd();
        let got = recvmsg::<()>(fd, &mut space, Some(&mut control), flags)?;
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                fds.into_iter().map(own).for_each(drop);
            }
        }
        let whole = got.bytes == 12;
        Ok(whole.then_some(header))
    }

    /// What a good daemon answers.
    fn answer(&mut self, request: u32, flags: u32) -> Option<Vec<u8>> {
        let value = match request {
            GET_FEATURES => 1 << 32 | 1 << 30 | 1 << 26,
            GET_PROTOCOL_FEATURES => {
                let all =
                    Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS | Features::LOG_SHMFD;
                // All more often than not.
                let some = self.random.next() | self.random.next();
                all.bits() & some
            }
            GET_MAX_MEM_SLOTS => self.random.of(&[1, 8, 32, 509, u64::MAX]),
            SET_LOG_BASE => 0,
            _ if flags & NEED_REPLY != 0 => u64::from(self.random.below(50) == 0),
            _ => return None,
        };
        Some(value.to_ne_bytes().to_vec())
    }

    /// Says whether the connection goes on.
    fn play(&mut self, trick: Trick, request: u32, body: Vec<u8>) -> std::io::Result<bool> {
        let good = VERSION | REPLY;
        let len = body.len();
        match trick {
            Trick::OtherValue => {
                let value = self.random.word().to_ne_bytes();
                self.send(request, good, 8, &value)?;
            }
            Trick::OtherRequest => {
                let other = self.random.below(50) as u32;
                self.send(other, good, len, &body)?;
            }
            Trick::OtherFlags => {
                let flags = self.random.word() as u32;
                self.send(request, flags, len, &body)?;
            }
            Trick::OtherSize => {
                let size = self.random.word() as u32;
                self.send(request, good, size as usize, &body)?;
            }
            Trick::OtherLength => {
                let body = self.random.bytes(5000);
                self.send(request, good, body.len(), &body)?;
            }
            Trick::Half => {
                let header = [request, good, len as u32].map(u32::to_ne_bytes);
                let message = [header.as_flattened(), &body].concat();
                let cut = self.random.below(message.len() as u64) as usize;
                self.socket.write_all(&message[..cut])?;
                return Ok(self.random.below(2) == 0);
            }
            Trick::Garbage => {
                let bytes = self.random.bytes(200);
                self.socket.write_all(&bytes)?;
            }
            Trick::Flood => {
                let bytes = vec![self.random.next() as u8; 100_000];
                self.socket.write_all(&bytes)?;
            }
            Trick::Twice => {
                self.send(request, good, len, &body)?;
                self.send(request, good, len, &body)?;
            }
            Trick::Early => {
                self.send(request, good, len, &body)?;
                let next = self.random.of(&[GET_FEATURES, SET_LOG_BASE, 37, 38, 5]);
                self.send(next, good, 8, &[0; 8])?;
            }
            Trick::Descriptors => {
                let count = self.random.below(40) as usize + 1;
                let fds = vec![self.socket.as_raw_fd(); count];
                let header = [request, good, len as u32].map(u32::to_ne_bytes);
                let sent = self
                    .socket
                    .send_with_fds(&[header.as_flattened(), &body], &fds);
                sent?;
            }
            Trick::Late => {
                std::thread::sleep(Duration::from_millis(self.random.below(20)));
                self.send(request, good, len, &body)?;
            }
            Trick::Drop => {}
            Trick::Never => {
                let mut rest = Vec::new();
                self.socket.read_to_end(&mut rest)?;
                return Ok(false);
            }
            Trick::HangUp => return Ok(false),
            Trick::AnswerAndHangUp => {
                self.send(request, good, len, &body)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn send(&mut self, request: u32, flags: u32, size: usize, body: &[u8]) -> std::io::Result<()> {
        let header = [request, flags, size as u32].map(u32::to_ne_bytes);
        self.socket
            .write_all(&[header.as_flattened(), body].concat())
    }
}

#[allow(unsafe_code, reason = "descriptors come from a socket as bare numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this message, and nothing else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

type Share = VhostUserShare;

/// Changes an address space with such daemons, and looks at it after each change.
pub(super) fn converse(mut random: Random) {
    let space = AddressSpace::new(GuestMemoryShm::from_arc_regions(vec![region(0)]).unwrap());
    let mut threads = Vec::new();
    let mut daemons: Vec<ListenerId<Share>> = Vec::new();
    for number in 0..2 {
        if let Some((frontend, features)) = negotiate(&mut random, &mut threads) {
            let share = VhostUserShare::new(&frontend, features).unwrap();
            let share = share.with_deadline(LIMIT);
            let required = random.of(&[false, true]);
            let name = format!("disk{number}");
            let attach = || attach_as(&space, name, required, share).map_err(Box::new);
            match in_time(attach) {
                Ok(id) => daemons.push(id),
                Err(error) => says_something(error.error()),
            }
        }
        look(&space, &daemons);
    }
    for _ in 0..8 {
        let before = space.published().memory().memory_table();
        let at = 2 * random.below(12);
        let start = GuestAddress(at * MIB);
        let changed: Result<(), Error> = match random.below(4) {
            0 => in_time(|| Ok(space.insert(region(at)).map(drop)?)),
            1 => in_time(|| Ok(space.remove((start, MIB)).map(drop)?)),
            2 => {
                let change = space.transaction().insert(region(at + 1));
                let change = change.insert(region(at + 30));
                in_time(|| Ok(change.remove((GuestAddress(0), MIB)).commit().map(drop)?))
            }
            _ => match daemons.get(random.below(2) as usize) {
                None => Ok(()),
                Some(id) => use_daemon(&space, id, &mut random, &mut threads),
            },
        };
        if let Err(error) = changed {
            says_something(&error);
            assert_eq!(space.published().memory().memory_table(), before);
        }
        look(&space, &daemons);
    }
    in_time(|| drop(space));
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Something besides changes.
fn use_daemon(
    space: &AddressSpace,
    id: &ListenerId<Share>,
    random: &mut Random,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<(), Error> {
    match random.below(4) {
        0 => in_time(|| Ok(space.with_listener(id, Share::start_log)??)),
        1 => in_time(|| Ok(space.with_listener(id, Share::drain_dirty).map(drop)?)),
        2 => in_time(|| Ok(space.refresh(id)?)),
        _ => {
            let Some((frontend, features)) = negotiate(random, threads) else {
                return Ok(());
            };
            in_time(|| Ok(space.reconnect(id, &frontend, features)?))
        }
    }
}

fn negotiate(
    random: &mut Random,
    threads: &mut Vec<JoinHandle<()>>,
) -> Option<(Frontend, Features)> {
    let (stream, thread) = Hostile::start(random);
    threads.push(thread);
    let ours = stream.try_clone().unwrap();
    match in_time(|| within_limit(&ours, || agree(stream, Features::all()))) {
        Ok(agreed) => Some(agreed),
        Err(error) => {
            says_something(&error);
            None
        }
    }
}

/// Ends the connection if it takes longer: vhost's `Frontend` waits indefinitely.
fn within_limit<T>(connection: &UnixStream, work: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (over, is_over) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            if is_over.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                // The daemon may have ended it.
                let _ = connection.shutdown(Shutdown::Both);
            }
        });
        let done = work();
        drop(over);
        done
    })
}

/// Asserts that each daemon was told what is published, by its own account, or is called stale.
fn look(space: &AddressSpace, daemons: &[ListenerId<Share>]) {
    let table = space.published().memory().memory_table();
    for status in space.listeners().unwrap() {
        let id = daemons.iter().find(|id| status.is(id));
        let id = id.expect("it is one of these");
        let (held, broken) = space
            .with_listener(id, |share| {
                (share.table().clone(), share.broken().is_some())
            })
            .unwrap();
        match status.stale() {
            Some(error) => assert!(!error.reason().is_empty()),
            None => assert!(broken || held == table, "{status:?}: {held:?}"),
        }
    }
}

fn in_time<T>(work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    assert!(start.elapsed() < MOST, "it took {:?}", start.elapsed());
    done
}

fn says_something(error: &dyn std::error::Error) {
    assert!(error.to_string().len() > 8, "{error:?}");
}

fn region(start: u64) -> Arc<GuestRegionShm> {
    let region = GuestRegionShm::new((GuestAddress(start * MIB), MIB), &RamOptions::new());
    Arc::new(region.unwrap())
}
