//! The share with a daemon that follows a script, at the other end of a socket.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::MutexGuard;
use std::thread::{self, JoinHandle};

use vm_memory::GuestAddress;

use super::*;
use crate::memory::GuestMemoryShm;
use crate::vhost_user::wire::{DaemonFailure, DaemonRequest};

/// Asserts that a daemon failed in this way.
macro_rules! assert_failed {
    ($answer:expr, $way:pat) => {
        let error = $answer.map(drop).unwrap_err();
        assert!(matches!(error.failure(), Some($way)), "{error}");
    };
}

mod messages;
mod postcopy;
mod refused;
mod time;

const SLOTS: Features = Features::CONFIGURE_MEM_SLOTS;
const ACK: Features = Features::REPLY_ACK;
const LOG: Features = Features::LOG_SHMFD;

/// What the share told the daemon; addresses in MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Slots,
    Set(Vec<u64>),
    Add(u64),
    Remove(u64),
    AckBases,
    Log,
    Barrier,
}

/// How a message is answered that is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Refuse,
    HangUp,
    AnswerToAnother,
}

#[derive(Default)]
struct Script {
    said: Vec<Said>,
    /// What was said, and not refused.
    held: BTreeSet<u64>,
    /// The n-th messages, counted from 0, are answered like this.
    fails: Vec<(usize, Way)>,
    /// While postcopy listens: the base of the first region of a message.
    base: Option<u64>,
}

impl Script {
    /// Notes a message, and gives the body of the answer, if there is one.
    fn take(
        &mut self,
        code: u32,
        asks: bool,
        mut body: Vec<u8>,
        refuses: bool,
    ) -> Option<Vec<u8>> {
        let regions = body.get(8..).unwrap_or_default().chunks_exact(32);
        let starts = regions.filter_map(|region| region.first_chunk());
        let starts: Vec<u64> = starts
            .map(|start| u64::from_ne_bytes(*start) >> 20)
            .collect();
        let said = match code {
            1 => Said::Barrier,
            6 => Said::Log,
            36 => Said::Slots,
            5 | 37 if starts.is_empty() => Said::AckBases,
            5 => Said::Set(starts),
            37 => Said::Add(starts[0]),
            38 => Said::Remove(starts[0]),
            other => panic!("request {other}"),
        };
        match &said {
            _ if refuses => {}
            Said::Set(starts) => self.held = starts.iter().copied().collect(),
            Said::Add(start) => drop(self.held.insert(*start)),
            Said::Remove(start) => drop(self.held.remove(start)),
            _ => {}
        }
        let number = |number: u64| Some(number.to_ne_bytes().to_vec());
        let answer = match (&said, self.base) {
            (Said::Barrier | Said::Log, _) => number(0),
            (Said::Slots, _) => number(8),
            (Said::Set(_) | Said::Add(_), Some(base)) => {
                for (base, region) in (base..).zip(body[8..].chunks_exact_mut(32)) {
                    region[16..24].copy_from_slice(&base.to_ne_bytes());
                }
                Some(body)
            }
            _ => asks.then(|| number(refuses.into())).flatten(),
        };
        self.said.push(said);
        answer
    }
}

/// Handles one message; false once the connection has ended.
fn serve(mut socket: &UnixStream, script: &Mutex<Script>) -> bool {
    let mut header = [[0; 4]; 3];
    if socket.read_exact(header.as_flattened_mut()).is_err() {
        return false;
    }
    let [code, flags, size] = header.map(u32::from_ne_bytes);
    let mut body = vec![0; size as usize];
    socket.read_exact(&mut body).unwrap();
    let script = &mut *script.lock().unwrap();
    let (nth, mut fails) = (script.said.len(), script.fails.iter());
    let way = fails.find_map(|(at, way)| (*at == nth).then_some(*way));
    let answer = script.take(code, flags & 8 != 0, body, way == Some(Way::Refuse));
    if way == Some(Way::HangUp) {
        let _ = socket.shutdown(Shutdown::Both);
        return false;
    }
    if let Some(answer) = answer {
        let code = way.map_or(code, |way| if way == Way::Refuse { code } else { 99 });
        let header = [code, 5, answer.len() as u32].map(u32::to_ne_bytes);
        let message = [header.as_flattened(), &answer].concat();
        // The share may have let go of the connection.
        let _ = socket.write_all(&message);
    }
    true
}

/// A daemon in a thread, which ends with its connection.
struct Daemon {
    script: Arc<Mutex<Script>>,
    thread: JoinHandle<()>,
}

impl Daemon {
    fn start(socket: UnixStream) -> Self {
        let script = Arc::default();
        let serves = Arc::clone(&script);
        let thread = thread::spawn(move || while serve(&socket, &serves) {});
        Self { script, thread }
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// What it was told since it was last asked.
    fn said(&self) -> Vec<Said> {
        self.script().fails.clear();
        std::mem::take(&mut self.script().said)
    }

    /// Has it answer the message after `more` others in this way.
    fn fail(&self, more: usize, way: Way) {
        let mut script = self.script();
        let at = script.said.len() + more;
        script.fails.push((at, way));
    }
}

fn share(features: Features) -> (VhostUserShare, Daemon) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let share = VhostUserShare::new(ours, features).unwrap();
    (share, Daemon::start(theirs))
}

fn reconnect(share: &mut VhostUserShare, features: Features) -> Daemon {
    let (ours, theirs) = UnixStream::pair().unwrap();
    share.reconnect(ours, features).unwrap();
    Daemon::start(theirs)
}

fn starts(table: &MemoryTable) -> Vec<u64> {
    let regions = table.regions().iter();
    regions
        .map(|region| region.range().start_addr().0 >> 20)
        .collect()
}

/// Regions of 1 MiB at these addresses in MiB.
fn table(starts: &[u64]) -> MemoryTable {
    let ranges = starts
        .iter()
        .map(|start| (GuestAddress(start << 20), 1 << 20));
    let memory = GuestMemoryShm::<()>::from_ranges(&ranges.collect::<Vec<_>>());
    memory.unwrap().memory_table()
}
