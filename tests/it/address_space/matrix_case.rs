//! One case of the fault matrix: an operation, its listeners, and what goes wrong.

use std::fmt;

/// A region in the matrix: start and size in MiB.
pub(super) type Region = (u64, u64);

/// What is there when a case begins.
pub(super) const BOOT: [Region; 3] = [(0, 2), (16, 2), (32, 2)];

/// What is done to the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    Insert,
    Remove,
    InsertTwo,
    RemoveTwo,
    /// A removal and an insertion in the same place, and another insertion.
    Replace,
    /// Of the last listener.
    Attach,
    /// Of the listener at this place, which was away during a hotplug if it may lag.
    Reconnect(usize),
    /// The same step by step, of a session.
    Steps(usize),
}

/// How a listener is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// A vhost-user daemon with CONFIGURE_MEM_SLOTS, or without, and with REPLY_ACK, or without.
    Daemon { slots: bool, acks: bool },
    /// Such a daemon as a session has it, with a ring that runs.
    Session {
        slots: bool,
        acks: bool,
        goes_on: GoesOn,
    },
    /// One that is told of each region, maps it and keeps a descriptor of it.
    Hypervisor,
    /// KVM's memory slots.
    Kvm,
}

/// What becomes of the requests that a daemon had taken when it died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum GoesOn {
    /// The device completes them in order: it goes on at the used index.
    InOrder,
    /// They are noted in an in-flight buffer.
    Noted,
    /// Nobody knows.
    Not,
}

/// What goes wrong, at one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fault {
    /// Any listener says no, and goes on.
    Refuse,
    /// The answer comes late, but within the limit.
    Late,
    /// A daemon never answers, and does not do what it is told.
    Silent,
    /// It does, but never answers.
    SilentAfter,
    /// It does, and answers what is no answer.
    Nonsense,
    /// It does, and answers what it was not asked.
    Other,
    /// It does, and answers twice.
    Twice,
    /// It does, and hangs up within its answer.
    CutOff,
    HangUpBefore,
    HangUpAfter,
    /// It says "done", which it is not, and hangs up.
    DoneThenHangUp,
    /// It had hung up before the change began, and that was not noticed.
    Gone,
    /// It had hung up, and that was noticed: the share is broken.
    Broken,
    /// It has as many slots as there were regions: message 0.
    OutOfSlots,
    /// A daemon's process is killed before it gets the message.
    KilledBefore,
    /// It is stopped before it gets the message, and killed then.
    KilledDuring,
    /// It is killed when it may have answered.
    KilledAfter,
    /// A daemon's process is stopped.
    Stopped,
    /// It is stopped before it gets the message, and goes on within the limit.
    Paused,
    /// A real EMFILE: in a daemon's process, or where the hypervisor takes a descriptor.
    NoDescriptors,
    /// A real ENOMEM: in a daemon's process, or where the hypervisor maps.
    NoMemory,
    /// What is no daemon dies.
    Dies,
}

/// What a message tells a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum About {
    Table,
    Log,
    /// Anything, on the connection by which a session goes on; several faults are of as many
    /// attempts.
    Session,
}

/// A fault, at the listener and at the message that it fires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Planned {
    pub(super) listener: usize,
    /// Counted from 1 at the listener since the operation began. 0: when it is asked, or, of a
    /// session, when it connects.
    pub(super) message: usize,
    /// Which messages are counted: those about the table, those about the log, or all.
    pub(super) about: About,
    pub(super) fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) operation: Operation,
    pub(super) kinds: Vec<Kind>,
    /// No change may happen while one of them is away.
    pub(super) required: bool,
    /// The daemons log what they write.
    pub(super) logs: bool,
    pub(super) faults: Vec<Planned>,
}

pub(super) const DAEMONS: [Kind; 4] = [
    Kind::Daemon {
        slots: true,
        acks: true,
    },
    Kind::Daemon {
        slots: false,
        acks: true,
    },
    Kind::Daemon {
        slots: true,
        acks: false,
    },
    Kind::Daemon {
        slots: false,
        acks: false,
    },
];

/// All kinds of sessions.
pub(super) fn sessions() -> impl Iterator<Item = Kind> + Clone {
    let all = [GoesOn::InOrder, GoesOn::Noted, GoesOn::Not].into_iter();
    all.flat_map(|goes_on| {
        DAEMONS.map(|kind| Kind::Session {
            slots: kind.has_slots(),
            acks: kind.acks(),
            goes_on,
        })
    })
}

pub(super) const OPERATIONS: [Operation; 7] = [
    Operation::Insert,
    Operation::Remove,
    Operation::InsertTwo,
    Operation::RemoveTwo,
    Operation::Replace,
    Operation::Attach,
    Operation::Reconnect(0),
];

impl Kind {
    pub(super) fn is_daemon(self) -> bool {
        matches!(self, Self::Daemon { .. } | Self::Session { .. })
    }

    /// What goes on after its daemon died, of a session.
    pub(super) fn goes_on(self) -> Option<GoesOn> {
        match self {
            Self::Session { goes_on, .. } => Some(goes_on),
            _ => None,
        }
    }

    /// Whether a session can go on with its rings.
    pub(super) fn keeps_requests(self) -> bool {
        self.goes_on() != Some(GoesOn::Not)
    }

    pub(super) fn has_slots(self) -> bool {
        matches!(
            self,
            Self::Daemon { slots: true, .. } | Self::Session { slots: true, .. }
        )
    }

    pub(super) fn acks(self) -> bool {
        matches!(
            self,
            Self::Daemon { acks: true, .. } | Self::Session { acks: true, .. }
        )
    }
}

impl Fault {
    /// Whether a deadline has to pass.
    pub(super) fn is_silence(self) -> bool {
        matches!(self, Self::Silent | Self::SilentAfter | Self::Stopped)
    }
}

impl Operation {
    /// The regions that go, and those that come.
    pub(super) fn changes(self) -> (&'static [Region], &'static [Region]) {
        match self {
            Self::Insert => (&[], &[(8, 2)]),
            Self::Remove => (&[(16, 2)], &[]),
            Self::InsertTwo => (&[], &[(8, 2), (48, 2)]),
            Self::RemoveTwo => (&[(16, 2), (32, 2)], &[]),
            Self::Replace => (&[(16, 2)], &[(16, 4), (64, 2)]),
            Self::Attach | Self::Reconnect(_) | Self::Steps(_) => (&[], &[]),
        }
    }

    pub(super) fn is_transaction(self) -> bool {
        !matches!(self, Self::Attach) && !self.is_reconnection()
    }

    pub(super) fn is_reconnection(self) -> bool {
        matches!(self, Self::Reconnect(_) | Self::Steps(_))
    }
}

impl Case {
    /// The listener that is attached or connected to.
    pub(super) fn subject(&self) -> Option<usize> {
        match self.operation {
            Operation::Attach => Some(self.kinds.len() - 1),
            Operation::Reconnect(at) | Operation::Steps(at) => Some(at),
            _ => None,
        }
    }

    /// Whether a session goes on, by all that it was told.
    pub(super) fn is_restart(&self) -> bool {
        let kind = self.subject().map(|subject| self.kinds[subject]);
        self.operation.is_reconnection() && kind.is_some_and(|kind| kind.goes_on().is_some())
    }

    /// What happens at each attempt of a session to go on: a fault, or none.
    pub(super) fn attempts(&self) -> Vec<Option<Planned>> {
        match self.faults.len() {
            0 => vec![None],
            _ => self.faults.iter().copied().map(Some).collect(),
        }
    }

    /// What is there when the operation begins. What is plugged while a daemon is away may be
    /// plugged only if it may lag.
    pub(super) fn before(&self) -> Vec<Region> {
        let mut before = BOOT.to_vec();
        if self.operation.is_reconnection() && !self.required {
            before.push((40, 2));
        }
        before
    }

    pub(super) fn after(&self) -> Vec<Region> {
        let (removed, added) = self.operation.changes();
        let mut after = self.before();
        after.retain(|region| !removed.contains(region));
        after.extend(added);
        after.sort_unstable();
        after
    }

    /// How many slots a listener has that has too few.
    pub(super) fn slots(&self) -> usize {
        match self.subject() {
            Some(_) => self.after().len() - 1,
            None => self.before().len(),
        }
    }

    pub(super) fn faults_of(&self, listener: usize) -> impl Iterator<Item = Planned> {
        let faults = self.faults.clone();
        faults.into_iter().filter(move |f| f.listener == listener)
    }

    /// Whether a listener plays its part in another process.
    pub(super) fn is_process(&self, listener: usize) -> bool {
        self.kinds[listener].is_daemon()
            && self.faults_of(listener).any(|planned| {
                matches!(
                    planned.fault,
                    Fault::KilledBefore
                        | Fault::KilledDuring
                        | Fault::KilledAfter
                        | Fault::Stopped
                        | Fault::Paused
                        | Fault::NoDescriptors
                        | Fault::NoMemory
                )
            })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.has_slots(), self.acks()) {
            _ if *self == Self::Hypervisor => "hypervisor",
            _ if *self == Self::Kvm => "kvm",
            (true, true) => "daemon",
            (true, false) => "no-acks",
            (false, true) => "no-slots",
            (false, false) => "neither",
        };
        match self.goes_on() {
            Some(goes_on) => write!(f, "session({what} {goes_on:?})"),
            None => f.write_str(what),
        }
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fault, message, listener) = (self.fault, self.message, self.listener);
        let what = match self.about {
            About::Table => "message",
            About::Log => "log",
            About::Session => "any",
        };
        write!(f, "{fault:?} at {what} {message} of listener {listener}")
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> = self.kinds.iter().map(Kind::to_string).collect();
        let attendance = if self.required { "required" } else { "may lag" };
        write!(
            f,
            "{:?} with {} ({attendance}{})",
            self.operation,
            kinds.join(" "),
            if self.logs { ", logging" } else { "" }
        )?;
        for (at, planned) in self.faults.iter().enumerate() {
            write!(f, "{} {planned}", if at == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}
