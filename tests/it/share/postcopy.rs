//! Memory that changes while postcopy listens: a peer that is strict about the order of messages,
//! and qemu-storage-daemon, which really waits for pages.
#![expect(
    unsafe_code,
    reason = "userfaultfd(2) is used by ioctl(2): nix has no safe calls for it"
)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::Mutex;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{FileOffset, GuestAddressSpace, GuestRegionMmap, MemoryRegionAddress};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

/// The regions that the handler was told of, each with its base.
type Bases = Arc<Mutex<Vec<(GuestRange, u64)>>>;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const POSTCOPY_ADVISE: u32 = 28;
const POSTCOPY_LISTEN: u32 = 29;
const POSTCOPY_END: u32 = 30;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Where the strict peer says that it mapped guest address 0.
const BASE: u64 = 0x7000_0000_0000;

/// A daemon that does what the specification says, and goes at the first message that it does not
/// allow.
struct Strict {
    socket: UnixStream,
    features: Features,
    listening: bool,
    bases: Bases,
    /// The number of the acknowledgement that it does not live to see.
    dies_at: Option<usize>,
    acknowledged: usize,
    /// If there, regions are mapped, and their pages are waited for.
    userfaultfd: Option<File>,
    /// Each reads a word as soon as it may.
    readers: Vec<JoinHandle<(u64, GuestRegionMmap)>>,
    /// Starts in MiB.
    held: Vec<u64>,
}

impl Strict {
    fn start(
        features: Features,
        dies_at: Option<usize>,
        userfaultfd: Option<File>,
    ) -> (VhostUserShare<Frontend>, Bases, JoinHandle<Vec<u64>>) {
        let (ours, socket) = UnixStream::pair().unwrap();
        let bases = Bases::default();
        let peer = Self {
            socket,
            features: features | Features::PAGEFAULT,
            listening: false,
            bases: Arc::clone(&bases),
            dies_at,
            acknowledged: 0,
            userfaultfd,
            readers: Vec::new(),
            held: Vec::new(),
        };
        let peer = thread::spawn(move || peer.serve());
        let mut frontend = Frontend::from_stream(ours, 1);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        frontend.set_features(offered).unwrap();
        let features = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(features).unwrap();
        let told = Arc::clone(&bases);
        let share = VhostUserShare::new(frontend, features)
            .with_time_limit(PATIENCE)
            .with_base_handler(move |range, base| told.lock().unwrap().push((range, base)));
        (share, bases, peer)
    }

    /// The next message, its flags and what came with it. `None`: the front-end has gone.
    fn receive(&mut self) -> Option<(u32, u32, Vec<u8>, Option<File>)> {
        let mut header = [0; 12];
        let (size, file) = self.socket.recv_with_fd(&mut header).unwrap();
        if size == 0 {
            return None;
        }
        assert_eq!(size, header.len());
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        self.socket.read_exact(&mut body).unwrap();
        Some((word(0), word(4), body, file))
    }

    fn answer(&mut self, request: u32, body: &[u8]) {
        let header = [request, VERSION | REPLY, body.len() as u32].map(u32::to_ne_bytes);
        let message = [header.as_flattened(), body].concat();
        self.socket.write_all(&message).unwrap();
    }

    /// Serves until the front-end goes; what it holds then.
    fn serve(mut self) -> Vec<u64> {
        while let Some((request, flags, body, file)) = self.receive() {
            let mut answer = Some(0);
            match request {
                GET_FEATURES => answer = Some(1 << 30 | 1 << 32),
                GET_PROTOCOL_FEATURES => answer = Some(self.features.bits()),
                GET_MAX_MEM_SLOTS => answer = Some(8),
                SET_FEATURES | SET_OWNER | SET_PROTOCOL_FEATURES => {}
                POSTCOPY_ADVISE => {
                    let header = [request, VERSION | REPLY, 0].map(u32::to_ne_bytes);
                    let any = File::open("/dev/null").unwrap();
                    let fd = self.userfaultfd.as_ref().unwrap_or(&any).as_raw_fd();
                    let sent = self.socket.send_with_fd(header.as_flattened(), fd);
                    assert_eq!(sent.unwrap(), 12);
                    continue;
                }
                POSTCOPY_LISTEN => self.listening = true,
                POSTCOPY_END => self.listening = false,
                SET_MEM_TABLE | ADD_MEM_REG => {
                    let file = file.expect("a region comes with its descriptor");
                    // {regions, padding} or {padding}, then one region.
                    let start = u64::from_ne_bytes(body[8..16].try_into().unwrap());
                    if request == SET_MEM_TABLE {
                        assert_eq!(body[..4], 1u32.to_ne_bytes(), "this peer knows one region");
                        self.held.clear();
                    }
                    self.held.push(start / MIB);
                    if self.listening {
                        assert_eq!(flags & NEED_REPLY, 0, "the bases are the reply");
                        if !self.answer_with_base(request, body, start, file) {
                            return self.held;
                        }
                        continue;
                    }
                }
                REM_MEM_REG => {
                    let start = u64::from_ne_bytes(body[8..16].try_into().unwrap());
                    self.held.retain(|held| *held != start / MIB);
                }
                other => panic!("request {other}"),
            }
            let asked = matches!(
                request,
                GET_FEATURES | GET_PROTOCOL_FEATURES | GET_MAX_MEM_SLOTS
            );
            if let Some(value) = answer.filter(|_| asked || flags & NEED_REPLY != 0) {
                self.answer(request, &u64::to_ne_bytes(value));
            }
        }
        // What they read from stays mapped until all are done.
        let readers = self.readers.drain(..).map(|reader| reader.join().unwrap());
        let (words, _mapped): (Vec<u64>, Vec<_>) = readers.unzip();
        assert!(words.iter().all(|word| word % MIB == READ), "{words:x?}");
        self.held
    }

    /// Answers with the base of a region, and takes nothing but the acknowledgement next.
    fn answer_with_base(
        &mut self,
        request: u32,
        mut body: Vec<u8>,
        start: u64,
        file: File,
    ) -> bool {
        let mapped = self.userfaultfd.as_ref().map(|_| {
            let file = Some(FileOffset::new(file, 0));
            GuestRegionMmap::<()>::from_range(GuestAddress(start), MIB as usize, file).unwrap()
        });
        let base = mapped
            .as_ref()
            .map_or(BASE + start, |mapped| mapped.as_ptr() as u64);
        // {guest address, size, user address, offset}
        body[24..32].copy_from_slice(&base.to_ne_bytes());
        if self.dies_at == Some(self.acknowledged) {
            return false;
        }
        self.answer(request, &body);
        let (next, flags, body, file) = self.receive().unwrap();
        assert_eq!(next, request, "instead of the acknowledgement");
        assert_eq!(body, [0; 8], "the acknowledgement is a 0 of 64 bits");
        assert_eq!(flags & NEED_REPLY, 0, "and has no answer");
        assert!(file.is_none());
        let told = self.bases.lock().unwrap();
        let (range, known) = told.last().expect("the handler was told before");
        assert_eq!((range.start_addr().0, *known), (start, base));
        self.acknowledged += 1;
        if let (Some(mapped), Some(userfaultfd)) = (mapped, &self.userfaultfd) {
            wait_for_pages(userfaultfd, base);
            let read = move || (mapped.read_obj(MemoryRegionAddress(READ)).unwrap(), mapped);
            self.readers.push(thread::spawn(read));
        }
        true
    }
}

fn told(bases: &Bases) -> Vec<(u64, u64)> {
    let bases = bases.lock().unwrap();
    let told = bases
        .iter()
        .map(|(range, base)| (range.start_addr().0 / MIB, *base));
    told.collect()
}

#[test]
fn regions_that_are_plugged_while_postcopy_listens_are_acknowledged_at_once() {
    for acks in [Features::REPLY_ACK, Features::empty()] {
        let (mut share, bases, peer) =
            Strict::start(Features::CONFIGURE_MEM_SLOTS | acks, None, None);
        share.sink_mut().postcopy_advise().unwrap();
        share.sink_mut().postcopy_listen().unwrap();
        // Two regions at once, then one by one.
        let space = AddressSpace::new(memory(&[0, 2]));
        let id = space.attach("blk", share).unwrap();
        for start in [10, 20] {
            space.insert(regions(&[start]).remove(0)).unwrap();
        }
        space.remove(GuestAddress(2 * MIB), MIB).unwrap();
        let base = |start| (start, BASE + start * MIB);
        assert_eq!(told(&bases), [0, 2, 10, 20].map(base));

        // Afterwards it is as it was before.
        let end = |share: &mut VhostUserShare<Frontend>| share.sink_mut().postcopy_end();
        space.with_listener(&id, end).unwrap().unwrap();
        space.insert(regions(&[30]).remove(0)).unwrap();
        assert_eq!(told(&bases).len(), 4);

        let mut share = space.detach(id).unwrap();
        let kept: Vec<_> = share
            .take_bases()
            .iter()
            .map(|(at, b)| (at.0 / MIB, *b))
            .collect();
        assert_eq!(kept, [0, 10, 20].map(base), "what is gone has no base");
        drop(share);
        assert_eq!(peer.join().unwrap(), [0, 10, 20, 30]);
    }
}

#[test]
fn a_whole_table_is_acknowledged_at_once_while_postcopy_listens() {
    for acks in [Features::REPLY_ACK, Features::empty()] {
        let (mut share, bases, peer) = Strict::start(acks, None, None);
        share.sink_mut().postcopy_advise().unwrap();
        share.sink_mut().postcopy_listen().unwrap();
        for start in [0, 2] {
            let report = share.update_memory(&memory(&[start])).unwrap();
            assert_eq!(
                report.bases(),
                [(GuestAddress(start * MIB), BASE + start * MIB)]
            );
        }
        assert_eq!(told(&bases), [(0, BASE), (2, BASE + 2 * MIB)]);
        drop(share);
        assert_eq!(peer.join().unwrap(), [2]);
    }
}

#[test]
fn a_daemon_that_goes_instead_of_returning_a_base_is_not_acknowledged() {
    let features = Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK;
    let (mut share, bases, peer) = Strict::start(features, Some(1), None);
    share.sink_mut().postcopy_advise().unwrap();
    share.sink_mut().postcopy_listen().unwrap();
    let space = AddressSpace::new(memory(&[0]));
    let id = space.attach("blk", share).unwrap();
    space.insert(regions(&[10]).remove(0)).unwrap_err();
    assert_eq!(peer.join().unwrap(), [0, 10]);
    assert_eq!(told(&bases), [(0, BASE)]);
    let mut share = space.detach(id).unwrap();
    assert!(share.broken().unwrap().contains("hung up"));
    assert_eq!(share.take_bases(), [(GuestAddress(0), BASE)]);
}

const PAGE: u64 = 4096;
/// Where in a region the strict peer reads.
const READ: u64 = 5 * PAGE;

/// userfaultfd(2), ready for use; `None` where it is not allowed.
fn userfaultfd() -> Option<File> {
    let flags = nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK;
    // SAFETY: it makes a descriptor, and has no other effect.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_userfaultfd, flags) };
    let Ok(fd) = Errno::result(fd) else {
        support::skip("userfaultfd(2) may not be used here");
        return None;
    };
    // SAFETY: the kernel has just made it, and nobody else knows of it.
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
fn wait_for_pages(userfaultfd: &File, start: u64) {
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
fn late_page(addr: u64) -> [u8; PAGE as usize] {
    let word = if addr < MIB { 0 } else { addr };
    let mut page = [0; PAGE as usize];
    let words = page.chunks_exact_mut(8);
    words.for_each(|bytes| bytes.copy_from_slice(&word.to_ne_bytes()));
    page
}

/// Where in the guest a daemon's address is, by what the kernel says of its mappings.
///
/// The bases of QEMU 10's daemons do not say it: they are the user addresses that were sent.
fn place_of(daemon: nix::unistd::Pid, memory: &GuestMemoryShm, address: u64) -> u64 {
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
fn resolve(mut faults: &File, place_of: impl Fn(u64) -> u64, stop: &UnixStream) -> Vec<u64> {
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

#[test]
fn pages_that_are_waited_for_right_after_the_acknowledgement_have_a_known_base() {
    let slots = Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK;
    let Some(userfaultfd) = userfaultfd() else {
        return;
    };
    let (mut share, bases, peer) = Strict::start(slots, None, Some(userfaultfd));
    let faults = share.sink_mut().postcopy_advise().unwrap();
    share.sink_mut().postcopy_listen().unwrap();
    let place_of = move |address: u64| {
        let known = bases.lock().unwrap();
        let mut places = known.iter().filter_map(|(range, base)| {
            let offset = address.checked_sub(*base)?;
            (offset < range.size()).then(|| range.start_addr().0 + offset)
        });
        places
            .next()
            .expect("faults are where the handler was told")
    };
    let (stop, stopped) = UnixStream::pair().unwrap();
    let resolver = thread::spawn(move || resolve(&faults, place_of, &stopped));

    let space = AddressSpace::new(memory(&[1]));
    let id = space.attach("blk", share).unwrap();
    for start in [10, 20] {
        space.insert(regions(&[start]).remove(0)).unwrap();
    }
    drop(space.detach(id).unwrap());
    // Its readers have got what they waited for, or it would not end.
    assert_eq!(peer.join().unwrap(), [1, 10, 20]);
    drop(stop);
    let mut resolved = resolver.join().unwrap();
    resolved.sort_unstable();
    assert_eq!(resolved, [1, 10, 20].map(|start| start * MIB + READ));
}

/// What postcopy does with a qemu-storage-daemon that has a disk of `image`.
struct Postcopy {
    daemon: StorageDaemon,
    share: VhostUserShare<Frontend>,
    device: BlkDevice,
    faults: File,
    bases: Bases,
}

impl Postcopy {
    /// `None`: there is no such daemon here, or none that can do it.
    fn listen(image: &std::path::Path) -> Option<Self> {
        let daemon = StorageDaemon::start(image, None)?;
        let stream = UnixStream::connect(&daemon.socket).unwrap();
        let mut frontend = Frontend::from_stream(stream, 1);
        let wanted = Features::CONFIG | Features::REPLY_ACK | Features::PAGEFAULT;
        let device = BlkDevice::negotiate(&mut frontend, wanted).unwrap();
        if !device.protocol_features().contains(Features::PAGEFAULT) {
            support::skip("qemu-storage-daemon may not use userfaultfd(2) here");
            return None;
        }
        let bases = Bases::default();
        let told = Arc::clone(&bases);
        let mut share = VhostUserShare::new(frontend, device.protocol_features())
            .with_time_limit(PATIENCE)
            .with_base_handler(move |range, base| told.lock().unwrap().push((range, base)));
        // Before any region, and for whole tables only: QEMU 10's daemons go at the acknowledgement
        // of ADD_MEM_REG, because it brings no descriptor.
        let faults = share.sink_mut().postcopy_advise().unwrap();
        share.sink_mut().postcopy_listen().unwrap();
        Some(Self {
            daemon,
            share,
            device,
            faults,
            bases,
        })
    }
}

#[test]
fn qemu_storage_daemon_waits_for_late_pages_of_regions_that_were_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, vec![0x42; 1 << 20]).unwrap();
    let Some(postcopy) = Postcopy::listen(&image) else {
        return;
    };
    let Postcopy {
        daemon,
        share,
        device,
        faults,
        bases,
    } = postcopy;
    let space = AddressSpace::new(memory(&[0]));
    let id = space.attach("blk", share).unwrap();
    space.insert(regions(&[10]).remove(0)).unwrap();
    // A whole table is mapped anew each time.
    let starts: Vec<u64> = told(&bases).iter().map(|(start, _)| *start).collect();
    assert_eq!(starts, [0, 0, 10]);

    let (stop, stopped) = UnixStream::pair().unwrap();
    let all = GuestMemoryShm::clone(&space.memory().memory());
    let (pid, known) = (daemon.process.pid(), all.clone());
    let place = move |address| place_of(pid, &known, address);
    let resolver = thread::spawn(move || resolve(&faults, place, &stopped));
    let start = |share: &mut VhostUserShare<Frontend>| driver(&all, share, &device);
    let mut driver = space.with_listener(&id, start).unwrap();

    // The daemon reads a page that nobody has written, and then writes another one.
    let (late, other) = (10 * MIB + 7 * PAGE, 10 * MIB + 9 * PAGE);
    driver
        .write(0, &[(GuestAddress(late), PAGE as u32)])
        .unwrap();
    driver
        .read(8, &[(GuestAddress(other), PAGE as u32)])
        .unwrap();
    driver.flush().unwrap();
    let disk = fs::read(&image).unwrap();
    assert_eq!(disk[..PAGE as usize], late_page(late));
    let mut page = [0; PAGE as usize];
    all.read_slice(&mut page, GuestAddress(other)).unwrap();
    assert_eq!(page, [0x42; PAGE as usize]);

    // Afterwards it takes regions as ever, and nobody waits for pages.
    let end = |share: &mut VhostUserShare<Frontend>| share.sink_mut().postcopy_end();
    space.with_listener(&id, end).unwrap().unwrap();
    drop(stop);
    let resolved = resolver.join().unwrap();
    assert!(resolved.contains(&late), "{resolved:x?}");
    assert!(resolved.contains(&other), "{resolved:x?}");
    space.insert(regions(&[20]).remove(0)).unwrap();
    assert_eq!(told(&bases).len(), 3);
    let end = GuestAddress(11 * MIB - PAGE);
    driver.read(16, &[(end, PAGE as u32)]).unwrap();
}
