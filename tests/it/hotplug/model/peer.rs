//! What the model knows of a daemon.

use std::collections::BTreeSet;

use guest_memory_shm::mock::Fault;

use super::*;

/// How a daemon is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// Its table is this one. It is stale if that is not what is published.
    Holds(BTreeSet<u64>),
    /// It hung up, and that was not noticed.
    Gone,
    Away,
}

pub(super) struct Peer {
    pub(super) daemon: MockDaemon,
    pub(super) id: ListenerId<Share>,
    pub(super) name: String,
    pub(super) required: bool,
    pub(super) state: State,
    /// What it does at the next change that it is told of.
    pub(super) fault: Option<Fault>,
}

/// What one daemon makes of a change.
#[derive(PartialEq)]
pub(super) enum Answer {
    Takes,
    /// It says so, or hangs up.
    Refuses,
    /// It is silent, or was gone before.
    Leaves,
}

impl Peer {
    /// What it will answer to being told `next`; its fault is spent if anything is said to it.
    pub(super) fn answer(&mut self, next: &BTreeSet<u64>) -> Answer {
        let State::Holds(held) = &self.state else {
            unreachable!("{} is told nothing", self.name);
        };
        if held == next {
            return Answer::Takes;
        }
        match self.fault.take() {
            None | Some(Fault::AnswerLate(_)) => {
                self.state = State::Holds(next.clone());
                Answer::Takes
            }
            Some(Fault::Refuse) => Answer::Refuses,
            Some(Fault::NeverAnswer) => {
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
