//! The process of a daemon, and whether it is known to be dead.

use crate::host::process::Stat;

/// The process at the other end of a connection, as a handle that outlives it.
///
/// It is known from the credentials that the kernel adds to a message (`SCM_CREDENTIALS`,
/// unix(7)): they are those of the process that *sent* it. (`SO_PEERCRED` would name the one that
/// called listen(2), which may have been a manager that is long gone.) A process that it made, or
/// that it handed guest RAM on to, is not known.
#[derive(Debug)]
pub(super) struct DaemonProcess {
    id: u32,
    stat: Option<Stat>,
}

impl DaemonProcess {
    /// The process with this number in our PID namespace. Call it while the connection is there:
    /// later the number may be another's.
    ///
    /// If it is another's already, this one is dead. Then [`is_dead`](Self::is_dead) says so once
    /// the other one is dead, too: too late, and never too early.
    pub(super) fn new(id: u32) -> Self {
        Self {
            id,
            stat: Stat::of(id),
        }
    }

    /// Its number, in our PID namespace.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Whether it is known to be dead, all of its threads. Where /proc does not show it, it never
    /// is.
    pub(super) fn is_dead(&self) -> bool {
        self.stat.as_ref().is_some_and(Stat::is_of_dead)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_dead_when_it_is_a_zombie_and_when_it_is_gone() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let process = DaemonProcess::new(child.id());
        assert_eq!(process.id(), child.id());
        assert!(!process.is_dead());
        drop(child.stdin.take());
        // It is not waited for: its end closes the pipe, and comes soon after.
        let output = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
        assert_eq!(output, "");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !process.is_dead() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(process.is_dead(), "a zombie");
        child.wait().unwrap();
        assert!(process.is_dead(), "gone");
    }

    #[test]
    fn one_that_cannot_be_seen_is_never_known_to_be_dead() {
        // No number is that large (PID_MAX_LIMIT in the kernel).
        assert!(!DaemonProcess::new(1 << 30).is_dead());
    }
}
