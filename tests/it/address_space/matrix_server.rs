//! The daemon of a listener of the matrix, and how it is made to fail.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use guest_memory_shm::mock::{BlkDevice, Fault as MockFault, MockDaemon};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};

use super::matrix_case::{About, Case, Fault, Kind, Planned};
use super::matrix_member::PATIENCE;
use super::matrix_process::{DaemonProcess, builder};
use super::matrix_relay::{Hook, Moment, Relay};

/// How late an answer is that is late.
const LATE: Duration = Duration::from_millis(15);

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

    /// Connects to it; by a relay if the case does something to it.
    pub(super) fn connect(&self, case: &Case, at: usize) -> Connection {
        let (stream, process) = match self {
            Self::Mock(daemon) => (daemon.connect().unwrap(), None),
            Self::Process(daemon) => {
                let daemon = daemon.lock().unwrap();
                (daemon.connect(), Some(daemon.pid()))
            }
        };
        let before_all = |f: Planned| f.message == 0 && f.fault == Fault::HangUpBefore;
        let is_relayed = process.is_some() || case.faults_of(at).any(before_all);
        let (relay, stream) = match is_relayed {
            true => {
                let (relay, stream) = Relay::start(stream, process);
                (Some(relay), stream)
            }
            false => (None, stream),
        };
        let mut frontend = Frontend::from_stream(stream, 1);
        let wanted = Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS | Features::LOG_SHMFD;
        let device = BlkDevice::negotiate(&mut frontend, wanted).unwrap();
        Connection {
            frontend,
            features: device.protocol_features(),
            relay,
        }
    }

    /// Ends the connection.
    pub(super) fn hang_up(daemon: &MockDaemon) {
        daemon.hang_up();
        daemon.wait_disconnected(PATIENCE).unwrap();
    }

    /// Arms the daemon, and tells what the relay has to do to it.
    pub(super) fn arm(&self, case: &Case, at: usize) -> Vec<Hook> {
        let mut hooks = Vec::new();
        for planned in case.faults_of(at) {
            let message = planned.message;
            match self {
                Self::Mock(daemon) => match planned.fault {
                    Fault::Gone | Fault::Broken => Self::hang_up(daemon),
                    Fault::OutOfSlots => {}
                    Fault::HangUpBefore if message == 0 => {
                        let daemon = Arc::clone(daemon);
                        hooks.push(Hook {
                            message,
                            moment: Moment::Before,
                            act: Box::new(move || Self::hang_up(&daemon)),
                        });
                    }
                    fault => {
                        let fault = mock_fault(fault);
                        match planned.about {
                            About::Table => daemon.inject(message as u64, fault),
                            About::Log => daemon.inject_at_log(message as u64, fault),
                        }
                    }
                },
                Self::Process(daemon) => {
                    let daemon = Arc::clone(daemon);
                    let fault = planned.fault;
                    let moment = match fault {
                        Fault::KilledAfter => Moment::After,
                        _ => Moment::Before,
                    };
                    let act = Box::new(move || act_on(daemon.lock().unwrap(), fault));
                    hooks.push(Hook {
                        message,
                        moment,
                        act,
                    });
                }
            }
        }
        hooks
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
