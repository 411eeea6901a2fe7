//! One change: what the model says that comes of it.

use std::collections::BTreeSet;

use guest_memory_shm::{AddressSpaceError, ChangeReport};
use vm_memory::Bytes;

use super::moods::Mood;
use super::peer::{Answer, Peer, State};
use super::world::{Member, World};
use super::*;

/// A listener that stops a change, and whether it is away rather than refusing.
type Objection = (String, bool);

impl World {
    /// One to three regions come or go, in one transaction.
    pub(super) fn change(&mut self) -> String {
        let space = Arc::clone(&self.space);
        let mut transaction = space.transaction();
        let mut next = self.present.clone();
        for _ in 0..=self.random.below(3) {
            let place = 1 + self.random.below(PLACES - 1);
            if self.present.contains(&place) {
                if !next.remove(&place) {
                    continue;
                }
                transaction = transaction.remove((GuestAddress(place * MIB), MIB));
            } else if next.insert(place) {
                let new = region(place);
                new.write_obj(place, vm_memory::MemoryRegionAddress(0))
                    .unwrap();
                transaction = transaction.insert(new);
            }
        }
        let what = format!("{:?} -> {next:?}", self.present);
        // Their plans, before they are carried out.
        let plan = |member: &Member| {
            let plan = member.plan.lock().unwrap();
            (plan.check, plan.updates.clone())
        };
        // Before they are carried out.
        let plans = self.members.iter().map(plan);
        let (checks, mut updates): (Vec<_>, Vec<_>) = plans.unzip();
        let done = transaction.commit();

        if std::mem::take(&mut self.replaced) {
            expect_replaced(done, &what);
            return format!("{what}, stopped by a foreign memory");
        }
        if next == self.present {
            // No participant is asked.
            self.expect_done(done, &what);
            return String::from("an empty transaction");
        }
        let mut told = Vec::new();
        let mut objection = self.asked(&checks);
        if objection.is_none() {
            // Who is away is not told; those that are, in two groups: the first one with moods,
            // and then the second beside the daemons.
            let there = |at: usize| checks[at].is_none();
            for group in [0, 1] {
                if objection.is_some() {
                    break;
                }
                let mut begins = true;
                if there(group) {
                    told.push(group);
                    let mood = updates[group].pop_front().flatten();
                    objection = self.members[group].takes(mood);
                    begins = mood.is_none_or(Mood::begins);
                }
                // Those that are told beside it begin after it.
                if group == 1 && begins {
                    let daemons = self.daemons_told(&next);
                    objection = objection.or(daemons);
                }
            }
        }
        let Some((name, away)) = objection else {
            self.present = next;
            self.expect_done(done, &what);
            return what;
        };
        for at in told {
            // Put back.
            let mood = updates[at].pop_front().flatten();
            let member = &mut self.members[at];
            member.stale = mood.is_some();
        }
        expect_failure(done, &name, away, &what);
        for peer in &mut self.peers {
            if let State::Holds(held) = &mut peer.state {
                // Nothing is left of their faults: all that were told something have met them.
                *held = self.present.clone();
            }
        }
        format!("{what}, undone for {name}")
    }

    /// All are asked, one after the other, until one stops it.
    fn asked(&mut self, checks: &[Option<Mood>]) -> Option<Objection> {
        for (member, mood) in self.members.iter_mut().zip(checks) {
            let Some(mood) = mood else { continue };
            if !mood.leaves() {
                return Some((member.name.to_owned(), false));
            }
            member.stale = true;
            if member.required {
                return Some((member.name.to_owned(), true));
            }
        }
        // A required listener that is away stops it before those after it are asked.
        for peer in &mut self.peers {
            if let State::Holds(_) = peer.state {
                continue;
            }
            peer.state = State::Away;
            if peer.required {
                return Some((peer.name.clone(), true));
            }
        }
        None
    }

    fn daemons_told(&mut self, next: &BTreeSet<u64>) -> Option<Objection> {
        let mut objection = None;
        let there = |peer: &&mut Peer| peer.state != State::Away;
        for peer in self.peers.iter_mut().filter(there) {
            let away = match peer.answer(next) {
                Answer::Takes => continue,
                Answer::Refuses => false,
                Answer::Leaves if peer.required => true,
                Answer::Leaves => continue,
            };
            objection.get_or_insert((peer.name.clone(), away));
        }
        objection
    }

    /// The change happened, and says who was not told.
    fn expect_done(&self, done: Result<ChangeReport, AddressSpaceError>, what: &str) {
        let report = done.unwrap_or_else(|error| panic!("{what}: {error}"));
        let stale = report.stale().iter();
        let stale: Vec<_> = stale.map(|stale| stale.name()).collect();
        assert_eq!(stale, self.stale(), "{what}");
    }
}

impl Member {
    /// It is told something.
    fn takes(&mut self, mood: Option<Mood>) -> Option<Objection> {
        let Some(mood) = mood else {
            self.stale = false;
            return None;
        };
        if mood.leaves() {
            self.stale = true;
            if !self.required {
                return None;
            }
        }
        Some((self.name.to_owned(), mood.leaves()))
    }
}
