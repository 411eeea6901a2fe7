//! Changing guest memory under qemu-storage-daemons: `AddressSpace` against the bare messages, as
//! `address_space` has it with daemons in the same process. Needs qemu-storage-daemon.
//!
//! At a reconnection the bare side asks after each region whether the daemon is still there, as a
//! frontend has to that wants to know which one was refused. A whole session is that, with the
//! connection and what is agreed on it.

mod frontend;
mod plug;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use vhost::VhostBackend;

use plug::{Bare, Failure, attach, in_folder, many_regions, memory, print_head, reconnections};

const PROGRAM: &str = "qemu-storage-daemon";
const GIB: usize = 1 << 30;
/// libvhost-user has 509 slots.
const REGIONS: u64 = 500;

fn main() -> Result<(), Failure> {
    if Command::new(PROGRAM).arg("--version").output().is_err() {
        println!("skipped: {PROGRAM} is not installed");
        return Ok(());
    }
    let test = std::env::args().any(|arg| arg == "--test");
    let rounds = std::env::var("ROUNDS").ok();
    let rounds = rounds.and_then(|rounds| rounds.parse().ok());
    let rounds = if test { 3 } else { rounds.unwrap_or(1000) };
    in_folder(|folder| run(folder, rounds, if test { 1 } else { 20 }))
}

fn run(folder: &Path, rounds: usize, reconnections: usize) -> Result<(), Failure> {
    print_head(rounds);
    for count in [1, 4] {
        let start = |side: &str| -> Result<Vec<_>, Failure> {
            let name = |at| folder.join(format!("{side}{count}-{at}"));
            (0..count).map(|at| Daemon::start(&name(at))).collect()
        };
        let (theirs, ours) = (start("bare")?, start("ours")?);
        let memory = memory(GIB)?;
        let bare = Bare::connect(sockets(&theirs)?, &memory)?;
        plug::plug(bare, &attach(sockets(&ours)?, memory)?, rounds)?;
    }
    println!();
    reconnect(folder, reconnections)
}

fn sockets(daemons: &[Daemon]) -> Result<Vec<UnixStream>, Failure> {
    daemons.iter().map(Daemon::connect).collect()
}

/// Daemons that come back to many regions.
fn reconnect(folder: &Path, rounds: usize) -> Result<(), Failure> {
    let start = |name: &str| Daemon::start(&folder.join(name));
    let (bare, ours, session) = (start("bare")?, start("ours")?, start("session")?);
    reconnections(
        &many_regions(REGIONS)?,
        rounds,
        [&|| bare.connect(), &|| ours.connect()],
        &session.socket,
        |frontend| frontend.get_features().map(drop),
    )
}

/// A qemu-storage-daemon that serves an empty image; it ends when this is dropped.
struct Daemon {
    child: Child,
    socket: PathBuf,
    _monitor: BufReader<ChildStdout>,
}

impl Daemon {
    fn start(path: &Path) -> Result<Self, Failure> {
        let (image, socket) = (path.with_extension("img"), path.with_extension("sock"));
        File::create(&image)?.set_len(1 << 20)?;
        let file = format!("driver=file,node-name=disk,filename={}", image.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={}",
            socket.display()
        );
        let mut child = Command::new(PROGRAM)
            .args(["--blockdev", &file, "--export", &export])
            .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().ok_or("it has an output")?;
        let mut monitor = BufReader::new(stdout);
        let daemon = |monitor| Self {
            child,
            socket,
            _monitor: monitor,
        };
        // Its monitor greets when the export is there.
        monitor.read_line(&mut String::new())?;
        Ok(daemon(monitor))
    }

    fn connect(&self) -> Result<UnixStream, Failure> {
        Ok(UnixStream::connect(&self.socket)?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
