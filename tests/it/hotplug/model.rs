//! Random operations and faults against a naive model of an address space under daemons.
//!
//! `MODEL_SEED=n` runs the sequence of one seed alone, `MODEL_SEEDS=n` as many as that.

use std::collections::BTreeSet;

use guest_memory_shm::mock::{Fault, FaultKind};
use guest_memory_shm::{
    AddressSpaceError, Attendance, Error, ListenerError, PerRegion, RegionListener,
};
use vm_memory::Bytes;

use super::*;
use crate::isolation::in_own_process;
use crate::proc::leaves_nothing_but_heaps;

const SEEDS: u64 = 60;
const STEPS: usize = 60;
/// Where regions may be, in MiB: 0 is always there.
const PLACES: u64 = 12;
/// How long a silent daemon holds everybody up.
const LIMIT: Duration = Duration::from_millis(60);

/// Sebastiano Vigna's splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % end
    }
}

/// What the model knows of a daemon.
#[derive(Clone, Debug, PartialEq)]
enum State {
    /// Its table is this one. It is stale if that is not what is published.
    Holds(BTreeSet<u64>),
    /// It hung up, and nobody has noticed.
    Gone,
    Away,
}

struct Peer {
    daemon: MockDaemon,
    id: ListenerId<Share>,
    name: String,
    attendance: Attendance,
    state: State,
    /// What it does at the next change that it is told of.
    fault: Option<FaultKind>,
}

/// What one daemon makes of a change.
#[derive(PartialEq)]
enum Answer {
    Takes,
    /// It says so, or hangs up.
    Refuses,
    /// It is silent, or was gone before.
    Leaves,
}

impl Peer {
    /// What it will answer to being told `next`; its fault is spent if anything is said to it.
    fn answer(&mut self, next: &BTreeSet<u64>) -> Answer {
        let State::Holds(held) = &self.state else {
            unreachable!("nobody tells {} anything", self.name);
        };
        if held == next {
            return Answer::Takes;
        }
        match self.fault.take() {
            None | Some(FaultKind::AnswerLate(_)) => {
                self.state = State::Holds(next.clone());
                Answer::Takes
            }
            Some(FaultKind::Refuse) => Answer::Refuses,
            Some(FaultKind::NeverAnswer) => {
                self.state = State::Away;
                Answer::Leaves
            }
            Some(_) => {
                self.state = State::Away;
                Answer::Refuses
            }
        }
    }
}

/// A listener of another kind, in front of the daemons.
struct Recorder(BTreeSet<u64>);

impl RegionListener for Recorder {
    fn region_add(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        assert!(self.0.insert(region.range().start_addr().0 / MIB));
        Ok(())
    }
    fn region_remove(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        assert!(self.0.remove(&(region.range().start_addr().0 / MIB)));
        Ok(())
    }
}

struct World {
    random: Random,
    space: AddressSpace,
    recorder: ListenerId<PerRegion<Recorder>>,
    peers: Vec<Peer>,
    present: BTreeSet<u64>,
    daemons: usize,
}

impl World {
    fn new(seed: u64) -> World {
        let space = space();
        let recorder = PerRegion::new(Recorder(BTreeSet::new()));
        World {
            random: Random(seed),
            recorder: space.attach("recorder", recorder).unwrap(),
            space,
            peers: Vec::new(),
            present: BTreeSet::from([0]),
            daemons: 0,
        }
    }

    /// One operation or fault, predicted and done. Says what it was.
    fn step(&mut self) -> String {
        match self.random.below(16) {
            0..=8 => self.change(),
            9 => self.attach(),
            10 if !self.peers.is_empty() => self.detach(),
            11 | 12 => self.reconnect(),
            13 if !self.peers.is_empty() => self.hang_up(),
            _ if !self.peers.is_empty() => self.inject(),
            _ => String::from("nothing"),
        }
    }

    fn some_peer(&mut self) -> usize {
        self.random.below(self.peers.len() as u64) as usize
    }

    /// One to three regions come or go, in one transaction.
    fn change(&mut self) -> String {
        let mut transaction = self.space.transaction();
        let mut next = self.present.clone();
        for _ in 0..=self.random.below(3) {
            let place = 1 + self.random.below(PLACES - 1);
            if self.present.contains(&place) {
                if !next.remove(&place) {
                    continue;
                }
                transaction = transaction.remove(GuestAddress(place * MIB), MIB);
            } else if next.insert(place) {
                let new = region(place);
                new.write_obj(place, vm_memory::MemoryRegionAddress(0))
                    .unwrap();
                transaction = transaction.insert(new);
            }
        }
        if next == self.present {
            // Nothing is asked of anybody.
            transaction.commit().unwrap();
            return String::from("an empty transaction");
        }
        let what = format!("{:?} -> {next:?}", self.present);
        let done = transaction.commit();

        // Who must be there and is not stops it before anybody is told, and before those behind it
        // are asked.
        for peer in &mut self.peers {
            if let State::Holds(_) = peer.state {
                continue;
            }
            peer.state = State::Away;
            if peer.attendance == Attendance::Required {
                expect_away(done, &peer.name, &what);
                return format!("{what}, stopped by {}", peer.name);
            }
        }
        let mut objection = None;
        for peer in self
            .peers
            .iter_mut()
            .filter(|peer| peer.state != State::Away)
        {
            let refuses = match peer.answer(&next) {
                Answer::Takes => continue,
                Answer::Refuses => true,
                Answer::Leaves if peer.attendance == Attendance::Required => false,
                Answer::Leaves => continue,
            };
            objection.get_or_insert((peer.name.clone(), refuses));
        }
        let Some((name, refuses)) = objection else {
            done.unwrap_or_else(|error| panic!("{what}: {error}"));
            self.present = next;
            return what;
        };
        if refuses {
            expect_refused(done, &name, &what);
        } else {
            expect_away(done, &name, &what);
        }
        for peer in &mut self.peers {
            if let State::Holds(held) = &mut peer.state {
                // Nothing is left of their faults: all that were told something have met them.
                *held = self.present.clone();
            }
        }
        format!("{what}, undone for {name}")
    }

    fn attach(&mut self) -> String {
        if self.peers.len() == 4 {
            return String::from("no daemon more");
        }
        let daemon = MockDaemon::builder().start_unnamed().unwrap();
        let attendance = match self.random.below(2) {
            0 => Attendance::MayLag,
            _ => Attendance::Required,
        };
        self.daemons += 1;
        let name = format!("daemon {}", self.daemons);
        let share = share(&daemon, LIMIT);
        let refuse = self.random.below(4) == 0;
        if refuse {
            // At some message or other.
            let change = 1 + self.random.below(self.present.len() as u64);
            daemon.inject(Fault::refuse(change));
        }
        let attached = self.space.attach_as(name.clone(), attendance, share);
        if refuse {
            let share = attached.unwrap_err().into_listener();
            assert_eq!(share.table().regions().len(), 0);
            assert_eq!(mapped(&daemon), []);
            return format!("{name} refuses to be attached");
        }
        let what = format!("{name} attached, {attendance:?}");
        self.peers.push(Peer {
            id: attached.unwrap(),
            daemon,
            name,
            attendance,
            state: State::Holds(self.present.clone()),
            fault: None,
        });
        what
    }

    fn detach(&mut self) -> String {
        let at = self.some_peer();
        let peer = self.peers.remove(at);
        let share = self.space.detach(peer.id).unwrap();
        if let State::Holds(held) = &peer.state {
            assert_eq!(share.table().regions().len(), held.len());
        }
        format!("{} detached", peer.name)
    }

    fn reconnect(&mut self) -> String {
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.state == State::Away) else {
            return String::from("nobody to reconnect");
        };
        let done = reconnect(&self.space, &peer.id, &peer.daemon);
        peer.state = State::Holds(BTreeSet::new());
        match peer.answer(&self.present) {
            Answer::Takes => drop(done.unwrap()),
            Answer::Refuses => expect_refused(done, &peer.name, "reconnect"),
            Answer::Leaves => expect_away(done, &peer.name, "reconnect"),
        }
        if peer.state != State::Holds(self.present.clone()) {
            // The new connection was given up.
            peer.state = State::Away;
        }
        format!("{} reconnected, {:?}", peer.name, peer.state)
    }

    fn hang_up(&mut self) -> String {
        let at = self.some_peer();
        let peer = &mut self.peers[at];
        if let State::Holds(_) = peer.state {
            peer.daemon.hang_up();
            peer.daemon.wait_disconnected(PATIENCE).unwrap();
            peer.state = State::Gone;
        }
        format!("{} hangs up", peer.name)
    }

    fn inject(&mut self) -> String {
        let kind = match self.random.below(12) {
            0..=2 => FaultKind::Refuse,
            3 | 4 => FaultKind::HangUpBefore,
            5 | 6 => FaultKind::HangUpAfter,
            7 | 8 => FaultKind::AnswerThenHangUp,
            9 | 10 => FaultKind::AnswerLate(Duration::from_millis(5)),
            _ => FaultKind::NeverAnswer,
        };
        let at = self.some_peer();
        let peer = &mut self.peers[at];
        if peer.fault.is_none() {
            peer.daemon.inject(Fault::new(1, kind));
            peer.fault = Some(kind);
        }
        format!("{} will {:?}", peer.name, peer.fault)
    }

    /// What the model says is what is there.
    fn check(&self, seed: u64, history: &[String]) {
        let context = || format!("MODEL_SEED={seed}, after:\n  {}", history.join("\n  "));
        let memory = self.space.memory().memory();
        let seen: BTreeSet<_> = published(&self.space)
            .iter()
            .map(|(at, _)| at.0 / MIB)
            .collect();
        assert_eq!(seen, self.present, "{}", context());
        for place in self.present.iter().skip(1) {
            let stamp: u64 = memory.read_obj(GuestAddress(place * MIB)).unwrap();
            assert_eq!(stamp, *place, "{}", context());
        }
        let recorded = self
            .space
            .with_listener(&self.recorder, |it| it.get_ref().0.clone());
        assert_eq!(recorded.unwrap(), self.present, "{}", context());

        let listeners = self.space.listeners();
        assert_eq!(listeners.len(), self.peers.len() + 1);
        for (peer, status) in self.peers.iter().zip(&listeners[1..]) {
            let of = || format!("{}: {:?}, {status:?}\n{}", peer.name, peer.state, context());
            assert_eq!(status.name(), peer.name);
            let stale = match &peer.state {
                State::Holds(held) => {
                    if *held == self.present {
                        assert_eq!(mapped(&peer.daemon), published(&self.space), "{}", of());
                    }
                    *held != self.present
                }
                State::Gone => continue,
                State::Away => true,
            };
            assert_eq!(status.stale().is_some(), stale, "{}", of());
        }
    }
}

#[track_caller]
fn expect_refused<T>(done: Result<T, Error>, name: &str, what: &str) {
    match done.err() {
        Some(Error::AddressSpace(error)) => match *error {
            AddressSpaceError::Refused { listener, .. } => assert_eq!(listener, name, "{what}"),
            other => panic!("{what}: {other}"),
        },
        other => panic!("{what}: {other:?}"),
    }
}

#[track_caller]
fn expect_away<T>(done: Result<T, Error>, name: &str, what: &str) {
    match done.err() {
        Some(Error::AddressSpace(error)) => match *error {
            AddressSpaceError::Away { listener, .. } => assert_eq!(listener, name, "{what}"),
            other => panic!("{what}: {other}"),
        },
        other => panic!("{what}: {other:?}"),
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let mut history = Vec::new();
    for _ in 0..STEPS {
        history.push(String::from("..."));
        let what = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.step()));
        let last = history.len() - 1;
        match what {
            Ok(what) => history[last] = what,
            Err(panic) => {
                eprintln!("MODEL_SEED={seed}, after:\n  {}", history.join("\n  "));
                std::panic::resume_unwind(panic);
            }
        }
        world.check(seed, &history);
    }
}

#[test]
fn whatever_happens_is_what_the_model_says() {
    let number = |name| {
        std::env::var(name)
            .ok()
            .and_then(|n: String| n.parse().ok())
    };
    let seeds = match number("MODEL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("MODEL_SEEDS").unwrap_or(SEEDS),
    };
    println!("seeds {seeds:?}, {STEPS} steps each");
    in_own_process(|| {
        // The first one has the loggers and buffers of the process made.
        run(seeds.start);
        for seed in seeds.clone() {
            leaves_nothing_but_heaps(|| run(seed));
        }
    });
}
