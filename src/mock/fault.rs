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

/// The ways in which the mock misbehaves at one GET_INFLIGHT_FD
/// ([`MockDaemon::inject_at_inflight`](super::MockDaemon::inject_at_inflight)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InflightFault {
    /// The daemon hangs up: it has no other way to refuse.
    Refuse,
    /// The buffer is half as large as its queues need.
    TooSmall,
    /// The answer comes without the buffer's descriptor.
    NoDescriptor,
    /// The buffer's file has no seals: the daemon can truncate it later.
    Unsealed,
    /// The buffer's file is half as long as the answer says.
    ShortFile,
}

/// The ways in which the mock misbehaves on its backend channel, instead of sending one request
/// ([`MockDaemon::inject_at_channel`](super::MockDaemon::inject_at_channel)). The connection is
/// none the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelFault {
    /// Bytes that are no message: a header in which all bits are set.
    Nonsense,
    /// The first bytes of the request, and no more for now.
    CutShort,
    /// The channel ends.
    HangUp,
}

/// The faults that are still to come, by what they count and meet.
#[derive(Clone, Debug, Default)]
pub(super) struct FaultPlan {
    pub(super) table: Pending<Fault>,
    pub(super) log: Pending<Fault>,
    pub(super) inflight: Pending<InflightFault>,
    pub(super) channel: Pending<ChannelFault>,
}

impl FaultPlan {
    pub(super) fn len(&self) -> usize {
        self.table.0.len() + self.log.0.len() + self.inflight.0.len() + self.channel.0.len()
    }
}

/// Faults of one kind, each counting down to its change.
#[derive(Clone, Debug)]
pub(super) struct Pending<F>(Vec<(u64, F)>);

impl<F> Default for Pending<F> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<F: Copy> Pending<F> {
    pub(super) fn push(&mut self, change: u64, fault: F) {
        self.0.push((change, fault));
    }

    /// Counts one change and says what is wrong with it. Of several faults that meet at one
    /// change, the one that was told first wins and the others are spent.
    pub(super) fn next(&mut self) -> Option<F> {
        let mut fired = None;
        self.0.retain_mut(|(change, fault)| {
            if *change == 1 {
                fired.get_or_insert(*fault);
                return false;
            }
            *change = change.saturating_sub(1);
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
            plan.table.push(change, fault);
        }
        assert_eq!(plan.log.next(), None);
        let fired: Vec<_> = (0..5).map(|_| plan.table.next()).collect();
        let expected = [
            None,
            Some(Fault::Refuse),
            Some(Fault::HangUpAfter),
            None,
            None,
        ];
        assert_eq!(fired, expected);
        assert_eq!(plan.len(), 1);
    }
}
