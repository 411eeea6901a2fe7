//! Messages of which the first part is sent, because there is no room for more.

use super::*;

/// What is cut: the bytes of two messages, one of them without a body.
const CUT: usize = 52 + 12;

/// A narrow pair that has sent an ADD_MEM_REG and the beginning of a batch: another one, a filler
/// of this size, a REM_MEM_REG and a question.
fn cut_after(filler_size: usize) -> Pair {
    let mut pair = Pair::narrow();
    pair.push(Message::add_region(region(0), Reply::Ack));
    pair.push(Message::add_region(region(1), Reply::Ack));
    pair.push(filler(filler_size));
    pair.push(Message::remove_region(region(2), Reply::Ack));
    pair.push(barrier());
    assert!(pair.advance().is_none());
    assert_eq!(pair.wire.blocked, Blocked::Full);
    pair
}

/// The size of the filler with which all but the last two messages are sent.
fn filler_size() -> usize {
    cut_after(1 << 20).peer.read_all() - 2 * 52 - HEADER
}

#[test]
fn messages_cut_at_each_byte_arrive_whole_with_their_descriptors() {
    let size = filler_size();
    for cut in 0..CUT {
        let mut pair = cut_after(size - cut);
        let sent = pair.peer.read_all();
        assert_eq!(sent + CUT - cut, pair.expected.bytes.len(), "cut elsewhere");
        pair.check_peer();
        assert!(pair.is_ready());
        assert!(pair.advance().is_none());
        pair.peer.read_all();
        pair.check_peer_got_all();

        for code in [FrontendReq::ADD_MEM_REG; 2] {
            pair.peer.say(&acknowledgement(code));
        }
        pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
        pair.peer.answer(FrontendReq::GET_FEATURES, &[1; 8]);
        assert_eq!(pair.answers().len(), 4);
        assert!(pair.wire.is_idle());
    }
}

#[test]
fn descriptors_go_once_with_the_first_byte_of_a_long_message() {
    // Cut several times, at another byte each.
    for size in (2000..9000).step_by(97) {
        let mut pair = Pair::narrow();
        for at in 0..3 {
            let fds: Vec<Descriptor> = (0..=at).map(|_| log()).collect();
            pair.push(filler(size).with_fds(fds));
        }
        pair.push(barrier());
        while pair.peer.bytes.len() < pair.expected.bytes.len() {
            assert!(pair.advance().is_none());
            assert!(pair.peer.read_all() > 0);
        }
        pair.check_peer_got_all();
    }
}

/// It cannot be told from one that comes a moment later: what counts is that nothing is taken for
/// handled before it was sent, and that no byte is read which may be somebody else's.
#[test]
fn an_answer_to_what_is_not_all_sent_stays_in_the_socket() {
    let size = filler_size();
    for cut in 0..CUT {
        let mut pair = cut_after(size - cut);
        for _ in 0..2 {
            pair.peer.say(&acknowledgement(FrontendReq::ADD_MEM_REG));
        }
        pair.peer.say(&acknowledgement(FrontendReq::REM_MEM_REG));
        pair.peer.answer(FrontendReq::GET_FEATURES, &[1; 8]);
        let early = pair.answers();
        // Of a question without a body all is sent once the message before it is.
        let expected = 2 + usize::from(cut >= 52);
        assert_eq!(early.len(), expected, "cut after {cut}");
        assert_eq!(pair.rest().len(), 20 * (4 - expected));
        assert!(!pair.waits_for().is_for_reading());
        assert!(!pair.is_ready());

        pair.peer.read_all();
        assert!(pair.is_ready());
        assert_eq!(pair.answers().len(), 4 - expected);
        assert!(pair.wire.is_idle());
    }
}
