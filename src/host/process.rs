//! Another process, and whether it is known to be dead.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What the kernel says of the process that sent a message.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sender {
    /// Its number in our PID namespace, if it has one there.
    pub(crate) id: Option<u32>,
    /// Its pidfd, or why there is none; `None` before Linux 6.5, which gives none.
    pub(crate) pidfd: Option<Result<Arc<OwnedFd>, Errno>>,
}

/// A process, by a handle that outlives it.
#[derive(Debug)]
pub(crate) struct Process {
    id: Option<u32>,
    handle: Option<Handle>,
}

#[derive(Debug)]
enum Handle {
    Pidfd(Arc<OwnedFd>),
    /// `/proc/PID/stat`, which stands for this process also when the number is another's.
    Stat(File),
}

impl Process {
    /// The process that sent something, if anything is known of it. Call it while the process is
    /// known to live.
    pub(crate) fn of(sender: Sender) -> Option<Self> {
        let Sender { id, pidfd } = sender;
        let handle = match pidfd {
            Some(pidfd) => pidfd.ok().map(Handle::Pidfd),
            None => id.and_then(stat).map(Handle::Stat),
        };
        (id.is_some() || handle.is_some()).then_some(Self { id, handle })
    }

    /// Its number in our PID namespace, if it has one there.
    pub(crate) fn id(&self) -> Option<u32> {
        self.id
    }

    /// Whether it is known to be dead, all of its threads. Without a handle it never is.
    pub(crate) fn is_dead(&self) -> bool {
        match &self.handle {
            Some(Handle::Pidfd(pidfd)) => {
                let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                poll(&mut ended, PollTimeout::ZERO) == Ok(1)
            }
            Some(Handle::Stat(stat)) => {
                let mut bytes = [0; 1024];
                match stat.read_at(&mut bytes, 0) {
                    Ok(read) => is_dead_by(&bytes[..read]),
                    // proc(5) does not say it: what is left of a process that is gone is ESRCH.
                    Err(error) => error.raw_os_error() == Some(Errno::ESRCH as i32),
                }
            }
            None => false,
        }
    }
}

/// `/proc/PID/stat` of the process with this number, if /proc counts as our PID namespace does.
///
/// If the number is another's already, the one that is meant is dead. It is known to be once the
/// other one is dead, too: too late, and never too early.
fn stat(id: u32) -> Option<File> {
    let own = fs::read_link("/proc/self").ok()?;
    let is_ours = own.as_os_str() == process::id().to_string().as_str();
    is_ours.then(|| File::open(format!("/proc/{id}/stat")).ok())?
}

/// Whether this line is that of a zombie of which no thread is left: where only the first thread
/// has ended, the others may write.
fn is_dead_by(stat: &[u8]) -> bool {
    // The name is in parentheses, and may contain some.
    let Some(end) = stat.iter().rposition(|byte| *byte == b')') else {
        return false;
    };
    let rest = String::from_utf8_lossy(&stat[end + 1..]);
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let (state, threads) = (fields.first(), fields.get(17));
    matches!(state, Some(&("Z" | "X"))) && matches!(threads, Some(&("0" | "1")))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_zombie_whose_other_threads_live_is_not_dead() {
        let stat = |state, threads| {
            let fields = ["0"; 16].join(" ");
            format!("1 (a) Z 1 (b)) {state} {fields} {threads} 0 1\n").into_bytes()
        };
        assert!(is_dead_by(&stat("Z", 1)));
        assert!(is_dead_by(&stat("X", 0)));
        assert!(!is_dead_by(&stat("Z", 2)));
        assert!(!is_dead_by(&stat("S", 1)));
        assert!(!is_dead_by(b""));
    }

    /// As Linux before 6.5 has it known.
    fn by_number(id: u32) -> Process {
        let (id, pidfd) = (Some(id), None);
        Process::of(Sender { id, pidfd }).unwrap()
    }

    #[test]
    fn a_process_is_dead_when_it_is_a_zombie_and_when_it_is_gone() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let process = by_number(child.id());
        assert_eq!(process.id(), Some(child.id()));
        assert!(!process.is_dead());
        drop(child.stdin.take());
        // It is not waited for: its end closes the pipe, and comes soon after.
        let output = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
        assert_eq!(output, "");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !process.is_dead() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(process.is_dead(), "a zombie");
        child.wait().unwrap();
        assert!(process.is_dead(), "gone");
    }

    #[test]
    fn one_that_cannot_be_seen_is_never_known_to_be_dead() {
        // No number is that large (PID_MAX_LIMIT in the kernel).
        assert!(!by_number(1 << 30).is_dead());
    }
}
