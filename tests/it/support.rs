//! What several tests need: peers that may be missing, and processes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use guest_memory_shm::{
    AddressSpace, AddressSpaceError, AttachError, ChangeReport, Error, ListenerId, MemoryListener,
    ResourceLimit,
};
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

/// A change that no listener may miss.
pub(crate) trait ToldAll {
    fn told_all(self);
}

impl<B> ToldAll for Result<ChangeReport<B>, AddressSpaceError> {
    #[track_caller]
    fn told_all(self) {
        match self {
            Ok(report) => assert!(report.stale().is_empty(), "{:?}", report.stale()),
            Err(error) => panic!("{error}"),
        }
    }
}

/// The error and its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    // One that names itself as its cause has no end.
    let texts: Vec<_> = causes.take(40).map(ToString::to_string).collect();
    texts.join(": ")
}

/// Attaches a listener that is required, or not.
pub(crate) fn attach_as<L: MemoryListener>(
    space: &AddressSpace,
    name: impl Into<String>,
    required: bool,
    listener: L,
) -> Result<ListenerId<L>, AttachError<L>> {
    match required {
        true => space.attach_required(name, listener),
        false => space.attach(name, listener),
    }
}

/// Whether tests may change this machine's settings: pools of huge pages, switches in sysfs,
/// control groups. Prints why the test is skipped if not.
///
/// They may with `HOST_CHANGES=1`, as in CI; nobody who runs `cargo test` has asked for it.
pub(crate) fn host_changes() -> bool {
    let may = may_change_host();
    if !may {
        skip(NO_HOST_CHANGES);
    }
    may
}

/// As [`host_changes`], but without a word.
pub(crate) fn may_change_host() -> bool {
    std::env::var_os("HOST_CHANGES").is_some_and(|value| value == "1")
}

/// Why a test that changes the host is skipped.
pub(crate) const NO_HOST_CHANGES: &str =
    "it changes settings of this machine, which needs HOST_CHANGES=1";

/// The binary of an example, as its sources are now.
///
/// `cargo test` builds it before the tests; `cargo test --test it` does not, so it is built here
/// if it is missing or older than a source. Where that cannot be done, the one that is there is
/// used.
pub(crate) fn example(name: &str) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    // target/<profile>/deps/it-0123
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let binary = profile.join("examples").join(name);
    if is_older_than_its_sources(&binary) {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--example", name, "--target-dir"]);
        cargo.arg(profile.parent().unwrap());
        match profile.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => {}
            Some(name) => drop(cargo.args(["--profile", name])),
        }
        match cargo.current_dir(top()).status() {
            Ok(status) => assert!(status.success(), "{cargo:?}: {status}"),
            Err(error) => eprintln!("{} is old, {cargo:?}: {error}", binary.display()),
        }
    }
    assert!(binary.is_file(), "{}: build it first", binary.display());
    binary
}

/// Whether cargo would build `binary` again, by what it wrote beside it: a line that names the
/// binary and its sources, with a backslash before spaces in names.
fn is_older_than_its_sources(binary: &Path) -> bool {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified());
    let (Ok(built), Ok(line)) = (
        modified(binary),
        std::fs::read_to_string(binary.with_extension("d")),
    ) else {
        return true;
    };
    let sources = line.split_once(": ").map_or("", |(_, sources)| sources);
    let sources = sources.trim_end().replace("\\ ", "\n").replace(' ', "\0");
    let all = sources
        .split('\0')
        .map(|source| PathBuf::from(source.replace('\n', " ")));
    all.chain(["Cargo.toml", "Cargo.lock"].map(|file| top().join(file)))
        .any(|source| modified(&source).is_ok_and(|modified| modified > built))
}

/// The top of the source tree, where the examples are.
pub(crate) fn top() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
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

/// Lets this process, and what it starts, have `wanted` descriptors, or prints why the test is
/// skipped.
///
/// The soft limit is 1,024 nearly everywhere (`ulimit -n`); the hard one, up to which a process
/// may raise it, is larger on most machines.
pub(crate) fn may_have_descriptors(wanted: u64) -> bool {
    // Another thread may raise it, too, and must not lower it.
    static RAISING: Mutex<()> = Mutex::new(());
    let _one = RAISING.lock().unwrap_or_else(PoisonError::into_inner);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if hard < wanted {
        skip(&format!(
            "it needs {wanted} descriptors, and the hard limit is {hard} (ulimit -Hn)"
        ));
        return false;
    }
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).unwrap();
    }
    true
}

#[test]
fn an_example_is_built_again_when_a_source_is_newer() {
    let place = tempfile::tempdir().unwrap();
    let [binary, source] = ["example", "a source.rs"].map(|name| place.path().join(name));
    let built = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    let write = |path: &Path, text: &str, at| {
        std::fs::write(path, text).unwrap();
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(at)
            .unwrap();
    };
    write(&binary, "", built);
    assert!(
        is_older_than_its_sources(&binary),
        "it is not said what it is made of"
    );
    let escaped = source.to_str().unwrap().replace(' ', "\\ ");
    let line = format!("{}: /gone.rs {escaped}\n", binary.display());
    write(&binary.with_extension("d"), &line, built);
    write(&source, "", built);
    assert!(!is_older_than_its_sources(&binary));
    write(&source, "", built + std::time::Duration::from_secs(1));
    assert!(is_older_than_its_sources(&binary));
}

/// The huge pages that are short by an error: how many are needed, and how many can be had.
pub(crate) fn huge_pages_short(error: &Error) -> Option<(u64, u64)> {
    let short = error.shortage()?;
    match short.limit {
        ResourceLimit::HugePages { page_size, .. } => {
            Some((short.needed / page_size, short.left / page_size))
        }
        _ => None,
    }
}

/// The room in a file system that is short by an error, in bytes: needed, and free.
pub(crate) fn room_short(error: &Error) -> Option<(u64, u64)> {
    let short = error.shortage()?;
    let is_room = matches!(short.limit, ResourceLimit::FileSystem { .. });
    is_room.then_some((short.needed, short.left))
}

/// All files of Rust below a folder.
pub(crate) fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let all = entries.flat_map(|path| match path.is_dir() {
        true => sources(&path),
        false => vec![path],
    });
    all.filter(|path| path.extension().is_some_and(|ext| ext == "rs"))
        .collect()
}
