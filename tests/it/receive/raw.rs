//! Messages by the byte: a daemon that does not use the vhost crate, and frontends that send what
//! that crate would not.

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use guest_memory_shm::receive::ReceivedRegion;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::*;
use crate::isolation::in_own_process;
use crate::proc::{descriptors_of, leaves_nothing_but_heaps};

const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const NEED_REPLY: u32 = 0x8;
const VERSION: u32 = 1;
const PATIENCE: Duration = Duration::from_secs(10);

/// A message as it is on the wire.
struct Message {
    request: u32,
    payload: Vec<u8>,
    files: Vec<OwnedFd>,
}

/// Receives a message with its descriptors; `None` when the peer has hung up.
fn receive(mut socket: &UnixStream) -> Option<Message> {
    let mut header = [0; 12];
    let mut control = nix::cmsg_space!([RawFd; 64]);
    let files: Vec<OwnedFd> = {
        let mut space = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
        let fd = socket.as_raw_fd();
        let got = recvmsg::<()>(fd, &mut space, Some(&mut control), flags).unwrap();
        if got.bytes == 0 {
            return None;
        }
        let rights = got.cmsgs().unwrap().filter_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        rights.flatten().map(own).collect()
    };
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    socket.read_exact(&mut payload).unwrap();
    Some(Message {
        request: word(0),
        payload,
        files,
    })
}

#[allow(unsafe_code, reason = "descriptors come from a socket as bare numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this message, and nothing else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn send(socket: &UnixStream, request: u32, flags: u32, payload: &[u8], files: &[&File]) {
    let size = u32::try_from(payload.len()).unwrap();
    let header = [request, VERSION | flags, size].map(u32::to_ne_bytes);
    let raw: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let bytes = [IoSlice::new(header.as_flattened()), IoSlice::new(payload)];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &bytes,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    assert_eq!(sent, Ok(12 + payload.len()));
}

/// Sends a message that wants an answer; what the daemon answers.
fn ask(socket: &UnixStream, request: u32, payload: &[u8], files: &[&File]) -> u64 {
    send(socket, request, NEED_REPLY, payload, files);
    let answer = receive(socket).expect("it is still there");
    assert_eq!((answer.request, answer.files.len()), (request, 0));
    u64::from_ne_bytes(answer.payload.try_into().unwrap())
}

/// A daemon that knows three messages; returns its table when the frontend has hung up.
fn serve(socket: &UnixStream, policy: ReceivePolicy) -> ReceivedTable {
    let mut table = ReceivedTable::new(policy);
    while let Some(message) = receive(socket) {
        let Message {
            request,
            payload,
            files,
        } = message;
        let next = match request {
            SET_MEM_TABLE => ReceivedRegion::decode_table(&payload)
                .and_then(|regions| table.set(regions, files)),
            ADD_MEM_REG => {
                ReceivedRegion::decode(&payload).and_then(|region| table.add(region, files))
            }
            REM_MEM_REG => {
                drop(files);
                ReceivedRegion::decode(&payload).and_then(|region| table.remove(region))
            }
            other => panic!("{other}"),
        };
        let answer = match next {
            Ok(next) => {
                table = next;
                0
            }
            Err(refused) => refused.reply_code(),
        };
        send(socket, request, 0x4, &answer.to_ne_bytes(), &[]);
    }
    table
}

/// Has `frontend` talk to a daemon, and gives the daemon's table at the end.
fn with_daemon(policy: ReceivePolicy, frontend: impl FnOnce(&UnixStream)) -> ReceivedTable {
    let (theirs, ours) = UnixStream::pair().unwrap();
    for socket in [&theirs, &ours] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    thread::scope(|scope| {
        let daemon = scope.spawn(move || serve(&ours, policy));
        frontend(&theirs);
        drop(theirs);
        daemon.join().unwrap()
    })
}

fn words(region: &ReceivedRegion) -> Vec<u8> {
    let ReceivedRegion {
        guest_addr,
        size,
        user_addr,
        mmap_offset,
    } = *region;
    [guest_addr.0, size, user_addr, mmap_offset]
        .map(u64::to_ne_bytes)
        .concat()
}

fn one(region: &ReceivedRegion) -> Vec<u8> {
    [&[0; 8][..], &words(region)].concat()
}

fn many(regions: &[ReceivedRegion]) -> Vec<u8> {
    let head = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
    regions
        .iter()
        .fold(head, |bytes, region| [bytes, words(region)].concat())
}

#[test]
fn a_daemon_without_the_vhost_crate_answers_with_the_code_of_the_refusal() {
    in_own_process(|| {
        let file = sealed(2 * MIB);
        let files = |count: usize| vec![&file; count];
        let both = [good(0), good(1)];
        leaves_nothing_but_heaps(|| {
            let table = with_daemon(require_seals(), |daemon| {
                assert_eq!(ask(daemon, SET_MEM_TABLE, &many(&both), &files(2)), 0);
                // Of SET_MEM_TABLE.
                let nine: Vec<_> = (0..9).map(good).collect();
                let wrap = ReceivedRegion {
                    size: u64::MAX - PAGE + 1,
                    ..good(1)
                };
                let long = ReceivedRegion {
                    size: 4 * MIB,
                    ..good(4)
                };
                let bare = unsealed(MIB);
                let null = File::open("/dev/null").unwrap();
                for (code, payload, files) in [
                    (22, many(&[]), files(0)),
                    (22, many(&both), files(1)),
                    (22, many(&both), files(3)),
                    (22, many(&both)[1..].to_vec(), files(2)),
                    (22, vec![0xff; 72], files(2)),
                    (22, Vec::new(), files(2)),
                    (28, many(&nine), files(9)),
                    (17, many(&[good(0), good(0)]), files(2)),
                    (22, many(&[wrap]), files(1)),
                    (6, many(&[long]), files(1)),
                    (1, many(&[good(0)]), vec![&bare]),
                    (9, many(&[good(0)]), vec![&null]),
                ] {
                    assert_eq!(
                        ask(daemon, SET_MEM_TABLE, &payload, &files),
                        code,
                        "{payload:x?}"
                    );
                }
                // Of the messages about one region.
                for (request, code, payload, files) in [
                    (ADD_MEM_REG, 22, one(&good(2)), files(0)),
                    (ADD_MEM_REG, 22, one(&good(2)), files(2)),
                    (ADD_MEM_REG, 22, words(&good(2)), files(1)),
                    (ADD_MEM_REG, 17, one(&good(1)), files(1)),
                    (ADD_MEM_REG, 6, one(&long), files(1)),
                    (REM_MEM_REG, 2, one(&good(2)), files(0)),
                    (REM_MEM_REG, 22, words(&good(0)), files(0)),
                ] {
                    assert_eq!(ask(daemon, request, &payload, &files), code, "{payload:x?}");
                }
                assert_eq!(ask(daemon, ADD_MEM_REG, &one(&good(2)), &files(1)), 0);
                assert_eq!(ask(daemon, REM_MEM_REG, &one(&good(0)), &files(0)), 0);
            });
            assert_eq!(table.regions(), [good(1), good(2)]);
        });
    });
}

#[test]
fn a_descriptor_that_comes_with_a_removal_is_closed() {
    let file = sealed(MIB);
    let other = sealed(MIB);
    let table = with_daemon(require_seals(), |daemon| {
        for n in 0..3 {
            assert_eq!(ask(daemon, ADD_MEM_REG, &one(&good(n)), &[&file]), 0);
        }
        assert_eq!(descriptors_of(&file), 4);
        // One descriptor or several, with a removal that is done and one that is refused.
        assert_eq!(ask(daemon, REM_MEM_REG, &one(&good(1)), &[&other]), 0);
        assert_eq!(
            ask(daemon, REM_MEM_REG, &one(&good(2)), &[&other, &other]),
            0
        );
        assert_eq!(ask(daemon, REM_MEM_REG, &one(&good(2)), &[&other]), 2);
        assert_eq!(descriptors_of(&other), 1);
        assert_eq!(descriptors_of(&file), 2);
    });
    assert_eq!(table.regions(), [good(0)]);
}
