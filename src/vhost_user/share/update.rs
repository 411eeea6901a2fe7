//! What passes between a share and its daemon, in steps that do not wait.
//!
//! The messages of a stage are all under way at once; the next stage begins when all of them are
//! answered. With REPLY_ACK each change is acknowledged, and one question follows them all:
//! libvhost-user acknowledges a change that it refuses, and hangs up then, so only an answer after
//! the acknowledgement shows that the daemon took it. Without REPLY_ACK a question follows each.
//!
//! Regions that come are sent only once all those that go are acknowledged: they may take the
//! place of one, or its slot, and a daemon that refuses to let go of that must not be told of
//! them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::VhostUserShare;
use super::error::{Result, ShareError};
use super::logging::Logging;
use super::stage::Stage;
use crate::listener::{Exchange, ListenerError, WaitFor, drive};
use crate::logs;
use crate::range::{Difference, GuestRange};
use crate::vhost_user::table::{MemoryTable, TableRegion};
use crate::vhost_user::wire::{
    Answer, DaemonFailure, DaemonRequest, Message, Reply, bases, number,
};

/// How long a daemon may take more for each whole GiB that it is newly told of: one that locks
/// what it maps (mlockall(2)) has all of it allocated and cleared then.
const PER_GIB: Duration = Duration::from_secs(5);

/// Something that a daemon is told, under way. Dropped before its end, it breaks the share: what
/// the daemon holds is not known then.
pub(in crate::vhost_user) struct Update<'a> {
    share: &'a mut VhostUserShare,
    pending: Pending,
}

/// What is known of something that a daemon is told, without its share. It is kept while nobody
/// waits for it ([`Update::pause`]).
#[derive(Debug)]
pub(in crate::vhost_user) struct Pending {
    stages: VecDeque<Stage>,
    stage: Option<Stage>,
    table: MemoryTable,
    /// The changes of the table that are not answered, in their order.
    changes: VecDeque<Change>,
    /// How many of them were sent.
    sent: usize,
    /// What it is newly told of.
    added: Vec<GuestRange>,
    /// How many regions it is told to forget.
    removed: usize,
    refusal: Option<(DaemonRequest, DaemonFailure)>,
    /// The messages of [`Stage::Ask`], and what was answered.
    asks: Vec<Message>,
    answers: Vec<Answer>,
    /// Why nothing is to be sent.
    refused: Option<ShareError>,
    deadline: Instant,
    /// The time until then, as a daemon is told that it was too long.
    limit: Duration,
    ended: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Remove(TableRegion),
    Add(TableRegion),
    Whole,
}

impl VhostUserShare {
    /// Begins these stages; the time counts from `begun`. A daemon that comes after others which
    /// used it up has a tenth of it all the same: it is not the one that is silent.
    pub(super) fn begin(
        &mut self,
        stages: &[Stage],
        table: MemoryTable,
        begun: Instant,
    ) -> Update<'_> {
        if !self.wire.is_idle() {
            // Its answers would pass for those to other changes.
            self.break_off(ShareError::GivenUp {
                reason: "a change was forgotten (std::mem::forget) while it was under way"
                    .to_owned(),
            });
        }
        let change = self.held.change_to(&table);
        let added: Vec<GuestRange> = change.additions.iter().map(TableRegion::range).collect();
        let limit = self
            .limit
            .saturating_add(allowance(&change, self.mem_slots, &table));
        let removed = change.removals.len();
        let removals = change.removals.into_iter().map(Change::Remove);
        let changes = match self.mem_slots {
            true => removals
                .chain(change.additions.into_iter().map(Change::Add))
                .collect(),
            false if table == self.held => VecDeque::new(),
            false => VecDeque::from([Change::Whole]),
        };
        let pending = Pending {
            stages: stages.iter().copied().collect(),
            table,
            changes,
            added,
            removed,
            refused: self.check_not_broken().err(),
            deadline: after(begun, limit).max(after(Instant::now(), limit / 10)),
            limit,
            ..Pending::nothing(begun)
        };
        Update {
            share: self,
            pending,
        }
    }

    /// Does these stages, and waits for their end.
    pub(super) fn run(&mut self, stages: &[Stage], table: MemoryTable) -> Result<()> {
        let mut result = None;
        let update = self.begin(stages, table, Instant::now());
        let told = |ended, _| result = Some(ended);
        drive(vec![Box::new(Told { update, told })]);
        // Without one it panicked, in code of others, which breaks the share.
        result.unwrap_or_else(|| self.check_not_broken())
    }

    /// Begins to have these messages answered, all under way together; the time counts from
    /// `begun`.
    pub(in crate::vhost_user) fn begin_asking(
        &mut self,
        asks: Vec<Message>,
        begun: Instant,
        limit: Duration,
    ) -> Update<'_> {
        let held = self.held.clone();
        let mut update = self.begin(&[Stage::Ask], held, begun);
        update.pending.asks = asks;
        update.pending.deadline = after(begun, limit);
        update.pending.limit = limit;
        update
    }

    /// Has these messages answered, and waits for that.
    pub(in crate::vhost_user) fn ask(
        &mut self,
        asks: Vec<Message>,
        begun: Instant,
        limit: Duration,
    ) -> Result<Vec<Answer>> {
        self.check_not_broken()?;
        let mut result = None;
        let update = self.begin_asking(asks, begun, limit);
        let told = |ended: Result<()>, answers| result = Some(ended.map(|()| answers));
        drive(vec![Box::new(Told { update, told })]);
        result.unwrap_or_else(|| self.check_not_broken().map(|()| Vec::new()))
    }

    /// Goes on with something that was paused.
    pub(in crate::vhost_user) fn resume(&mut self, pending: Pending) -> Update<'_> {
        Update {
            share: self,
            pending,
        }
    }
}

/// Time for the bytes that the daemon is newly told of: in a whole table, that is all of them.
fn allowance(
    change: &Difference<TableRegion, TableRegion>,
    mem_slots: bool,
    table: &MemoryTable,
) -> Duration {
    let new = match mem_slots {
        true => &change.additions[..],
        false => table.regions(),
    };
    let bytes: u64 = new.iter().map(|region| region.range().size()).sum();
    PER_GIB.saturating_mul(u32::try_from(bytes >> 30).unwrap_or(u32::MAX))
}

/// The end of a limit: a moment that never comes, if no clock can express it.
pub(in crate::vhost_user) fn after(begun: Instant, limit: Duration) -> Instant {
    let far_off = || Instant::now() + Duration::from_secs(u64::from(u32::MAX));
    begun.checked_add(limit).unwrap_or_else(far_off)
}

impl Update<'_> {
    /// Does all that can be done at once; gives the result once there is one.
    pub(in crate::vhost_user) fn advance(&mut self, now: Instant) -> Option<Result<()>> {
        let ended = self.go_on(now).transpose();
        self.pending.ended = ended.is_some();
        ended
    }

    /// Leaves it under way, without the share.
    pub(in crate::vhost_user) fn pause(mut self) -> Pending {
        let nothing = Pending {
            ended: true,
            ..Pending::nothing(self.pending.deadline)
        };
        std::mem::replace(&mut self.pending, nothing)
    }

    /// What was answered to the messages that it [asks](VhostUserShare::begin_asking).
    pub(in crate::vhost_user) fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.pending.answers)
    }

    /// Has it end with this error instead of sending anything.
    pub(super) fn refuse(&mut self, refused: Option<ShareError>) {
        self.pending.refused = refused.or(self.pending.refused.take());
    }

    pub(in crate::vhost_user) fn share(&mut self) -> &mut VhostUserShare {
        self.share
    }

    fn go_on(&mut self, now: Instant) -> Result<Option<()>> {
        if let Some(refused) = self.pending.refused.take() {
            return Err(refused);
        }
        loop {
            match self.share.wire.advance() {
                Ok(Some(answer)) => self.note(answer)?,
                Ok(None) if self.share.wire.is_idle() => {
                    self.leave_stage();
                    self.pending.stage = self.pending.stages.pop_front();
                    match self.pending.stage {
                        None => return self.result().map(Some),
                        Some(stage) => self.enter(stage)?,
                    }
                    // Nothing is sent that there is no time to answer. A daemon that has answered
                    // all is not silent, however late that is looked at.
                    if now >= self.pending.deadline && !self.share.wire.is_idle() {
                        return Err(self.silent());
                    }
                }
                Ok(None) if now >= self.pending.deadline => return Err(self.silent()),
                Ok(None) => return Ok(None),
                Err(failure) => {
                    let request = self.share.wire.pending();
                    return Err(self.fail(request.unwrap_or(DaemonRequest::Other), failure));
                }
            }
        }
    }

    pub(in crate::vhost_user) fn waits_for(&self) -> WaitFor<'_> {
        self.share.wire.waits_for(self.pending.deadline)
    }

    fn result(&mut self) -> Result<()> {
        if let Some((request, failure)) = self.pending.refusal.take() {
            return Err(ShareError::Daemon { request, failure });
        }
        let (removed, added) = (self.pending.removed, self.pending.added.len());
        if (removed, added) != (0, 0) {
            logs::debug!("daemon took {removed} regions less, {added} more");
        }
        Ok(())
    }

    fn enter(&mut self, stage: Stage) -> Result<()> {
        let mut asks = self.pending.asks.iter();
        let with_fds = asks.any(|ask| ask.reply() == Reply::Any);
        self.share.wire.keep_fds(with_fds);
        match stage {
            Stage::Slots if self.share.slots.is_none() && self.share.mem_slots => {
                self.share.wire.push(Message::max_slots());
            }
            Stage::Slots => {}
            Stage::LogBefore => self.log_before()?,
            Stage::Table => self.send_changes(),
            Stage::LogAfter if self.share.held != MemoryTable::default() => self.send_log(true),
            Stage::LogAfter => {}
            Stage::LogTaken => self.confirm_log(),
            Stage::Ask => {
                let asks = std::mem::take(&mut self.pending.asks);
                asks.into_iter().for_each(|ask| self.share.wire.push(ask));
            }
        }
        Ok(())
    }

    /// All of the stage is answered.
    fn leave_stage(&mut self) {
        let logs = matches!(self.pending.stage, Some(Stage::LogAfter | Stage::LogTaken));
        if let (true, Some(logging)) = (logs, &mut self.share.logging) {
            logging.settle();
        }
    }

    fn log_before(&mut self) -> Result<()> {
        self.share.check_limit(&self.pending.table)?;
        let Some(logging) = &mut self.share.logging else {
            return Ok(());
        };
        let is_needed = logging.prepare(&self.share.held, &self.pending.table)?;
        logging.unsettle();
        if is_needed {
            self.send_log(false);
        }
        Ok(())
    }

    fn send_log(&mut self, is_confirmed: bool) {
        let Some(log) = self.share.logging.as_ref().and_then(Logging::log) else {
            return;
        };
        let message = Message::set_log(log.size(), log.descriptor());
        // The process that answers is the daemon. vhost's frontend has no room for credentials,
        // and would take them for a message that was cut off: only for as long as that takes.
        self.share.wire.pass_credentials(true);
        self.share.wire.push(message);
        if is_confirmed {
            self.confirm_log();
        }
    }

    /// The answer to a log cannot refuse it. A daemon that does not take it hangs up: that it is
    /// there after its answer shows that it did.
    fn confirm_log(&mut self) {
        if let Some(log) = self.share.logging.as_ref().and_then(Logging::log) {
            let about = DaemonRequest::SetLog(log.size());
            self.share.wire.push(Message::barrier(about));
        }
    }

    fn send_changes(&mut self) {
        self.share.mark_what_is_mapped_anew(&self.pending.added);
        self.send_next_changes();
    }

    /// Sends those that can be under way together.
    fn send_next_changes(&mut self) {
        let next: Vec<Change> = self
            .pending
            .changes
            .iter()
            .take(self.at_once())
            .cloned()
            .collect();
        self.pending.sent = next.len();
        for change in &next {
            self.send_change(change);
        }
        if self.share.reply_ack
            && !self.share.listens
            && self.pending.sent == self.pending.changes.len()
        {
            self.ask_after(next.last());
        }
    }

    fn at_once(&self) -> usize {
        let removals = self.pending.changes.iter();
        let removals = removals.take_while(|change| matches!(change, Change::Remove(_)));
        match removals.count() {
            // The daemon waits for an acknowledgement of each answer before all else.
            _ if self.share.listens => 1,
            // One that does not acknowledge hangs up to refuse.
            removals if removals > 0 && self.share.reply_ack => removals,
            _ => self.pending.changes.len(),
        }
    }

    /// Asks whether the daemon is still there after a change.
    fn ask_after(&mut self, change: Option<&Change>) {
        if let Some(change) = change {
            let about = change.request(&self.pending.table);
            self.share.wire.push(Message::barrier(about));
        }
    }

    fn send_change(&mut self, change: &Change) {
        let share = &mut *self.share;
        let is_answered = match change {
            Change::Remove(_) => share.reply_ack,
            Change::Add(_) | Change::Whole => share.reply_ack || share.listens,
        };
        let reply = match change {
            Change::Add(_) | Change::Whole if share.listens => Reply::Bases,
            _ if share.reply_ack => Reply::Ack,
            _ => Reply::None,
        };
        let message = match change {
            Change::Remove(region) => Message::remove_region(region, reply),
            Change::Add(region) => {
                share.expect_unlogged(std::slice::from_ref(region));
                Message::add_region(region, reply)
            }
            Change::Whole => {
                // Before it, so that they count also if the answer never comes.
                share.mark_what_stays(&self.pending.table);
                share.expect_unlogged(self.pending.table.regions());
                Message::set_table(self.pending.table.regions(), reply)
            }
        };
        share.wire.push(message);
        if !is_answered {
            self.ask_after(Some(change));
        }
    }

    fn note(&mut self, answer: Answer) -> Result<()> {
        let about = answer.request.about();
        match answer.request.reply() {
            Reply::Ack if number(&answer.body) != 0 => {
                self.refused(about, number(&answer.body))?
            }
            _ if self.pending.stage == Some(Stage::Ask) => self.pending.answers.push(answer),
            Reply::Ack => self.took_change(),
            Reply::Bases => {
                self.take_up(about, &answer)?;
                self.took_change();
            }
            _ => match about {
                DaemonRequest::GetMaxSlots => self.share.slots = Some(number(&answer.body)),
                DaemonRequest::SetLog(size) if !answer.request.is_barrier() => {
                    self.share.wire.pass_credentials(false);
                    if let Some(logging) = &mut self.share.logging {
                        logging.take(size, answer.process);
                    }
                }
                DaemonRequest::SetLog(_) => {}
                // The question after a change that is not acknowledged.
                _ if !self.share.reply_ack && self.pending.refusal.is_none() => self.took_change(),
                _ => {}
            },
        }
        Ok(())
    }

    /// The daemon took the oldest change that is not answered.
    fn took_change(&mut self) {
        let Some(change) = self.pending.changes.pop_front() else {
            return;
        };
        let held = &mut self.share.held;
        match &change {
            Change::Remove(region) => held.remove(region),
            Change::Add(region) => held.insert(region),
            Change::Whole => held.clone_from(&self.pending.table),
        }
        self.pending.sent = self.pending.sent.saturating_sub(1);
        match self.pending.changes.is_empty() {
            true if self.share.listens => self.ask_after(Some(&change)),
            false if self.pending.sent == 0 && self.pending.refusal.is_none() => {
                self.send_next_changes()
            }
            _ => {}
        }
    }

    fn refused(&mut self, request: DaemonRequest, code: u64) -> Result<()> {
        let refusal = DaemonFailure::refused(format!("its answer is {code}"));
        self.pending.sent = self.pending.sent.saturating_sub(1);
        if let Some(Change::Whole) = self.pending.changes.pop_front() {
            // Some daemons have let go of the old table by then.
            return Err(self.fail(request, refusal));
        }
        if self.pending.refusal.is_none() {
            self.pending.refusal = Some((request, refusal));
            // What is under way is answered, too; then it is known what the daemon holds. Most
            // daemons hang up now: whether it is still there, a question says.
            self.share.wire.cancel_unsent();
            self.share.wire.push(Message::barrier(request));
        }
        Ok(())
    }

    /// Hands the bases in an answer on, and acknowledges them: the very next message.
    fn take_up(&mut self, about: DaemonRequest, answer: &Answer) -> Result<()> {
        let regions = match self.pending.changes.front() {
            Some(Change::Whole) => self.pending.table.regions().to_vec(),
            Some(Change::Add(region)) => vec![region.clone()],
            _ => Vec::new(),
        };
        let Some(bases) = bases(answer.request.body(), &answer.body) else {
            let what = "it answered with other regions than it was sent";
            return Err(self.fail(about, DaemonFailure::protocol(what)));
        };
        for (region, base) in regions.iter().zip(bases) {
            self.share.tell_base(region.range(), base);
        }
        self.share.wire.push(Message::acknowledge_bases(about));
        Ok(())
    }

    fn silent(&mut self) -> ShareError {
        let request = self.share.wire.pending().unwrap_or(DaemonRequest::Other);
        self.fail(request, DaemonFailure::Silent(self.pending.limit))
    }

    /// Breaks the share. A refusal that came before is the reason, whatever followed from it.
    fn fail(&mut self, request: DaemonRequest, failure: DaemonFailure) -> ShareError {
        let (request, failure) = match self.pending.refusal.take() {
            Some(refusal) => {
                logs::debug!("after its refusal: {failure}");
                refusal
            }
            None => (request, failure),
        };
        self.share.break_off(ShareError::Daemon {
            request,
            failure: failure.clone(),
        });
        ShareError::Daemon { request, failure }
    }
}

impl Drop for Update<'_> {
    fn drop(&mut self) {
        if !self.pending.ended && self.share.broken.is_none() {
            self.share.break_off(ShareError::GivenUp {
                reason: "a change was given up while it was under way".to_owned(),
            });
        }
    }
}

impl Pending {
    /// When it ends at the latest.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    fn nothing(deadline: Instant) -> Self {
        Self {
            stages: VecDeque::new(),
            stage: None,
            table: MemoryTable::default(),
            changes: VecDeque::new(),
            sent: 0,
            added: Vec::new(),
            removed: 0,
            refusal: None,
            asks: Vec::new(),
            answers: Vec::new(),
            refused: None,
            deadline,
            limit: Duration::ZERO,
            ended: false,
        }
    }
}

impl Change {
    fn request(&self, table: &MemoryTable) -> DaemonRequest {
        match self {
            Self::Remove(region) => DaemonRequest::RemoveRegion(region.range()),
            Self::Add(region) => DaemonRequest::AddRegion(region.range()),
            Self::Whole => DaemonRequest::SetTable(table.regions().len()),
        }
    }
}

/// An update that tells its own result before it becomes a listener's.
struct Told<'a, F> {
    update: Update<'a>,
    told: F,
}

impl<F: FnMut(Result<()>, Vec<Answer>)> Exchange for Told<'_, F> {
    fn advance(&mut self, now: Instant) -> Option<Result<(), ListenerError>> {
        let ended = self.update.advance(now)?;
        (self.told)(ended, self.update.take_answers());
        Some(Ok(()))
    }

    fn waits_for(&self) -> WaitFor<'_> {
        self.update.waits_for()
    }
}
