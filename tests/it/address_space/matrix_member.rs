//! A listener of the matrix, and its daemon.

use std::time::Duration;

use guest_memory_shm::mock::LoggedRequest;
use guest_memory_shm::{
    AddressSpace, AddressSpaceError, FileIdentity, GuestMemoryShm, KvmSlot, KvmSlots, ListenerId,
    MemoryTable, RegionAdapter, TableRegion, VhostUserSession, VhostUserShare,
};
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::GuestAddress;

use super::matrix_case::{About, Case, Fault, Kind, Planned};
use super::matrix_hypervisor::Hypervisor;
use super::matrix_kvm::Machine;
use super::matrix_log::Writes;
use super::matrix_relay::Relay;
use super::matrix_server::{Connection, Server};
use super::matrix_session::{Side, Told};

use crate::support::attach_as;

/// For what comes at once unless something is wrong.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// A listener, as long as it is not attached.
#[allow(
    clippy::large_enum_variant,
    reason = "there is one per listener of a case"
)]
pub(super) enum Loose {
    Share(VhostUserShare),
    Session(VhostUserSession),
    Hypervisor(RegionAdapter<Hypervisor>),
    Kvm(KvmSlots),
}

/// The address space's names for listeners.
pub(super) enum Id {
    Share(ListenerId<VhostUserShare>),
    Session(ListenerId<VhostUserSession>),
    Hypervisor(ListenerId<RegionAdapter<Hypervisor>>),
    Kvm(ListenerId<KvmSlots>),
}

pub(super) struct Member {
    pub(super) at: usize,
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) server: Option<Server>,
    /// The VMM's, as long as the connection is of use.
    pub(super) frontend: Option<Frontend>,
    pub(super) relay: Option<Relay>,
    pub(super) machine: Option<Machine>,
    pub(super) side: Option<Side>,
    pub(super) loose: Option<Loose>,
    pub(super) id: Option<Id>,
    pub(super) writes: Writes,
}

/// A deadline that is short enough for a test of silence, and long enough for all that comes
/// before it: it is one for a whole change, or for all of its undoing, and of a session for all
/// that it is told.
pub(super) fn limit_for(case: &Case, at: usize) -> Option<Duration> {
    let planned = case.faults_of(at).find(|f| f.fault.is_silence())?;
    let is_first = match case.operation.is_transaction() {
        _ if case.kinds[at].goes_on().is_some() => false,
        true => planned.message == 1 && !case.logs,
        false => planned.message == 0,
    };
    let millis = match is_first && planned.about == About::Table {
        true => 60,
        false => 1000,
    };
    Some(Duration::from_millis(millis))
}

impl Member {
    /// A listener that is not attached yet; `test` is what a process of its own is started with.
    pub(super) fn new(space: &AddressSpace, case: &Case, at: usize, test: &str) -> Self {
        let kind = case.kinds[at];
        let mut this = Self {
            at,
            name: format!("{kind} {at}"),
            kind,
            server: None,
            frontend: None,
            relay: None,
            machine: None,
            side: None,
            loose: None,
            id: None,
            writes: Writes::default(),
        };
        this.loose = Some(match kind {
            Kind::Hypervisor => Loose::Hypervisor(RegionAdapter::new(Hypervisor::new(usize::MAX))),
            Kind::Kvm => {
                let few = case.faults_of(at).any(|f| f.fault == Fault::OutOfSlots);
                let machine = this.machine.insert(Machine::new());
                Loose::Kvm(machine.slots(few.then(|| case.slots())))
            }
            Kind::Session { .. } => {
                this.server = Some(Server::first(case, at, test));
                this.side = Some(Side::new(space, at));
                Loose::Session(this.begin_session(case))
            }
            Kind::Daemon { .. } => {
                this.server = Some(Server::first(case, at, test));
                let features = this.connect(case);
                let share = VhostUserShare::new(this.frontend.as_ref().unwrap(), features);
                let mut share = share.unwrap().with_deadline(PATIENCE);
                if case.logs {
                    share.start_log().unwrap();
                }
                Loose::Share(share)
            }
        });
        this
    }

    /// Makes a connection to the daemon; the one before it has ended.
    pub(super) fn connect(&mut self, case: &Case) -> Features {
        self.hang_up();
        let server = self.server.as_ref().expect("it is a daemon");
        let connection = server.connect(case, self.at);
        let Connection {
            frontend,
            features,
            relay,
        } = connection;
        (self.frontend, self.relay) = (Some(frontend), relay);
        features
    }

    /// Ends the connection, unless the share has it, too.
    pub(super) fn hang_up(&mut self) {
        self.frontend = None;
        self.relay = None;
    }

    /// Attaches it; at a failure it is kept, and the reason is looked at. Says whether it is
    /// attached.
    pub(super) fn attach(
        &mut self,
        space: &AddressSpace,
        required: bool,
        look: impl FnOnce(&AddressSpaceError),
    ) -> bool {
        let name = self.name.clone();
        match self.loose.take().expect("it is not attached") {
            Loose::Share(share) => match attach_as(space, name, required, share) {
                Ok(id) => self.id = Some(Id::Share(id)),
                Err(refused) => {
                    look(refused.error());
                    self.loose = Some(Loose::Share(refused.into_listener()));
                }
            },
            Loose::Session(session) => match attach_as(space, name, required, session) {
                Ok(id) => self.id = Some(Id::Session(id)),
                Err(refused) => {
                    look(refused.error());
                    self.loose = Some(Loose::Session(refused.into_listener()));
                }
            },
            Loose::Kvm(slots) => match attach_as(space, name, required, slots) {
                Ok(id) => self.id = Some(Id::Kvm(id)),
                Err(refused) => {
                    look(refused.error());
                    self.loose = Some(Loose::Kvm(refused.into_listener()));
                }
            },
            Loose::Hypervisor(hypervisor) => match attach_as(space, name, required, hypervisor) {
                Ok(id) => self.id = Some(Id::Hypervisor(id)),
                Err(refused) => {
                    look(refused.error());
                    self.loose = Some(Loose::Hypervisor(refused.into_listener()));
                }
            },
        }
        self.start_ring(space);
        self.id.is_some()
    }

    /// Has what the daemon writes looked at from now on. Its descriptors of messages are closed.
    pub(super) fn begin_to_write(&mut self, space: &AddressSpace) {
        if let Some(frontend) = &self.frontend {
            frontend.get_features().unwrap();
        }
        if self.side.is_some() {
            assert!(self.ask(space));
        }
        if let Some(server) = &self.server {
            self.writes.add(server);
        }
    }

    /// Has the daemons write that there are or were; one in another process if it `lives`.
    pub(super) fn write(&mut self, case: &Case, lives: bool) {
        if case.logs {
            let server = self.server.as_ref().filter(|_| lives);
            self.writes.write(case.operation, server);
        }
    }

    /// Uses what keeps the daemon's memory, wherever it is.
    pub(super) fn with_daemon<T>(
        &mut self,
        space: &AddressSpace,
        work: impl FnOnce(Told<'_>) -> T,
    ) -> Option<T> {
        match (&mut self.loose, &self.id) {
            (Some(Loose::Share(share)), _) => Some(work(Told::Share(share))),
            (Some(Loose::Session(session)), _) => Some(work(Told::Session(session))),
            (_, Some(Id::Share(id))) => {
                let work = |share: &mut VhostUserShare| work(Told::Share(share));
                Some(space.with_listener(id, work).unwrap())
            }
            (_, Some(Id::Session(id))) => {
                let work = |session: &mut VhostUserSession| work(Told::Session(session));
                Some(space.with_listener(id, work).unwrap())
            }
            _ => None,
        }
    }

    /// Sets the deadline of a share; that of a session stays.
    pub(super) fn set_deadline(&mut self, space: &AddressSpace, limit: Duration) {
        self.with_daemon(space, |told| {
            if let Told::Share(share) = told {
                share.set_deadline(limit);
            }
        });
    }

    /// Uses the hypervisor, wherever it is.
    pub(super) fn with_hypervisor<T>(
        &mut self,
        space: &AddressSpace,
        work: impl FnOnce(&mut Hypervisor) -> T,
    ) -> Option<T> {
        match (&mut self.loose, &self.id) {
            (Some(Loose::Hypervisor(hypervisor)), _) => Some(work(hypervisor.get_mut())),
            (_, Some(Id::Hypervisor(id))) => {
                let work = |hypervisor: &mut RegionAdapter<_>| work(hypervisor.get_mut());
                Some(space.with_listener(id, work).unwrap())
            }
            _ => None,
        }
    }

    /// Repairs the hypervisor, if it is one.
    pub(super) fn heal_hypervisor(&mut self, space: &AddressSpace) {
        self.with_hypervisor(space, Hypervisor::heal);
    }

    /// Has the faults of the case happen from now on.
    pub(super) fn arm(&mut self, space: &AddressSpace, case: &Case) {
        let at = self.at;
        if let Some(Server::Mock(daemon)) = &self.server {
            daemon.clear_requests();
        }
        self.with_hypervisor(space, |hypervisor| {
            let faults: Vec<_> = case.faults_of(at).collect();
            if faults.iter().any(|f| f.fault == Fault::OutOfSlots) {
                hypervisor.slots = case.slots();
            }
            hypervisor.arm(faults);
        });
        if let Some(machine) = &mut self.machine {
            machine.arm(case, at);
        }
        let Some(server) = &self.server else { return };
        let faults: Vec<_> = case.faults_of(at).collect();
        let hooks = server.arm(case, &faults);
        if let Some(relay) = &self.relay {
            relay.arm(hooks);
        }
        let hung_up = |f: &Planned| matches!(f.fault, Fault::Gone | Fault::Broken);
        if let Some(relay) = &self.relay
            && faults.iter().any(hung_up)
        {
            relay.wait_cut();
        }
        if let Some(limit) = limit_for(case, at) {
            self.set_deadline(space, limit);
        }
        if faults.iter().any(|f| f.fault == Fault::Broken) {
            self.with_daemon(space, |told| {
                if let Told::Share(share) = told {
                    share
                        .update_table(&unlike_any().memory_table())
                        .unwrap_err();
                }
            });
            assert!(self.side.is_none() || !self.ask(space));
            let is_broken = self.with_daemon(space, |told| told.broken().is_some());
            assert_eq!(is_broken, Some(true));
        }
    }

    /// Goes on with a daemon that does nothing wrong, also if it is not attached.
    pub(super) fn reconnect_whole(&mut self, space: &AddressSpace, case: &Case) {
        let features = self.connect(case);
        self.writes
            .add(self.server.as_ref().expect("it is a daemon"));
        let frontend = self.frontend.as_ref().expect("it is connected");
        match (&mut self.loose, &self.id) {
            (Some(Loose::Share(share)), _) => share.reconnect(frontend, features).unwrap(),
            (_, Some(Id::Share(id))) => space.reconnect(id, frontend, features).unwrap(),
            _ => unreachable!("it is a daemon"),
        }
    }

    /// A connection to the daemon of the case, for one who was away, with its faults to come.
    pub(super) fn connect_armed(
        &mut self,
        space: &AddressSpace,
        case: &Case,
        test: &str,
    ) -> Features {
        let (server, another) = Server::of(case, self.at, test);
        if another {
            self.server = Some(server);
        }
        let features = self.connect(case);
        let server = self.server.as_ref().expect("it is a daemon");
        self.writes.add(server);
        let faults: Vec<_> = case.faults_of(self.at).collect();
        let hooks = server.arm(case, &faults);
        if let Some(relay) = &self.relay {
            relay.arm(hooks);
        }
        if let Some(limit) = limit_for(case, self.at) {
            self.set_deadline(space, limit);
        }
        features
    }

    /// How many of the faults have not happened.
    pub(super) fn pending(&mut self, space: &AddressSpace) -> usize {
        let mock = match &self.server {
            Some(Server::Mock(daemon)) => daemon.pending_faults(),
            _ => 0,
        };
        let relay = self.relay.as_ref().map(Relay::pending);
        let hypervisor = self.with_hypervisor(space, |hypervisor| hypervisor.pending());
        mock + relay.or(hypervisor).unwrap_or(0)
    }

    /// The messages about the table that the daemon was sent, if it can say.
    pub(super) fn messages(&self) -> Option<usize> {
        let Some(Server::Mock(daemon)) = &self.server else {
            return None;
        };
        let is_change = |request: &LoggedRequest| {
            matches!(
                request,
                LoggedRequest::SetMemTable(_)
                    | LoggedRequest::AddMemRegion(_)
                    | LoggedRequest::RemoveMemRegion(_)
            )
        };
        let requests = daemon.requests();
        Some(requests.iter().filter(|r| is_change(r)).count())
    }

    /// Asserts that it holds, by its own account and in truth, what is in `table`.
    pub(super) fn holds(&mut self, space: &AddressSpace, table: &MemoryTable) {
        let expected: Vec<_> = table.regions().iter().map(facts).collect();
        let name = self.name.clone();
        self.with_hypervisor(space, |hypervisor| {
            assert_eq!(hypervisor.table(), expected, "what {name} maps");
        });
        self.with_daemon(space, |told| {
            assert!(told.broken().is_none(), "the share of {name}");
            assert_eq!(told.table(), table, "the share of {name}");
        });
        if let Some(machine) = &mut self.machine {
            let mib =
                |(start, size, ..): &(u64, u64, u64, FileIdentity)| (start >> 20, size >> 20);
            let regions: Vec<_> = expected.iter().map(mib).collect();
            let held = |slots: &mut KvmSlots| {
                let ranges = slots.slots().map(KvmSlot::range);
                let mib = ranges.map(|range| (range.start_addr().0 >> 20, range.size() >> 20));
                mib.collect::<Vec<_>>()
            };
            if let Some(Id::Kvm(id)) = &self.id {
                assert_eq!(space.with_listener(id, held).unwrap(), regions);
            }
            machine.holds(&regions);
        }
        if let Some(Server::Mock(daemon)) = &self.server {
            let held: Vec<_> = daemon
                .table()
                .iter()
                .map(|r| (r.guest_addr.0, r.size, r.mmap_offset, r.identity))
                .collect();
            assert_eq!(held, expected, "what {name} maps");
        }
    }
}

fn facts(region: &TableRegion) -> (u64, u64, u64, FileIdentity) {
    let range = region.range();
    (
        range.start_addr().0,
        range.size(),
        region.mmap_offset(),
        region.backing().identity(),
    )
}

/// A memory that no listener holds.
fn unlike_any() -> GuestMemoryShm {
    GuestMemoryShm::from_ranges(&[(GuestAddress(1 << 40), 1 << 20)]).unwrap()
}
