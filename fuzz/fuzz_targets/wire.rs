//! Any answers of a daemon while its memory table changes, in any pieces: each change ends, by its
//! deadline at the latest, and it is done exactly if all that was asked was answered as it should.
//!
//! Input: a byte with what was negotiated; a byte for each of two memories, with a bit for each of
//! 8 regions; then a byte for each thing that the daemon does, see `Daemon::act`.

#![no_main]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use guest_memory_shm::{
    GuestMemoryShm, GuestRegionShm, ListenerError, MemoryListener, RamOptions, VhostUserShare,
};
use libfuzzer_sys::fuzz_target;
use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;
/// Longer than any deadline here.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const NEED_REPLY: u32 = 8;
const HEADER: usize = 12;

static REGIONS: LazyLock<Vec<Arc<GuestRegionShm>>> = LazyLock::new(|| {
    let region = |at| GuestRegionShm::new((GuestAddress(at * PAGE), PAGE), &RamOptions::new());
    (0..8)
        .map(|at| Arc::new(region(at).expect("there is memory")))
        .collect()
});

fuzz_target!(|input: &[u8]| {
    let _ = run(input);
});

fn run(input: &[u8]) -> Option<()> {
    let ([negotiated, first, second], acts) = input.split_first_chunk()?;
    let mut features = Features::empty();
    features.set(Features::REPLY_ACK, negotiated & 1 != 0);
    features.set(Features::CONFIGURE_MEM_SLOTS, negotiated & 2 != 0);
    let listens = negotiated & 4 != 0;

    let (ours, theirs) = UnixStream::pair().ok()?;
    theirs.set_nonblocking(true).ok()?;
    let mut share = VhostUserShare::new(ours, features).expect("it is a socket");
    share.set_postcopy(listens);
    let mut daemon = Daemon {
        socket: theirs,
        listens,
        came: Vec::new(),
        asked: VecDeque::new(),
        to_say: VecDeque::new(),
        is_fair: true,
    };
    let mut acts = acts.iter().copied();
    for memory in [memory(*first)?, memory(*second)?] {
        let (result, is_over) = change(&mut share, &memory, &mut daemon, &mut acts);
        match result {
            Ok(()) => {
                assert_eq!(share.table(), &memory.memory_table());
                daemon.read();
                assert!(!daemon.is_fair || daemon.has_answered());
            }
            Err(error) => {
                assert!(!daemon.is_fair || is_over, "{error}");
                assert!(share.broken().is_some() || !daemon.is_fair, "{error}");
                if share.broken().is_some() {
                    return None;
                }
            }
        }
    }
    Some(())
}

/// Those of the regions that the bits say.
fn memory(bits: u8) -> Option<GuestMemoryShm> {
    let all = REGIONS.iter().enumerate();
    let some = all.filter(|(at, _)| bits & (1 << at) != 0);
    let regions: Vec<_> = some.map(|(_, region)| Arc::clone(region)).collect();
    GuestMemoryShm::from_arc_regions(regions).ok()
}

/// The result of a change, and whether it is only because its time was over.
fn change(
    share: &mut VhostUserShare,
    memory: &GuestMemoryShm,
    daemon: &mut Daemon,
    acts: &mut impl Iterator<Item = u8>,
) -> (Result<(), ListenerError>, bool) {
    let begun = Instant::now();
    let exchange = share.begin_update(memory, begun);
    let mut exchange = exchange.expect("a share is told in steps");
    loop {
        if let Some(result) = exchange.advance(begun) {
            return (result, false);
        }
        assert!(exchange.waits_for().fd().is_some());
        let Some(act) = acts.next() else {
            let result = exchange.advance(begun + DAY);
            return (result.expect("its time is over"), true);
        };
        daemon.act(act, acts);
    }
}

struct Daemon {
    socket: UnixStream,
    /// Postcopy listens: tables are answered with bases.
    listens: bool,
    /// Of the message that is coming.
    came: Vec<u8>,
    /// What is to be answered: the request and the body of the right answer.
    asked: VecDeque<(u32, Vec<u8>)>,
    to_say: VecDeque<u8>,
    /// It has done nothing but answer what it was asked.
    is_fair: bool,
}

impl Daemon {
    /// The lower 3 bits say what is to be said next, the upper 5 how many bytes are said now.
    fn act(&mut self, act: u8, more: &mut impl Iterator<Item = u8>) {
        self.read();
        match act % 8 {
            0..=2 => {
                if let Some((code, body)) = self.asked.pop_front() {
                    self.answer(code, &body);
                }
            }
            3 => {
                if let Some((code, mut body)) = self.asked.pop_front() {
                    body[0] ^= more.next().unwrap_or(1);
                    self.is_fair &= code == GET_FEATURES;
                    self.answer(code, &body);
                }
            }
            4 => {
                self.is_fair = false;
                let count = usize::from(more.next().unwrap_or(0) % 32);
                self.to_say.extend(more.take(count));
            }
            5 => {
                self.is_fair = false;
                let code = u32::from(more.next().unwrap_or(0));
                self.answer(code, &[0; 8]);
            }
            6 if act > 128 => {
                self.is_fair = false;
                let _ = self.socket.shutdown(Shutdown::Both);
            }
            _ => {}
        }
        let count = match act / 8 {
            31 => self.to_say.len(),
            count => self.to_say.len().min(usize::from(count)),
        };
        let bytes: Vec<u8> = self.to_say.drain(..count).collect();
        let _ = self.socket.write_all(&bytes);
    }

    fn has_answered(&self) -> bool {
        self.came.is_empty() && self.asked.is_empty() && self.to_say.is_empty()
    }

    fn answer(&mut self, code: u32, body: &[u8]) {
        let header = [code, 5, body.len() as u32].map(u32::to_ne_bytes);
        self.to_say.extend(header.as_flattened());
        self.to_say.extend(body);
    }

    /// Reads what came; descriptors are dropped by the kernel.
    fn read(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = self.socket.read(&mut buffer) {
            self.came.extend(&buffer[..count]);
        }
        while let Some((header, rest)) = self.came.split_first_chunk::<HEADER>() {
            let field = |at: usize| u32::from_ne_bytes(header.as_chunks().0[at]);
            let (code, flags, size) = (field(0), field(1), field(2) as usize);
            let Some(body) = rest.get(..size) else { break };
            let is_table = [SET_MEM_TABLE, ADD_MEM_REG].contains(&code);
            match code {
                GET_FEATURES => self.asked.push_back((code, vec![0; 8])),
                GET_MAX_MEM_SLOTS => self.asked.push_back((code, 8_u64.to_ne_bytes().to_vec())),
                // 8 bytes acknowledge bases.
                _ if self.listens && is_table && size > 8 => {
                    assert_eq!(flags, 1);
                    self.asked.push_back((code, body.to_vec()));
                }
                _ if flags & NEED_REPLY != 0 => self.asked.push_back((code, vec![0; 8])),
                _ => {}
            }
            self.came.drain(..HEADER + size);
        }
    }
}
