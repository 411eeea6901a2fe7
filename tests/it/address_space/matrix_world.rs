//! Plays a case with real listeners, and looks at everything afterwards.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use guest_memory_shm::{
    AddressSpace, AddressSpaceError, DaemonFailure, GuestMemoryShm, GuestRange, GuestRegionShm,
    KvmError, ListenerError, ListenerStatus, RamOptions, SessionError, ShareError, TableError,
};
use nix::errno::Errno;
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::matrix_case::{BOOT, Case, Fault, Operation, Planned, Region};
use super::matrix_hypervisor::Refusal;
use super::matrix_member::{Id, Loose, Member, PATIENCE};
use super::matrix_model::{Cause, Failure, Objection, Outcome};
use super::matrix_relay::Relay;
use super::matrix_server::Server;

use crate::support::ToldAll;

const MIB: u64 = 1 << 20;

pub(super) struct World<'a> {
    pub(super) case: &'a Case,
    pub(super) expected: &'a Outcome,
    pub(super) space: AddressSpace,
    pub(super) members: Vec<Member>,
}

/// What a failed operation says, beside the error's kind.
struct Said<'a> {
    listener: &'a str,
    failed: &'a ListenerError,
    stale: &'a [ListenerStatus],
    source: &'a (dyn std::error::Error + 'static),
}

/// Plays the case; `test` is what a process of its own is started with.
pub(super) fn play(case: &Case, expected: &Outcome, test: &str) {
    let mut world = World::start(case, expected, test);
    let before = world.published();
    let added: Vec<_> = case.operation.changes().1.iter().map(new_region).collect();
    let after = with(&before, case.operation.changes().0, &added);
    world.write();
    world.freeze();
    let counts = held_here();

    match case.operation {
        Operation::Attach => world.attach(),
        _ if case.is_restart() => world.restart(test),
        Operation::Reconnect(subject) => world.reconnect(subject, test),
        _ => world.transact(&added),
    }
    world.write_again();
    world.harvest();
    let happened = expected.objection.is_none();
    if !happened && case.operation.is_transaction() && !expected.stale.contains(&true) {
        assert!(
            comes_to(counts),
            "{counts:?} before, {:?} after",
            held_here()
        );
    }
    world.members.iter_mut().for_each(Member::submit);
    world.look(if happened { &after } else { &before });
    world.heal();
    world.write();
    if !happened && case.operation.is_transaction() {
        world.commit(&added).expect("nothing is in the way");
    }
    world.all_hold(&after);

    let more = new_region(&(96, 2));
    world.space.insert(Arc::clone(&more)).told_all();
    world.all_hold(&with(&after, &[], &[Arc::clone(&more)]));
    let removed = world.space.remove((GuestAddress(96 * MIB), 2 * MIB));
    assert!(removed.expect("nothing is in the way").removed()[0].is(&more));
    world.all_hold(&after);
    world.write();
    world.stop();
}

impl<'a> World<'a> {
    /// All listeners as they are before the operation, with the faults to come.
    fn start(case: &'a Case, expected: &'a Outcome, test: &str) -> Self {
        let boot: Vec<_> = BOOT.iter().map(new_region).collect();
        let memory = GuestMemoryShm::from_arc_regions(boot).unwrap();
        let space = AddressSpace::new(memory);
        let members = (0..case.kinds.len()).map(|at| Member::new(&space, case, at, test));
        let mut this = Self {
            case,
            expected,
            members: members.collect(),
            space,
        };
        for at in 0..this.members.len() {
            if case.operation != Operation::Attach || case.subject() != Some(at) {
                let attached = this.members[at].attach(&this.space, case.required, |error| {
                    panic!("{error}: nothing is in the way")
                });
                assert!(attached);
            }
        }
        for member in &mut this.members {
            member.begin_to_write(&this.space);
        }
        match case.subject() {
            Some(subject) if case.operation.is_reconnection() => this.lose(subject),
            _ => {
                for member in &mut this.members {
                    member.arm(&this.space, case);
                }
            }
        }
        this
    }

    fn published(&self) -> GuestMemoryShm {
        GuestMemoryShm::clone(&self.space.published().memory())
    }

    fn commit(
        &self,
        added: &[Arc<GuestRegionShm>],
    ) -> Result<Vec<ListenerStatus>, AddressSpaceError> {
        let mut transaction = self.space.transaction();
        for (start, size) in self.case.operation.changes().0 {
            transaction = transaction.remove((GuestAddress(start * MIB), size * MIB));
        }
        for region in added {
            transaction = transaction.insert(Arc::clone(region));
        }
        let report = transaction.commit()?;
        assert_eq!(
            report.removed().len(),
            self.case.operation.changes().0.len()
        );
        Ok(report.stale().to_vec())
    }

    fn transact(&mut self, added: &[Arc<GuestRegionShm>]) {
        match self.commit(added) {
            Ok(lagging) => {
                assert_eq!(self.expected.objection, None, "it happened");
                self.names_stale(&lagging);
            }
            Err(error) => self.check_error(&error, self.expected.objection),
        }
        self.settle();
        for (at, member) in self.members.iter().enumerate() {
            // No daemon heard of anything else. One that hung up earlier heard of less.
            let gone = |f: &Planned| matches!(f.fault, Fault::Gone | Fault::Broken);
            if let (Some(told), Some(expected)) = (member.messages(), self.expected.messages[at])
                && !self.case.faults_of(at).any(|f| gone(&f))
            {
                assert_eq!(told, expected, "told to {}", member.name);
            }
        }
    }

    fn attach(&mut self) {
        let mut last = self.members.pop().expect("there is a listener");
        let attached = last.attach(&self.space, self.case.required, |error| {
            self.check_error(error, self.expected.objection);
        });
        assert_eq!(attached, self.expected.objection.is_none());
        self.members.push(last);
    }

    /// Has a daemon go away, and the memory grow meanwhile if it may lag.
    fn lose(&mut self, subject: usize) {
        let member = &mut self.members[subject];
        let Some(Server::Mock(daemon)) = &member.server else {
            unreachable!("it is another daemon that plays the faults");
        };
        Server::hang_up(daemon);
        if member.side.is_some() {
            member.relay.iter().for_each(Relay::wait_cut);
            member.submit_unheard();
        }
        match self.space.insert(new_region(&(40, 2))) {
            Ok(report) => {
                assert!(!self.case.required);
                assert_eq!(report.stale()[0].name(), member.name);
            }
            Err(error) => {
                assert!(self.case.required, "{error}");
                assert!(error.to_string().contains(&member.name), "{error}");
            }
        }
    }

    fn reconnect(&mut self, subject: usize, test: &str) {
        let member = &mut self.members[subject];
        let features = member.connect_armed(&self.space, self.case, test);
        let (Some(Id::Share(id)), Some(frontend)) = (&member.id, &member.frontend) else {
            unreachable!("it is an attached daemon");
        };
        match self.space.reconnect(id, frontend, features) {
            Ok(()) => assert_eq!(self.expected.objection, None, "it happened"),
            Err(error) => self.check_error(&error, self.expected.objection),
        }
    }

    /// Has a session go on, until it does or no fault is left.
    fn restart(&mut self, test: &str) {
        let subject = self.case.subject().expect("one goes on");
        let earlier = self.expected.earlier.iter().copied().map(Some);
        let expected = earlier.chain([self.expected.objection]);
        for (planned, expected) in self.case.attempts().into_iter().zip(expected) {
            let member = &mut self.members[subject];
            member.listen_armed(self.case, planned, test);
            let member = &self.members[subject];
            let meanwhile = || self.change_meanwhile(subject);
            match member.go_on(&self.space, self.case.operation, meanwhile) {
                Ok(()) => {
                    assert_eq!(expected, None, "it happened");
                    member.was_told_all(self.case);
                    if member.kind.keeps_requests() {
                        // The guest does not kick once more.
                        self.members[subject].completes();
                    }
                }
                Err(error) => self.check_error(&error, expected),
            }
        }
        let needs_reset = self.members[subject].needs_reset(&self.space);
        assert_eq!(needs_reset, self.expected.needs_reset);
    }

    /// Another thread of the VMM changes the memory, as far as one who is away lets it.
    fn change_meanwhile(&self, away: usize) {
        let name = &self.members[away].name;
        match self.space.insert(new_region(&(96, 2))) {
            Ok(report) => {
                assert!(!self.case.required);
                assert_eq!(report.stale()[0].name(), name);
                let removed = self.space.remove((GuestAddress(96 * MIB), 2 * MIB));
                assert_eq!(removed.expect("it may lag").stale().len(), 1);
            }
            Err(error) => assert!(self.case.required, "{error}"),
        }
    }

    /// Asserts that the error names the listener, the region, the cause and who is stale.
    fn check_error(&self, error: &AddressSpaceError, expected: Option<Objection>) {
        let (listener, failed, stale) = match error {
            AddressSpaceError::Change {
                listener,
                error,
                stale,
                ..
            } => (listener, error, stale.as_slice()),
            AddressSpaceError::Attach {
                listener,
                error,
                stale,
                ..
            } => {
                let expected = self.expected.stale.last().copied();
                assert_eq!(stale.is_some(), expected.unwrap_or(false), "{error}");
                (listener, error, [].as_slice())
            }
            AddressSpaceError::Refresh {
                listener, error, ..
            } => (listener, error, [].as_slice()),
            other => panic!("{other:?}"),
        };
        let said = Said {
            listener,
            failed,
            stale,
            source: StdError::source(error).expect("it has a cause"),
        };
        let Some(Objection { listener, failure }) = expected else {
            panic!("it should have happened: {error}");
        };
        self.check_said(&said, &self.members.get(listener), failure);
        let text = error.to_string();
        assert!(text.contains(&format!("{:?}", said.listener)), "{text}");
        assert!(
            failed.reason().starts_with(&said.source.to_string()),
            "{failed:?}"
        );
        if let Some(range) = failed.range() {
            assert!(text.contains(&range.to_string()), "{text}");
        }
        for stale in said.stale {
            let named = match stale.name() == said.listener {
                true => format!("{:?} is stale", stale.name()),
                false => stale.to_string(),
            };
            assert!(text.contains(&named), "{text}");
        }
    }

    fn check_said(&self, said: &Said<'_>, member: &Option<&Member>, failure: Failure) {
        let source = said.source;
        assert_eq!(said.failed.is_away(), failure.away, "{source}");
        match member {
            Some(member) => assert_eq!(said.listener, member.name),
            // The one that is being attached.
            None => assert!(said.listener.ends_with(&self.members.len().to_string())),
        }
        let (removed, added) = self.case.operation.changes();
        let subject = added.first().or(removed.first()).copied();
        assert_eq!(
            said.failed.range(),
            failure.region.or(subject).map(range),
            "{source}"
        );
        assert_eq!(cause_of(source), failure.cause, "{source}");
        if self.case.operation.is_transaction() {
            self.names_stale(said.stale);
        }
    }

    /// Asserts that these are the stale ones.
    fn names_stale(&self, stale: &[ListenerStatus]) {
        let named: Vec<_> = stale.iter().map(ListenerStatus::name).collect();
        let members = self.members.iter().zip(&self.expected.stale);
        let expected: Vec<_> = members
            .filter(|(_, stale)| **stale)
            .map(|(member, _)| member.name.as_str())
            .collect();
        assert_eq!(named, expected);
        assert!(
            stale
                .iter()
                .all(|stale| !stale.stale().unwrap().reason().is_empty())
        );
    }

    /// Hangs up on daemons whose shares broke, and waits until they have read all that they were
    /// sent before: on a busy machine a deadline can be over before a daemon has met its fault.
    fn settle(&mut self) {
        for (member, broken) in self.members.iter_mut().zip(&self.expected.broken) {
            if !broken {
                continue;
            }
            member.frontend = None;
            if let Some(Server::Mock(daemon)) = &member.server {
                daemon.wait_disconnected(PATIENCE).unwrap();
            }
        }
    }

    /// Checks all participants after the operation: `memory` is what should be published.
    fn look(&mut self, memory: &GuestMemoryShm) {
        self.settle();
        let table = memory.memory_table();
        assert_eq!(self.published().memory_table(), table, "what readers see");
        for status in self.space.listeners().unwrap() {
            let at = self.members.iter().position(|m| m.name == status.name());
            let stale = self.expected.stale[at.expect("it is known")];
            assert_eq!(status.stale().is_some(), stale, "{status:?}");
        }
        for member in &mut self.members {
            if member.id.is_some() && !self.expected.stale[member.at] {
                member.holds(&self.space, &table);
            }
            assert_eq!(member.pending(&self.space), 0, "faults of {}", member.name);
        }
    }

    /// Repairs what is broken, without a fault to come.
    fn heal(&mut self) {
        for at in 0..self.members.len() {
            let broken = self.expected.broken[at];
            let member = &mut self.members[at];
            member.heal_hypervisor(&self.space);
            member.set_deadline(&self.space, PATIENCE);
            let ran = member.rings_run();
            let is_broken = member.with_daemon(&self.space, |told| told.broken().is_some());
            assert!(is_broken.is_none_or(|is| is == broken), "{}", member.name);
            let few = self
                .case
                .faults_of(at)
                .any(|f| f.fault == Fault::OutOfSlots);
            if let Some(machine) = &mut member.machine {
                machine.heal();
                if few {
                    if let Some(Id::Kvm(id)) = member.id.take() {
                        drop(self.space.detach(id).expect("it is attached"));
                    }
                    // Its slots are free again before others are taken.
                    member.loose = None;
                    member.loose = Some(Loose::Kvm(machine.slots(None)));
                }
            }
            if member.kind.is_daemon() && (broken || few) {
                // Another program may be there by now.
                if few || matches!(member.server, Some(Server::Process(_))) {
                    member.server = Some(Server::mock(member.kind));
                }
                match member.side.is_some() {
                    true => member.go_on_whole(&self.space, self.case.operation),
                    false => member.reconnect_whole(&self.space, self.case),
                }
            }
            if member.loose.is_some() {
                member.attach(&self.space, self.case.required, |error| {
                    panic!("{error}: nothing is in the way")
                });
            }
            // Who is stale but there is told at the next change; after these there is none.
            if self.expected.objection.is_none() || !self.case.operation.is_transaction() {
                let refreshed = match member.id.as_ref().expect("it is attached") {
                    Id::Share(id) => self.space.refresh(id),
                    Id::Session(id) => self.space.refresh(id),
                    Id::Hypervisor(id) => self.space.refresh(id),
                    Id::Kvm(id) => self.space.refresh(id),
                };
                refreshed.expect("nothing is in the way");
            }
            let is_subject = self.case.is_restart() && self.case.subject() == Some(at);
            let went_on = broken || few || is_subject;
            let needs_reset = went_on && ran && !member.kind.keeps_requests();
            assert_eq!(member.needs_reset(&self.space), needs_reset);
            member.start_ring(&self.space);
        }
    }

    /// Asserts that `memory` is published, and that all hold it.
    fn all_hold(&mut self, memory: &GuestMemoryShm) {
        let table = memory.memory_table();
        assert_eq!(self.published().memory_table(), table, "what readers see");
        for status in self.space.listeners().unwrap() {
            assert!(status.stale().is_none(), "{status}");
        }
        for member in &mut self.members {
            member.holds(&self.space, &table);
            member.serves();
        }
    }
}

/// How many descriptors and mappings of shared memory this process has, those of the daemons in it
/// included.
fn held_here() -> (usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = crate::proc::maps();
    let shared = maps.iter().filter(|map| map.path.starts_with("/memfd:"));
    (descriptors, shared.count())
}

/// Whether there are as many as that, once the daemons have closed what they were sent.
fn comes_to(counts: (usize, usize)) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while held_here() != counts && Instant::now() < deadline {
        std::thread::yield_now();
    }
    held_here() == counts
}

fn new_region((start, size): &Region) -> Arc<GuestRegionShm> {
    let region = GuestRegionShm::new((GuestAddress(start * MIB), size * MIB), &RamOptions::new());
    Arc::new(region.unwrap())
}

fn range((start, size): Region) -> GuestRange {
    GuestRange::new(GuestAddress(start * MIB), size * MIB).unwrap()
}

fn with(
    memory: &GuestMemoryShm,
    removed: &[Region],
    added: &[Arc<GuestRegionShm>],
) -> GuestMemoryShm {
    let mut regions = memory.arc_regions();
    let gone: Vec<_> = removed.iter().copied().map(range).collect();
    regions.retain(|region| !gone.contains(&region.range()));
    regions.extend(added.iter().cloned());
    regions.sort_by_key(|region| region.range());
    GuestMemoryShm::from_arc_regions(regions).unwrap()
}

fn cause_of(source: &(dyn std::error::Error + 'static)) -> Cause {
    if let Some(error) = source.downcast_ref::<ShareError>() {
        return match (error, error.failure()) {
            (_, Some(DaemonFailure::Refused(_))) => Cause::Refused,
            (_, Some(DaemonFailure::HungUp(_))) => Cause::HungUp,
            (_, Some(DaemonFailure::Silent(_))) => Cause::Silent,
            (_, Some(DaemonFailure::Protocol(_))) => Cause::Protocol,
            (ShareError::Broken { .. }, _) => Cause::Broken,
            (ShareError::Gone, _) => Cause::Gone,
            (ShareError::Table(TableError::TooManyRegions { .. }), _) => Cause::TooManyRegions,
            other => panic!("{other:?}"),
        };
    }
    match source.downcast_ref::<SessionError>() {
        Some(SessionError::Share(error)) => return cause_of(error),
        Some(SessionError::Connect { .. }) => return Cause::NoDaemon,
        Some(other) => panic!("{other:?}"),
        None => {}
    }
    if let Some(error) = source.downcast_ref::<KvmError>() {
        return match error {
            KvmError::OutOfSlots { .. } | KvmError::Refused { .. } => Cause::NoSlot,
            other => panic!("{other:?}"),
        };
    }
    if let Some(error) = source.downcast_ref::<io::Error>() {
        return match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMFILE) => Cause::Emfile,
            Some(Errno::ENOMEM) => Cause::Enomem,
            other => panic!("{other:?}"),
        };
    }
    match source.downcast_ref::<Refusal>() {
        Some(Refusal::NoSlot) => Cause::NoSlot,
        Some(Refusal::Dead) => Cause::Dead,
        None => panic!("{source:?}"),
    }
}
