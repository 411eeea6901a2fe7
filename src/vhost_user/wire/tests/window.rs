//! How many messages with descriptors are under way at once.

use super::*;

/// ADD_MEM_REG with 40 bytes after its header.
const ADD: usize = 52;

#[test]
fn at_most_32_messages_with_descriptors_are_under_way() {
    let mut pair = Pair::new();
    for at in 0..100 {
        pair.push(Message::add_region(region(at), Reply::Ack));
    }
    pair.push(Message::remove_region(region(0), Reply::Ack));
    pair.push(barrier());
    for answered in 0..100 {
        assert!(pair.answers().len() <= 1);
        pair.peer.read_all();
        // What has no descriptors waits its turn, and goes with the last one.
        let rest = if answered < 68 { 0 } else { ADD + HEADER };
        let sent = ADD * (32 + answered).min(100) + rest;
        assert_eq!(pair.peer.bytes.len(), sent, "after {answered} answers");
        assert_eq!(pair.wire.blocked, Blocked::Not);
        assert!(pair.waits_for().is_for_reading() && !pair.waits_for().is_for_writing());
        pair.peer.say(&acknowledgement(FrontendReq::ADD_MEM_REG));
    }
    pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
    pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
    assert_eq!(pair.answers().len(), 3);
    pair.check_peer_got_all();
    assert!(pair.wire.is_idle());
}

/// A table counts once, however many descriptors it has, and as soon as any message after one was
/// answered, it is known to have arrived.
#[test]
fn the_answer_to_a_later_message_makes_room_too() {
    let mut pair = Pair::new();
    for at in 0..64 {
        match at % 2 {
            0 => pair.push(Message::set_table(regions(), Reply::None)),
            _ => pair.push(Message::add_region(region(at), Reply::None)),
        }
        if at % 8 == 7 {
            pair.push(barrier());
        }
    }
    assert!(pair.advance().is_none());
    assert_eq!(pair.wire.with_fds, 32);
    pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
    assert_eq!(pair.answers().len(), 1);
    assert_eq!(pair.wire.with_fds, 32);
    let codes = pair.wire.under_way.iter().map(|message| message.code);
    let with_fds = codes.filter(|code| *code != u32::from(FrontendReq::GET_FEATURES));
    assert_eq!(with_fds.count(), 32);
    for _ in 1..8 {
        pair.peer.read_all();
        pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
        assert_eq!(pair.answers().len(), 1);
    }
    pair.check_peer_got_all();
    assert!(pair.wire.is_idle());
    assert_eq!(
        (pair.wire.with_fds, pair.wire.sent, pair.wire.awaited),
        (0, 0, 0)
    );
}
