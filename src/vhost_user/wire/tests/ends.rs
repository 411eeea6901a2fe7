//! The end of a connection, from either side, and messages that are not to be sent after all.

use std::io::Read;
use std::net::Shutdown;

use super::*;

/// A pair that has sent some of many removals.
fn with_a_full_buffer() -> Pair {
    let mut pair = Pair::new();
    for at in 0..4000 {
        pair.push(Message::remove_region(region(at), Reply::Ack));
    }
    assert!(pair.advance().is_none());
    pair
}

#[test]
fn answers_are_taken_before_the_hang_up_that_stops_the_sending() {
    for answered in 0..5 {
        for read in [1, 1000, 1 << 20] {
            let mut pair = with_a_full_buffer();
            pair.peer.read(read);
            for _ in 0..answered {
                pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
            }
            let Pair { mut wire, peer, .. } = pair;
            drop(peer);
            for _ in 0..answered {
                assert!(wire.advance().unwrap().is_some());
            }
            assert_hung_up(&wire.advance().unwrap_err());
            // It says so again.
            assert_hung_up(&wire.advance().unwrap_err());
        }
    }
}

/// What a daemon does not read any more, it may have read before.
#[test]
fn a_peer_that_only_stops_reading_is_heard_to_its_last_answer() {
    let mut pair = Pair::asking(barrier());
    pair.push(barrier());
    assert!(pair.advance().is_none());
    pair.peer.socket.shutdown(Shutdown::Read).unwrap();
    pair.push(barrier());
    assert!(pair.advance().is_none());
    assert!(matches!(pair.wire.blocked, Blocked::HungUp(_)));
    for _ in 0..2 {
        pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
    }
    assert!(pair.advance().is_some());
    // The last of those that it may have got: there is nothing to wait for.
    assert!(pair.advance().is_some());
    assert_hung_up(&pair.failure());
}

#[test]
fn a_hang_up_with_nothing_awaited_is_seen_by_looking_and_by_the_next_message() {
    let messages: [fn() -> Message; 3] = [
        barrier,
        || Message::add_region(region(0), Reply::Ack),
        || filler(0),
    ];
    for message in messages {
        let mut pair = Pair::asking(barrier());
        pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
        assert!(pair.advance().is_some());
        assert!(!pair.wire.has_hung_up());
        let Pair { mut wire, peer, .. } = pair;
        drop(peer);
        assert!(wire.has_hung_up());
        assert!(wire.is_idle());
        assert!(wire.advance().unwrap().is_none());
        wire.push(message());
        assert_hung_up(&wire.advance().unwrap_err());
    }
}

#[test]
fn a_closed_wire_has_let_go_of_the_socket() {
    let mut pair = with_a_full_buffer();
    pair.wire.close();
    assert!(pair.wire.is_idle());
    assert_eq!(pair.wire.pending(), None);
    assert!(pair.waits_for().fd().is_none());
    assert!(pair.waits_for().until() <= Instant::now());
    let Pair { ours, mut peer, .. } = pair;
    drop(ours);
    while peer.read_all() > 0 {}
    assert_eq!(peer.socket.read(&mut [0]).unwrap(), 0);
}

#[test]
fn messages_of_which_no_byte_was_sent_can_be_cancelled() {
    // The buffer is full, in the middle of a message or between two.
    let mut between = 0;
    for size in 0..200 {
        let mut pair = Pair::narrow();
        // The first is sent by itself, so that the others are cut.
        pair.push(Message::add_region(region(0), Reply::Ack));
        pair.push(Message::add_region(region(1), Reply::Ack));
        pair.push(filler(size));
        for at in 0..200 {
            pair.push(Message::remove_region(region(at), Reply::Ack));
        }
        pair.push(Message::add_region(region(0), Reply::Ack));
        assert!(pair.advance().is_none());
        assert_eq!(pair.wire.blocked, Blocked::Full);
        let sent = pair.peer.read_all();
        pair.wire.cancel_unsent();

        // What was begun is ended, nothing else is sent.
        let start = 2 * 52 + HEADER + size;
        let removals = (sent - start).div_ceil(52);
        let begun = start + removals * 52;
        assert!(removals < 200);
        between += usize::from(begun == sent);
        assert!(pair.advance().is_none());
        assert_eq!(pair.peer.read_all(), begun - sent);
        pair.check_peer();
        assert!(!pair.waits_for().is_for_writing());

        // What is pushed then comes next.
        pair.expected.bytes.truncate(begun);
        pair.expected.fds.truncate(2);
        pair.push(Message::add_region(region(1), Reply::Ack));
        pair.push(barrier());
        assert!(pair.advance().is_none());
        for _ in 0..2 {
            pair.peer.say(&acknowledgement(FrontendReq::ADD_MEM_REG));
        }
        for _ in 0..removals {
            pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
        }
        pair.peer.say(&acknowledgement(FrontendReq::ADD_MEM_REG));
        pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
        assert_eq!(pair.answers().len(), 2 + removals + 2);
        assert!(pair.wire.is_idle());
        pair.peer.read_all();
        pair.check_peer_got_all();
    }
    assert!((1..200).contains(&between), "{between}");
}

#[test]
fn messages_with_descriptors_that_are_cancelled_take_no_part_of_the_window() {
    let mut pair = Pair::new();
    for at in 0..50 {
        pair.push(Message::add_region(region(at), Reply::Ack));
    }
    assert!(pair.advance().is_none());
    pair.wire.cancel_unsent();
    assert_eq!((pair.wire.with_fds, pair.wire.under_way.len()), (32, 32));
    for _ in 0..32 {
        pair.peer.say(&acknowledgement(FrontendReq::ADD_MEM_REG));
    }
    assert_eq!(pair.answers().len(), 32);
    assert!(pair.wire.is_idle());

    // One that waits for room, all of it.
    while socket::send(pair.ours.as_fd(), &[0], &[]).is_ok() {}
    pair.push(Message::add_region(region(0), Reply::Ack));
    assert!(pair.advance().is_none());
    assert_eq!(pair.wire.with_fds, 1);
    pair.wire.cancel_unsent();
    assert_eq!(pair.wire.with_fds, 0);
    assert!(pair.wire.is_idle());
    assert!(pair.advance().is_none());
}

#[test]
fn the_oldest_message_without_an_answer_is_pending() {
    let mut pair = Pair::new();
    assert_eq!(pair.wire.pending(), None);
    pair.push(Message::max_slots());
    assert_eq!(pair.wire.pending(), Some(DaemonRequest::GetMaxSlots));
    pair.push(Message::set_table(regions(), Reply::Ack));
    assert!(pair.advance().is_none());
    assert_eq!(pair.wire.pending(), Some(DaemonRequest::GetMaxSlots));
    pair.peer.answer(FrontendReq::GET_MAX_MEM_SLOTS, &[0; 8]);
    assert!(pair.advance().is_some());
    let table = DaemonRequest::SetTable(regions().len());
    assert_eq!(pair.wire.pending(), Some(table));
}
