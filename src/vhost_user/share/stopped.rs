//! What a daemon's log reports when it is stopped.

use std::fmt;

use crate::range::GuestRange;

/// What a log reports when it is [stopped](crate::VhostUserShare::stop_log): the last dirty
/// pages, and which daemons may write others that are in no harvest.
///
/// ```
/// use guest_memory_shm::{GuestRange, VhostUserShare};
///
/// /// The last pages to copy, if they are the last.
/// fn last_round(share: &mut VhostUserShare) -> Result<Vec<GuestRange>, String> {
///     let stopped = share.stop_log();
///     match &stopped.former_daemons[..] {
///         [] => Ok(stopped.dirty),
///         [first, ..] => Err(first.to_string()),
///     }
/// }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "it has the last dirty pages"]
#[non_exhaustive]
pub struct StoppedLog {
    /// The pages that are dirty since the last
    /// [`drain_dirty`](crate::VhostUserShare::drain_dirty), as that gives them.
    pub dirty: Vec<GuestRange>,
    /// The daemons whose connection ended while they logged, and that are not known to be dead, in
    /// the order of their ends, each process once. A daemon that closed its end of the connection
    /// is among them, and so is one that has served several connections and lives on.
    ///
    /// What they noted until now is in [`dirty`](Self::dirty). They still map guest RAM and the
    /// log, and what they write from now on is noted where it is not read any more. See that they
    /// are dead before the log is stopped, or count all that they can reach as dirty.
    pub former_daemons: Vec<FormerDaemon>,
}

/// A daemon whose connection ended while it logged, and that may still write to guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FormerDaemon {
    /// The number of its process in our PID namespace, if it is known: of the one that answered
    /// the log.
    pub process: Option<u32>,
    /// Why its connection ended.
    pub reason: String,
}

impl fmt::Display for FormerDaemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.process {
            Some(process) => write!(f, "the daemon in process {process}")?,
            None => f.write_str("a daemon in an unknown process")?,
        }
        write!(
            f,
            " may still write to guest RAM: see that it is dead (its connection ended: {})",
            self.reason
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_former_daemon_says_who_and_why() {
        let mut daemon = FormerDaemon {
            process: Some(12),
            reason: "it was silent".to_owned(),
        };
        let text = "the daemon in process 12 may still write to guest RAM: see that it is dead \
                    (its connection ended: it was silent)";
        assert_eq!(daemon.to_string(), text);
        daemon.process = None;
        assert!(
            daemon
                .to_string()
                .starts_with("a daemon in an unknown process may")
        );
    }
}
