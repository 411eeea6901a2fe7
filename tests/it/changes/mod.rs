//! The address space with listeners that play by a script.

use std::collections::VecDeque;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use guest_memory_shm::*;
use vm_memory::{GuestAddress, GuestMemoryAtomic};

use crate::support::{ToldAll, attach_as, chain};

mod exchanges;
mod inside;
mod listeners;
mod order;
mod panics;
mod panics_around;
mod panics_in_steps;
mod published;

const MIB: u64 = 1 << 20;
/// For what comes at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was said, by whom: `("a", "[0, 4]")`, and `begins [0, 4]` before by one that is told in
/// steps.
type Said = Arc<Mutex<Vec<(&'static str, String)>>>;

struct Script {
    name: &'static str,
    said: Said,
    /// What the n-th update answers; all others are taken.
    answers: Vec<(usize, fn() -> ListenerError)>,
    updates: usize,
    limit: usize,
    told: Told,
    held: Vec<u64>,
    /// What readers see while it is told.
    readers: Option<PublishedMemory>,
}

/// How a listener is told.
#[derive(Clone)]
enum Told {
    /// It has no exchange.
    AtOnce,
    /// By an exchange that waits for all of these, one after the other, and then says something on
    /// each of the lines.
    InSteps(Vec<Wait>, Vec<Line>),
}

/// What an exchange waits for.
#[derive(Clone)]
enum Wait {
    /// A moment that has passed already.
    Past,
    /// Something on the line.
    Word(Line),
}

/// A way to say one thing to an exchange, and no more.
#[derive(Clone)]
enum Line {
    Event(Arc<EventFd>),
    Pipe(Arc<(PipeReader, PipeWriter)>),
    Socket(Arc<(UnixStream, UnixStream)>),
}

/// With an exchange that has something to wait for, and without one.
fn both_ways() -> [Told; 2] {
    [Told::AtOnce, Told::InSteps(vec![Wait::Past], Vec::new())]
}

impl Told {
    fn is_in_steps(&self) -> bool {
        matches!(self, Self::InSteps(..))
    }
}

impl Line {
    fn event() -> Self {
        Self::Event(Arc::new(
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
        ))
    }

    fn pipe() -> Self {
        let (reader, writer) = pipe().unwrap();
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        Self::Pipe(Arc::new((reader, writer)))
    }

    fn socket() -> Self {
        let (reader, writer) = UnixStream::pair().unwrap();
        reader.set_nonblocking(true).unwrap();
        Self::Socket(Arc::new((reader, writer)))
    }

    fn say(&self) {
        match self {
            Self::Event(event) => drop(event.write(1).unwrap()),
            Self::Pipe(ends) => (&ends.1).write_all(&[1]).unwrap(),
            Self::Socket(ends) => (&ends.1).write_all(&[1]).unwrap(),
        }
    }

    /// Whether something was said that was not heard yet.
    fn hears(&self) -> bool {
        match self {
            Self::Event(event) => event.read().is_ok(),
            Self::Pipe(ends) => (&ends.0).read(&mut [0]).is_ok(),
            Self::Socket(ends) => (&ends.0).read(&mut [0]).is_ok(),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Event(event) => event.as_fd(),
            Self::Pipe(ends) => ends.0.as_fd(),
            Self::Socket(ends) => ends.0.as_fd(),
        }
    }
}

fn mib(memory: &GuestMemoryShm) -> Vec<u64> {
    memory
        .iter()
        .map(|region| region.range().start_addr().0 / MIB)
        .collect()
}

impl Script {
    fn say(&self, what: &str, places: &[u64]) {
        let mut what = format!("{what}{places:?}");
        if let Some(readers) = &self.readers {
            what += &format!(" while readers see {:?}", mib(&readers.memory()));
        }
        self.said.lock().unwrap().push((self.name, what));
    }

    /// Takes what it is told, or not.
    fn take(&mut self, places: Vec<u64>) -> Result<(), ListenerError> {
        self.updates += 1;
        self.say("", &places);
        if let Some((_, error)) = self.answers.iter().find(|(at, _)| *at == self.updates) {
            return Err(error());
        }
        self.held = places;
        Ok(())
    }
}

impl MemoryListener for Script {
    fn check(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        if memory.num_regions() > self.limit {
            return Err(ListenerError::refused("too many"));
        }
        Ok(())
    }

    fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        assert!(!self.told.is_in_steps(), "it has an exchange");
        self.take(mib(memory))
    }

    fn begin_update<'a>(
        &'a mut self,
        memory: &GuestMemoryShm,
        _begun: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        let Told::InSteps(waits, says) = self.told.clone() else {
            return None;
        };
        let places = mib(memory);
        self.say("begins ", &places);
        Some(Box::new(Steps {
            script: self,
            places,
            waits: waits.into_iter().collect(),
            says,
            deadline: Instant::now() + PATIENCE,
            calls: 0,
        }))
    }
}

/// An update of a script in steps.
struct Steps<'a> {
    script: &'a mut Script,
    places: Vec<u64>,
    /// Those that are not over; the first one is that which it waits for.
    waits: VecDeque<Wait>,
    says: Vec<Line>,
    deadline: Instant,
    calls: usize,
}

impl Exchange for Steps<'_> {
    fn advance(&mut self, now: Instant) -> Option<Result<(), ListenerError>> {
        self.calls += 1;
        if now >= self.deadline {
            return Some(Err(ListenerError::away("it heard nothing")));
        }
        // It is called again for each moment.
        let mut is_again = self.calls > 1;
        while let Some(wait) = self.waits.front() {
            let is_over = match wait {
                Wait::Past => std::mem::take(&mut is_again),
                Wait::Word(line) => line.hears(),
            };
            if !is_over {
                return None;
            }
            self.waits.pop_front();
        }
        let taken = self.script.take(std::mem::take(&mut self.places));
        self.says.iter().for_each(Line::say);
        Some(taken)
    }

    fn waits_for(&self) -> WaitFor<'_> {
        match self.waits.front() {
            None => unreachable!("it has ended"),
            Some(Wait::Past) => WaitFor::moment(self.deadline - PATIENCE),
            Some(Wait::Word(line)) => WaitFor::moment(self.deadline).or_readable(line.fd()),
        }
    }
}

fn script(name: &'static str, said: &Said) -> Script {
    Script {
        name,
        said: said.clone(),
        answers: Vec::new(),
        updates: 0,
        limit: usize::MAX,
        told: Told::AtOnce,
        held: Vec::new(),
        readers: None,
    }
}

fn refused() -> ListenerError {
    ListenerError::refused("no room")
}

fn away() -> ListenerError {
    ListenerError::away("it died")
}

fn space() -> AddressSpace {
    AddressSpace::new(GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

fn region(at: u64) -> GuestRegionShm {
    GuestRegionShm::new((GuestAddress(at * MIB), MIB), &RamOptions::new()).unwrap()
}

fn present(space: &AddressSpace) -> Vec<u64> {
    mib(&space.published().memory())
}

fn said(said: &Said) -> Vec<(&'static str, String)> {
    std::mem::take(&mut said.lock().unwrap())
}

/// What was said, each in one word: `a[0, 4]`.
fn lines(said: &Said) -> Vec<String> {
    let all = self::said(said).into_iter();
    all.map(|(who, what)| format!("{who}{what}")).collect()
}

fn held<L: MemoryListener>(
    space: &AddressSpace,
    id: &ListenerId<L>,
    of: fn(&L) -> &[u64],
) -> Vec<u64> {
    space
        .with_listener(id, |listener| of(listener).to_vec())
        .unwrap()
}

fn all(script: &Script) -> &[u64] {
    &script.held
}
