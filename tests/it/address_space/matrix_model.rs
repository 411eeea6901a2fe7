//! What should come of a case, by a model without sockets, files or threads.

use super::matrix_case::{About, BOOT, Case, Fault, Kind, Operation, Planned, Region};
use super::matrix_restart::{Come, come};

/// Why a listener did not do what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    Refused,
    HungUp,
    Silent,
    /// It says what is no answer.
    Protocol,
    /// The share broke earlier.
    Broken,
    Gone,
    TooManyRegions,
    /// Nobody listens.
    NoDaemon,
    /// What the hypervisor says: an error of the kernel, or its own.
    Emfile,
    Enomem,
    NoSlot,
    Dead,
}

/// How a listener fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) away: bool,
    pub(super) cause: Cause,
    /// Where it failed, if it was at a region.
    pub(super) region: Option<Region>,
}

/// What the caller of the operation is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Objection {
    pub(super) listener: usize,
    pub(super) failure: Failure,
}

/// What comes of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) objection: Option<Objection>,
    /// What it was told when it tried before.
    pub(super) earlier: Vec<Objection>,
    /// The guest has to reset the device of the listener that is connected to.
    pub(super) needs_reset: bool,
    /// Who does not hold what it should.
    pub(super) stale: Vec<bool>,
    /// Who must be connected to anew.
    pub(super) broken: Vec<bool>,
    /// Which of the case's faults fired.
    pub(super) fired: Vec<Planned>,
    /// How often each listener was told something, if that is determined.
    pub(super) messages: Vec<Option<usize>>,
}

struct Peer {
    at: usize,
    kind: Kind,
    held: Vec<Region>,
    /// What is told is not of use any more.
    broken: bool,
    stale: bool,
    /// It hung up after it was told the last, or answered twice, which shows at the next message.
    next: Option<Cause>,
    asked: bool,
    /// There is a log, up to here; absent if it is not to log.
    log: Option<u64>,
    /// It took the log up to there, on this connection.
    taken: u64,
    logs: usize,
    messages: usize,
    /// It may have heard of more, or less.
    unclear: bool,
    faults: Vec<Planned>,
    fired: Vec<Planned>,
}

type Answer = Result<(), Failure>;

#[derive(Clone, Copy)]
enum Step {
    Remove(Region),
    Add(Region),
    Set,
}

impl Step {
    fn region(self) -> Option<Region> {
        match self {
            Self::Remove(region) | Self::Add(region) => Some(region),
            Self::Set => None,
        }
    }
}

impl Peer {
    fn new(case: &Case, at: usize) -> Self {
        let absent = case.subject() == Some(at);
        Self {
            at,
            kind: case.kinds[at],
            held: if absent { Vec::new() } else { case.before() },
            broken: false,
            stale: false,
            // A listener that was told something is asked first.
            asked: !absent,
            next: None,
            log: (case.logs && case.kinds[at].is_daemon()).then_some(match case.operation {
                Operation::Attach if absent => 0,
                operation if absent && operation.is_reconnection() => end_of(&BOOT),
                _ => end_of(&case.before()),
            }),
            taken: if absent { 0 } else { end_of(&case.before()) },
            logs: 0,
            messages: 0,
            unclear: false,
            faults: case.faults_of(at).collect(),
            fired: Vec::new(),
        }
    }

    /// The fault at a message that is sent now, if there is one.
    fn fault_at(&mut self, message: usize, happens: impl Fn(Fault) -> bool) -> Option<Fault> {
        let found = self.faults.iter().position(|planned| {
            let earlier = planned.fault == Fault::Gone && message == 1;
            let is_here = planned.message == message || earlier;
            is_here && planned.about == About::Table && happens(planned.fault)
        })?;
        let planned = self.faults.remove(found);
        self.fired.push(planned);
        Some(planned.fault)
    }

    fn away(&mut self, cause: Cause, region: Option<Region>) -> Failure {
        self.broken = true;
        if !self.kind.is_daemon() {
            // One that is told of regions holds none from then on.
            self.held.clear();
        }
        Failure {
            away: true,
            cause,
            region,
        }
    }

    fn check(&mut self, slots: usize, target: &[Region]) -> Answer {
        if self.fault_at(0, |fault| fault == Fault::Broken).is_some() {
            self.broken = true;
        }
        if !self.kind.is_daemon() {
            return self.check_slots(slots, target, Cause::NoSlot);
        }
        if self.broken {
            return Err(self.away(Cause::Broken, None));
        }
        if self.fault_at(1, |fault| fault == Fault::Gone).is_some() {
            return Err(self.away(Cause::Gone, None));
        }
        if !self.kind.has_slots() {
            return Ok(());
        }
        if self.held == target {
            return Ok(());
        }
        if !std::mem::replace(&mut self.asked, true) {
            let happens = |fault| fault != Fault::OutOfSlots;
            match self.fault_at(0, happens) {
                None | Some(Fault::Paused) => {}
                Some(Fault::Silent | Fault::Stopped) => return Err(self.away(Cause::Silent, None)),
                Some(_) => return Err(self.away(Cause::HungUp, None)),
            }
        }
        self.check_slots(slots, target, Cause::TooManyRegions)
    }

    fn check_slots(&mut self, slots: usize, target: &[Region], cause: Cause) -> Answer {
        let few = |fault| fault == Fault::OutOfSlots && target.len() > slots;
        match self.fault_at(0, few) {
            None => Ok(()),
            Some(_) => Err(Failure {
                away: false,
                cause,
                region: None,
            }),
        }
    }

    fn steps(&self, target: &[Region]) -> Vec<Step> {
        if self.kind.is_daemon() && !self.kind.has_slots() {
            return if self.held == target {
                Vec::new()
            } else {
                vec![Step::Set]
            };
        }
        let gone = self.held.iter().rev().filter(|r| !target.contains(r));
        let new = target.iter().filter(|r| !self.held.contains(r));
        let gone = gone.copied().map(Step::Remove);
        gone.chain(new.copied().map(Step::Add)).collect()
    }

    fn update(&mut self, target: &[Region]) -> Answer {
        if self.broken && self.kind.is_daemon() {
            return Err(self.away(Cause::Broken, None));
        }
        let steps = self.steps(target);
        let Some(first) = steps.first() else {
            return Ok(());
        };
        if self.broken {
            return Err(self.away(Cause::Dead, first.region()));
        }
        if let Some(log) = &mut self.log {
            *log = end_of(target).max(*log);
            if self.taken < end_of(target) {
                self.tell_log()?;
            }
        }
        let told = self.tell(target, &steps);
        // After a refusal it may hold more, or less, than before.
        if self.log.is_some() && !self.broken && !self.held.is_empty() {
            // It is asked once more, so that it shows if it is gone.
            told.and(self.tell_log().and_then(|()| self.still_there(None)))
        } else {
            told
        }
    }

    fn tell_log(&mut self) -> Answer {
        self.still_there(None)?;
        self.logs += 1;
        let logs = self.logs;
        let found = self
            .faults
            .iter()
            .position(|planned| planned.message == logs && planned.about == About::Log);
        let fault = found.map(|found| self.faults.remove(found));
        self.fired.extend(fault);
        match fault.map(|planned| planned.fault) {
            None | Some(Fault::Late) => {}
            Some(Fault::Silent | Fault::SilentAfter) => return Err(self.away(Cause::Silent, None)),
            Some(Fault::Nonsense | Fault::Other) => return Err(self.away(Cause::Protocol, None)),
            Some(Fault::Twice) => {
                self.next = Some(Cause::Protocol);
                self.unclear = true;
            }
            Some(Fault::DoneThenHangUp) => self.next = Some(Cause::HungUp),
            Some(_) => return Err(self.hung_up(None)),
        }
        self.taken = self.log.unwrap_or(0);
        Ok(())
    }

    /// It hangs up at what it is told: some refuse like that.
    fn hung_up(&mut self, region: Option<Region>) -> Failure {
        Failure {
            away: false,
            ..self.away(Cause::HungUp, region)
        }
    }

    fn still_there(&mut self, region: Option<Region>) -> Answer {
        match self.next.take() {
            Some(Cause::HungUp) => Err(self.hung_up(region)),
            Some(cause) => Err(self.away(cause, region)),
            None => Ok(()),
        }
    }

    /// Tells it the steps. Those of a wave are all under way before the first of them is answered;
    /// what is removed is a wave of its own where there are acknowledgements.
    fn tell(&mut self, target: &[Region], steps: &[Step]) -> Answer {
        let is_removal = |step: &Step| matches!(step, Step::Remove(_));
        let removals = match self.kind.acks() {
            true => steps.iter().take_while(|s| is_removal(s)).count(),
            false => 0,
        };
        let (removals, others) = steps.split_at(removals);
        let next = others.first().copied();
        self.tell_wave(target, removals, next)?;
        self.tell_wave(target, others, None)
    }

    /// A daemon that refuses and stays does the later steps all the same, which were sent.
    fn tell_wave(&mut self, target: &[Region], steps: &[Step], after: Option<Step>) -> Answer {
        let mut refusal = None;
        let acks = self.kind.acks();
        for (at, step) in steps.iter().copied().enumerate() {
            self.still_there(step.region())?;
            self.messages += 1;
            let kind = self.kind;
            // Where nothing is mapped, nothing is needed.
            let possible = |fault| match fault {
                Fault::NoDescriptors | Fault::NoMemory => !matches!(step, Step::Remove(_)),
                // A slot in the way is in the way of what comes.
                Fault::Refuse if kind == Kind::Kvm => matches!(step, Step::Add(_)),
                Fault::Twice => acks,
                _ => true,
            };
            if let Some(fault) = self.fault_at(self.messages, possible) {
                let next = match (fault, steps.get(at + 1)) {
                    // The second answer passes for the next one, until one does not fit.
                    (Fault::Twice, _) => after.or(steps.last().copied()),
                    (_, Some(next)) => Some(*next),
                    (_, None) => after,
                };
                let next = next.unwrap_or(step);
                let Err(failure) = self.meet(fault, step, next) else {
                    self.apply(step, target);
                    continue;
                };
                if self.broken {
                    self.heard_of(fault, steps.len() - at - 1);
                    return Err(refusal.unwrap_or(failure));
                }
                if !kind.is_daemon() {
                    return Err(failure);
                }
                refusal = refusal.or(Some(failure));
                continue;
            }
            self.apply(step, target);
        }
        refusal.map_or(Ok(()), Err)
    }

    fn heard(&self) -> Option<usize> {
        (!self.unclear).then_some(self.messages)
    }

    fn apply(&mut self, step: Step, target: &[Region]) {
        match step {
            Step::Remove(region) => self.held.retain(|held| *held != region),
            Step::Add(region) => {
                self.held.push(region);
                self.held.sort_unstable();
            }
            Step::Set => self.held = target.to_vec(),
        }
    }

    /// It was sent so many messages more than the one at which it broke.
    fn heard_of(&mut self, fault: Fault, more: usize) {
        match fault {
            // It reads on.
            Fault::Silent | Fault::SilentAfter => self.messages += more,
            // It may read on, until it is hung up on.
            Fault::Nonsense | Fault::Other | Fault::Twice => self.unclear = true,
            _ => {}
        }
    }

    fn meet(&mut self, fault: Fault, step: Step, next: Step) -> Answer {
        let refused = |cause| {
            Err(Failure {
                away: false,
                cause,
                region: step.region(),
            })
        };
        let (slots, acks) = (self.kind.has_slots(), self.kind.acks());
        if !self.kind.is_daemon() {
            return match fault {
                Fault::Dies => Err(self.away(Cause::Dead, step.region())),
                Fault::NoDescriptors => refused(Cause::Emfile),
                Fault::NoMemory => refused(Cause::Enomem),
                _ => refused(Cause::NoSlot),
            };
        }
        Err(match fault {
            Fault::Late | Fault::Paused => return Ok(()),
            Fault::Refuse if acks && slots => return refused(Cause::Refused),
            // What it holds is not known, or it hangs up: but it has refused.
            Fault::Refuse | Fault::NoMemory if acks => Failure {
                away: false,
                ..self.away(Cause::Refused, step.region())
            },
            Fault::Silent | Fault::SilentAfter | Fault::Stopped => {
                self.away(Cause::Silent, step.region())
            }
            Fault::Nonsense | Fault::Other => self.away(Cause::Protocol, step.region()),
            Fault::Twice => self.away(Cause::Protocol, next.region()),
            // It was believed until the next word.
            Fault::DoneThenHangUp | Fault::KilledAfter if acks => self.hung_up(next.region()),
            _ => self.hung_up(step.region()),
        })
    }
}

/// Where the last of the regions ends.
fn end_of(regions: &[Region]) -> u64 {
    regions.last().map_or(0, |(start, size)| start + size)
}

/// Plays a case.
pub(super) fn play(case: &Case) -> Outcome {
    let mut peers: Vec<_> = (0..case.kinds.len())
        .map(|at| Peer::new(case, at))
        .collect();
    let (mut earlier, mut needs_reset) = (Vec::new(), false);
    let objection = match case.subject() {
        Some(subject) if case.is_restart() => {
            let peer = &mut peers[subject];
            for planned in case.attempts() {
                let Some((objection, in_rings)) = restart(case, peer, planned) else {
                    break;
                };
                needs_reset |= in_rings && !peer.kind.keeps_requests();
                earlier.push(objection);
            }
            earlier.pop().flatten()
        }
        Some(subject) => bring_up(case, &mut peers[subject]),
        None => transact(case, &mut peers),
    };
    Outcome {
        objection,
        earlier: earlier.into_iter().flatten().collect(),
        needs_reset,
        stale: peers.iter().map(|peer| peer.stale).collect(),
        broken: peers.iter().map(|peer| peer.broken).collect(),
        messages: peers.iter().map(Peer::heard).collect(),
        fired: peers.into_iter().flat_map(|peer| peer.fired).collect(),
    }
}

/// An attempt of a session to go on. What it says, and whether it came to the rings; none if the
/// fault cannot happen, or it went on before.
fn restart(
    case: &Case,
    peer: &mut Peer,
    planned: Option<Planned>,
) -> Option<(Option<Objection>, bool)> {
    if !peer.fired.is_empty() && !peer.broken {
        return None;
    }
    let come = come(case, planned)?;
    peer.fired.extend(planned);
    peer.held = case.after();
    let failed = match come {
        Come::Done => None,
        Come::Failed { cause, region, .. } => Some(peer.away(cause, region)),
    };
    peer.broken = failed.is_some();
    peer.stale = peer.broken;
    let objection = failed.map(|failure| Objection {
        listener: peer.at,
        failure,
    });
    let in_rings = matches!(come, Come::Done | Come::Failed { in_rings: true, .. });
    Some((objection, in_rings))
}

fn bring_up(case: &Case, peer: &mut Peer) -> Option<Objection> {
    let target = case.after();
    let mut told = false;
    let answer = peer.check(case.slots(), &target).and_then(|()| {
        told = true;
        peer.update(&target)
    });
    let failure = answer.err()?;
    // A connection on which the daemon does not get what it has to, is given up.
    peer.broken |= case.operation != Operation::Attach;
    peer.stale = match case.operation {
        // Taken back, if anything was told.
        Operation::Attach => told && peer.update(&[]).is_err(),
        _ => true,
    };
    Some(Objection {
        listener: peer.at,
        failure,
    })
}

fn transact(case: &Case, peers: &mut [Peer]) -> Option<Objection> {
    let (before, after) = (case.before(), case.after());
    let tolerate = |peer: &mut Peer, failure: Failure| {
        peer.stale |= failure.away;
        let listener = peer.at;
        (!failure.away || case.required).then_some(Objection { listener, failure })
    };

    let mut present = Vec::new();
    for (at, peer) in peers.iter_mut().enumerate() {
        match peer.check(case.slots(), &after) {
            Ok(()) => present.push(at),
            Err(failure) => {
                if let Some(objection) = tolerate(peer, failure) {
                    return Some(objection);
                }
            }
        }
    }

    // Daemons that are neighbours among those who are there are told side by side.
    let is_daemon = |at: usize| case.kinds[at].is_daemon();
    let groups = present.chunk_by(|left, right| is_daemon(*left) && is_daemon(*right));
    let mut told = Vec::new();
    let mut objection = None;
    for group in groups {
        told.push(group);
        for at in group {
            match peers[*at].update(&after) {
                Ok(()) => peers[*at].stale = false,
                Err(failure) => objection = objection.or(tolerate(&mut peers[*at], failure)),
            }
        }
        if objection.is_some() {
            break;
        }
    }
    if objection.is_some() {
        for at in told.iter().rev().copied().flatten() {
            let peer = &mut peers[*at];
            peer.stale = peer.update(&before).is_err();
        }
    }
    objection
}
