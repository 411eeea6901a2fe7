//! Another process, and whether it is known to be dead.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process;

use nix::errno::Errno;

/// A process, by a handle that outlives it.
#[derive(Debug)]
pub(crate) struct Process {
    id: u32,
    /// `/proc/PID/stat`, which stands for this process also when the number is another's.
    stat: Option<File>,
}

impl Process {
    /// The process with this number in our PID namespace. Call it while the process is known to
    /// live: later the number may be another's.
    ///
    /// If it is another's already, this one is dead. Then [`is_dead`](Self::is_dead) says so once
    /// the other one is dead, too: too late, and never too early.
    pub(crate) fn new(id: u32) -> Self {
        // procfs may count processes as another PID namespace does.
        let own = fs::read_link("/proc/self").ok();
        let is_ours = own.is_some_and(|own| own.as_os_str() == process::id().to_string().as_str());
        let stat = is_ours.then(|| File::open(format!("/proc/{id}/stat")).ok());
        let stat = stat.flatten();
        Self { id, stat }
    }

    /// Its number, in our PID namespace.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Whether it is known to be dead, all of its threads. Where /proc does not show it, it never
    /// is.
    pub(crate) fn is_dead(&self) -> bool {
        let Some(stat) = &self.stat else {
            return false;
        };
        let mut bytes = [0; 1024];
        match stat.read_at(&mut bytes, 0) {
            Ok(read) => is_dead_by(&bytes[..read]),
            // proc(5) does not say it: what is left of a process that is gone is ESRCH.
            Err(error) => error.raw_os_error() == Some(Errno::ESRCH as i32),
        }
    }
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

    #[test]
    fn a_process_is_dead_when_it_is_a_zombie_and_when_it_is_gone() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::new(child.id());
        assert_eq!(process.id(), child.id());
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
        assert!(!Process::new(1 << 30).is_dead());
    }
}
