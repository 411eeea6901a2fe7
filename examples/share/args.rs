//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use guest_memory_shm::{BackingSource, PageSize, RamOptions};

use crate::disk::SECTOR;
use crate::ram::MAX_DAEMONS;

const ABOUT: &str = "\
Shares guest RAM with a vhost-user-blk daemon and copies a disk through it.

Without any option everything happens in this process: guest RAM around a PCI hole, a daemon on \
a real Unix socket, negotiation, the memory table, a region that is hot-added, reads and writes \
through a virtqueue that lives in the shared RAM, each byte compared with the daemon's disk, and \
the removal of the region. The report at the end says what happened.

With --socket the daemon is another process, for example qemu-storage-daemon. Its disk is only \
written by --write-from and --overwrite: without any of those and --read-to the first 64 MiB of \
the disk are read twice, through different regions, and compared (they differ if another process \
writes to the disk meanwhile).

Exit status: 0; 2 where the command line is wrong, 1 after any other error. SIGINT and SIGTERM \
end it at any time, and nothing is left behind.";

const EXAMPLES: &str = "\
Examples (in the source tree, share is: cargo run --release --example share --):
  share
          The self-test in one process.
  share --ram 8G --backing hugetlb
          The same in huge pages (fill /proc/sys/vm/nr_hugepages first).
  share --hotplug 40 --daemons 4
          Adds 40 regions under 4 daemons while each does I/O in all of them, and removes them.
  share --hotplug 40 --daemons 4 --refuse 3
          The same, and the third daemon refuses the region in the middle: then none keeps it.
  share --socket /tmp/blk.sock --hotplug 40
          Under a daemon that is another process, which is only read from.
  share --socket /tmp/scratch.sock --hotplug 40 --overwrite
          The same with a disk that may be overwritten, which is written and read back.
  share --socket /tmp/blk.sock --read-to disk.img
          Copies a daemon's disk to a file.
  share --socket /tmp/blk.sock --write-from disk.img
          Copies a file onto a daemon's disk, and flushes.

A daemon to try it with:
  qemu-storage-daemon --blockdev driver=file,node-name=f,filename=disk.img \\
      --export type=vhost-user-blk,id=e,node-name=f,writable=on,\\
addr.type=unix,addr.path=/tmp/blk.sock

RUST_LOG=debug shows what happens on the way.";

#[derive(Debug, Parser)]
#[command(name = "share", long_about = ABOUT, after_long_help = EXAMPLES, next_line_help = true)]
/// Shares guest RAM with a vhost-user-blk daemon and copies a disk through it
pub(crate) struct Args {
    /// Connect to the daemon that listens on this Unix socket, instead of one in this process
    ///
    /// One that does not listen yet is waited for, until --deadline.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Copy the whole disk to FILE, which appears, or is replaced, when the copy is complete
    #[arg(long, value_name = "FILE", conflicts_with = "write_from")]
    pub(crate) read_to: Option<PathBuf>,

    /// Copy FILE to the start of the disk, and flush
    #[arg(long, value_name = "FILE")]
    pub(crate) write_from: Option<PathBuf>,

    /// Guest RAM, in bytes or with K, M, G or T (powers of 1024)
    ///
    /// A multiple of 2M, at least 4M. It is split in two around a PCI hole: RAM up to 3 GiB at
    /// half its size, larger RAM at 3 GiB. The region of 2 MiB that is hot-added comes on top of
    /// it.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size,
        allow_negative_numbers = true)]
    pub(crate) ram: u64,

    /// What the RAM consists of
    #[arg(long, value_name = "KIND", value_enum, default_value_t = BackingArg::Memfd)]
    pub(crate) backing: BackingArg,

    /// Size of the disk of the daemon in this process [default: 64M, or the size of FILE]
    ///
    /// It begins with a pattern: the 8 bytes at offset x are x times 0x9e3779b97f4a7c15, modulo
    /// 2^64, little-endian.
    #[arg(long, value_name = "SIZE", value_parser = parse_disk, conflicts_with = "socket")]
    pub(crate) disk: Option<u64>,

    /// Hot-add N regions of 2 MiB one after the other, use each for I/O, and remove them again,
    /// while I/O runs
    ///
    /// Every byte that is read is compared. A daemon that takes whole memory tables only, or few
    /// memory slots, makes the region that exceeds them fail.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=4096),
        conflicts_with_all = ["read_to", "write_from"])]
    pub(crate) hotplug: Option<u64>,

    /// How many daemons share the RAM, with --hotplug: 1 to 16
    ///
    /// With --socket, the first is the one that listens there, the others are in this process.
    #[arg(long, value_name = "M", default_value = "1", requires = "hotplug",
        value_parser = clap::value_parser!(u64).range(1..=MAX_DAEMONS as u64))]
    pub(crate) daemons: u64,

    /// With --hotplug and --socket, write to that daemon's disk, too: its contents are lost
    #[arg(long, requires = "hotplug", requires = "socket")]
    pub(crate) overwrite: bool,

    /// Have the K-th daemon refuse the region in the middle: one in this process
    #[arg(long, value_name = "K", requires = "hotplug")]
    pub(crate) refuse: Option<u64>,

    /// Have the kernel end this process at any system call but those that it needs from then on
    ///
    /// A seccomp filter, as VMMs have one, in all threads: installed when RAM, files and the
    /// daemons in this process are there, before any daemon is connected to.
    #[arg(long)]
    pub(crate) sandbox: bool,

    /// How long the daemon may take to be there, and for each answer
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = parse_seconds,
        allow_negative_numbers = true)]
    pub(crate) deadline: Duration,
}

/// The kinds of RAM by the names of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackingArg {
    /// A memfd, sealed: no daemon can truncate it
    Memfd,
    /// POSIX shared memory, as QEMU's memory-backend-shm
    Shm,
    /// A sealed memfd of huge pages of 2 MiB from the pool
    Hugetlb,
}

impl Args {
    pub(crate) fn ram_options(&self) -> RamOptions {
        let options = RamOptions::new();
        match self.backing {
            BackingArg::Memfd => options.with_backing(BackingSource::Memfd),
            BackingArg::Shm => options.with_backing(BackingSource::PosixShm),
            BackingArg::Hugetlb => options.with_page_size(PageSize::Huge(Some(2 << 20))),
        }
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last().map(|unit| unit.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "give a number of bytes, or one with K, M, G or T".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is more than 2^64 bytes".to_owned())
}

fn parse_disk(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        bytes if bytes > 0 && bytes.is_multiple_of(SECTOR) => Ok(bytes),
        _ => Err(format!(
            "a disk has one or more whole sectors of {SECTOR} bytes"
        )),
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give seconds".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(limit) if !limit.is_zero() => Ok(limit),
        _ => Err("give seconds, more than 0 and less than 2^64".to_owned()),
    }
}
