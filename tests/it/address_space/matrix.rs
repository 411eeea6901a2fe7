//! The fault matrix: every operation, with one to four listeners, fails at each listener and at
//! each message in every way there is, alone and while a first fault is being undone.
//!
//! After each case every listener that is not stale holds what is published, in truth and by its
//! own account; the stale ones are named; the error names the listener, the region and the cause;
//! what is published is the memory from before or the new one; the next operations succeed; and
//! when all is dropped, no descriptor and no mapping is left.
//!
//! Cases are generated. Played are those that differ in what matters (`matrix_sample`). With
//! `MATRIX=text` all are played whose description contains the text, such as one that a failure
//! printed; without text, really all.
//!
//! In three of four cases the daemons log, and there is a fault at each message about a log, too.
//! They write and note it before the operation, after it, and after everything is repaired, those
//! that were hung up on too: what they wrote is always a part of what was harvested.
//!
//! Daemons are shares, or sessions with a ring that runs: it completes requests before and after
//! all is repaired. A session goes on with a new daemon in one call or step by step, and there is
//! a fault at each message by which it does, once or at two attempts.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::matrix_case::{
    About, Case, DAEMONS, Fault, GoesOn, Kind, OPERATIONS, Operation, Planned, sessions,
};
use super::matrix_kvm::has_kvm;
use super::matrix_model::play as model;
use super::matrix_process::was_daemon;
use super::matrix_sample::essential;
use super::matrix_world::play;
use crate::isolation::in_own_process;
use crate::proc::leaves_nothing_but_heaps;

/// More messages about the table, or about the log, than any listener gets in a case.
const MESSAGES: usize = 8;

/// More messages than there are by which a session goes on.
const ALL_MESSAGES: usize = 40;

/// What a daemon in this process does wrong.
const MOCK: [Fault; 10] = [
    Fault::Refuse,
    Fault::Late,
    Fault::Silent,
    Fault::HangUpBefore,
    Fault::HangUpAfter,
    Fault::DoneThenHangUp,
    Fault::Nonsense,
    Fault::Gone,
    Fault::Broken,
    Fault::OutOfSlots,
];

/// What a daemon does wrong when it is sent a log: an answer to it cannot refuse.
const LOG: [Fault; 7] = [
    Fault::Late,
    Fault::Silent,
    Fault::SilentAfter,
    Fault::HangUpBefore,
    Fault::HangUpAfter,
    Fault::DoneThenHangUp,
    Fault::Nonsense,
];

/// What a daemon does wrong at the answer to a table or a log.
const ANSWERS: [Fault; 3] = [Fault::Other, Fault::Twice, Fault::CutOff];

/// What a daemon does wrong at any message by which a session goes on.
const ANY: [Fault; 11] = [
    Fault::Refuse,
    Fault::Late,
    Fault::Silent,
    Fault::SilentAfter,
    Fault::Nonsense,
    Fault::Twice,
    Fault::CutOff,
    Fault::HangUpBefore,
    Fault::HangUpAfter,
    Fault::DoneThenHangUp,
    Fault::OutOfSlots,
];

/// The same, with a daemon in another process.
const ANY_PROCESS: [Fault; 5] = [
    Fault::KilledBefore,
    Fault::KilledDuring,
    Fault::KilledAfter,
    Fault::Stopped,
    Fault::Paused,
];

/// What goes wrong with a daemon in another process.
const PROCESS: [Fault; 7] = [
    Fault::KilledBefore,
    Fault::KilledDuring,
    Fault::KilledAfter,
    Fault::Stopped,
    Fault::Paused,
    Fault::NoDescriptors,
    Fault::NoMemory,
];

const HYPERVISOR: [Fault; 5] = [
    Fault::Refuse,
    Fault::Dies,
    Fault::NoDescriptors,
    Fault::NoMemory,
    Fault::OutOfSlots,
];

/// What may be found wrong when a listener is asked, before it is told anything.
fn happens_at_0(fault: Fault, operation: Operation) -> bool {
    match fault {
        Fault::Gone | Fault::OutOfSlots => true,
        Fault::Broken => operation.is_transaction(),
        Fault::HangUpBefore
        | Fault::KilledBefore
        | Fault::KilledDuring
        | Fault::Stopped
        | Fault::Paused => true,
        _ => false,
    }
}

fn happens_only_at_0(fault: Fault) -> bool {
    matches!(fault, Fault::Gone | Fault::OutOfSlots | Fault::Broken)
}

/// The faults that can happen to a listener, and when.
fn plans(operation: Operation, faults: &[Fault]) -> Vec<(About, usize, Fault)> {
    let all = (0..=MESSAGES).flat_map(|message| faults.iter().map(move |fault| (message, *fault)));
    let possible = all.filter(|(message, fault)| match message {
        0 => happens_at_0(*fault, operation),
        _ => !happens_only_at_0(*fault),
    });
    possible
        .map(|(message, fault)| (About::Table, message, fault))
        .collect()
}

/// The faults that can happen to a daemon that logs, and when.
fn log_plans(faults: &[Fault]) -> Vec<(About, usize, Fault)> {
    let all = (1..=MESSAGES).flat_map(|message| faults.iter().map(move |fault| (message, *fault)));
    all.map(|(message, fault)| (About::Log, message, fault))
        .collect()
}

/// `count` listeners; the one at `at` is of this kind, the others are alike or all different.
fn kinds(count: usize, at: usize, kind: Kind, alike: bool) -> Vec<Kind> {
    let mut all = vec![Kind::Hypervisor];
    all.extend(DAEMONS);
    // Beside those with shares, one of the sessions.
    let session = sessions().cycle().nth(5 * at + count);
    all.splice(2..2, session);
    let kind_of = |place| match place == at {
        true => kind,
        false if alike => DAEMONS[0],
        false => all[(place + at) % all.len()],
    };
    (0..count).map(kind_of).collect()
}

/// The operation for each listener at which it can fail.
fn subjects(operation: Operation, count: usize) -> Vec<(Operation, usize)> {
    match operation {
        Operation::Attach => vec![(operation, count - 1)],
        Operation::Reconnect(_) => (0..count)
            .map(|at| (Operation::Reconnect(at), at))
            .collect(),
        Operation::Steps(_) => (0..count).map(|at| (Operation::Steps(at), at)).collect(),
        _ => (0..count).map(|at| (operation, at)).collect(),
    }
}

fn happens(case: &Case) -> bool {
    model(case).fired.len() == case.faults.len()
}

/// Each fault at each message of each of `count` listeners.
fn single(operation: Operation, count: usize, kind: Kind, faults: &[Fault]) -> Vec<Case> {
    planned(operation, count, kind, &plans(operation, faults))
}

/// Each of these faults at each of `count` listeners.
fn planned(
    operation: Operation,
    count: usize,
    kind: Kind,
    plans: &[(About, usize, Fault)],
) -> Vec<Case> {
    let mut cases = Vec::new();
    for (operation, listener) in subjects(operation, count) {
        let is_share = kind.is_daemon() && kind.goes_on().is_none();
        if !is_share && operation.is_reconnection() {
            continue;
        }
        for (at, (about, message, fault)) in plans.iter().copied().enumerate() {
            for required in [false, true] {
                let alike = (at + listener).is_multiple_of(2) == required;
                cases.push(Case {
                    operation,
                    kinds: kinds(count, listener, kind, alike),
                    required,
                    logs: about == About::Log || !(at + listener + count).is_multiple_of(4),
                    faults: vec![Planned {
                        listener,
                        message,
                        about,
                        fault,
                    }],
                });
            }
        }
    }
    cases.retain(happens);
    cases
}

fn singles(operation: Operation) -> Vec<Case> {
    let mut cases = Vec::new();
    for count in 1..=4 {
        for kind in DAEMONS.into_iter().chain(sessions()) {
            cases.extend(single(operation, count, kind, &MOCK));
            cases.extend(single(operation, count, kind, &ANSWERS));
            cases.extend(planned(operation, count, kind, &log_plans(&LOG)));
            cases.extend(planned(operation, count, kind, &log_plans(&ANSWERS)));
        }
        cases.extend(single(operation, count, Kind::Hypervisor, &HYPERVISOR));
    }
    cases
}

/// A second fault wherever one is possible.
fn doubles(operation: Operation, count: usize, seconds: &[Fault]) -> Vec<Case> {
    let mut cases = Vec::new();
    let session = sessions().nth(count).into_iter();
    for kind in session.chain([DAEMONS[0], DAEMONS[1], Kind::Hypervisor]) {
        for first in single(operation, count, kind, &[Fault::Refuse]) {
            let mut plans = plans(operation, seconds);
            if first.logs {
                plans.extend(log_plans(&LOG));
            }
            for (listener, (about, message, fault)) in
                (0..count).flat_map(|listener| plans.iter().map(move |plan| (listener, *plan)))
            {
                let second = Planned {
                    listener,
                    message,
                    about,
                    fault,
                };
                let taken =
                    |f: &Planned| (f.listener, f.about, f.message) == (listener, about, message);
                let hypervisor = first.kinds[listener] == Kind::Hypervisor;
                let possible = match hypervisor {
                    true => about == About::Table && HYPERVISOR.contains(&fault),
                    false => true,
                };
                if possible && !first.faults.iter().any(taken) {
                    let mut case = first.clone();
                    case.faults.push(second);
                    cases.push(case);
                }
            }
        }
    }
    cases.retain(happens);
    cases
}

/// A session goes on, and this happens to it at the attempts; `mix` varies all else.
fn restart(operation: Operation, kind: Kind, mix: usize, faults: &[(usize, Fault)]) -> Case {
    let (count, listener) = match mix % 3 {
        0 => (1, 0),
        place => (2, place - 1),
    };
    let operation = match operation {
        Operation::Steps(_) => Operation::Steps(listener),
        _ => Operation::Reconnect(listener),
    };
    let planned = |(message, fault): &(usize, Fault)| Planned {
        listener,
        message: *message,
        about: About::Session,
        fault: *fault,
    };
    Case {
        operation,
        kinds: kinds(count, listener, kind, mix.is_multiple_of(5)),
        required: mix.is_multiple_of(2),
        logs: !(mix / 2).is_multiple_of(4),
        faults: faults.iter().map(planned).collect(),
    }
}

/// Each fault at each message by which a session of each kind goes on.
fn restarts(operation: Operation, faults: &[Fault]) -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in sessions() {
        for message in 0..=ALL_MESSAGES {
            for fault in faults {
                let mix = cases.len();
                cases.extend(
                    (mix..mix + 12).map(|mix| restart(operation, kind, mix, &[(message, *fault)])),
                );
            }
        }
    }
    cases.retain(happens);
    cases
}

/// Each fault at each message, after an attempt that failed at each message.
fn restarts_again(operation: Operation) -> Vec<Case> {
    let mut cases = Vec::new();
    for first in 0..=ALL_MESSAGES {
        for second in 0..=ALL_MESSAGES {
            for fault in ANY.into_iter().filter(|fault| *fault != Fault::OutOfSlots) {
                let mix = cases.len();
                let kind = sessions().nth(mix % sessions().count()).expect("a session");
                let faults = [(first, Fault::HangUpBefore), (second, fault)];
                cases.push(restart(operation, kind, mix, &faults));
            }
        }
    }
    cases.retain(happens);
    cases
}

/// The cases that are worth it, of which there are at least `floor`, or those that are wished for.
fn chosen(mut cases: Vec<Case>, floor: usize) -> Vec<Case> {
    let total = cases.len();
    assert!(!total.is_multiple_of(7919), "the order would not reach all");
    match std::env::var("MATRIX") {
        Ok(text) => cases.retain(|case| case.to_string().contains(&text)),
        Err(_) => {
            cases = essential(cases);
            assert!(cases.len() >= floor, "{} cases", cases.len());
        }
    }
    eprintln!("{} cases of {total}", cases.len());
    cases
}

/// How many cases are played at the same time where deadlines have to pass.
const TOGETHER: usize = 8;

/// Plays cases, in a process of its own; `test` is what daemons' processes are started with.
fn play_all(cases: &[Case], test: &str) {
    // What is made once in a process stays.
    if let Some(first) = cases.first() {
        play_one(first, test);
    }
    let is_waited_for = |case: &&Case| case.faults.iter().any(|f| f.fault.is_silence());
    let (waited_for, others): (Vec<_>, Vec<_>) = cases.iter().partition(is_waited_for);
    for case in others {
        leaves_nothing_but_heaps(|| play_one(case, test));
    }
    leaves_nothing_but_heaps(|| play_together(&waited_for, test));
}

/// Where a daemon is silent, its listener is stale in the end: so nothing is counted in the
/// process meanwhile.
fn play_together(cases: &[&Case], test: &str) {
    let next = AtomicUsize::new(0);
    let play_next = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            play_one(case, test);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..TOGETHER.min(cases.len()) {
            scope.spawn(play_next);
        }
    });
}

fn play_one(case: &Case, test: &str) {
    let expected = model(case);
    let failing = Failing(case);
    play(case, &expected, test);
    std::mem::forget(failing);
}

/// Names the case at which a test fails.
struct Failing<'a>(&'a Case);

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        eprintln!("failed: MATRIX='{}'\n{:#?}", self.0, model(self.0));
    }
}

/// KVM refuses, or a daemon does after it.
fn after_kvm() -> Vec<Case> {
    let mut cases = Vec::new();
    for operation in OPERATIONS {
        for count in 1..=4 {
            let faults = [Fault::Refuse, Fault::OutOfSlots];
            cases.extend(single(operation, count, Kind::Kvm, &faults));
            for mut case in single(operation, count, DAEMONS[0], &MOCK) {
                if case.faults[0].listener != 0 {
                    case.kinds[0] = Kind::Kvm;
                    cases.push(case);
                }
            }
        }
    }
    cases.retain(happens);
    cases
}

/// Faults of daemons in processes of their own.
fn processes() -> Vec<Case> {
    let mut cases = Vec::new();
    for operation in OPERATIONS {
        for kind in DAEMONS {
            cases.extend(single(operation, 1, kind, &PROCESS));
        }
        cases.extend(single(operation, 3, DAEMONS[0], &PROCESS));
        // How many descriptors a daemon with an in-flight buffer has is not known.
        for kind in sessions().filter(|kind| kind.goes_on() != Some(GoesOn::Noted)) {
            cases.extend(single(operation, 1, kind, &PROCESS));
        }
    }
    cases
}

#[test]
fn one_fault_while_one_region_is_plugged() {
    let cases = chosen(singles(Operation::Insert), 200);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_one_region_is_unplugged() {
    let cases = chosen(singles(Operation::Remove), 190);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_two_regions_are_plugged() {
    let cases = chosen(singles(Operation::InsertTwo), 360);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_two_regions_are_unplugged() {
    let cases = chosen(singles(Operation::RemoveTwo), 275);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_a_region_is_replaced() {
    let cases = chosen(singles(Operation::Replace), 450);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_a_listener_is_attached() {
    let cases = chosen(singles(Operation::Attach), 290);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_a_daemon_is_connected_to_anew() {
    let cases = chosen(singles(Operation::Reconnect(0)), 450);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_a_session_goes_on_in_one_call() {
    let cases = chosen(restarts(Operation::Reconnect(0), &ANY), 200);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_while_a_session_goes_on_step_by_step() {
    let cases = chosen(restarts(Operation::Steps(0), &ANY), 200);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn a_second_fault_while_a_session_goes_on_again() {
    let mut cases = restarts_again(Operation::Reconnect(0));
    cases.extend(restarts_again(Operation::Steps(0)));
    let cases = chosen(cases, 100);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn one_fault_of_kvm_or_after_it() {
    if has_kvm() {
        let cases = chosen(after_kvm(), 130);
        in_own_process(|| play_all(&cases, ""));
    }
}

#[test]
fn a_second_fault_beside_the_first_or_while_it_is_undone() {
    let mut cases = Vec::new();
    for operation in OPERATIONS {
        for count in 1..=3 {
            cases.extend(doubles(operation, count, &MOCK));
        }
    }
    let cases = chosen(cases, 900);
    in_own_process(|| play_all(&cases, ""));
}

#[test]
fn a_daemon_that_is_a_process_is_killed_stopped_or_starved() {
    let name = "address_space::matrix::a_daemon_that_is_a_process_is_killed_stopped_or_starved";
    if was_daemon() {
        return;
    }
    let cases = chosen(processes(), 310);
    in_own_process(|| play_all(&cases, name));
}

#[test]
fn a_session_goes_on_with_a_process_that_is_killed_or_stopped() {
    let name = "address_space::matrix::a_session_goes_on_with_a_process_that_is_killed_or_stopped";
    if was_daemon() {
        return;
    }
    let mut cases = restarts(Operation::Reconnect(0), &ANY_PROCESS);
    cases.extend(restarts(Operation::Steps(0), &ANY_PROCESS));
    let cases = chosen(cases, 60);
    in_own_process(|| play_all(&cases, name));
}
