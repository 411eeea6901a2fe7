//! The daemon of a listener of the matrix, and how it is made to fail.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use guest_memory_shm::mock::{Fault as MockFault, MockDaemon};
use nix::unistd::Pid;
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};

use super::matrix_case::{About, Case, Fault, Kind, Planned};
use super::matrix_member::PATIENCE;
use super::matrix_process::{DaemonProcess, builder};
use super::matrix_relay::{Deed, Door, Hook, LATE, Moment, Relay};
use super::matrix_restart::{Sent, messages};
use crate::frontend::agree;

/// What plays the daemon.
pub(super) enum Server {
    Mock(Arc<MockDaemon>),
    Process(Arc<Mutex<DaemonProcess>>),
}

/// A connection to a daemon, as the VMM has it.
pub(super) struct Connection {
    pub(super) frontend: Frontend,
    pub(super) features: Features,
    /// Where something is done to the daemon at a message.
    pub(super) relay: Option<Relay>,
}

impl Server {
    pub(super) fn mock(kind: Kind) -> Self {
        Self::Mock(Arc::new(builder(kind).start_unnamed().unwrap()))
    }

    /// The daemon that does what the case says, and whether another one cannot do that.
    pub(super) fn of(case: &Case, at: usize, test: &str) -> (Self, bool) {
        let kind = case.kinds[at];
        if case.is_process(at) {
            let process = DaemonProcess::start(test, kind);
            return (Self::Process(Arc::new(Mutex::new(process))), true);
        }
        if case.faults_of(at).any(|f| f.fault == Fault::OutOfSlots) {
            let daemon = builder(kind).with_max_mem_slots(case.slots() as u64);
            return (Self::Mock(Arc::new(daemon.start_unnamed().unwrap())), true);
        }
        (Self::mock(kind), false)
    }

    /// The daemon that is there first: what the case says of a reconnection happens to the next.
    pub(super) fn first(case: &Case, at: usize, test: &str) -> Self {
        match case.operation.is_reconnection() && case.subject() == Some(at) {
            true => Self::mock(case.kinds[at]),
            false => Self::of(case, at, test).0,
        }
    }

    /// A connection to it, and its process if that is another one.
    fn stream(&self) -> (UnixStream, Option<Pid>) {
        match self {
            Self::Mock(daemon) => (daemon.connect().unwrap(), None),
            Self::Process(daemon) => {
                let daemon = daemon.lock().unwrap();
                (daemon.connect(), Some(daemon.pid()))
            }
        }
    }

    /// Has it found by a session at this path, once.
    pub(super) fn listen(&self, path: PathBuf, door: Door) -> Relay {
        let (stream, process) = self.stream();
        Relay::listen(path, door, stream, process)
    }

    /// Connects to it; by a relay if the case does something to it.
    pub(super) fn connect(&self, case: &Case, at: usize) -> Connection {
        let (stream, process) = self.stream();
        let before_all = |f: Planned| f.message == 0 && f.fault == Fault::HangUpBefore;
        let is_relayed = process.is_some() || case.faults_of(at).any(before_all);
        let (relay, stream) = match is_relayed {
            true => {
                let (relay, stream) = Relay::start(stream, process);
                (Some(relay), stream)
            }
            false => (None, stream),
        };
        let wanted = Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS | Features::LOG_SHMFD;
        let (frontend, features) = agree(stream, wanted).unwrap();
        Connection {
            frontend,
            features,
            relay,
        }
    }

    /// Ends the connection.
    pub(super) fn hang_up(daemon: &MockDaemon) {
        daemon.hang_up();
        daemon.wait_disconnected(PATIENCE).unwrap();
    }

    /// Arms the daemon, and tells what the relay has to do to it.
    pub(super) fn arm(&self, case: &Case, faults: &[Planned]) -> Vec<Hook> {
        let hooks = faults
            .iter()
            .filter_map(|planned| self.arm_one(case, *planned));
        hooks.collect()
    }

    fn arm_one(&self, case: &Case, planned: Planned) -> Option<Hook> {
        let Planned {
            message,
            about,
            fault,
            ..
        } = planned;
        let hook = |moment, deed| {
            Some(Hook {
                message,
                about,
                moment,
                deed,
            })
        };
        match self {
            Self::Mock(daemon) => match fault {
                Fault::Gone | Fault::Broken => Self::hang_up(daemon),
                Fault::OutOfSlots => {}
                _ if about == About::Session => {
                    return match message {
                        // At the door.
                        0 => None,
                        _ => self.arm_any(case, planned),
                    };
                }
                Fault::HangUpBefore if message == 0 => {
                    let daemon = Arc::clone(daemon);
                    let act = Box::new(move || Self::hang_up(&daemon));
                    return hook(Moment::Before, Deed::Act(act));
                }
                fault => inject(daemon, about, message, fault),
            },
            Self::Process(daemon) => {
                let daemon = Arc::clone(daemon);
                let moment = match fault {
                    Fault::KilledAfter => Moment::After,
                    _ => Moment::Before,
                };
                let act = Box::new(move || act_on(daemon.lock().unwrap(), fault));
                return hook(moment, Deed::Act(act));
            }
        }
        None
    }

    /// At any message of a session that goes on: the mock plays what it counts, the relay the
    /// rest.
    fn arm_any(&self, case: &Case, planned: Planned) -> Option<Hook> {
        let all = &messages(case)[..planned.message];
        let about = all.last().and_then(Sent::about);
        if let (Some(about), Self::Mock(daemon)) = (about, self) {
            let count = all.iter().filter(|sent| sent.about() == Some(about));
            inject(daemon, about, count.count(), planned.fault);
            return None;
        }
        Some(Hook {
            message: planned.message,
            about: planned.about,
            moment: match planned.fault {
                Fault::Twice | Fault::DoneThenHangUp => Moment::After,
                _ => Moment::Before,
            },
            deed: Deed::Fault(planned.fault),
        })
    }
}

fn inject(daemon: &MockDaemon, about: About, message: usize, fault: Fault) {
    let fault = mock_fault(fault);
    match about {
        About::Log => daemon.inject_at_log(message as u64, fault),
        _ => daemon.inject(message as u64, fault),
    }
}

fn mock_fault(fault: Fault) -> MockFault {
    match fault {
        Fault::Refuse => MockFault::Refuse,
        Fault::Late => MockFault::AnswerLate(LATE),
        Fault::Silent => MockFault::NeverAnswer,
        Fault::SilentAfter => MockFault::NeverAnswerAfter,
        Fault::Nonsense => MockFault::AnswerNonsense,
        Fault::Other => MockFault::AnswerOther,
        Fault::Twice => MockFault::AnswerTwice,
        Fault::CutOff => MockFault::HangUpWithinAnswer,
        Fault::HangUpBefore => MockFault::HangUpBefore,
        Fault::HangUpAfter => MockFault::HangUpAfter,
        Fault::DoneThenHangUp => MockFault::AnswerThenHangUp,
        fault => unreachable!("{fault:?} is not the mock's"),
    }
}

fn act_on(mut daemon: MutexGuard<'_, DaemonProcess>, fault: Fault) {
    match fault {
        Fault::KilledBefore | Fault::KilledAfter => daemon.kill(),
        Fault::KilledDuring => daemon.kill_soon(),
        Fault::Stopped => daemon.stop(),
        Fault::Paused => daemon.pause(LATE),
        Fault::NoDescriptors => daemon.order("no descriptors"),
        Fault::NoMemory => daemon.order("no memory"),
        fault => unreachable!("{fault:?} is not a process's"),
    }
}
