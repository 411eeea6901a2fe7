//! Which cases of the matrix are played unless others are asked for.

use std::cmp::Ordering;
use std::collections::HashSet;

use super::matrix_case::{About, Case, DAEMONS, Fault, Kind, Operation, Planned, sessions};
use super::matrix_restart::messages;

/// What makes a case worth its time.
#[derive(PartialEq, Eq, Hash)]
enum Essence {
    /// Each fault at each message of each listener, however many there are.
    Place(Operation, usize, Planned),
    /// And for each kind and attendance, wherever it is.
    Kind(Operation, bool, Kind, usize, Fault),
    /// Each fault at each message about the log; of each kind and of each listener, but for those
    /// that are waited for.
    Log(Operation, usize, Fault),
    LogKind(Operation, Kind, usize, Fault),
    LogPlace(Operation, usize, usize, Fault),
    /// Processes and virtual machines take longer, and wrong answers are alike in much: each fault
    /// at each message of each kind.
    Few(Operation, Kind, About, usize, Fault),
    /// Of two faults, the second at each message after or beside each of the first, at the same
    /// listener, one before it and one after it.
    Pair(Operation, usize, usize, Fault, Ordering),
    /// The second at each message about the log, and at each of these listeners.
    LogPair(Operation, usize, Fault),
    LogOrder(Operation, Fault, Ordering),
    /// Each fault at each kind of message by which a session goes on, and for each kind of
    /// session, but for those that are waited for, or happen to a process.
    Restart(Option<Operation>, &'static str, Fault),
    RestartKind(Operation, Kind, Fault),
    /// The second at each kind of message, and after the first at each.
    RestartAfter(usize),
    RestartAgain(&'static str, Fault),
}

impl Essence {
    fn of(case: &Case) -> Vec<Self> {
        let operation = match case.operation {
            Operation::Reconnect(_) => Operation::Reconnect(0),
            Operation::Steps(_) => Operation::Steps(0),
            operation => operation,
        };
        let kind = |planned: &Planned| alike(case.kinds[planned.listener]);
        match &case.faults[..] {
            [one] if one.about == About::Session => {
                let name = name_of(case, one);
                match one.fault.is_silence() || case.is_process(one.listener) {
                    true => vec![Self::Restart(None, name, one.fault)],
                    false => vec![
                        Self::Restart(Some(operation), name, one.fault),
                        Self::RestartKind(operation, case.kinds[one.listener], one.fault),
                    ],
                }
            }
            [one] if is_played_rarely(case, one) => {
                let (about, message) = (one.about, one.message);
                vec![Self::Few(operation, kind(one), about, message, one.fault)]
            }
            [one] if one.about == About::Log => match one.fault {
                Fault::Silent | Fault::SilentAfter => {
                    vec![Self::Log(operation, one.message, one.fault)]
                }
                _ => vec![
                    Self::LogKind(operation, kind(one), one.message, one.fault),
                    Self::LogPlace(operation, one.listener, one.message, one.fault),
                ],
            },
            [one] => vec![
                Self::Place(operation, case.kinds.len(), *one),
                Self::Kind(operation, case.required, kind(one), one.message, one.fault),
            ],
            [one, two] => {
                let order = two.listener.cmp(&one.listener);
                let (first, second) = (one.message, two.message);
                match two.about {
                    About::Table => vec![Self::Pair(operation, first, second, two.fault, order)],
                    About::Session if two.fault.is_silence() => Vec::new(),
                    About::Session => vec![
                        Self::RestartAfter(first),
                        Self::RestartAgain(name_of(case, two), two.fault),
                    ],
                    About::Log => vec![
                        Self::LogPair(operation, second, two.fault),
                        Self::LogOrder(operation, two.fault, order),
                    ],
                }
            }
            _ => unreachable!("there are one or two"),
        }
    }
}

/// In a change, sessions are what shares are: some of them stand for all.
fn alike(kind: Kind) -> Kind {
    let mut all = sessions();
    match kind.goes_on() {
        Some(_) => all.next().unwrap_or(DAEMONS[0]),
        None => kind,
    }
}

/// Which message a fault is at.
fn name_of(case: &Case, planned: &Planned) -> &'static str {
    let at = planned.message.checked_sub(1);
    at.map_or("connect", |at| messages(case)[at].name)
}

fn is_played_rarely(case: &Case, one: &Planned) -> bool {
    let is_answer = matches!(one.fault, Fault::Other | Fault::Twice | Fault::CutOff);
    is_answer || case.is_process(one.listener) || case.kinds.contains(&Kind::Kvm)
}

/// The cases that have something that none before has.
pub(super) fn essential(cases: Vec<Case>) -> Vec<Case> {
    let mut known = HashSet::new();
    let count = cases.len();
    // In an order in which neighbours differ in everything.
    let mixed = (0..count).map(|at| &cases[(at * 7919) % count]);
    let is_new = |case: &&Case| {
        let essences = Essence::of(case).into_iter();
        essences.fold(false, |new, essence| known.insert(essence) | new)
    };
    mixed.filter(is_new).cloned().collect()
}
