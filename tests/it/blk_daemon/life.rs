//! Frontends that come and go, and the daemon's own end.

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use guest_memory_shm::{GuestRegionShm, RamOptions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::mount::MsFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::unistd::ftruncate;
use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
use vm_memory::GuestAddress;

use super::frontend::{DATA, Guest};
use super::*;
use crate::frontend::agree;
use crate::isolation::{in_own_process, mount_tmpfs, own_mounts};
use crate::support::{Process, example};

#[test]
fn front_ends_are_served_one_after_the_other() {
    let place = Place::new();
    let image = place.image(1 << 20);
    let mut daemon = place.daemon(&image);
    for round in 0..3 {
        let mut guest = Guest::connect(daemon.socket());
        let before = pattern(round, 1 << 20);
        assert!(guest.read(0, 1 << 20).unwrap() == before);
        guest.write(0, &pattern(round + 1, 1 << 20)).unwrap();
        // Without a word, and with requests under way.
        guest.drivers[0].submit_read(0, &[(DATA, 1 << 20)]).unwrap();
        guest.drivers[0].submit_flush().unwrap();
        drop(guest);
        daemon.wait_for_log("the frontend has gone");
    }
    // What a connection held is given back.
    let pid = daemon.process().pid();
    let held = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let shared = || {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        maps.lines().filter(|line| line.contains("memfd:")).count()
    };
    let mut counts = Vec::new();
    for _ in 0..2 {
        let guest = Guest::connect(daemon.socket());
        assert_eq!(shared(), 1);
        counts.push(held());
        drop(guest);
        daemon.wait_for_log("the frontend has gone");
    }
    assert_eq!(counts[0], counts[1]);
    daemon.end(Signal::SIGTERM);
}

#[test]
fn a_front_end_that_is_killed_does_not_take_the_daemon_along() {
    let place = Place::new();
    let image = place.path("disk.img");
    // More than can be copied before it is killed.
    sparse(&image, 1 << 40);
    let mut daemon = place.daemon(&image);
    for text in ["a frontend is here", "memory table with 3 regions"] {
        let child = Command::new(example("share"))
            .arg("--socket")
            .arg(daemon.socket())
            .arg("--read-to")
            .arg(place.path("copy"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut share = Process(child);
        daemon.wait_for_log(text);
        assert!(share.0.try_wait().unwrap().is_none());
        share.kill();
        daemon.wait_for_log("the frontend");
    }
    let mut guest = Guest::connect(daemon.socket());
    guest.write(5, &[5; 512]).unwrap();
    assert_eq!(guest.read(5, 512).unwrap(), [5; 512]);
    daemon.end(Signal::SIGTERM);
}

#[test]
fn the_example_share_copies_its_disk_both_ways_through_plugged_ram() {
    let place = Place::new();
    let image = place.image(12 << 20);
    let daemon = place.daemon(&image);
    let [copy, other] = ["copy", "other"].map(|name| place.path(name));
    fs::write(&other, pattern(1, 12 << 20)).unwrap();
    for (option, file) in [("--read-to", &copy), ("--write-from", &other)] {
        let output = Command::new(example("share"))
            .arg("--socket")
            .arg(daemon.socket())
            .arg(option)
            .arg(file)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
    }
    assert!(fs::read(copy).unwrap() == pattern(0, 12 << 20));
    assert!(fs::read(image).unwrap() == pattern(1, 12 << 20));
    daemon.end(Signal::SIGTERM);
}

#[test]
fn a_region_beyond_the_end_of_its_file_is_refused() {
    let place = Place::new();
    let image = place.image(4096);
    let mut daemon = place.daemon(&image);
    let file = memfd_create("short", MFdFlags::empty()).unwrap();
    ftruncate(&file, 1 << 20).unwrap();
    for (size, offset) in [(2 << 20, 0), (1 << 20, 4096)] {
        let stream = UnixStream::connect(daemon.socket()).unwrap();
        let (frontend, _) = agree(stream, Features::REPLY_ACK).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: size,
            userspace_addr: 0x1000_0000,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        };
        assert!(frontend.set_mem_table(&[region]).is_err());
        let line = daemon.wait_for_log("the frontend was given up");
        assert!(line.contains("cannot adopt a file of 1 MiB"), "{line}");
    }
    assert_eq!(Guest::connect(daemon.socket()).capacity(), 4096);
    daemon.end(Signal::SIGTERM);
}

#[test]
fn signals_end_it_cleanly_whatever_it_does() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let place = Place::new();
        let image = place.image(1 << 20);
        // No frontend is there.
        place.daemon(&image).end(signal);
        // A frontend is there, and goes.
        let daemon = place.daemon(&image);
        drop(Guest::connect(daemon.socket()));
        daemon.end(signal);
        // A frontend is there, and has requests under way.
        let daemon = place.daemon(&image);
        let mut guest = Guest::connect(daemon.socket());
        for part in 0..4 {
            let buffer = (GuestAddress(DATA.0 + part * (256 << 10)), 256 << 10);
            guest.drivers[0]
                .submit_write(part * 512, &[buffer])
                .unwrap();
        }
        daemon.end(signal);
        assert_eq!(fs::metadata(&image).unwrap().len(), 1 << 20);
        // One is connected and says nothing.
        let daemon = place.daemon(&image);
        let _silent = UnixStream::connect(daemon.socket()).unwrap();
        daemon.end(signal);
    }
}

#[test]
fn a_second_signal_kills_it_and_leaves_no_socket_either() {
    let place = Place::new();
    let image = place.image(4096);
    for _ in 0..10 {
        let mut daemon = place.daemon(&image);
        let _silent = UnixStream::connect(daemon.socket()).unwrap();
        // Both arrive at once; it may have ended by the first one before it sees the other.
        daemon.process().stop();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCONT] {
            daemon.send(signal);
        }
        let status = daemon.wait();
        assert!(status.success() || status.signal().is_some(), "{status}");
        assert!(!daemon.socket().exists(), "{status}");
    }
}

#[test]
fn the_socket_of_a_daemon_that_died_is_replaced_and_one_that_is_not_ours_is_left() {
    let place = Place::new();
    let image = place.image(4096);
    let mut daemon = place.daemon(&image);
    daemon.kill();
    let mut daemon = place.daemon(&image);
    assert_eq!(Guest::connect(daemon.socket()).capacity(), 4096);

    fs::remove_file(place.socket()).unwrap();
    fs::write(place.socket(), "another's").unwrap();
    let inode = fs::metadata(place.socket()).unwrap().ino();
    daemon.send(Signal::SIGTERM);
    assert!(daemon.wait().success());
    assert_eq!(fs::metadata(place.socket()).unwrap().ino(), inode);
}

#[test]
fn what_a_killed_daemon_left_undone_is_done_by_the_next() {
    let place = Place::new();
    let image = place.image(1 << 20);
    let mut daemon = place.daemon(&image);
    let mut guest = Guest::connect(daemon.socket());
    guest.write(0, &pattern(1, 4096)).unwrap();
    // From here on it does nothing.
    daemon.process().stop();
    guest.memory.write_slice(&pattern(2, 8192), DATA).unwrap();
    let half = GuestAddress(DATA.0 + 4096);
    let requests = [
        guest.drivers[0].submit_write(8, &[(DATA, 4096)]).unwrap(),
        guest.drivers[0].submit_write(8, &[(half, 4096)]).unwrap(),
        guest.drivers[0].submit_flush().unwrap(),
    ];
    daemon.kill();
    assert!(fs::read(&image).unwrap()[4096..] == pattern(0, 1 << 20)[4096..]);

    let daemon = place.daemon(&image);
    let mut guest = guest.reconnect(daemon.socket());
    for request in requests {
        guest.drivers[0].wait(request).unwrap();
    }
    // In their order.
    let mut expected = pattern(0, 1 << 20);
    expected[..4096].copy_from_slice(&pattern(1, 4096));
    expected[4096..8192].copy_from_slice(&pattern(2, 8192)[4096..]);
    assert!(fs::read(&image).unwrap() == expected);
    daemon.end(Signal::SIGTERM);
}

#[test]
fn a_file_size_limit_is_an_io_error_of_the_guest() {
    let place = Place::new();
    let image = place.image(1 << 20);
    // 4096 bytes, or 8192 where the shell counts in KiB.
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -f 8 && exec \"$@\"", "sh"])
        .arg(example("blk_daemon"))
        .arg("--socket")
        .arg(place.socket())
        .arg("--file")
        .arg(&image);
    let daemon = BlkDaemon::spawn(&mut command, &place.socket());
    let mut guest = Guest::connect(daemon.socket());
    guest.write(0, &[1; 4096]).unwrap();
    assert!(guest.write(64, &[2; 4096]).is_err());
    guest.write(7, &[3; 512]).unwrap();
    assert_eq!(
        guest.read(64, 512).unwrap(),
        pattern(0, 1 << 20)[32768..][..512]
    );
    daemon.end(Signal::SIGTERM);
}

#[test]
fn a_full_file_system_is_an_io_error_of_the_guest() {
    in_own_process(|| {
        let place = Place::new();
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=1m");
        let image = Path::new("/dev/shm/disk.img").to_owned();
        sparse(&image, 4 << 20);
        let daemon = place.daemon(&image);
        let mut guest = Guest::connect(daemon.socket());
        assert!(guest.write(0, &pattern(0, 2 << 20)).is_err());
        // Discarded, there is room again.
        let mut queue = guest.into_raw();
        assert_eq!(queue.ranges(11, &[(0, 8192, 0)]).status, 0);
        queue.guest.memory.write_slice(&[7; 512], DATA).unwrap();
        assert_eq!(queue.request(1, 100, 512, 0).status, 0);
        assert_eq!(fs::read(&image).unwrap()[51_200..51_712], [7; 512]);
        daemon.end(Signal::SIGTERM);
    });
}

/// A dirty log in a file of so many bytes.
struct DirtyLog {
    file: File,
    region: VhostUserDirtyLogRegion,
}

impl DirtyLog {
    fn new(flags: MFdFlags, len: i64, size: u64, offset: u64) -> Self {
        let file = File::from(memfd_create("log", flags).unwrap());
        ftruncate(&file, len).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: size,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        };
        Self { file, region }
    }

    fn send(&self, guest: &mut Guest) -> vhost::Result<()> {
        guest.frontend.set_log_base(0, Some(self.region))
    }

    fn has(&self, addr: GuestAddress) -> bool {
        let (page, mut byte) = (addr.0 / 4096, [0]);
        self.file.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    }
}

/// The RAM of the guest has 1024 pages: a log of 128 bytes.
const LOG: u64 = 128;

#[test]
fn what_the_daemon_writes_is_in_the_dirty_log() {
    let place = Place::new();
    let image = place.image(1 << 20);
    let daemon = place.daemon(&image);
    let mut guest = Guest::connect(daemon.socket());
    let log = DirtyLog::new(MFdFlags::MFD_ALLOW_SEALING, 128, LOG, 0);
    log.send(&mut guest).unwrap();
    guest.write(0, &[1; 8192]).unwrap();
    assert!(!log.has(DATA));
    guest.drivers[0].read(0, &[(DATA, 8192)]).unwrap();
    let pages = [0, 1, 2].map(|page| GuestAddress(DATA.0 + page * 4096));
    assert_eq!(pages.map(|page| log.has(page)), [true, true, false]);
    daemon.end(Signal::SIGTERM);
}

#[test]
fn a_dirty_log_that_could_end_the_daemon_is_refused() {
    let sealable = MFdFlags::MFD_ALLOW_SEALING;
    let place = Place::new();
    let image = place.image(1 << 20);
    let mut daemon = place.daemon(&image);
    for (flags, len, size, offset, reason) in [
        (
            sealable,
            0,
            LOG,
            0,
            "128 bytes at offset 0x0 is not in its file of 0 bytes",
        ),
        (sealable, 64, LOG, 0, "not in its file of 64 bytes"),
        (sealable, 4096, 8192, 0, "not in its file of 4096 bytes"),
        (
            sealable,
            4096,
            LOG,
            4096,
            "offset 0x1000 is not in its file",
        ),
        (sealable, 4096, LOG, 1 << 62, "not in its file"),
        (
            sealable,
            4096,
            LOG - 8,
            0,
            "120 bytes does not reach to 0x3fffff",
        ),
        (
            MFdFlags::empty(),
            4096,
            LOG,
            0,
            "not sealed against shrinking",
        ),
    ] {
        let mut guest = Guest::connect(daemon.socket());
        let log = DirtyLog::new(flags, len, size, offset);
        log.send(&mut guest).expect_err(reason);
        let line = daemon.wait_for_log("the frontend was given up");
        assert!(line.contains(reason), "{line}");
    }

    // A log that is sealed by its frontend is taken as well as one that is not yet; neither can
    // be cut then, and the daemon goes on writing.
    let sealed = DirtyLog::new(sealable, 4096, LOG, 0);
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&sealed.file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    for log in [sealed, DirtyLog::new(sealable, 4096, LOG, 0)] {
        let mut guest = Guest::connect(daemon.socket());
        log.send(&mut guest).unwrap();
        assert_eq!(ftruncate(&log.file, 0), Err(Errno::EPERM));
        guest.read(0, 4096).unwrap();
        assert!(log.has(DATA));
        drop(guest);
        daemon.wait_for_log("the frontend has gone");
    }
    daemon.end(Signal::SIGTERM);
}

#[test]
fn a_region_that_comes_after_the_log_is_logged() {
    let place = Place::new();
    let image = place.image(1 << 20);
    let daemon = place.daemon(&image);
    let mut guest = Guest::connect(daemon.socket());
    let plug = GuestAddress(1 << 30);
    // A bit for each page up to 2 GiB.
    let log = DirtyLog::new(MFdFlags::MFD_ALLOW_SEALING, 1 << 16, 1 << 16, 0);
    log.send(&mut guest).unwrap();
    let region = GuestRegionShm::new((plug, 1 << 20), &RamOptions::new()).unwrap();
    let memory = guest.memory.insert_region(region.into()).unwrap();
    guest.share.update_table(&memory.memory_table()).unwrap();
    guest.drivers[0].read(0, &[(plug, 4096)]).unwrap();
    assert!(log.has(plug) && !log.has(GuestAddress(plug.0 + 4096)));
    let mut bytes = vec![0; 4096];
    memory.read_slice(&mut bytes, plug).unwrap();
    assert_eq!(bytes, pattern(0, 4096));
    daemon.end(Signal::SIGTERM);
}
