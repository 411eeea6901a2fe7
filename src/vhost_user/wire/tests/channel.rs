//! Requests that a daemon makes by itself.

use std::fs::File;
use std::io;

use super::super::channel::Incoming;
use super::super::message::LONGEST;
use super::*;

const CODE: u32 = 7;
const NEED_REPLY: u32 = 1 << 3;

/// The frontend's end, and the daemon's.
fn channel(with_fds: bool) -> (IncomingRequests, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (
        IncomingRequests::new(ours.into(), with_fds),
        Peer::new(theirs),
    )
}

/// A header, and a body of some length.
fn request(flags: u32, size: usize) -> Vec<u8> {
    let header = [CODE, 1 | flags, u32::try_from(size).unwrap()].map(u32::to_ne_bytes);
    let body = (0..size).map(|at| u8::try_from(at % 251).unwrap());
    header.concat().into_iter().chain(body).collect()
}

fn next(channel: &mut IncomingRequests) -> Incoming {
    channel.next().unwrap().unwrap()
}

fn assert_is(came: &Incoming, flags: u32, size: usize) {
    assert_eq!(
        (came.code, came.asks),
        (CODE, flags & NEED_REPLY != 0),
        "{size}"
    );
    assert_eq!(came.body, request(flags, size)[HEADER..]);
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

#[test]
fn requests_come_byte_by_byte() {
    let (mut channel, mut peer) = channel(true);
    let sizes = [0, 1, 16, 100];
    for (size, flags) in sizes.into_iter().zip([0, NEED_REPLY].into_iter().cycle()) {
        let bytes = request(flags, size);
        for byte in &bytes[..bytes.len() - 1] {
            peer.say(&[*byte]);
            assert!(channel.next().unwrap().is_none());
        }
        peer.say(&bytes[bytes.len() - 1..]);
        assert_is(&next(&mut channel), flags, size);
        assert!(channel.next().unwrap().is_none());
    }
}

#[test]
fn many_that_come_at_once_are_told_one_after_the_other() {
    let (mut channel, mut peer) = channel(true);
    let sizes = [0, 8, 0, LONGEST, 3];
    let all: Vec<u8> = sizes
        .into_iter()
        .flat_map(|size| request(0, size))
        .collect();
    peer.say(&all);
    for size in sizes {
        assert_is(&next(&mut channel), 0, size);
    }
    assert!(channel.next().unwrap().is_none());
}

#[test]
fn the_longest_body_is_taken_and_one_byte_more_is_not() {
    let (mut channel, mut peer) = channel(true);
    peer.say(&request(0, LONGEST));
    assert_is(&next(&mut channel), 0, LONGEST);
    // The header suffices.
    peer.say(&request(0, LONGEST + 1)[..HEADER]);
    let refused = channel.next().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidData);
    assert_eq!(refused.to_string(), "request 7, flags 0x1, 4097 bytes");
}

#[test]
fn what_is_no_request_is_refused() {
    for flags in [0, 2, 5, 1 << 4 | 1, u32::MAX] {
        let (mut channel, mut peer) = channel(true);
        let header = [CODE, flags, 0].map(u32::to_ne_bytes);
        peer.say(header.as_flattened());
        let refused = channel.next().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidData, "{flags:#x}");
    }
}

#[test]
fn descriptors_are_those_of_their_request() {
    let (mut channel, mut peer) = channel(true);
    let (null, zero) = (null(), File::open("/dev/zero").unwrap());
    let (first, second) = (file(null.as_fd()), file(zero.as_fd()));
    peer.say_with(&request(0, 8), &[null.as_fd(), null.as_fd()]);
    peer.say(&request(0, 0));
    let bytes = request(0, 8);
    // In its middle, too.
    peer.say_with(&bytes[..5], &[zero.as_fd()]);
    peer.say_with(&bytes[5..], &[null.as_fd()]);
    let files = |came: &Incoming| {
        let fds = came.fds.iter();
        fds.map(|fd| file(fd.as_fd())).collect::<Vec<_>>()
    };
    assert_eq!(files(&next(&mut channel)), [first, first]);
    assert!(files(&next(&mut channel)).is_empty());
    assert_eq!(files(&next(&mut channel)), [second, first]);
}

#[test]
fn descriptors_are_closed_where_none_were_agreed_on() {
    let (mut channel, mut peer) = channel(false);
    let (read, write) = nix::unistd::pipe().unwrap();
    for count in [1, 2, 5, MAX_FDS] {
        peer.say_with(&request(0, 8), &vec![write.as_fd(); count]);
        let came = next(&mut channel);
        assert!(came.fds.is_empty());
        assert_is(&came, 0, 8);
    }
    // Nobody has the pipe's other end any more.
    drop(write);
    assert_eq!(nix::unistd::read(&read, &mut [0]), Ok(0));
}

#[test]
fn no_more_descriptors_are_kept_than_one_message_has() {
    let (mut channel, mut peer) = channel(true);
    let (null, mut came) = (null(), None);
    for byte in request(0, 8) {
        peer.say_with(&[byte], &[null.as_fd(); 20]);
        came = channel.next().unwrap();
    }
    assert_eq!(came.unwrap().fds.len(), MAX_FDS);
}

#[test]
fn what_came_before_the_end_is_told() {
    let (mut channel, mut peer) = channel(true);
    peer.say(&request(0, 8));
    peer.say(&request(0, 8)[..15]);
    drop(peer);
    assert_is(&next(&mut channel), 0, 8);
    for _ in 0..2 {
        let ended = channel.next().unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::UnexpectedEof);
    }
}

#[test]
fn answers_are_sent_without_waiting() {
    let (channel, mut peer) = channel(true);
    channel.answer(CODE, 0).unwrap();
    channel.answer(CODE, u64::MAX).unwrap();
    peer.read_all();
    let expected = [0, u64::MAX].map(|value| answer(CODE, &value.to_ne_bytes()));
    assert_eq!(peer.bytes, expected.concat());
    // A daemon that reads none of them.
    let full = std::iter::repeat_with(|| channel.answer(CODE, 0));
    let full = full.take(1 << 20).find_map(Result::err).unwrap();
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    // Gone, which is no SIGPIPE.
    drop(peer);
    let gone = channel.answer(CODE, 0).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe);
}
