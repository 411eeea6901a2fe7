//! A peer that does not read.

use super::*;

/// More than fits into any send buffer.
const MANY: usize = 4000;

fn full_of_removals() -> Pair {
    let mut pair = Pair::new();
    for at in 0..MANY {
        pair.push(Message::remove_region(region(at), Reply::Ack));
    }
    assert!(pair.advance().is_none());
    assert_eq!(pair.wire.blocked, Blocked::Full);
    pair
}

#[test]
fn a_full_buffer_is_waited_for_and_all_arrives_once_the_peer_reads() {
    let mut pair = full_of_removals();
    let deadline = far_off();
    let wait = pair.wire.waits_for(deadline);
    assert!(wait.is_for_writing() && wait.is_for_reading());
    assert_eq!(wait.until(), deadline);
    assert!(!pair.is_ready());

    while pair.peer.read_all() > 0 {
        assert!(pair.is_ready() || pair.wire.queue.is_empty());
        assert!(pair.advance().is_none());
    }
    pair.check_peer_got_all();
    assert!(!pair.waits_for().is_for_writing());
    for _ in 0..MANY {
        pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
        assert!(pair.advance().is_some());
    }
    assert!(pair.wire.is_idle());
}

#[test]
fn an_answer_is_a_sign_of_room() {
    let mut pair = full_of_removals();
    // Room for some, but too little for poll(2) to say so.
    pair.peer.read(20_000);
    assert!(!pair.is_ready());
    let unsent = pair.wire.queue.len();
    pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
    assert!(pair.is_ready());
    assert_eq!(pair.answers().len(), 1);
    assert!(pair.wire.queue.len() < unsent);
}

#[test]
fn a_peer_that_answers_before_it_reads_on_blocks_nothing() {
    let mut pair = full_of_removals();
    let mut answered = 0;
    for _ in 0..MANY {
        pair.peer.read(52);
        pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
        answered += pair.answers().len();
    }
    assert_eq!(answered, MANY);
    pair.check_peer_got_all();
}

#[test]
fn what_was_not_asked_for_is_not_waited_for() {
    let mut pair = Pair::new();
    // Nothing is answered before the last one.
    (0..MANY).for_each(|_| pair.push(filler(40)));
    pair.push(barrier());
    assert!(pair.advance().is_none());
    pair.peer.say(OTHERS);
    assert!(pair.waits_for().is_for_writing());
    assert!(!pair.waits_for().is_for_reading());
    assert!(!pair.is_ready());
    assert!(pair.advance().is_none());
    assert_eq!(pair.rest(), OTHERS);
}

#[test]
fn a_peer_that_hangs_up_instead_of_reading_is_noticed() {
    let mut pair = Pair::new();
    (0..MANY).for_each(|_| pair.push(filler(40)));
    pair.push(barrier());
    assert!(pair.advance().is_none());
    let Pair { peer, .. } = &mut pair;
    peer.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(pair.is_ready());
    assert_hung_up(&pair.failure());
}
