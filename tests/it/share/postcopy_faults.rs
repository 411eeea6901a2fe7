//! Pages that come late: userfaultfd(2) at both ends.
#![expect(
    unsafe_code,
    reason = "userfaultfd(2) is used by ioctl(2): nix has no safe calls for it"
)]

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

pub(super) const PAGE: u64 = 4096;
/// Where in a region the strict peer reads.
pub(super) const READ: u64 = 5 * PAGE;

/// userfaultfd(2), ready for use; `None` where it is not allowed.
pub(super) fn userfaultfd() -> Option<File> {
    let flags = nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK;
    // SAFETY: it makes a descriptor, and has no other effect.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_userfaultfd, flags) };
    let Ok(fd) = Errno::result(fd) else {
        support::skip("userfaultfd(2) may not be used here");
        return None;
    };
    // SAFETY: the kernel has just made it, and nothing else knows of it.
    let fd = unsafe { File::from_raw_fd(fd as i32) };
    let mut api = Api {
        version: 0xaa,
        features: 0,
        ioctls: 0,
    };
    // SAFETY: the descriptor is open, and the structure is what the request takes.
    unsafe { agree(fd.as_raw_fd(), &mut api) }.unwrap();
    Some(fd)
}

/// Has missing pages of a region that is mapped at `start` waited for.
pub(super) fn wait_for_pages(userfaultfd: &File, start: u64) {
    let span = Span { start, len: MIB };
    let mut all = Register {
        span,
        mode: 1,
        ioctls: 0,
    };
    // SAFETY: the descriptor is open, and the range is a mapping that only its reader uses.
    unsafe { register(userfaultfd.as_raw_fd(), &mut all) }.unwrap();
}

#[repr(C)]
#[derive(Default)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Span {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    span: Span,
    mode: u64,
    ioctls: u64,
}

// linux/userfaultfd.h: UFFDIO_API, UFFDIO_REGISTER, UFFDIO_COPY, UFFDIO_WAKE.
nix::ioctl_readwrite!(agree, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
nix::ioctl_readwrite!(copy_page, 0xaa, 0x03, Copy);
nix::ioctl_read!(wake, 0xaa, 0x02, Span);

/// What a page has that comes late: nothing in the first region, and elsewhere its address.
pub(super) fn late_page(addr: u64) -> [u8; PAGE as usize] {
    let word = if addr < MIB { 0 } else { addr };
    let mut page = [0; PAGE as usize];
    let words = page.chunks_exact_mut(8);
    words.for_each(|bytes| bytes.copy_from_slice(&word.to_ne_bytes()));
    page
}

/// Where in the guest a daemon's address is, by what the kernel says of its mappings.
///
/// The bases of QEMU 10's daemons do not say it: they are the user addresses that were sent.
pub(super) fn place_of(daemon: nix::unistd::Pid, memory: &GuestMemoryShm, address: u64) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{daemon}/maps")).unwrap();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (start, end) = fields[0].split_once('-').unwrap();
        let (start, end, offset) = (hex(start), hex(end), hex(fields[2]));
        let ino: u64 = fields[4].parse().unwrap();
        let regions = memory.arc_regions();
        let region = regions
            .iter()
            .find(|region| region.backing().identity().ino == ino);
        if let Some(region) = region.filter(|_| (start..end).contains(&address)) {
            return region.range().start_addr().0 + (address - start) + offset;
        }
    }
    panic!("a fault at {address:#x}, which is not in a region:\n{maps}");
}

/// Resolves the faults on `memory` until `stop`; says where in the guest they were.
pub(super) fn resolve(
    mut faults: &File,
    place_of: impl Fn(u64) -> u64,
    stop: &UnixStream,
) -> Vec<u64> {
    let mut resolved = Vec::new();
    loop {
        let wanted = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut both = [wanted(faults.as_fd()), wanted(stop.as_fd())];
        poll(&mut both, PollTimeout::NONE).unwrap();
        if both[1].any().unwrap() {
            return resolved;
        }
        let mut message = [0; 32];
        assert_eq!(faults.read(&mut message).unwrap(), message.len());
        assert_eq!(message[0], 0x12, "only faults are reported");
        let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
        let at = address - address % PAGE;
        let place = place_of(at);
        let page = late_page(place);
        let from = page.as_ptr() as u64;
        let mut copy = Copy {
            to: at,
            from,
            len: PAGE,
            ..Copy::default()
        };
        // SAFETY: the descriptor is open, and the page lives until the kernel has read it. What is
        // written is memory of the daemon, which waits for it.
        match unsafe { copy_page(faults.as_raw_fd(), &mut copy) } {
            Ok(_) => resolved.push(place),
            // We have touched the page ourselves since.
            Err(Errno::EEXIST) => {
                let mut span = Span {
                    start: at,
                    len: PAGE,
                };
                // SAFETY: the descriptor is open, and nothing is written.
                unsafe { wake(faults.as_raw_fd(), &mut span) }.unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}
