//! A daemon in a process of its own, which can be stopped, killed and starved.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest_memory_shm::mock::{MockDaemon, MockDaemonBuilder};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::matrix_case::{DAEMONS, GoesOn, Kind, sessions};
use super::matrix_hypervisor::{limit_address_space, limit_descriptors};
use super::matrix_member::PATIENCE;
use crate::support::Process;

/// Says to this binary, started anew, that it is to be the daemon: where it listens, and its kind.
const SOCKET: &str = "GUEST_MEMORY_SHM_MATRIX_SOCKET";
const KIND: &str = "GUEST_MEMORY_SHM_MATRIX_KIND";

pub(super) fn builder(kind: Kind) -> MockDaemonBuilder {
    assert!(kind.is_daemon());
    let mut builder = MockDaemon::builder().with_disk_size(512);
    if !kind.has_slots() {
        builder = builder.without_mem_slots();
    }
    if !kind.acks() {
        builder = builder.without_reply_ack();
    }
    if kind.goes_on() == Some(GoesOn::Noted) {
        builder = builder.with_inflight();
    }
    builder
}

/// Whether this process was started to be a daemon. If so, it has been one when this returns.
pub(super) fn was_daemon() -> bool {
    let (Some(socket), Ok(kind)) = (std::env::var_os(SOCKET), std::env::var(KIND)) else {
        return false;
    };
    let kind = DAEMONS
        .into_iter()
        .chain(sessions())
        .find(|known| known.to_string() == kind)
        .expect("a kind of daemon");
    let others = memfds();
    let daemon = builder(kind).start(socket).unwrap();
    println!("\nready");
    for order in std::io::stdin().lines() {
        match order.unwrap().as_str() {
            "no descriptors" => {
                settle(&daemon, others);
                limit_descriptors();
            }
            "no memory" => limit_address_space(),
            order => match order.strip_prefix("write ") {
                Some(addresses) => write_to(&daemon, addresses),
                None => panic!("{order:?} is no order"),
            },
        }
        println!("\nready");
    }
    drop(daemon);
    true
}

/// How many descriptors of memfds this process has.
fn memfds() -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap();
    let links = all.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let is_memfd = |link: &PathBuf| link.to_string_lossy().starts_with("/memfd:");
    links.filter(is_memfd).count()
}

/// Waits until the daemon has closed what it was sent and does not keep, or one would be free when
/// there is to be none. `others` are inherited.
fn settle(daemon: &MockDaemon, others: usize) {
    let deadline = Instant::now() + PATIENCE;
    while memfds() != others + daemon.table().len() && Instant::now() < deadline {
        thread::yield_now();
    }
}

/// Writes where it maps something, and says where.
fn write_to(daemon: &MockDaemon, addresses: &str) {
    let writer = daemon.writer().expect("it is connected");
    for address in addresses.split(' ') {
        if writer.write(GuestAddress(address.parse().unwrap())) {
            println!("\nwrote {address}");
        }
    }
}

pub(super) struct DaemonProcess {
    // Before the directory: it is killed first.
    process: Process,
    /// Ends its stop.
    waker: Option<JoinHandle<()>>,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    directory: TempDir,
}

impl DaemonProcess {
    /// Starts this binary with the test whose first act is `was_daemon`.
    pub(super) fn start(test: &str, kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(SOCKET, directory.path().join("socket"))
            .env(KIND, kind.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut this = Self {
            process: Process(child),
            waker: None,
            orders,
            answers,
            directory,
        };
        this.wait_ready();
        this
    }

    pub(super) fn connect(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("socket")).unwrap()
    }

    /// Takes all descriptors or the address space from it that it does not use yet.
    pub(super) fn order(&mut self, what: &str) {
        writeln!(self.orders, "{what}").unwrap();
        self.wait_ready();
    }

    /// Has it write to those of the addresses that it maps, and says which.
    pub(super) fn write(&mut self, addresses: &[u64]) -> Vec<u64> {
        let texts: Vec<_> = addresses.iter().map(u64::to_string).collect();
        writeln!(self.orders, "write {}", texts.join(" ")).unwrap();
        let answers = self.wait_ready();
        let wrote = answers
            .iter()
            .filter_map(|line| line.strip_prefix("wrote "));
        wrote.map(|address| address.parse().unwrap()).collect()
    }

    /// Waits until it is ready for another order; gives what it said before.
    fn wait_ready(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "it died");
            match line.trim_end() {
                "ready" => return said,
                line => said.push(line.to_owned()),
            }
        }
    }

    pub(super) fn pid(&self) -> Pid {
        self.process.pid()
    }

    pub(super) fn stop(&self) {
        self.process.stop();
    }

    pub(super) fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops it now, and kills it while or before it is waited for.
    pub(super) fn kill_soon(&mut self) {
        self.stop_until(Signal::SIGKILL, Duration::ZERO);
    }

    /// Stops it now, and has it go on after this time.
    pub(super) fn pause(&mut self, time: Duration) {
        self.stop_until(Signal::SIGCONT, time);
    }

    fn stop_until(&mut self, signal: Signal, time: Duration) {
        self.process.stop();
        let pid = self.process.pid();
        self.waker = Some(thread::spawn(move || {
            thread::sleep(time);
            kill(pid, signal).unwrap();
        }));
    }
}

impl Drop for DaemonProcess {
    fn drop(&mut self) {
        // Its number may be another's once the process is reaped.
        if let Some(waker) = self.waker.take() {
            waker.join().unwrap();
        }
    }
}
