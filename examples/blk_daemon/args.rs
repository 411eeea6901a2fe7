//! The command line.

use std::path::PathBuf;

use clap::Parser;

const ABOUT: &str = "\
Serves a disk image to a guest as a vhost-user-blk daemon.

The guest reads, writes, flushes, discards and zeroes the image through the RAM that its VMM \
shares with this process. One frontend is served after the other: one that hangs up or dies is \
no error, and a VMM that connects again continues where it was. SIGINT and SIGTERM end the \
daemon: what is under way is finished, and the socket is removed. Exit status: 0; 2 where the \
command line is wrong, 1 after any other error.

The size of the image never changes. If it is no multiple of 512 bytes, the disk has one sector \
more than the image has whole sectors: what lies past the end of the file reads as zeroes, and a \
write is refused with an I/O error, as a whole, unless it has nothing but zeroes there. So no \
byte that a guest wrote is ever lost silently.

A flush by the guest reaches the medium (fdatasync). A guest that does not know flushes has each \
write on the medium before it is told that it is done. Discarded sectors are holes in the image, \
where its file system has holes.

The image is locked (flock) against a second blk_daemon; read-only ones may share it. An image \
that may not be written is served read-only.";

const EXAMPLES: &str = "\
Examples (in the source tree, blk_daemon is: cargo run --release --example blk_daemon --):
  blk_daemon --socket /tmp/blk.sock --file disk.img
          Serves disk.img until SIGINT or SIGTERM.
  blk_daemon --socket /tmp/blk.sock --file disk.img --read-only
          The same, but nothing is ever written.

A guest in QEMU with this disk; with reconnect-ms it survives a restart of the daemon:
  qemu-system-x86_64 -M q35,memory-backend=mem -m 512M \\
      -object memory-backend-shm,id=mem,size=512M \\
      -chardev socket,id=c,path=/tmp/blk.sock,reconnect-ms=100 \\
      -device vhost-user-blk-pci,chardev=c ...

Memory and dirty logs that are shorter than their frontend says are refused. A frontend that \
truncates its memory later ends the daemon with SIGBUS: share sealed memfds where that matters. A \
dirty log must be sealed against that, or let itself be sealed.

RUST_LOG=blk_daemon=debug shows frontends, memory tables and failed requests; warnings are shown \
anyway.";

#[derive(Debug, Parser)]
#[command(name = "blk_daemon", next_line_help = true)]
#[command(long_about = ABOUT, after_long_help = EXAMPLES)]
/// Serves a disk image to a guest as a vhost-user-blk daemon
pub(crate) struct Args {
    /// Listen on this Unix socket; what a daemon that died left there is replaced
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// The disk image: a raw file of any size but 0, or a block device
    #[arg(long, value_name = "IMAGE")]
    pub(crate) file: PathBuf,

    /// Never write to the image; the guest is told that the disk is read-only
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Offer up to N queues, 1 to 64; each that is used has a thread
    ///
    /// QEMU uses as many as the guest has CPUs, unless told otherwise, and refuses a daemon that
    /// has fewer.
    #[arg(long, value_name = "N", default_value = "16",
        value_parser = clap::value_parser!(u16).range(1..=64), allow_negative_numbers = true)]
    pub(crate) queues: u16,
}
