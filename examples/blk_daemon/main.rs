//! A vhost-user-blk daemon that serves a disk image to a guest, in QEMU or another VMM.
//! `blk_daemon --help` tells what it can do.
//!
//! How a daemon does it, in the order of the files:
//!
//! - `socket`: the socket that frontends find, and that is gone when the daemon is;
//! - `server`: one frontend after the other, and the end by a signal;
//! - `handler`: what each message does; memory and logs are checked before they are used;
//! - `dirty_log`: the frontend's dirty log; `queue`: the threads that serve queues;
//! - `device`: features, and the requests in a queue;
//! - `request`: one request, every word of which is the guest's and may be wrong;
//! - `buffers`: the request's pieces of guest RAM; no reference to guest RAM is ever made;
//! - `image`: the file that the disk is stored in, and its last, partial sector;
//! - `config`: what the guest is told about the disk; `args`: the command line;
//! - `failure`, `not_offered`, `rim`: what the examples have in common.

mod args;
mod buffers;
mod config;
mod device;
mod dirty_log;
#[path = "../common/failure.rs"]
mod failure;
mod handler;
mod image;
#[path = "../common/not_offered.rs"]
mod not_offered;
mod queue;
mod request;
#[path = "../common/rim.rs"]
mod rim;
mod server;
mod socket;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use nix::sys::signal::SigSet;

use args::Args;
use failure::{Result, Words};
use image::Image;
use server::Ending;
use socket::Socket;

/// The errors of this program's are its own.
const WORDS: Words = &[];

fn main() -> ExitCode {
    rim::run("blk_daemon", "warn", run)
}

fn run(args: &Args) -> Result<()> {
    // Before any other thread exists: all inherit which signals are blocked.
    let signals = server::block_signals()?;
    let image = Arc::new(Image::open(&args.file, args.read_only)?);
    let socket = Arc::new(Socket::bind(&args.socket)?);
    let served = serve(args, &image, &socket, signals);
    socket.remove();
    served
}

fn serve(args: &Args, image: &Arc<Image>, socket: &Arc<Socket>, signals: SigSet) -> Result<()> {
    let ending = Arc::new(Ending::new(socket.listener())?);
    server::end_by(signals, Arc::clone(&ending), Arc::clone(socket))?;
    // For scripts that wait until there is something to connect to; a closed pipe is no error.
    let _ = writeln!(
        std::io::stdout(),
        "serving {}, {} bytes, {}, on {}",
        args.file.display(),
        image.len(),
        if image.read_only() {
            "read-only"
        } else {
            "read-write"
        },
        args.socket.display()
    );
    server::serve(socket.listener(), image, args.queues, &ending)
}
