//! A vhost-user-blk daemon that serves a disk image to a guest, in QEMU or another VMM.
//! `blk_daemon --help` tells what it can do.
//!
//! How a daemon does it, in the order of the files:
//!
//! - `socket`: the socket that front-ends find, and that is gone when the daemon is;
//! - `server`: one front-end after the other, and the end by a signal;
//! - `device`: features, the memory that a front-end shares, queues and their threads;
//! - `request`: one request, every word of which is the guest's and may be wrong;
//! - `buffers`: the request's pieces of guest RAM; no reference to guest RAM is ever made;
//! - `image`: the file behind the disk, and its last, partial sector;
//! - `config`: what the guest is told about the disk; `args` and `share`'s `failure`: the rim.

mod args;
mod buffers;
mod config;
mod device;
#[path = "../share/failure.rs"]
mod failure;
mod image;
mod request;
mod server;
mod socket;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;

use args::Args;
use failure::{Failure, OrFail, Result};
use image::Image;
use server::Ending;
use socket::Socket;

fn main() -> ExitCode {
    let log = env_logger::Env::default().default_filter_or("warn");
    env_logger::Builder::from_env(log).init();
    let done = match Args::try_parse() {
        Ok(args) => run(&args),
        Err(help) if !help.use_stderr() => help.print().or_fail(|| "cannot print the help"),
        Err(error) => Err(usage(&error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Where even that fails, the exit status is all that is left to say.
            let _ = writeln!(std::io::stderr(), "blk_daemon: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    // Before any other thread exists: all inherit which signals are blocked.
    let signals = server::block_signals()?;
    let image = Arc::new(Image::open(&args.file, args.read_only)?);
    let socket = Socket::bind(&args.socket)?;
    let ending = Arc::new(Ending::new(socket.listener())?);
    server::end_by(signals, Arc::clone(&ending))?;
    // For whoever waits until there is something to connect to; nobody need listen.
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
    server::serve(socket.listener(), &image, args.queues, &ending)
}

/// What clap says on several lines, on one.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let paragraph = text.lines().take_while(|line| !line.trim().is_empty());
    let line = paragraph.map(str::trim).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    Failure::new(format!("{line}; see blk_daemon --help"))
}
