//! Whether another process is dead.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

/// `/proc/PID/stat`, which stands for its process also when the number is another's.
#[derive(Debug)]
pub(crate) struct Stat(File);

impl Stat {
    /// That of the process with this number in our PID namespace, if procfs shows it.
    pub(crate) fn of(id: u32) -> Option<Self> {
        // procfs may count processes as another PID namespace does.
        let own = fs::read_link("/proc/self").ok()?;
        let is_ours = own.as_os_str() == std::process::id().to_string().as_str();
        let file = is_ours.then(|| File::open(format!("/proc/{id}/stat")).ok());
        file.flatten().map(Self)
    }

    /// Whether the process is dead, all of its threads.
    pub(crate) fn is_of_dead(&self) -> bool {
        let mut bytes = [0; 1024];
        match self.0.read_at(&mut bytes, 0) {
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
}
