//! Misbehaviour on demand.

use std::time::Duration;

/// One misbehaviour, and the change of the memory table at which it shows.
///
/// A *change* is a SET_MEM_TABLE, ADD_MEM_REG or REM_MEM_REG request; for a fault
/// [at a log](Self::at_log) it is a SET_LOG_BASE. Changes are counted from 1:
/// since the start of the daemon for a fault told to the builder, since
/// [`MockDaemon::inject`](super::MockDaemon::inject) for one told later. The count goes on across
/// reconnects. A fault fires once; change number 0 never comes.
///
/// An acknowledgement exists only where REPLY_ACK was negotiated and the front-end asked for it.
/// Where it does not, a refusal shows as a hang-up, as it does with real daemons, and "answer"
/// below means the answers to what the front-end sends next.
///
/// ```
/// use guest_memory_shm::mock::{Fault, FaultKind};
///
/// let fault = Fault::refuse(2);
/// assert_eq!((fault.change(), fault.kind()), (2, FaultKind::Refuse));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    change: u64,
    kind: FaultKind,
    at_log: bool,
}

/// The ways in which the mock misbehaves at one change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The change is not applied; its answer is 1 and the connection stays. Without REPLY_ACK, and
    /// for a log, whose answer cannot refuse: the connection ends.
    Refuse,
    /// The change is applied at once, its answer comes so much later. The front-end hanging up
    /// ends the wait.
    AnswerLate(Duration),
    /// The change is not applied, and neither it nor anything after it on this connection is
    /// answered. The connection stays open until either side hangs up.
    NeverAnswer,
    /// The change is applied, but neither it nor anything after it on this connection is answered.
    NeverAnswerAfter,
    /// The change is applied, and its answer is none of the protocol. The connection stays.
    AnswerNonsense,
    /// The change is not applied and the daemon hangs up.
    HangUpBefore,
    /// The change is applied and the daemon hangs up without having answered.
    HangUpAfter,
    /// The change is **not** applied, but its answer is 0 ("done"), and then the daemon hangs up.
    /// libvhost-user treats a change that it rejects like this.
    AnswerThenHangUp,
}

impl Fault {
    /// Refuses the change: [`FaultKind::Refuse`].
    pub fn refuse(change: u64) -> Fault {
        Fault::new(change, FaultKind::Refuse)
    }

    /// Applies the change and answers it late: [`FaultKind::AnswerLate`].
    pub fn answer_late(change: u64, delay: Duration) -> Fault {
        Fault::new(change, FaultKind::AnswerLate(delay))
    }

    /// Falls silent at the change: [`FaultKind::NeverAnswer`].
    pub fn never_answer(change: u64) -> Fault {
        Fault::new(change, FaultKind::NeverAnswer)
    }

    /// Hangs up instead of applying the change: [`FaultKind::HangUpBefore`].
    pub fn hang_up_before(change: u64) -> Fault {
        Fault::new(change, FaultKind::HangUpBefore)
    }

    /// Applies the change and hangs up: [`FaultKind::HangUpAfter`].
    pub fn hang_up_after(change: u64) -> Fault {
        Fault::new(change, FaultKind::HangUpAfter)
    }

    /// Answers that the change is done, which it is not, and hangs up:
    /// [`FaultKind::AnswerThenHangUp`].
    pub fn answer_then_hang_up(change: u64) -> Fault {
        Fault::new(change, FaultKind::AnswerThenHangUp)
    }

    /// The fault of this kind at this change.
    pub fn new(change: u64, kind: FaultKind) -> Fault {
        Fault {
            change,
            kind,
            at_log: false,
        }
    }

    /// Has the fault count and meet SET_LOG_BASE requests, instead of changes of the table.
    ///
    /// ```
    /// use guest_memory_shm::mock::Fault;
    ///
    /// assert!(Fault::hang_up_after(1).at_log().is_at_log());
    /// ```
    #[must_use]
    pub fn at_log(mut self) -> Fault {
        self.at_log = true;
        self
    }

    /// Whether it counts and meets SET_LOG_BASE requests.
    pub fn is_at_log(&self) -> bool {
        self.at_log
    }

    /// The number of the change at which the fault shows, from 1.
    pub fn change(&self) -> u64 {
        self.change
    }

    /// What happens at that change.
    pub fn kind(&self) -> FaultKind {
        self.kind
    }
}

/// The faults that are still to come, each counting down to its change.
#[derive(Debug, Default)]
pub(super) struct FaultPlan {
    pending: Vec<Fault>,
}

impl FaultPlan {
    pub(super) fn push(&mut self, fault: Fault) {
        self.pending.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.pending.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    /// Counts one change and says what is wrong with it. Of several faults that meet at one
    /// change, the one that was told first wins and the others are spent.
    pub(super) fn next_change(&mut self) -> Option<FaultKind> {
        self.next(false)
    }

    /// The same for one log.
    pub(super) fn next_log(&mut self) -> Option<FaultKind> {
        self.next(true)
    }

    fn next(&mut self, at_log: bool) -> Option<FaultKind> {
        let mut fired = None;
        self.pending.retain_mut(|fault| match fault.change {
            _ if fault.at_log != at_log => true,
            0 => true,
            1 => {
                fired.get_or_insert(fault.kind);
                false
            }
            _ => {
                fault.change -= 1;
                true
            }
        });
        fired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_fires_once_at_its_change_and_never_at_zero() {
        let mut plan = FaultPlan::default();
        for fault in [
            Fault::refuse(2),
            Fault::hang_up_before(2),
            Fault::never_answer(0),
            Fault::hang_up_after(3),
        ] {
            plan.push(fault);
        }
        let fired: Vec<_> = (0..5).map(|_| plan.next_change()).collect();
        assert_eq!(
            fired,
            [
                None,
                Some(FaultKind::Refuse),
                Some(FaultKind::HangUpAfter),
                None,
                None
            ]
        );
        assert_eq!(plan.len(), 1);
        plan.clear();
        assert_eq!(plan.len(), 0);
    }
}
