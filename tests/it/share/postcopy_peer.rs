//! A daemon that is strict about what follows its bases.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{FileOffset, GuestRegionMmap, MemoryRegionAddress};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::postcopy::Bases;
use super::postcopy_faults::{READ, wait_for_pages};
use super::*;

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
pub(super) const BASE: u64 = 0x7000_0000_0000;

/// A daemon that does what the specification says, and goes at the first message that it does not
/// allow.
pub(super) struct Strict {
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
    pub(super) fn start(
        features: Features,
        dies_at: Option<usize>,
        userfaultfd: Option<File>,
    ) -> (Frontend, VhostUserShare, Bases, JoinHandle<Vec<u64>>) {
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
        let share = VhostUserShare::new(&frontend, features)
            .unwrap()
            .with_deadline(PATIENCE)
            .with_base_handler(move |range, base| told.lock().unwrap().push((range, base)));
        (frontend, share, bases, peer)
    }

    /// The next message, its flags and what came with it. `None`: the frontend has gone.
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

    /// Serves until the frontend goes; what it holds then.
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
