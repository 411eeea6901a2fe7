//! How a daemon gets its log, and how what it wrote is read from it.
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
//! all count as dirty then. Where the log does not follow, the pages of all regions that the
//! daemon may hold without it do, in each harvest until it does.
//!
//! There is one log until logging stops, which grows in place and is never sent with a smaller
//! size: whichever message a daemon handled last, it sets bits in the same pages, and they are
//! harvested. That includes a daemon that does not know yet that its connection has ended.

use super::VhostUserShare;
use super::error::{Result, ShareError};
use super::logging::Logging;
use super::stage::Stage;
use super::stopped::StoppedLog;
use crate::logs;
use crate::range::GuestRange;
use crate::vhost_user::table::{MemoryTable, TableRegion};

impl VhostUserShare {
    /// Has the daemon log the pages that it writes, from now on and across changes of its table
    /// and reconnections, until [`stop_log`](Self::stop_log). Does nothing if it does already.
    ///
    /// The log is sent (SET_LOG_BASE) with each table: before it if the log has to grow for it,
    /// and after it. It is one file all the time, and never gets smaller. So nothing that a daemon
    /// notes is lost, wherever it is in a change of the table when it hangs up, falls silent or
    /// answers nonsense, and what it notes after that is not either: it comes in a later harvest.
    ///
    /// Daemons log only with the feature `VHOST_F_LOG_ALL` (bit 26) acknowledged: call
    /// SET_FEATURES with it after this, and again after each reconnection, once the table was
    /// sent. Used rings are logged where SET_VRING_ADDR says so.
    ///
    /// ```no_run
    /// use guest_memory_shm::{AddressSpace, ListenerId, VhostUserShare};
    /// use vhost::VhostBackend;
    /// use vhost::vhost_user::Frontend;
    ///
    /// const LOG_ALL: u64 = 1 << 26;
    ///
    /// fn start(
    ///     space: &AddressSpace,
    ///     disk: &ListenerId<VhostUserShare>,
    ///     frontend: &Frontend, // the disk's
    ///     features: u64,       // as acknowledged before
    /// ) -> Result<(), Box<dyn std::error::Error>> {
    ///     space.with_listener(disk, |share| share.start_log())??; // it has the log
    ///     Ok(frontend.set_features(features | LOG_ALL)?) // it uses it
    /// }
    /// // Each round, for as long as it logs:
    /// // space.with_listener(&disk, |share| share.drain_dirty())?
    /// // At the end: SET_FEATURES without LOG_ALL, then share.stop_log().
    /// ```
    ///
    /// Without SET_FEATURES there is no error: the daemon logs nothing. The log can be started
    /// before or after a table was sent.
    ///
    /// # Errors
    ///
    /// [`ShareError::LogNotShared`] if LOG_SHMFD is not among the protocol features;
    /// [`ShareError::Broken`]; [`ShareError::Log`]; and those of
    /// [`update_table`](Self::update_table) if the daemon does not take the log. The daemon does
    /// not log then.
    pub fn start_log(&mut self) -> Result<()> {
        self.check_not_broken()?;
        if self.logging.is_some() {
            return Ok(());
        }
        self.check_log_shmfd()?;
        self.logging = Some(Logging::new(self.held != MemoryTable::default()));
        let sent = self.run(&[Stage::LogBefore, Stage::LogTaken], self.held.clone());
        if sent.is_err() {
            self.logging = None;
        }
        sent
    }

    /// Ends logging; gives what is dirty since the last [`drain_dirty`](Self::drain_dirty), and
    /// names the daemons that were hung up on meanwhile and are not known to be dead: they may go
    /// on writing to guest RAM.
    ///
    /// Call SET_FEATURES without `VHOST_F_LOG_ALL` before: no message takes a log away from a
    /// daemon, and one that goes on logging meets regions that its log has no bits for.
    pub fn stop_log(&mut self) -> StoppedLog {
        let stopped = self.logging.take().map(Logging::stop).unwrap_or_default();
        for daemon in &stopped.former_daemons {
            logs::warn!("logging stops, and {daemon}");
        }
        stopped
    }

    /// Whether the daemon is to log.
    pub fn is_logging(&self) -> bool {
        self.logging.is_some()
    }

    /// Takes what the daemon wrote since the last time, in whole pages of 4 KiB: sorted, apart
    /// from each other. Among them may be pages of regions that were removed meanwhile, and pages
    /// that were not written: those of regions that the daemon held for a while without logging.
    /// Empty if the daemon does not log.
    pub fn drain_dirty(&mut self) -> Vec<GuestRange> {
        match &mut self.logging {
            Some(logging) => logging.harvest(false),
            None => Vec::new(),
        }
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
            false => Err(ShareError::LogNotShared),
        }
    }

    /// Whether the daemon has yet to be sent the log for the table that it holds.
    pub(super) fn log_is_due(&self) -> bool {
        self.logging.as_ref().is_some_and(Logging::is_due) && self.held != MemoryTable::default()
    }

    /// The daemon is to be told of these regions.
    pub(super) fn expect_unlogged(&mut self, regions: &[TableRegion]) {
        if let Some(logging) = &mut self.logging {
            logging.expect_unlogged(regions.iter().map(TableRegion::range));
        }
    }

    /// Guest addresses that the daemon holds and is to hold by another region: it may be using
    /// them already when it gets that one, and logs there only once the log has followed.
    pub(super) fn mark_what_is_mapped_anew(&self, additions: &[GuestRange]) {
        if let Some(logging) = &self.logging {
            let held = self.held.regions();
            let known = |new: &GuestRange| held.iter().any(|held| held.range().overlaps(new));
            logging.mark(additions.iter().copied().filter(known));
        }
    }

    /// The daemon is to replace all of its regions, those that stay included.
    pub(super) fn mark_what_stays(&self, next: &MemoryTable) {
        if let Some(logging) = &self.logging {
            let held = self.held.regions().iter();
            let stay = held.filter(|region| next.contains(region));
            logging.mark(stay.map(TableRegion::range));
        }
    }
}
