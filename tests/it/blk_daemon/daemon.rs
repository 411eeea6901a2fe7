//! The example as a process.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::support::{Process, example};

/// For what comes at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running blk_daemon.
pub(crate) struct BlkDaemon {
    process: Process,
    socket: PathBuf,
    /// What it says at its start.
    greeting: String,
    log: Receiver<String>,
    seen: Vec<String>,
}

impl BlkDaemon {
    /// Starts it, and returns when it can be connected to.
    pub(crate) fn start<A: AsRef<OsStr>>(socket: &Path, image: &Path, args: &[A]) -> Self {
        let mut command = command(socket, image);
        Self::spawn(command.args(args), socket)
    }

    /// As [`start`](Self::start), by a command that is or becomes the example.
    pub(crate) fn spawn(command: &mut Command, socket: &Path) -> Self {
        command
            .env("RUST_LOG", "blk_daemon=debug")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let errors = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = mpsc::channel();
        thread::spawn(move || {
            let lines = errors.lines().map_while(Result::ok);
            lines.map(|line| sender.send(line)).all(|sent| sent.is_ok())
        });
        let mut greeting = String::new();
        out.read_line(&mut greeting).unwrap();
        let mut this = Self {
            process: Process(child),
            socket: socket.to_owned(),
            greeting,
            log,
            seen: Vec::new(),
        };
        assert!(this.greeting.starts_with("serving "), "{:?}", this.log());
        this
    }

    pub(crate) fn greeting(&self) -> &str {
        &self.greeting
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until the log has a new line with `text`, which is returned.
    #[track_caller]
    pub(crate) fn wait_for_log(&mut self, text: &str) -> String {
        loop {
            match self.log.recv_timeout(PATIENCE) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(error) => panic!("{error} for {text:?}: {:#?}", self.seen),
            }
        }
    }

    /// All lines of the log until now.
    pub(crate) fn log(&mut self) -> &[String] {
        self.seen.extend(self.log.try_iter());
        &self.seen
    }

    /// Kills it as a crash would; the name of its socket is left behind.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
        assert!(self.socket.exists());
    }

    pub(crate) fn send(&self, signal: Signal) {
        kill(self.process.pid(), signal).unwrap();
    }

    /// Ends it by `signal`, and asserts that it ends well.
    #[track_caller]
    pub(crate) fn end(mut self, signal: Signal) {
        self.send(signal);
        let status = self.wait();
        assert!(status.success(), "{status}: {:#?}", self.seen);
        assert_eq!(status.signal(), None);
        assert!(!self.socket.exists());
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        loop {
            match self.log.recv_timeout(PATIENCE) {
                Ok(line) => self.seen.push(line),
                // It has closed its standard error.
                Err(RecvTimeoutError::Disconnected) => return self.process.0.wait().unwrap(),
                Err(RecvTimeoutError::Timeout) => panic!("it does not end: {:#?}", self.seen),
            }
        }
    }
}

/// The example with a socket and an image, not started.
pub(crate) fn command(socket: &Path, image: &Path) -> Command {
    let mut command = bare_command();
    command.arg("--socket").arg(socket).arg("--file").arg(image);
    command
}

pub(crate) fn bare_command() -> Command {
    let mut command = Command::new(example("blk_daemon"));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs `command` to its end, which comes at once unless it serves; it is killed then.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Output {
    let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process(piped.spawn().unwrap());
    let mut out = process.0.stdout.take().unwrap();
    let mut errors = process.0.stderr.take().unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let (mut out_bytes, mut error_bytes) = (Vec::new(), Vec::new());
        out.read_to_end(&mut out_bytes).unwrap();
        errors.read_to_end(&mut error_bytes).unwrap();
        sender.send((out_bytes, error_bytes))
    });
    let printed = receiver.recv_timeout(PATIENCE);
    let (stdout, stderr) = printed.unwrap_or_else(|_| panic!("{command:?} does not end"));
    Output {
        status: process.0.wait().unwrap(),
        stdout,
        stderr,
    }
}
