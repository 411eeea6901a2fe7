//! What a new connection needs, step by step.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::connect::Attempts;
use crate::vhost_user::share::Pending;

/// One after the other, all messages of a step under way together.
#[derive(Debug)]
pub(super) enum Step {
    Connect(Attempts),
    /// To take this connection.
    Begin(OwnedFd),
    /// Which virtio features the daemon offers.
    Offer,
    /// Which protocol features.
    Protocol,
    /// What is agreed.
    Agree,
    /// The present memory, and the log.
    Memory,
    /// That it is to log, the in-flight buffer, the rings, the status.
    Rings,
}

/// What is still to be said to a daemon on a new connection.
#[derive(Debug)]
pub(super) struct Restart {
    pub(super) steps: VecDeque<Step>,
    /// The one that is under way: its messages, and the next one after it.
    pub(super) under_way: Option<(Step, Pending)>,
    /// Since when the deadline counts.
    pub(super) begun: Instant,
    /// The daemon is there, and was told all, but maybe not the present memory.
    pub(super) is_told: bool,
    /// It is gone on with in the VMM's event loop: without a deadline for the connection, and not
    /// by a change of the memory.
    pub(super) in_steps: bool,
}

impl Restart {
    pub(super) fn connecting() -> Self {
        Self::new(Step::Connect(Attempts::new()))
    }

    pub(super) fn on(socket: OwnedFd) -> Self {
        Self::new(Step::Begin(socket))
    }

    /// The present memory, for a daemon that is there and was told all else.
    pub(super) fn of_memory() -> Self {
        Self {
            is_told: true,
            ..Self::of([Step::Memory])
        }
    }

    fn new(first: Step) -> Self {
        Self::of([
            first,
            Step::Offer,
            Step::Protocol,
            Step::Agree,
            Step::Memory,
            Step::Rings,
        ])
    }

    fn of<const N: usize>(steps: [Step; N]) -> Self {
        Self {
            steps: VecDeque::from(steps),
            under_way: None,
            begun: Instant::now(),
            is_told: false,
            in_steps: false,
        }
    }

    /// Without what follows the agreement: there is no memory yet.
    #[must_use]
    pub(super) fn until_agreed(mut self) -> Self {
        let is_later = |step: &Step| matches!(step, Step::Memory | Step::Rings);
        self.steps.retain(|step| !is_later(step));
        self
    }

    /// Whether the daemon may have been told to start the rings.
    pub(super) fn was_told_of_rings(&self) -> bool {
        self.is_told || matches!(self.under_way, Some((Step::Rings, _)))
    }

    #[must_use]
    pub(super) fn in_steps(mut self) -> Self {
        self.in_steps = true;
        self
    }
}
