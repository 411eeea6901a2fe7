//! A Linux guest in QEMU that has the example `blk_daemon` as its disk, while RAM is plugged and
//! the daemon dies.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::blk_daemon::daemon::BlkDaemon;
use initramfs::Boot;
use machine::Machine;

mod initramfs;
mod machine;

const MIB: u64 = 1 << 20;

/// No multiple of a sector: the guest sees one that is mostly beyond the end of the file.
const IMAGE: u64 = 64 * MIB + 100;

/// How many write side by side, and how much at once.
const JOBS: u64 = 4;
const BLOCK: u64 = 64 << 10;

const PATIENCE: Duration = Duration::from_secs(300);

/// The image, and the guest whose disk it is.
struct Pair {
    image: PathBuf,
    machine: Machine,
}

impl Pair {
    /// Both have the same, the guest writes by all its jobs and flushes, and both have the same,
    /// which is another than before and what was written.
    fn cycle(&mut self, seed: &str) {
        let before = self.agree();
        self.machine.guest(&format!("write_and_flush {seed}"));
        self.check_written(seed);
        assert_ne!(self.agree(), before);
    }

    /// Asserts that the guest reads what is in the image, all of it, and returns its checksum.
    #[track_caller]
    fn agree(&mut self) -> String {
        let image = checksum(&self.image);
        assert_eq!(self.machine.guest("checksum"), image);
        image
    }

    /// Asserts that the image has what the guest wrote, as soon as it has flushed.
    #[track_caller]
    fn check_written(&self, seed: &str) {
        for job in 0..JOBS {
            assert!(self.is_written(seed, job), "{seed} {job}");
        }
        assert_eq!(fs::metadata(&self.image).unwrap().len(), IMAGE);
    }

    /// Whether the image has all that a job of the guest's writes.
    fn is_written(&self, seed: &str, job: u64) -> bool {
        self.has(seed, job, 4 * MIB)
    }

    /// Waits until the image has the first block of the job that writes directly to the disk.
    #[track_caller]
    fn wait_for_first_block(&self, seed: &str) {
        let started = Instant::now();
        while !self.has(seed, JOBS - 1, BLOCK) {
            assert!(started.elapsed() < PATIENCE, "the guest does not write");
            thread::yield_now();
        }
    }

    fn has(&self, seed: &str, job: u64, len: u64) -> bool {
        let mut found = vec![0; usize::try_from(len).unwrap()];
        let file = File::open(&self.image).unwrap();
        let offset = (job * 160 + 16) * BLOCK;
        file.read_exact_at(&mut found, offset).unwrap();
        let line = format!("{seed} {job}\n");
        line.bytes().cycle().zip(found).all(|(a, b)| a == b)
    }
}

/// The checksum of a disk with this image: what is missing of the last sector is zeroes.
fn checksum(image: &Path) -> String {
    let mut bytes = fs::read(image).unwrap();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// Fills the image with pseudo-random bytes.
fn fill(image: &Path) {
    let mut state = 1u64;
    let words = (0..IMAGE.div_ceil(8)).flat_map(|_| {
        // Donald Knuth's MMIX generator; its high bits are good.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state ^ state >> 32).to_le_bytes()
    });
    let bytes: Vec<u8> = words.take(usize::try_from(IMAGE).unwrap()).collect();
    fs::write(image, bytes).unwrap();
}

#[test]
fn a_linux_guest_uses_the_disk_across_plugged_ram_and_a_killed_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let [image, socket] = ["disk.img", "blk.sock"].map(|name| directory.path().join(name));
    fill(&image);
    let Some(boot) = Boot::build(directory.path()) else {
        return;
    };
    let mut daemon = BlkDaemon::start(&socket, &image, &[] as &[&str]);
    let Some(machine) = Machine::boot(&boot, &socket, directory.path()) else {
        return;
    };
    let mut pair = Pair { image, machine };
    assert_eq!(pair.machine.number("sectors"), IMAGE.div_ceil(512));
    assert_eq!(pair.machine.number("queues"), 2);
    assert_eq!(pair.machine.guest("serial"), "disk.img");
    wait_for_features(&mut daemon);
    assert!(!logged(&mut daemon, "memory table with 2 regions"));
    pair.cycle("first");

    // Holes in the image, and zeroes for the guest.
    let blocks = blocks(&pair.image);
    pair.machine
        .guest(&format!("discard {} {}", 32 * MIB, 8 * MIB));
    pair.agree();
    assert!(blocks - self::blocks(&pair.image) >= 8 * MIB / 512);

    // RAM is plugged: the daemon is told, and the guest has the disk's pages there.
    let before = pair.machine.number("memory");
    assert_eq!(pair.machine.number("cached"), 0);
    pair.machine.plug(256 * MIB);
    daemon.wait_for_log("memory table with 2 regions");
    let after = pair.machine.number(&format!("more_than {before}"));
    assert!(after > before, "{before} and {after} KiB");
    pair.cycle("plugged");
    let cached = pair.machine.number("cached") * 4096;
    assert!(cached > IMAGE / 2, "{cached} bytes in what was plugged");

    // The daemon dies in the middle of I/O: the next one goes on.
    pair.machine.guest("start killed");
    pair.wait_for_first_block("killed");
    daemon.kill();
    drop(daemon);
    assert!(!pair.is_written("killed", 3), "it was killed too late");
    let mut daemon = BlkDaemon::start(&socket, &pair.image, &[] as &[&str]);
    pair.machine.guest("finish");
    daemon.wait_for_log("memory table with 2 regions");
    pair.check_written("killed");
    pair.cycle("restarted");
    let cached = pair.machine.number("cached") * 4096;
    assert!(cached > IMAGE / 2, "{cached} bytes in what was plugged");

    pair.machine.end();
    daemon.wait_for_log("the frontend has gone");
    daemon.end(Signal::SIGTERM);
}

/// Waits until the log says that the guest uses the features that this daemon is for. The firmware
/// before it takes fewer.
fn wait_for_features(daemon: &mut BlkDaemon) {
    // FLUSH, MQ, DISCARD, WRITE_ZEROES, INDIRECT_DESC, EVENT_IDX
    let wanted = [9, 12, 13, 14, 28, 29]
        .iter()
        .fold(0, |set, bit| set | 1 << bit);
    loop {
        let line = daemon.wait_for_log("the guest takes the features 0x");
        let (_, digits) = line.rsplit_once("0x").unwrap();
        if u64::from_str_radix(digits, 16).unwrap() & wanted == wanted {
            return;
        }
    }
}

fn logged(daemon: &mut BlkDaemon, text: &str) -> bool {
    daemon.log().iter().any(|line| line.contains(text))
}

/// Blocks of 512 bytes that a file has on its file system.
fn blocks(path: &Path) -> u64 {
    File::open(path).unwrap().sync_all().unwrap();
    fs::metadata(path).unwrap().blocks()
}
