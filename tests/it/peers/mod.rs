//! The example `share` as a person runs it: in one process, and against qemu-storage-daemon.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use guest_memory_shm::mock::{Fault, LoggedRequest, MockDaemon, MockDaemonBuilder};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::isolation::HugePool;
use crate::support::{self, StorageDaemon};

mod copies;
mod daemons;
mod errors;
mod hotplug;
mod sandbox;
mod signals;

const MIB: u64 = 1 << 20;
const DISK: u64 = 256 * MIB;
/// For runs that must end by themselves much sooner.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a run of the example left.
struct Run {
    pid: u32,
    status: ExitStatus,
    out: String,
    errors: String,
}

impl Run {
    /// Runs `command`, which is or becomes the example, to its end.
    fn of(command: &mut Command) -> Run {
        let piped = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = piped.spawn().unwrap();
        let pid = child.id();
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || sender.send(child.wait_with_output()));
        let output = match receiver.recv_timeout(PATIENCE) {
            Ok(output) => output.unwrap(),
            Err(_) => {
                kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
                panic!("{command:?} does not end");
            }
        };
        Run {
            pid,
            status: output.status,
            out: String::from_utf8(output.stdout).unwrap(),
            errors: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    fn passes(&self) {
        assert!(self.status.success(), "{}", self.errors);
        assert_eq!(self.errors, "");
        self.check_left_nothing();
    }

    /// Asserts that it failed with one line that contains all of `texts`, and left nothing.
    #[track_caller]
    fn fails_with(&self, texts: &[&str]) {
        self.ends_with(1, texts);
    }

    /// As [`fails_with`](Self::fails_with), because of its command line.
    #[track_caller]
    fn is_misused(&self, texts: &[&str]) {
        self.ends_with(2, texts);
    }

    #[track_caller]
    fn ends_with(&self, code: i32, texts: &[&str]) {
        let line = self.errors.trim_end_matches('\n');
        assert_eq!(self.status.code(), Some(code), "{line}");
        assert!(
            line.starts_with("share: ") && !line.contains('\n'),
            "{line}"
        );
        for text in texts {
            assert!(line.contains(text), "no {text:?} in: {line}");
        }
        // What only a program can do helps no one at a shell.
        for name in ["::", "with_"] {
            assert!(!line.contains(name), "{name} in: {line}");
        }
        assert_eq!(self.out, "");
        self.check_left_nothing();
    }

    /// Its POSIX shared memory would have its process id in its name.
    #[track_caller]
    fn check_left_nothing(&self) {
        let ours = format!("gms-{}-", self.pid);
        let names = names_in(Path::new("/dev/shm"));
        assert!(
            !names.iter().any(|name| name.starts_with(&ours)),
            "{names:?}"
        );
    }
}

/// A directory for a test, in which the example keeps its own directory too.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(TempDir::with_prefix("gms-peers-").unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn share(&self) -> Command {
        let mut command = Command::new(support::example("share"));
        command.env("TMPDIR", self.0.path()).env_remove("RUST_LOG");
        command
    }

    /// What is in it, sorted.
    fn names(&self) -> Vec<String> {
        names_in(self.0.path())
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Creates a file of `len` pseudo-random bytes; each 4 KiB of it, and each seed, are different.
fn random_file(path: &Path, len: u64, seed: u64) {
    let mut state = seed;
    let mut block = Vec::new();
    // Sebastiano Vigna's splitmix64.
    for _ in 0..MIB / 8 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        block.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    let mut file = File::create(path).unwrap();
    let mut offset = 0;
    while offset < len {
        for (index, page) in (0u64..).zip(block.chunks_mut(4096)) {
            page[..8].copy_from_slice(&(offset + index).to_le_bytes());
        }
        let part = usize::try_from((len - offset).min(MIB)).unwrap();
        file.write_all(&block[..part]).unwrap();
        offset += part as u64;
    }
}

/// Whether two files hold the same bytes; none of them need fit in memory.
fn same(one: &Path, other: &Path) -> bool {
    let (mut one, mut other) = (File::open(one).unwrap(), File::open(other).unwrap());
    let len = one.metadata().unwrap().len();
    if other.metadata().unwrap().len() != len {
        return false;
    }
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for start in (0..len).step_by(1 << 20) {
        let part = usize::try_from((len - start).min(MIB)).unwrap();
        one.read_exact(&mut a[..part]).unwrap();
        other.read_exact(&mut b[..part]).unwrap();
        if a[..part] != b[..part] {
            return false;
        }
    }
    true
}
