//! The address space, all who are told, and what the model says of them.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use guest_memory_shm::mock::Fault;
use guest_memory_shm::{ListenerError, RegionAdapter, RegionListener};

use super::moods::{Mood, Moody, Plan};
use super::peer::{Answer, Peer, State};
use super::*;

use crate::support::attach_as;

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

/// A listener with moods, and what the model says of it.
pub(super) struct Member {
    pub(super) id: ListenerId<Moody>,
    pub(super) name: &'static str,
    pub(super) required: bool,
    pub(super) plan: Arc<Mutex<Plan>>,
    pub(super) stale: bool,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) space: Arc<AddressSpace>,
    recorder: ListenerId<RegionAdapter<Recorder>>,
    /// Two, in front of the daemons: the second is told beside them.
    pub(super) members: Vec<Member>,
    pub(super) peers: Vec<Peer>,
    pub(super) present: BTreeSet<u64>,
    /// Other code put another memory into the mirror.
    pub(super) replaced: bool,
    daemons: usize,
    /// Whether daemons may be silent, which costs their deadline.
    silence: bool,
}

impl World {
    pub(super) fn new(seed: u64) -> World {
        let mut random = Random(seed);
        let space = Arc::new(space());
        let recorder = RegionAdapter::new(Recorder(BTreeSet::new()));
        let recorder = space.attach("recorder", recorder).unwrap();
        let attach = |(name, in_steps)| {
            let required = random.below(2) == 1;
            let plan = Arc::new(Mutex::new(Plan::default()));
            let moody = Moody {
                plan: Arc::clone(&plan),
                space: Arc::downgrade(&space),
                in_steps,
            };
            Member {
                id: attach_as(&space, name, required, moody).unwrap(),
                name,
                required,
                plan,
                stale: false,
            }
        };
        World {
            members: [("moody", false), ("moody beside others", true)]
                .map(attach)
                .into(),
            random,
            space,
            recorder,
            peers: Vec::new(),
            present: BTreeSet::from([0]),
            replaced: false,
            daemons: 0,
            silence: seed.is_multiple_of(SILENCE),
        }
    }

    /// One operation or fault, predicted and done. Says what it was.
    pub(super) fn step(&mut self) -> String {
        match self.random.below(22) {
            0..=9 => self.change(),
            10 => self.attach(),
            11 if !self.peers.is_empty() => self.detach(),
            12 | 13 => self.reconnect(),
            14 if !self.peers.is_empty() => self.hang_up(),
            15..=17 => self.get_moody(),
            18 => self.refresh(),
            19 => self.attach_moody(),
            20 => self.meddle(),
            _ if !self.peers.is_empty() => self.inject(),
            _ => String::from("nothing"),
        }
    }

    fn some_peer(&mut self) -> usize {
        self.random.below(self.peers.len() as u64) as usize
    }

    fn some_mood(&mut self) -> Mood {
        Mood::pick(self.random.below(4), self.random.below(3))
    }

    /// One of those with moods gets some, for what comes next.
    fn get_moody(&mut self) -> String {
        let at = self.random.below(2) as usize;
        let (mood, again) = (self.some_mood(), self.some_mood());
        let when = self.random.below(4);
        let member = &self.members[at];
        let mut plan = member.plan.lock().unwrap();
        match when {
            0 => plan.check = Some(mood),
            1 => plan.updates = [Some(mood)].into(),
            // When it is put back, too; or only then.
            2 => plan.updates = [Some(mood), Some(again)].into(),
            _ => plan.updates = [None, Some(mood)].into(),
        }
        format!("{}: {plan:?}", member.name)
    }

    fn refresh(&mut self) -> String {
        let at = self.random.below(2) as usize;
        let member = &mut self.members[at];
        let mood = member.next_check().or_else(|| member.next_update());
        let done = self.space.refresh(&member.id);
        member.stale = mood.is_some();
        match mood {
            None => done.unwrap(),
            Some(mood) => expect_failure(done, member.name, mood.leaves(), "refresh"),
        }
        format!("{} refreshed: {mood:?}", member.name)
    }

    /// One that is in a mood from the start comes to nothing.
    fn attach_moody(&mut self) -> String {
        let plan = Arc::new(Mutex::new(Plan::default()));
        let mood = self.some_mood();
        match self.random.below(2) {
            0 => plan.lock().unwrap().check = Some(mood),
            _ => plan.lock().unwrap().updates = [Some(mood)].into(),
        }
        let moody = Moody {
            plan: Arc::clone(&plan),
            space: Arc::downgrade(&self.space),
            in_steps: self.random.below(2) == 1,
        };
        let error = self.space.attach("new", moody).unwrap_err();
        let (error, _moody) = error.into_parts();
        expect_failure(Err::<(), _>(error), "new", mood.leaves(), "attach");
        assert_eq!(plan.lock().unwrap().held, BTreeSet::new());
        format!("one that {mood:?} is not attached")
    }

    /// Code that has no business there.
    fn meddle(&mut self) -> String {
        if self.random.below(2) == 0 {
            let other = GuestMemoryShm::from_regions(vec![region(99)]).unwrap();
            self.space.atomic().lock().unwrap().replace(other);
            self.replaced = true;
            return String::from("a foreign memory in the mirror");
        }
        let at = self.random.below(2) as usize;
        let mood = self.some_mood();
        let id = &self.members[at].id;
        let work = || {
            self.space
                .with_listener(id, |_| std::panic::panic_any(mood))
        };
        let payload = catch_unwind(AssertUnwindSafe(work)).map(drop).unwrap_err();
        assert_eq!(payload.downcast_ref(), Some(&mood));
        String::from("a closure on a listener panics")
    }

    fn attach(&mut self) -> String {
        if self.peers.len() == 4 {
            return String::from("no daemon more");
        }
        let daemon = MockDaemon::builder().start_unnamed().unwrap();
        let required = self.random.below(2) == 1;
        self.daemons += 1;
        let name = format!("daemon {}", self.daemons);
        let share = share(&daemon, PATIENCE);
        let refuse = self.random.below(4) == 0;
        if refuse {
            // At some message or other.
            let change = 1 + self.random.below(self.present.len() as u64);
            daemon.inject(change, Fault::Refuse);
        }
        let attached = attach_as(&self.space, name.clone(), required, share);
        if refuse {
            let share = attached.unwrap_err().into_listener();
            assert_eq!(share.table().regions().len(), 0);
            assert_eq!(mapped(&daemon), []);
            return format!("{name} refuses to be attached");
        }
        let what = format!("{name} attached, required: {required}");
        self.peers.push(Peer {
            id: attached.unwrap(),
            daemon,
            name,
            required,
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
            return String::from("no daemon to reconnect");
        };
        if peer.fault != Some(Fault::NeverAnswer) {
            set_limit(&self.space, &peer.id, PATIENCE);
        }
        let done = reconnect(&self.space, &peer.id, &peer.daemon);
        peer.state = State::Holds(BTreeSet::new());
        match peer.answer(&self.present) {
            Answer::Takes => done.unwrap(),
            Answer::Refuses => expect_failure(done, &peer.name, false, "reconnect"),
            Answer::Leaves => expect_failure(done, &peer.name, true, "reconnect"),
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
            0..=2 => Fault::Refuse,
            3 | 4 => Fault::HangUpBefore,
            5 | 6 => Fault::HangUpAfter,
            7 | 8 => Fault::AnswerThenHangUp,
            9 | 10 => Fault::AnswerLate(Duration::from_millis(5)),
            _ if self.silence => Fault::NeverAnswer,
            _ => Fault::Refuse,
        };
        let at = self.some_peer();
        let peer = &mut self.peers[at];
        if peer.fault.is_none() {
            peer.daemon.inject(1, kind);
            if kind == Fault::NeverAnswer {
                set_limit(&self.space, &peer.id, LIMIT);
            }
            peer.fault = Some(kind);
        }
        format!("{} will {:?}", peer.name, peer.fault)
    }

    /// Who is stale, by the model. One that hung up may not have been noticed.
    pub(super) fn stale(&self) -> Vec<&str> {
        let members = self.members.iter().filter(|member| member.stale);
        let peers = self.peers.iter().filter(|peer| match &peer.state {
            State::Holds(held) => *held != self.present,
            State::Gone => false,
            State::Away => true,
        });
        let names = members.map(|member| member.name);
        names.chain(peers.map(|peer| peer.name.as_str())).collect()
    }

    /// What the model says is what is there.
    pub(super) fn check(&self, context: &str) {
        let memory = self.space.published().memory();
        let places = |memory: &GuestMemoryShm| -> BTreeSet<u64> {
            let regions = memory.arc_regions();
            let place = |region: &Arc<GuestRegionShm>| region.range().start_addr().0 / MIB;
            regions.iter().map(place).collect()
        };
        assert_eq!(places(&memory), self.present, "{context}");
        let mirror = places(&self.space.atomic().memory());
        assert_eq!(mirror != self.present, self.replaced, "{context}");
        for place in self.present.iter().skip(1) {
            let stamp: u64 = memory.read_obj(GuestAddress(place * MIB)).unwrap();
            assert_eq!(stamp, *place, "{context}");
        }
        let recorded = self
            .space
            .with_listener(&self.recorder, |it| it.get_ref().0.clone());
        assert_eq!(recorded.unwrap(), self.present, "{context}");

        let listeners = self.space.listeners().unwrap();
        assert_eq!(listeners.len(), 1 + self.members.len() + self.peers.len());
        let stale: Vec<_> = listeners
            .iter()
            .filter(|status| status.stale().is_some())
            .map(|status| status.name())
            .collect();
        assert_eq!(stale, self.stale(), "{context}");
        for member in self.members.iter().filter(|member| !member.stale) {
            let held = &member.plan.lock().unwrap().held;
            assert_eq!(*held, self.present, "{}: {context}", member.name);
        }
        for peer in &self.peers {
            if peer.state == State::Holds(self.present.clone()) {
                let (held, published) = (mapped(&peer.daemon), published(&self.space));
                assert_eq!(held, published, "{}: {context}", peer.name);
            }
        }
    }
}

impl Member {
    pub(super) fn next_check(&self) -> Option<Mood> {
        self.plan.lock().unwrap().check
    }

    /// How it takes the update that comes next, if that is the only one.
    pub(super) fn next_update(&self) -> Option<Mood> {
        let plan = self.plan.lock().unwrap();
        plan.updates.front().copied().flatten()
    }
}
