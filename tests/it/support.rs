//! What several tests need: peers that may be missing, and a look at this process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The path of a program that a test needs, or `None` after printing why the test is skipped.
///
/// With `REQUIRE_PEERS` set, as in CI, a missing program is a failure.
pub(crate) fn peer(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file());
    if found.is_none() {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Prints why a test is skipped; fails where everything is required.
pub(crate) fn skip(reason: &str) {
    assert!(
        std::env::var_os("REQUIRE_PEERS").is_none(),
        "REQUIRE_PEERS is set, but {reason}"
    );
    eprintln!("skipped: {reason}");
}

/// Held by tests that change or count something that belongs to the whole machine or the whole
/// process: huge pages, descriptors, mappings.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed while it held it has been reported already.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends and reaps a process that a test started, however the test ends.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap())
    }

    /// Stops it; when this returns it does not run any more.
    pub(crate) fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        let status = waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(status, WaitStatus::Stopped(self.pid(), Signal::SIGSTOP));
    }

    /// Kills it; when this returns it is gone.
    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A qemu-storage-daemon that serves an image by vhost-user-blk.
pub(crate) struct StorageDaemon {
    pub(crate) process: Process,
    pub(crate) socket: PathBuf,
    /// Keeps its monitor open.
    _monitor: BufReader<ChildStdout>,
}

impl StorageDaemon {
    /// Serves `image`, with at most `bytes_per_second` if given. `None`: it is not installed, and
    /// the test is to be skipped.
    pub(crate) fn start(image: &Path, bytes_per_second: Option<u64>) -> Option<Self> {
        let program = peer("qemu-storage-daemon")?;
        let socket = image.with_extension("sock");
        let mut command = Command::new(program);
        if let Some(rate) = bytes_per_second {
            let group = format!("throttle-group,id=slow,x-bps-total={rate}");
            command.args(["--object", &group]);
        }
        let file = format!("driver=file,node-name=file,filename={}", image.display());
        command.args(["--blockdev", &file]);
        let node = match bytes_per_second {
            Some(_) => "driver=throttle,node-name=disk,throttle-group=slow,file=file",
            None => "driver=raw,node-name=disk,file=file",
        };
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable=on",
            socket.display()
        );
        // Its monitor greets when the export is there: no need to look for the socket.
        let mut child = command
            .args(["--blockdev", node, "--export", &export])
            .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut monitor = BufReader::new(child.stdout.take().unwrap());
        let process = Process(child);
        let mut greeting = String::new();
        monitor.read_line(&mut greeting).unwrap();
        assert!(greeting.contains("QMP"), "{greeting}");
        Some(Self {
            process,
            socket,
            _monitor: monitor,
        })
    }
}

/// Runs the rest of the calling test in a process of its own: true there, and false, after it has
/// passed there, in the process that called.
///
/// For tests that count what belongs to the whole process while other tests run beside them.
pub(crate) fn in_own_process(test: &str) -> bool {
    const INSIDE: &str = "GUEST_MEMORY_SHM_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "no test is named {test}: {text}");
    false
}

/// More huge pages of 2 MiB than before, until it is dropped.
///
/// Nobody else changes or counts the pool meanwhile: neither a test of this process nor one of
/// another, as far as it takes the same lock.
pub(crate) struct HugePages {
    before: String,
    _file: Flock<File>,
    _alone: MutexGuard<'static, ()>,
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Adds `pages` to the pool. `None`: that cannot be, and the test is to be skipped.
    pub(crate) fn add(pages: u64) -> Option<Self> {
        let alone = alone();
        let lock = std::env::temp_dir().join("guest-memory-shm-hugepages.lock");
        let file = File::create(lock).unwrap();
        let file = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| e)
            .unwrap();
        let Ok(before) = fs::read_to_string(POOL) else {
            skip("there are no huge pages of 2 MiB");
            return None;
        };
        let wanted = before.trim().parse::<u64>().unwrap() + pages;
        if let Err(error) = fs::write(POOL, wanted.to_string()) {
            skip(&format!(
                "the pool of huge pages cannot be changed: {error}"
            ));
            return None;
        }
        let pool = Self {
            before,
            _file: file,
            _alone: alone,
        };
        let got: u64 = fs::read_to_string(POOL).unwrap().trim().parse().unwrap();
        if got < wanted {
            skip(&format!(
                "the pool has {got} huge pages, {wanted} are needed"
            ));
            return None;
        }
        Some(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, &self.before) {
            eprintln!("the pool of huge pages stays as it is: {error}");
        }
    }
}

/// Lets this process have as many descriptors as it may; says how many.
pub(crate) fn raise_descriptor_limit() -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    hard
}
