//! What a session says on a new connection, and what should come of a fault at each message.

use super::matrix_case::{About, Case, Fault, GoesOn, Kind, Operation, Planned, Region};
use super::matrix_model::Cause;

/// How a message is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    None,
    Ack,
    Body,
}

/// What is under way together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Offer,
    Protocol,
    Agree,
    Slots,
    LogBefore,
    Table,
    LogAfter,
    Rings,
}

/// A message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) name: &'static str,
    step: Step,
    reply: Reply,
    region: Option<Region>,
}

/// What comes of an attempt.
#[derive(Clone, Copy, Debug)]
pub(super) enum Come {
    Done,
    Failed {
        cause: Cause,
        region: Option<Region>,
        /// It came so far that the rings were to be told.
        in_rings: bool,
    },
}

impl Sent {
    /// Whether the mock counts it, and as what.
    pub(super) fn about(&self) -> Option<About> {
        match self.name {
            "ADD_MEM_REG" | "SET_MEM_TABLE" => Some(About::Table),
            "SET_LOG_BASE" => Some(About::Log),
            _ => None,
        }
    }
}

/// All messages of an attempt of the subject in which nothing goes wrong.
pub(super) fn messages(case: &Case) -> Vec<Sent> {
    let kind = case.kinds[case.subject().expect("a session goes on")];
    let mut all = Vec::new();
    let mut say = |step, name, reply, region| {
        all.push(Sent {
            name,
            step,
            reply,
            region,
        });
    };
    let done = match kind.acks() {
        true => Reply::Ack,
        false => Reply::None,
    };
    say(Step::Offer, "SET_OWNER", Reply::None, None);
    say(Step::Offer, "GET_FEATURES", Reply::Body, None);
    say(Step::Protocol, "GET_PROTOCOL_FEATURES", Reply::Body, None);
    say(Step::Agree, "SET_PROTOCOL_FEATURES", Reply::None, None);
    say(Step::Agree, "SET_FEATURES", done, None);
    say(Step::Agree, "GET_QUEUE_NUM", Reply::Body, None);
    if kind.has_slots() {
        say(Step::Slots, "GET_MAX_MEM_SLOTS", Reply::Body, None);
    }
    if case.logs {
        say(Step::LogBefore, "SET_LOG_BASE", Reply::Body, None);
    }
    let regions = case.after();
    let changes: Vec<_> = match kind.has_slots() {
        true => regions.iter().copied().map(Some).collect(),
        false => vec![None],
    };
    for (at, region) in changes.iter().copied().enumerate() {
        let name = region.map_or("SET_MEM_TABLE", |_| "ADD_MEM_REG");
        say(Step::Table, name, done, region);
        if !kind.acks() || at + 1 == changes.len() {
            say(Step::Table, "GET_FEATURES", Reply::Body, region);
        }
    }
    if case.logs {
        say(Step::LogAfter, "SET_LOG_BASE", Reply::Body, None);
        say(Step::LogAfter, "GET_FEATURES", Reply::Body, None);
        say(Step::Rings, "SET_FEATURES", done, None);
    }
    for name in ring_messages(kind) {
        say(Step::Rings, name, done, None);
    }
    if kind.keeps_requests() && !kind.acks() {
        say(Step::Rings, "GET_FEATURES", Reply::Body, None);
    }
    say(Step::Rings, "GET_FEATURES", Reply::Body, None);
    all
}

fn ring_messages(kind: Kind) -> impl Iterator<Item = &'static str> {
    const RING: [&str; 6] = [
        "SET_VRING_NUM",
        "SET_VRING_BASE",
        "SET_VRING_ADDR",
        "SET_VRING_CALL",
        "SET_VRING_KICK",
        "SET_VRING_ENABLE",
    ];
    let noted = (kind.goes_on() == Some(GoesOn::Noted)).then_some("SET_INFLIGHT_FD");
    let all = noted.into_iter().chain(RING);
    all.filter(move |_| kind.keeps_requests())
}

/// What comes of an attempt with this fault; none if that cannot happen.
pub(super) fn come(case: &Case, planned: Option<Planned>) -> Option<Come> {
    let Some(planned) = planned else {
        return Some(Come::Done);
    };
    let all = messages(case);
    let failed = |cause, at: usize| {
        Some(Come::Failed {
            cause,
            region: all[at].region,
            in_rings: all[at].step == Step::Rings,
        })
    };
    if planned.about != About::Session {
        return None;
    }
    let Some(at) = planned.message.checked_sub(1) else {
        let has_slots = case.kinds[planned.listener].has_slots();
        return match planned.fault {
            Fault::Late => Some(Come::Done),
            Fault::HangUpBefore => failed(Cause::HungUp, 0),
            Fault::Silent if matches!(case.operation, Operation::Reconnect(_)) => {
                failed(Cause::NoDaemon, 0)
            }
            Fault::OutOfSlots if has_slots => failed(Cause::TooManyRegions, 0),
            _ => None,
        };
    };
    let sent = all.get(at)?;
    let next = all.get(at + 1);
    let is_answered = sent.reply != Reply::None;
    match planned.fault {
        Fault::Late | Fault::Paused => Some(Come::Done),
        Fault::Refuse if sent.reply == Reply::Ack => failed(Cause::Refused, at),
        // It hangs up.
        Fault::Refuse if sent.about().is_some() => failed(Cause::HungUp, at),
        Fault::SilentAfter if sent.about().is_none() => None,
        Fault::Silent | Fault::SilentAfter | Fault::Stopped => failed(Cause::Silent, at),
        Fault::Nonsense => failed(Cause::Protocol, at),
        // The second answer must not pass for that to the next message.
        Fault::Twice if is_answered => {
            let next = next?;
            let answered = all[at + 1..].iter().find(|sent| sent.reply != Reply::None);
            let fits = answered.is_some_and(|answered| answered.name == sent.name);
            match next.step != sent.step || !fits {
                true => failed(Cause::Protocol, at + 1),
                false => None,
            }
        }
        Fault::CutOff
        | Fault::HangUpBefore
        | Fault::HangUpAfter
        | Fault::KilledBefore
        | Fault::KilledDuring => failed(Cause::HungUp, at),
        // It shows at the next word, if there is one.
        Fault::DoneThenHangUp | Fault::KilledAfter => {
            next?;
            failed(Cause::HungUp, if is_answered { at + 1 } else { at })
        }
        _ => None,
    }
}
