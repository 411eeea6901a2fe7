//! What several tests need: peers that may be missing, and processes.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

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

/// The binary of an example. `cargo test` builds it before the tests; `cargo test --test it` does
/// not.
pub(crate) fn example(name: &str) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    // target/<profile>/deps/it-0123
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let binary = profile.join("examples").join(name);
    if !binary.is_file() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--example", name, "--target-dir"]);
        cargo.arg(profile.parent().unwrap());
        match profile.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => {}
            Some(name) => drop(cargo.args(["--profile", name])),
        }
        let manifest = env!("CARGO_MANIFEST_DIR");
        assert!(cargo.current_dir(manifest).status().unwrap().success());
    }
    assert!(binary.is_file(), "{}: build it first", binary.display());
    binary
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

/// Lets this process have as many descriptors as it may; says how many.
pub(crate) fn raise_descriptor_limit() -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    hard
}

/// Whether tests may change the settings of this host: pools of huge pages, switches, control
/// groups. Prints why a test is skipped if not.
pub(crate) fn host_changes() -> bool {
    let allowed = std::env::var_os("HOST_CHANGES").is_some_and(|value| value == "1");
    if !allowed {
        skip("it changes settings of this host, which it may only with HOST_CHANGES=1");
    }
    allowed
}
