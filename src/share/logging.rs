//! A daemon that logs what it writes, while its table changes.
//!
//! When the log goes to the daemon, and why twice:
//! - Before a table that needs a longer log, or the first one: a daemon must never hold a region
//!   whose pages have no bits. libvhost-user ends its process then.
//! - After every table: vhost-user-backend connects the log with the regions that it has when it
//!   gets it, refuses one that is too short for them, and logs nothing for those that come later.
//!   So a log that may be shorter cannot go before, and regions that were added need it after.
//!
//! Guests use a region only after it was told to all, so nothing is written to a new one between
//! the table and the log that follows. SET_MEM_TABLE, however, replaces *all* regions in such a
//! daemon: what it writes to those that stay, until the log follows, is not logged. Their pages
//! all count as dirty then.

use super::log::{DaemonLog, DirtyRanges};
use super::{MemTableSink, VhostUserShare};
use crate::error::{Error, MemTableChange, Result};
use crate::layout::GuestRange;
use crate::table::MemoryTable;

/// That a daemon is to log.
#[derive(Debug, Default)]
pub(super) struct Logging {
    /// Absent until there was a region.
    log: Option<DaemonLog>,
    /// The daemon acknowledged `log`, on this connection.
    sent: bool,
    /// It did so after it took the table that it holds.
    settled: bool,
    /// What was set in logs that are gone, and has no place in this one.
    dirty: DirtyRanges,
}

impl Logging {
    /// On a new connection nobody has the log.
    pub(super) fn begin(&mut self) {
        self.sent = false;
        self.settled = false;
    }

    fn replace(&mut self, log: DaemonLog) {
        if let Some(old) = self.log.replace(log)
            && let Some(log) = &mut self.log
        {
            old.move_into(log, &mut self.dirty);
        }
    }
}

impl<F: MemTableSink> VhostUserShare<F> {
    /// Has the daemon log the pages that it writes, from now on and across changes of its table
    /// and reconnections, until [`stop_log`](Self::stop_log). Does nothing if it does already.
    ///
    /// The log is sent (SET_LOG_BASE) with each table: sized for it, before the table when it
    /// grows, after it when it shrinks, and nothing that was set is lost on the way. Whatever
    /// daemons log, they do so only with the feature `VHOST_F_LOG_ALL` (bit 26) acknowledged: call
    /// SET_FEATURES with it after this, and again after each reconnection, once the table was sent.
    /// Used rings are logged where SET_VRING_ADDR says so.
    ///
    /// SET_LOG_BASE goes past the lock of vhost's `Frontend`: as long as the daemon logs, no other
    /// call may be made on a clone of it while the table changes, or the daemon is reconnected to.
    ///
    /// # Errors
    ///
    /// [`Error::LogNotShared`] if LOG_SHMFD is not among the protocol features;
    /// [`Error::ShareBroken`]; those of a new memfd; and those of
    /// [`update_table`](Self::update_table) if the daemon does not take the log. The daemon does not
    /// log then.
    pub fn start_log(&mut self) -> Result<()> {
        self.check_not_broken()?;
        if self.logging.is_some() {
            return Ok(());
        }
        self.check_log_shmfd()?;
        self.logging = Some(Logging::default());
        let table = self.held.clone();
        let sent = self.log_before(&table);
        match (&sent, &mut self.logging) {
            // The regions were there before the log: once is enough.
            (Ok(()), Some(logging)) => logging.settled = true,
            _ => self.logging = None,
        }
        sent
    }

    /// Ends logging; gives what is dirty since the last [`drain_dirty`](Self::drain_dirty).
    ///
    /// Call SET_FEATURES without `VHOST_F_LOG_ALL` before: no message takes a log away from a
    /// daemon, and one that goes on logging meets regions that its log has no bits for.
    pub fn stop_log(&mut self) -> Vec<GuestRange> {
        let dirty = self.drain_dirty();
        self.logging = None;
        dirty
    }

    /// Whether the daemon is to log.
    pub fn is_logging(&self) -> bool {
        self.logging.is_some()
    }

    /// Takes what the daemon wrote since the last time, in whole pages of 4 KiB: sorted, apart
    /// from each other. Among them may be pages of regions that were removed meanwhile. Empty if
    /// the daemon does not log.
    pub fn drain_dirty(&mut self) -> Vec<GuestRange> {
        let Some(logging) = &mut self.logging else {
            return Vec::new();
        };
        let mut dirty = std::mem::take(&mut logging.dirty);
        if let Some(log) = &logging.log {
            log.drain(&mut dirty);
        }
        dirty.into_ranges()
    }

    /// Whether a daemon that is to log can.
    pub(super) fn check_log(&self) -> Result<()> {
        match self.logging {
            Some(_) => self.check_log_shmfd(),
            None => Ok(()),
        }
    }

    fn check_log_shmfd(&self) -> Result<()> {
        match self.log_shmfd {
            true => Ok(()),
            false => Err(Error::LogNotShared),
        }
    }

    /// Whether the daemon has yet to be sent the log for the table that it holds.
    pub(super) fn log_is_due(&self) -> bool {
        let due = self
            .logging
            .as_ref()
            .is_some_and(|logging| !logging.settled);
        due && self.held != MemoryTable::default()
    }

    /// Before `table` is sent: the daemon has a log that is long enough for it.
    pub(super) fn log_before(&mut self, table: &MemoryTable) -> Result<()> {
        self.with_logging(|share, logging| {
            let needed = DaemonLog::size_for(table);
            let present = logging.log.as_ref().map_or(0, DaemonLog::size);
            if needed > present {
                let mut log = DaemonLog::new(needed)?;
                log.watch(&share.held);
                log.watch(table);
                share.send_log(&log)?;
                logging.replace(log);
                logging.sent = true;
            } else if let Some(log) = &mut logging.log {
                log.watch(table);
                if !logging.sent {
                    share.send_log(log)?;
                    logging.sent = true;
                }
            }
            logging.settled = false;
            Ok(())
        })
    }

    /// After the table was sent: the daemon has a log of the right size, for all of its regions.
    pub(super) fn log_after(&mut self) -> Result<()> {
        self.with_logging(|share, logging| {
            let needed = DaemonLog::size_for(&share.held);
            let Some(present) = &logging.log else {
                return Ok(());
            };
            if needed == 0 {
                // Nothing can be written, and there is no log without a bit.
            } else if needed < present.size() {
                let mut log = DaemonLog::new(needed)?;
                log.watch(&share.held);
                share.send_log(&log)?;
                logging.replace(log);
            } else {
                share.send_log(present)?;
            }
            logging.settled = true;
            Ok(())
        })
    }

    /// The daemon is to replace all of its regions, those that stay included.
    pub(super) fn mark_what_stays(&self, next: &MemoryTable) {
        if let Some(Logging { log: Some(log), .. }) = &self.logging {
            let held = self.held.regions().iter();
            let stay = held.filter(|region| next.contains(region));
            stay.for_each(|region| log.mark(region.range()));
        }
    }

    fn send_log(&mut self, log: &DaemonLog) -> Result<()> {
        let step = MemTableChange::SetLog(log.size());
        self.change(step, |sink| sink.set_log_base(log))
    }

    fn with_logging(
        &mut self,
        act: impl FnOnce(&mut Self, &mut Logging) -> Result<()>,
    ) -> Result<()> {
        let Some(mut logging) = self.logging.take() else {
            return Ok(());
        };
        let done = act(self, &mut logging);
        self.logging = Some(logging);
        done
    }
}
