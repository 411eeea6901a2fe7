//! What passes between a share and its daemon: changes, their acknowledgements, failures.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use super::connection::{Answer, DaemonConnection};
use super::deadline::Clock;
use super::error::{DaemonFailure, DaemonRequest, Result, ShareError};
use super::{CallDeadline, VhostUserShare};
use crate::logs;
use crate::range::Difference;
use crate::vhost_user::table::{MemoryTable, TableRegion};

impl<F: DaemonConnection> VhostUserShare<F> {
    /// Sends what is different in `table`, and the dirty log around it.
    pub(super) fn send(
        &mut self,
        table: &MemoryTable,
        change: &Difference<TableRegion, TableRegion>,
    ) -> Result<()> {
        self.log_before(table)?;
        self.mark_what_is_mapped_anew(&change.additions);
        let sent = match self.mem_slots {
            true => self.send_difference(change),
            false if self.held == *table => Ok(()),
            false => self.send_whole(table),
        };
        if sent.is_err() && self.broken.is_some() {
            return sent;
        }
        // After a refusal, too: the daemon may have regions more, or less, than before.
        let logs = self.log_after();
        sent.and(logs)
    }

    fn send_difference(&mut self, change: &Difference<TableRegion, TableRegion>) -> Result<()> {
        let mut last = None;
        for region in &change.removals {
            let step = DaemonRequest::RemoveRegion(region.range());
            self.change(step, |connection| connection.remove_mem_region(region))?;
            self.confirm(step)?;
            self.held.remove(region);
            last = Some(step);
        }
        for region in &change.additions {
            let step = DaemonRequest::AddRegion(region.range());
            self.expect_unlogged(std::slice::from_ref(region));
            if let Some(base) =
                self.change(step, |connection| connection.add_mem_region(region))?
            {
                // The answer says that it was taken.
                self.held.insert(region);
                self.take_up(step, std::slice::from_ref(region), &[base])?;
            }
            self.confirm(step)?;
            self.held.insert(region);
            last = Some(step);
        }
        // libvhost-user acknowledges a change that it refuses, and hangs up then: only an answer
        // after the acknowledgement shows that the daemon took it.
        match last {
            Some(step) if self.reply_ack => self.call(step, F::barrier),
            _ => Ok(()),
        }
    }

    fn send_whole(&mut self, table: &MemoryTable) -> Result<()> {
        // Before, so that they count also if the answer never comes.
        self.mark_what_stays(table);
        self.expect_unlogged(table.regions());
        let step = DaemonRequest::SetTable(table.regions().len());
        let set = |connection: &mut F| connection.set_mem_table(table.regions());
        let bases = match self.connection.refusal_keeps_table() {
            true => self.change(step, set)?,
            false => self.call(step, set)?,
        };
        if let Some(bases) = bases {
            // The answer says that it was taken.
            self.held = table.clone();
            self.take_up(step, table.regions(), &bases)?;
        }
        self.call(step, F::barrier)?;
        self.held = table.clone();
        Ok(())
    }

    /// Without REPLY_ACK nothing says whether the daemon took a change: asks whether it is there.
    fn confirm(&mut self, step: DaemonRequest) -> Result<()> {
        match self.reply_ack {
            true => Ok(()),
            false => self.call(step, F::barrier),
        }
    }

    /// Makes one call that, refused, leaves the daemon as it was: if it still answers after the
    /// refusal, the share stays usable.
    pub(super) fn change<T>(
        &mut self,
        request: DaemonRequest,
        call: impl FnOnce(&mut F) -> Answer<T>,
    ) -> Result<T> {
        let refusal = match self.attempt(call)? {
            Ok(answer) => return Ok(answer),
            Err(refusal @ DaemonFailure::Refused(_)) => refusal,
            Err(failure) => return Err(self.fail(request, failure)),
        };
        // A refusal says that the daemon is there, not that it stays: most hang up now.
        match self.attempt(F::barrier) {
            Ok(Err(gone)) => {
                logs::debug!("after its refusal: {gone}");
                Err(self.fail(request, refusal))
            }
            // Where it could not be asked, the next call finds out.
            Ok(Ok(())) | Err(_) => Err(ShareError::Daemon {
                request,
                failure: refusal,
            }),
        }
    }

    /// Makes one call on the connection, before the deadline; a failure breaks the share.
    pub(super) fn call<T>(
        &mut self,
        request: DaemonRequest,
        call: impl FnOnce(&mut F) -> Answer<T>,
    ) -> Result<T> {
        self.attempt(call)?
            .map_err(|failure| self.fail(request, failure))
    }

    /// Makes one call on the connection, before the deadline. The outer error: it was not made.
    fn attempt<T>(&mut self, call: impl FnOnce(&mut F) -> Answer<T>) -> Result<Answer<T>> {
        let silent = DaemonFailure::Silent(self.limit);
        if let Some(limit) = &mut self.deadline
            && limit.start()? == Clock::RanOut
        {
            return Ok(Err(silent));
        }
        let acks_due = std::mem::take(&mut self.acks_due);
        let work = || {
            if acks_due {
                self.connection.request_acks();
            }
            call(&mut self.connection)
        };
        let made = catch_unwind(AssertUnwindSafe(work));
        let answer = made.unwrap_or_else(|panic| {
            // How much of the message passed is not known.
            self.deadline.as_ref().map(CallDeadline::stop);
            self.break_off(ShareError::GivenUp {
                reason: "the code of the connection panicked".to_owned(),
            });
            resume_unwind(panic)
        });
        let expired = self.deadline.as_ref().is_some_and(CallDeadline::stop);
        Ok(if expired { Err(silent) } else { answer })
    }

    /// Breaks the share, and says why.
    fn fail(&mut self, request: DaemonRequest, failure: DaemonFailure) -> ShareError {
        self.break_off(ShareError::Daemon {
            request,
            failure: failure.clone(),
        });
        ShareError::Daemon { request, failure }
    }

    /// Ends the connection, for this reason. Nothing more is said to a daemon in an unknown state;
    /// and most daemons serve one frontend at a time, so the next connection needs this one's end.
    pub(super) fn break_off(&mut self, reason: ShareError) {
        let text = reason.to_string();
        if let Some(logging) = &mut self.logging {
            logging.end(&text);
        }
        self.broken = Some(Arc::new(reason));
        // Last of all: it may call code of others.
        if let Some(limit) = &mut self.deadline {
            limit.end_connection();
        }
        logs::warn!("share broken: {text}");
    }
}
