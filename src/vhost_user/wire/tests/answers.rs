//! Answers at the wrong time, to the wrong request, and with what comes beside the bytes.

use std::io::{PipeReader, Read, Write, pipe};
use std::process::{Command, Stdio};

use super::*;
use crate::host::process::Process;

/// How long a descriptor may stay open that a process has which is just being started.
const PATIENCE: u16 = 10_000;

fn two_added_and_asked() -> Pair {
    let mut pair = Pair::new();
    pair.push(Message::add_region(region(0), Reply::Ack));
    pair.push(Message::add_region(region(1), Reply::Ack));
    pair.push(barrier());
    assert!(pair.advance().is_none());
    pair
}

#[test]
fn what_came_before_anything_was_asked_stops_the_first_message() {
    for count in 1..=20 {
        let mut pair = Pair::new();
        let early = &answer(FrontendReq::GET_FEATURES, &[0; 8])[..count];
        pair.peer.say(early);
        pair.push(barrier());
        assert_protocol(&pair.failure(), "nothing asked for");
        assert_eq!(pair.peer.read_all(), 0);
        assert_eq!(pair.rest(), early);
    }
}

#[test]
fn a_second_answer_to_the_last_question_is_not_one_to_the_next() {
    let mut pair = Pair::asking(barrier());
    for _ in 0..2 {
        pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
    }
    assert_eq!(pair.answers().len(), 1);
    assert!(pair.wire.is_idle());
    assert!(!pair.wire.has_hung_up());
    pair.push(Message::remove_region(region(0), Reply::None));
    pair.push(barrier());
    assert_protocol(&pair.failure(), "nothing asked for");
    assert_eq!(
        pair.wire.pending(),
        Some(DaemonRequest::RemoveRegion(region(0).range()))
    );
}

#[test]
fn an_answer_too_many_is_noticed_at_the_question_that_follows() {
    let mut pair = two_added_and_asked();
    for _ in 0..3 {
        pair.peer.say(&acknowledgement(FrontendReq::ADD_MEM_REG));
    }
    assert!(pair.advance().is_some() && pair.advance().is_some());
    assert_protocol(&pair.failure(), "or one that came twice");
}

#[test]
fn answers_out_of_order_are_refused() {
    let mut pair = two_added_and_asked();
    pair.peer.say(&acknowledgement(FrontendReq::ADD_MEM_REG));
    pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
    assert!(pair.advance().is_some());
    assert_protocol(&pair.failure(), "to request 37 came request 1,");
}

#[test]
fn the_answer_to_another_user_of_the_connection_is_named() {
    let mut pair = two_added_and_asked();
    pair.peer.answer(FrontendReq::GET_VRING_BASE, &[0; 8]);
    assert_protocol(
        &pair.failure(),
        "the answer to request 11, which another user",
    );
    // A request is no answer.
    let mut pair = two_added_and_asked();
    let mut request = answer(FrontendReq::GET_VRING_BASE, &[0; 8]);
    request[4..8].copy_from_slice(&u32::to_ne_bytes(1));
    pair.peer.say(&request);
    assert_protocol(
        &pair.failure(),
        "to request 37 came request 11, flags 0x1, 8 bytes",
    );
}

#[test]
fn an_answer_that_comes_too_late_is_not_read() {
    let mut pair = two_added_and_asked();
    pair.peer
        .say(&acknowledgement(FrontendReq::ADD_MEM_REG)[..15]);
    assert!(pair.advance().is_none());
    // The deadline is over.
    pair.wire.close();
    pair.peer.say(OTHERS);
    assert!(pair.wire.is_idle());
    assert!(pair.wire.advance().unwrap().is_none());
    assert_eq!(pair.rest(), OTHERS);
    assert!(pair.wire.has_hung_up());
    pair.push(barrier());
    assert_hung_up(&pair.failure());
}

/// Asserts that no one has the other end any more.
fn assert_closed(mut reader: PipeReader) {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PATIENCE), Ok(1));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn descriptors_in_answers_are_closed() {
    for each in [1, 7, 100] {
        let mut pair = two_added_and_asked();
        let (reader, writer) = pipe().unwrap();
        let fds = vec![writer.as_fd(); each];
        for byte in acknowledgement(FrontendReq::ADD_MEM_REG) {
            assert!(pair.advance().is_none());
            pair.peer.say_with(&[byte], &fds);
        }
        let answer = pair.advance().unwrap();
        assert!(answer.fds.is_empty());
        drop(writer);
        assert_closed(reader);
    }
}

#[test]
fn descriptors_that_are_wanted_come_with_their_answer() {
    let mut pair = Pair::keeping(true);
    (0..3).for_each(|_| pair.push(barrier()));
    assert!(pair.advance().is_none());
    let bytes = answer(FrontendReq::GET_FEATURES, &[0; 8]);
    // All are there before the first one is taken.
    pair.peer.say(&bytes);
    pair.peer
        .say_with(&bytes, &[region(3).as_fd(), region(4).as_fd()]);
    pair.peer.say_with(&bytes[..5], &[region(5).as_fd()]);
    pair.peer.say_with(&bytes[5..], &[region(6).as_fd()]);
    let answers = pair.answers();
    let files =
        |answer: &Answer| -> Vec<u64> { answer.fds.iter().map(|fd| file(fd.as_fd())).collect() };
    let of = |at: usize| file(region(at).as_fd());
    let all: Vec<Vec<u64>> = answers.iter().map(files).collect();
    assert_eq!(all, [vec![], vec![of(3), of(4)], vec![of(5), of(6)]]);
}

#[test]
fn no_more_descriptors_are_kept_than_a_message_can_have() {
    let mut pair = Pair::keeping(true);
    pair.push(barrier());
    assert!(pair.advance().is_none());
    let (reader, writer) = pipe().unwrap();
    let fds = vec![writer.as_fd(); 30];
    for byte in answer(FrontendReq::GET_FEATURES, &[0; 8]) {
        assert!(pair.advance().is_none());
        pair.peer.say_with(&[byte], &fds);
    }
    let answer = pair.advance().unwrap();
    assert_eq!(answer.fds.len(), MAX_FDS);
    drop(answer);
    drop(writer);
    assert_closed(reader);
}

#[test]
fn answers_come_with_the_process_that_sent_them_while_that_is_wanted() {
    for with_fds in [false, true] {
        let mut pair = Pair::keeping(with_fds);
        let mut processes = |wanted| {
            pair.wire.pass_credentials(wanted);
            (0..3).for_each(|_| pair.push(barrier()));
            assert!(pair.advance().is_none());
            // Together, the last one in two pieces and beside a descriptor.
            let bytes = answer(FrontendReq::GET_FEATURES, &[0; 8]);
            pair.peer.say(&[&bytes[..], &bytes, &bytes[..3]].concat());
            let mut answers = pair.answers();
            pair.peer.say_with(&bytes[3..], &[region(0).as_fd()]);
            answers.extend(pair.answers());
            let files = answers
                .iter()
                .map(|answer| answer.fds.len())
                .collect::<Vec<_>>();
            assert_eq!(files, [0, 0, usize::from(with_fds)]);
            answers
                .iter()
                .map(|answer| answer.process.id)
                .collect::<Vec<_>>()
        };
        assert_eq!(processes(false), [None; 3]);
        assert_eq!(processes(true), [Some(std::process::id()); 3]);
        assert_eq!(processes(false), [None; 3]);
    }
}

#[test]
fn a_process_that_sent_something_is_known_to_be_dead_once_it_is() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    socket::pass_credentials(ours.as_fd(), true);
    let mut child = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    child.stdin.as_ref().unwrap().write_all(b"!").unwrap();
    let wait = || {
        let mut ended = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ended, PATIENCE), Ok(1));
        socket::receive(ours.as_fd(), &mut [0; 9], &mut Control::new(false)).unwrap()
    };
    let by_pidfd = wait().sender;
    assert_eq!(by_pidfd.id, Some(child.id()));
    // As before Linux 6.5; and where no descriptor is left, or it was gone already.
    let (id, pidfd) = (by_pidfd.id, None);
    let by_number = Sender { id, pidfd };
    let pidfd = Some(Err(Errno::EMFILE));
    let unseen = Process::of(Sender { id, pidfd }).unwrap();
    let processes = [by_pidfd, by_number].map(|sender| Process::of(sender).unwrap());
    assert!(processes.iter().all(|process| !process.is_dead()));
    drop(child.stdin.take());
    // Its end of the socket is closed, and its own end comes soon after.
    assert_eq!(wait().bytes, 0);
    let deadline = Instant::now() + Duration::from_millis(PATIENCE.into());
    while !processes.iter().all(Process::is_dead) && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(processes.iter().all(Process::is_dead), "a zombie");
    child.wait().unwrap();
    assert!(processes.iter().all(Process::is_dead), "gone");
    assert!(!unseen.is_dead());
}
