//! The daemon's dirty log, with the features and rings that belong to it.

use vhost::vhost_user::VhostUserProtocolFeatures as Features;

use super::VhostUserSession;
use super::error::{Result, SessionError};
use super::options::LOG_ALL;
use super::ring::SessionRing;
use crate::logs;
use crate::range::GuestRange;
use crate::vhost_user::share::StoppedLog;
use crate::vhost_user::wire::{DaemonRequest, Message};

impl VhostUserSession {
    /// Has the daemon log what it writes from now on, in memory and used rings, across changes of
    /// the memory and reconnections: [`VhostUserShare::start_log`], and the features and rings.
    ///
    /// [`VhostUserShare::start_log`]: crate::VhostUserShare::start_log
    ///
    /// # Errors
    ///
    /// [`SessionError::NotOffered`] without `VHOST_F_LOG_ALL` or LOG_SHMFD;
    /// [`SessionError::Share`], as for [`VhostUserShare::start_log`].
    pub fn start_log(&mut self) -> Result<()> {
        self.check_there()?;
        self.check_logs()?;
        self.check_feature(Features::LOG_SHMFD, "LOG_SHMFD")?;
        self.share.start_log()?;
        let told = self.tell_log(true);
        if told.is_err() {
            // What was noted until now is of no use to one who thinks that it is not logged.
            drop(self.share.stop_log());
        }
        told
    }

    /// Takes what the daemon wrote since the last time:
    /// [`VhostUserShare::drain_dirty`](crate::VhostUserShare::drain_dirty).
    pub fn drain_dirty(&mut self) -> Vec<GuestRange> {
        self.share.drain_dirty()
    }

    /// Ends logging: [`VhostUserShare::stop_log`](crate::VhostUserShare::stop_log). A daemon that
    /// cannot be told of it may go on logging, where nobody reads it.
    pub fn stop_log(&mut self) -> StoppedLog {
        let is_there = self.share.broken().is_none() && self.restart.is_none();
        if self.share.is_logging()
            && is_there
            && let Err(error) = self.tell_log(false)
        {
            logs::warn!("the daemon may go on logging: {error}");
        }
        self.agreed.features &= !LOG_ALL;
        self.share.stop_log()
    }

    /// Whether the daemon can be told to log.
    pub(super) fn check_logs(&self) -> Result<()> {
        let what = "VHOST_F_LOG_ALL";
        match self.agreed.logs {
            true => Ok(()),
            false => Err(SessionError::NotOffered { what }),
        }
    }

    /// The features, with the one by which the daemon logs.
    pub(super) fn log_features(&mut self) -> Message {
        self.agreed.features |= LOG_ALL;
        self.agreed.set_features()
    }

    /// Says the features once more, with or without the log; with it, also where the rings are.
    fn tell_log(&mut self, logs: bool) -> Result<()> {
        let mut all = Vec::new();
        if logs {
            all.push(self.log_features());
            let (table, reply) = (self.share.table(), self.reply());
            let runs = |_: &(&u32, &SessionRing)| !self.needs_reset;
            for (index, ring) in self.rings.iter().filter(runs) {
                all.push(ring.addresses(*index, table, logs, reply)?);
            }
        } else {
            self.agreed.features &= !LOG_ALL;
            all.push(self.agreed.set_features());
        }
        self.tell(all, DaemonRequest::Negotiate)
    }
}
