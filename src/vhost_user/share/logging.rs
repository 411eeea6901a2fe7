//! The state of a daemon's log, and of daemons whose connections ended while they logged.

use super::error::Result;
use super::log::DaemonLog;
use super::stopped::{FormerDaemon, StoppedLog};
use crate::host::process::{Process, Sender};
use crate::range::GuestRange;
use crate::vhost_user::table::MemoryTable;

/// That a daemon is to log.
#[derive(Debug, Default)]
pub(super) struct Logging {
    /// Absent until there was a region.
    log: Option<DaemonLog>,
    /// The size with which the daemon took it, on this connection: 0 if it has not.
    taken: u64,
    /// The daemon took it after it took the table that it holds.
    settled: bool,
    /// Regions that the daemon may hold, and may not log yet.
    unlogged: Vec<GuestRange>,
    /// The daemon was told of a region, on this connection.
    reaches_ram: bool,
    /// The daemon's process, as far as it is known.
    process: Option<Process>,
    /// Those whose connections have ended, and that are not known to be dead.
    former: Vec<Former>,
}

/// A daemon whose connection has ended.
#[derive(Debug)]
struct Former {
    reason: String,
    process: Option<Process>,
    /// What it may have written without logging it, when the connection ended and later.
    unlogged: Vec<GuestRange>,
    /// That was harvested, as it was when the connection ended.
    is_counted: bool,
}

impl Former {
    fn id(&self) -> Option<u32> {
        self.process.as_ref().and_then(Process::id)
    }

    fn is_dead(&self) -> bool {
        self.process.as_ref().is_some_and(Process::is_dead)
    }
}

impl Logging {
    /// The state of a daemon that is to log, and that can reach RAM already, or not.
    pub(super) fn new(reaches_ram: bool) -> Self {
        Self {
            reaches_ram,
            ..Self::default()
        }
    }

    /// The log, if there was a region.
    pub(super) fn log(&self) -> Option<&DaemonLog> {
        self.log.as_ref()
    }

    /// Whether the daemon has yet to be sent the log for the table that it holds.
    pub(super) fn is_due(&self) -> bool {
        !self.settled
    }

    /// Makes the log long enough for `next`, which is to be sent to a daemon that holds `held`.
    /// Says whether the daemon needs it first.
    pub(super) fn prepare(&mut self, held: &MemoryTable, next: &MemoryTable) -> Result<bool> {
        let needed = DaemonLog::size_for(next);
        match &mut self.log {
            Some(log) => log.grow(needed)?,
            log @ None if needed > 0 => *log = Some(DaemonLog::new(needed)?),
            None => {}
        }
        if let Some(log) = &mut self.log {
            // From before it is told of them, and whatever it answers.
            log.watch(held);
            log.watch(next);
        }
        Ok(self.taken < needed)
    }

    /// The daemon took the log with this size, and is the process that said so.
    pub(super) fn take(&mut self, size: u64, daemon: Sender) {
        self.taken = size;
        // Now, while the connection is there: later the number may be another's.
        self.process = Process::of(daemon).or(self.process.take());
    }

    /// A table is to be sent: the log has to follow.
    pub(super) fn unsettle(&mut self) {
        self.settled = false;
    }

    /// The daemon is to be told of these regions.
    pub(super) fn expect_unlogged(&mut self, ranges: impl Iterator<Item = GuestRange>) {
        self.reaches_ram = true;
        self.unlogged.extend(ranges);
    }

    /// The connection has ended, or no call is made on it any more.
    pub(super) fn end(&mut self, reason: &str) {
        let process = self.process.take();
        let unlogged = std::mem::take(&mut self.unlogged);
        // It is noted once, and only if there is something that it could write to.
        if std::mem::take(&mut self.reaches_ram) {
            self.note_former(Former {
                reason: reason.to_owned(),
                process,
                unlogged,
                is_counted: false,
            });
        }
        self.taken = 0;
        self.settled = false;
    }

    fn note_former(&mut self, mut daemon: Former) {
        // One process may lose its connection again and again.
        if let Some(id) = daemon.id() {
            let before = |known: &mut Former| known.id() == Some(id) && !known.is_dead();
            for known in self.former.extract_if(.., before) {
                let more = known.unlogged.into_iter();
                let more: Vec<_> = more.filter(|r| !daemon.unlogged.contains(r)).collect();
                daemon.unlogged.extend(more);
            }
        }
        self.former.push(daemon);
    }

    /// The daemon logs all that it writes.
    pub(super) fn settle(&mut self) {
        self.unlogged.clear();
        self.settled = true;
    }

    /// Counts these ranges as written.
    pub(super) fn mark(&self, ranges: impl IntoIterator<Item = GuestRange>) {
        if let Some(log) = &self.log {
            ranges.into_iter().for_each(|range| log.mark(range));
        }
    }

    /// Takes what is dirty, together with what former daemons may have written without noting it:
    /// once when their connections ended, and once more when they are dead, or when this is the
    /// last harvest.
    pub(super) fn harvest(&mut self, is_last: bool) -> Vec<GuestRange> {
        let mut former = std::mem::take(&mut self.former);
        // Before the log is read: what the dead have noted is there.
        former.retain_mut(|daemon| {
            let is_dead = daemon.is_dead();
            if !daemon.is_counted || is_dead || is_last {
                self.mark(daemon.unlogged.iter().copied());
                daemon.is_counted = true;
            }
            !is_dead
        });
        self.former = former;
        if !self.settled {
            self.mark(self.unlogged.iter().copied());
        }
        self.log.as_ref().map(DaemonLog::drain).unwrap_or_default()
    }

    /// Ends logging.
    pub(super) fn stop(mut self) -> StoppedLog {
        let dirty = self.harvest(true);
        let former = self.former.into_iter().map(|daemon| FormerDaemon {
            process: daemon.id(),
            reason: daemon.reason,
        });
        StoppedLog {
            dirty,
            former_daemons: former.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::GuestMemoryShm;
    use crate::vhost_user::table::TableRegion;

    #[test]
    fn what_one_wrote_without_logging_before_it_died_counts_when_its_death_is_known() {
        for is_last in [false, true] {
            let mut command = Command::new("cat");
            let mut daemon = command.stdin(Stdio::piped()).spawn().unwrap();
            let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
            let table = memory.memory_table();
            let mut logging = Logging::new(true);
            logging.prepare(&table, &table).unwrap();
            let (id, pidfd) = (Some(daemon.id()), None);
            logging.take(64, Sender { id, pidfd });
            logging.settle();
            assert_eq!(logging.harvest(false), []);
            logging.unsettle();
            // The log does not follow: until it comes a daemon may log nothing at all.
            logging.expect_unlogged(table.regions().iter().map(TableRegion::range));
            logging.end("gone");

            let whole = [table.regions()[0].range()];
            assert_eq!(logging.harvest(false), whole);
            assert_eq!(logging.harvest(false), [], "it lives on");
            // It writes, and then:
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            if !is_last {
                assert_eq!(logging.harvest(false), whole);
                assert_eq!(logging.harvest(false), [], "once");
            }
            let stopped = logging.stop();
            let last = if is_last { &whole[..] } else { &[] };
            assert_eq!(stopped.dirty, last);
            assert_eq!(stopped.former_daemons, []);
        }
    }
}
