//! The mock daemon where this process is short of descriptors, and what else a frontend can do to
//! it: no client waits indefinitely, nothing leaks, nothing kills the process that it lives in.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use guest_memory_shm::mock::MockDaemon;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Features};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

use crate::frontend::agree;
use crate::isolation::in_own_process;

/// For what comes at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(20);
/// Numbers of descriptors below this one are all in use in some tests.
const LOW: RawFd = 64;

/// How many numbers of descriptors this process may use, for as long as this lives.
struct Limit {
    before: u64,
    hard: u64,
}

impl Limit {
    fn new(numbers: u64) -> Self {
        let (before, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, numbers, hard).unwrap();
        Self { before, hard }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.before, self.hard).unwrap();
    }
}

fn spare_file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

/// Takes all numbers that are left.
fn take_all() -> Vec<OwnedFd> {
    let file = spare_file();
    let copy = || fcntl(&file, FcntlArg::F_DUPFD_CLOEXEC(0)).map(own);
    let mut all: Vec<OwnedFd> = std::iter::from_fn(|| copy().ok()).collect();
    all.push(file);
    all
}

/// Takes all numbers below [`LOW`].
fn take_low() -> Vec<OwnedFd> {
    let mut low = Vec::new();
    loop {
        let file = spare_file();
        if file.as_raw_fd() >= LOW {
            return low;
        }
        low.push(file);
    }
}

#[allow(unsafe_code, reason = "fcntl gives a bare number")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: fcntl has just made it, and no one else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn connect(daemon: &MockDaemon) -> UnixStream {
    let stream = daemon.connect().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn negotiate(daemon: &MockDaemon) -> Frontend {
    agree(connect(daemon), Features::all()).unwrap().0
}

/// Asks for the features. By hand: vhost's `Frontend` waits indefinitely, whatever the socket
/// says.
fn assert_served(mut stream: &UnixStream) {
    let request = [1u32, 1, 0].map(u32::to_ne_bytes);
    stream.write_all(request.as_flattened()).unwrap();
    stream.read_exact(&mut [0; 20]).unwrap();
}

/// Regions of 4 KiB, each said to be at `offset` of a file of `len` bytes.
fn regions(count: u64, len: u64, offset: u64) -> (Vec<File>, Vec<VhostUserMemoryRegionInfo>) {
    let file = |_| memfd(len);
    let files: Vec<File> = (0..count).map(file).collect();
    let infos = files.iter().zip(0..).map(|(file, at)| {
        let addr = at * 4096;
        VhostUserMemoryRegionInfo {
            guest_phys_addr: addr,
            memory_size: 4096,
            userspace_addr: 0x10_0000 + addr,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        }
    });
    let infos = infos.collect();
    (files, infos)
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("mock", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

#[test]
fn a_client_that_cannot_be_accepted_is_hung_up_on_and_a_later_one_is_served() {
    in_own_process(|| {
        let mut low = take_low();
        // The listening socket and the descriptor that the daemon keeps in reserve.
        low.truncate(low.len() - 2);
        let daemon = MockDaemon::builder().start_unnamed().unwrap();
        let first = connect(&daemon);
        daemon.wait_connected(PATIENCE).unwrap();
        let mut second = connect(&daemon);
        assert!(first.as_raw_fd() >= LOW && second.as_raw_fd() >= LOW);
        // From here on not one number is free, whatever is closed above.
        let short = Limit::new(LOW as u64);
        drop(first);
        assert_eq!(second.read(&mut [0]).unwrap(), 0);
        drop(short);

        assert_served(&connect(&daemon));
    });
}

#[test]
fn clients_wait_while_not_even_that_is_possible_and_are_served_when_it_is() {
    in_own_process(|| {
        let _low = take_low();
        let daemon = MockDaemon::builder().start_unnamed().unwrap();
        let first = connect(&daemon);
        daemon.wait_connected(PATIENCE).unwrap();
        let second = connect(&daemon);
        let short = Limit::new(LOW as u64);
        drop(first);
        daemon.wait_disconnected(PATIENCE).unwrap();
        drop(short);
        assert_served(&second);

        // Such a daemon can be dropped, too.
        let short = Limit::new(LOW as u64);
        drop(second);
        daemon.wait_disconnected(PATIENCE).unwrap();
        drop(daemon);
        drop(short);
    });
}

#[test]
fn a_message_whose_descriptors_do_not_all_arrive_is_a_hang_up_and_leaves_none() {
    in_own_process(|| {
        let _limit = Limit::new(256);
        let daemon = MockDaemon::builder().start_unnamed().unwrap();
        let (_files, table) = regions(4, 4096, 0);
        let before = descriptors();
        for left in [0, 1, 3] {
            let frontend = negotiate(&daemon);
            let mut all = take_all();
            all.truncate(all.len() - left);
            frontend.set_mem_table(&table).unwrap_err();
            daemon.wait_disconnected(PATIENCE).unwrap();
            assert_eq!(daemon.table(), []);
            drop((all, frontend));
            assert_eq!(descriptors(), before, "{left}");
        }
        let frontend = negotiate(&daemon);
        frontend.set_mem_table(&table).unwrap();
        assert_eq!(daemon.table().len(), 4);
    });
}

#[test]
fn regions_and_logs_that_are_longer_than_their_files_are_refused() {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut frontend = negotiate(&daemon);
    for offset in [4096, 1 << 40, 0u64.wrapping_sub(4096)] {
        let (_files, infos) = regions(1, 4096, offset);
        assert!(frontend.add_mem_region(&infos[0]).is_err(), "{offset:#x}");
        assert!(frontend.set_mem_table(&infos).is_err(), "{offset:#x}");
        assert_eq!(daemon.table(), []);
    }
    let (_files, infos) = regions(1, 4096, 0);
    frontend.set_mem_table(&infos).unwrap();
    assert_eq!(daemon.table().len(), 1);
    drop(frontend);

    // No answer to SET_LOG_BASE is a refusal: it hangs up.
    for (len, size, offset) in [(0, 8, 0), (8, 16, 0), (4096, 8, 4096), (8, 8, 1 << 62)] {
        let frontend = negotiate(&daemon);
        frontend.set_mem_table(&infos).unwrap();
        let file = memfd(len);
        let log = VhostUserDirtyLogRegion {
            mmap_size: size,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        };
        let case = format!("{size} bytes at {offset:#x} of {len}");
        assert!(frontend.set_log_base(0, Some(log)).is_err(), "{case}");
        assert!(frontend.get_features().is_err(), "{case}");
    }
    let frontend = negotiate(&daemon);
    let file = memfd(8);
    let log = VhostUserDirtyLogRegion {
        mmap_size: 8,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    frontend.set_mem_table(&infos).unwrap();
    frontend.set_log_base(0, Some(log)).unwrap();
}
