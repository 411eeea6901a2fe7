//! Misbehaviour on demand.

use std::time::Duration;

/// The ways in which the mock misbehaves at one *change*: a SET_MEM_TABLE, ADD_MEM_REG or
/// REM_MEM_REG request, or, if it was [injected](super::MockDaemon::inject_at_log) so, a
/// SET_LOG_BASE.
///
/// An acknowledgement exists only where REPLY_ACK was negotiated and the frontend asked for it.
/// Where it does not, a refusal shows as a hang-up, as it does with real daemons, and "answer"
/// below means the answers to what the frontend sends next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The change is not applied; its answer is 1 and the connection stays. Without REPLY_ACK, and
    /// for a log, whose answer cannot refuse: the connection ends.
    Refuse,
    /// The change is applied at once, its answer comes so much later. The frontend hanging up ends
    /// the wait.
    AnswerLate(Duration),
    /// The change is not applied, and neither it nor anything after it on this connection is
    /// answered. The connection stays open until either side hangs up.
    NeverAnswer,
    /// The change is applied, but neither it nor anything after it on this connection is answered.
    NeverAnswerAfter,
    /// The change is applied, and its answer is none of the protocol. The connection stays.
    AnswerNonsense,
    /// The change is applied, and its answer comes twice. The connection stays.
    AnswerTwice,
    /// The change is applied. In place of its answer, one comes to a request that nobody made. The
    /// connection stays.
    AnswerOther,
    /// The change is applied, and the daemon hangs up within its answer.
    HangUpWithinAnswer,
    /// The change is not applied and the daemon hangs up.
    HangUpBefore,
    /// The change is applied and the daemon hangs up without having answered.
    HangUpAfter,
    /// The change is **not** applied, but its answer is 0 ("done"), and then the daemon hangs up.
    /// libvhost-user treats a change that it rejects like this.
    AnswerThenHangUp,
}

impl Fault {
    /// Whether the change is applied all the same.
    pub(super) fn applies(self) -> bool {
        match self {
            Self::AnswerLate(_)
            | Self::NeverAnswerAfter
            | Self::AnswerNonsense
            | Self::AnswerTwice
            | Self::AnswerOther
            | Self::HangUpWithinAnswer
            | Self::HangUpAfter => true,
            Self::Refuse | Self::NeverAnswer | Self::HangUpBefore | Self::AnswerThenHangUp => {
                false
            }
        }
    }
}

/// What a fault counts and meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    Table,
    Log,
}

/// The faults that are still to come, each counting down to its change.
#[derive(Clone, Debug, Default)]
pub(super) struct FaultPlan {
    pending: Vec<(At, u64, Fault)>,
}

impl FaultPlan {
    pub(super) fn push(&mut self, at: At, change: u64, fault: Fault) {
        self.pending.push((at, change, fault));
    }

    pub(super) fn clear(&mut self) {
        self.pending.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    /// Counts one change and says what is wrong with it. Of several faults that meet at one
    /// change, the one that was told first wins and the others are spent.
    pub(super) fn next(&mut self, met: At) -> Option<Fault> {
        let mut fired = None;
        self.pending.retain_mut(|(at, change, fault)| {
            if *at == met {
                if *change == 1 {
                    fired.get_or_insert(*fault);
                    return false;
                }
                *change = change.saturating_sub(1);
            }
            true
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
        for (change, fault) in [
            (2, Fault::Refuse),
            (2, Fault::HangUpBefore),
            (0, Fault::NeverAnswer),
            (3, Fault::HangUpAfter),
        ] {
            plan.push(At::Table, change, fault);
        }
        assert_eq!(plan.next(At::Log), None);
        let fired: Vec<_> = (0..5).map(|_| plan.next(At::Table)).collect();
        let expected = [
            None,
            Some(Fault::Refuse),
            Some(Fault::HangUpAfter),
            None,
            None,
        ];
        assert_eq!(fired, expected);
        assert_eq!(plan.len(), 1);
        plan.clear();
        assert_eq!(plan.len(), 0);
    }
}
