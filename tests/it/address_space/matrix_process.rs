//! A daemon in a process of its own, which can be stopped, killed and starved.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};

use guest_memory_shm::mock::{MockDaemon, MockDaemonBuilder};
use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

use super::matrix_case::Kind;
use super::matrix_hypervisor::{limit_address_space, limit_descriptors};
use crate::support::Process;

/// Says to this binary, started anew, that it is to be the daemon: where it listens, and its kind.
const SOCKET: &str = "GUEST_MEMORY_SHM_MATRIX_SOCKET";
const KIND: &str = "GUEST_MEMORY_SHM_MATRIX_KIND";

pub(super) fn builder(kind: Kind) -> MockDaemonBuilder {
    let Kind::Daemon { slots, acks } = kind else {
        unreachable!("{kind} is no daemon");
    };
    let mut builder = MockDaemon::builder().with_disk_size(512);
    if !slots {
        builder = builder.without_mem_slots();
    }
    if !acks {
        builder = builder.without_reply_ack();
    }
    builder
}

/// Whether this process was started to be a daemon. If so, it has been one when this returns.
pub(super) fn was_daemon() -> bool {
    let (Some(socket), Ok(kind)) = (std::env::var_os(SOCKET), std::env::var(KIND)) else {
        return false;
    };
    let kind = super::matrix_case::DAEMONS
        .into_iter()
        .find(|known| known.to_string() == kind)
        .expect("a kind of daemon");
    let daemon = builder(kind).start(socket).unwrap();
    println!("\nready");
    for order in std::io::stdin().lines() {
        match order.unwrap().as_str() {
            "no descriptors" => limit_descriptors(),
            "no memory" => limit_address_space(),
            order => panic!("{order:?} is no order"),
        }
        println!("\nready");
    }
    drop(daemon);
    true
}

pub(super) struct DaemonProcess {
    // Before the directory: it is killed first.
    process: Process,
    killer: Option<JoinHandle<()>>,
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
            killer: None,
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

    fn wait_ready(&mut self) {
        let mut line = String::new();
        while line.trim_end() != "ready" {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "it died");
        }
    }

    pub(super) fn stop(&self) {
        self.process.stop();
    }

    pub(super) fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops it now, and kills it while or before it is waited for.
    pub(super) fn kill_soon(&mut self) {
        self.process.stop();
        let pid = self.process.pid();
        self.killer = Some(thread::spawn(move || {
            kill(pid, Signal::SIGKILL).unwrap();
        }));
    }
}

impl Drop for DaemonProcess {
    fn drop(&mut self) {
        // Its number may be another's once the process is reaped.
        if let Some(killer) = self.killer.take() {
            killer.join().unwrap();
        }
    }
}
