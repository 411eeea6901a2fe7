//! Answers that come in pieces, are cut off, or are wrong somewhere.

use std::net::Shutdown;

use super::*;

/// A message, and the body of an answer to it.
type Case = (Message, Vec<u8>);

/// Each way to be answered.
fn cases() -> Vec<Case> {
    let with_bases = |message: Message| {
        let mut body = message.body.clone();
        for region in body[8..].chunks_mut(32) {
            region[16..24].copy_from_slice(&0x7f00_1234_5678_u64.to_ne_bytes());
        }
        (message, body)
    };
    let number = |number| numbers([number]);
    vec![
        (barrier(), number(1 << 30)),
        (Message::max_slots(), number(509)),
        (Message::set_table(&regions()[..3], Reply::Ack), number(0)),
        (Message::add_region(region(1), Reply::Ack), number(22)),
        (Message::remove_region(region(2), Reply::Ack), number(0)),
        (Message::set_log(PAGE, log()), Vec::new()),
        (Message::set_log(PAGE, log()), number(PAGE)),
        (Message::set_log(PAGE, log()), numbers([PAGE, 0])),
        with_bases(Message::set_table(&regions()[..1], Reply::Bases)),
        with_bases(Message::set_table(regions(), Reply::Bases)),
        with_bases(Message::add_region(region(3), Reply::Bases)),
    ]
}

#[test]
fn an_answer_may_come_byte_by_byte_and_nothing_after_it_is_taken() {
    for (message, body) in cases() {
        let bytes = answer(message.code, &body);
        let mut pair = Pair::asking(message);
        let (last, others) = bytes.split_last().unwrap();
        for byte in others {
            pair.peer.say(&[*byte]);
            assert!(pair.is_ready());
            assert!(pair.advance().is_none());
        }
        pair.peer.say(&[&[*last], OTHERS].concat());
        assert!(pair.is_ready());
        assert_eq!(pair.advance().unwrap().body, body);
        assert!(pair.wire.is_idle());
        assert!(pair.advance().is_none());
        assert_eq!(pair.rest(), OTHERS);
    }
}

#[test]
fn two_answers_may_be_cut_anywhere() {
    let count = cases().len();
    for (first, second) in (0..count * count).map(|at| (at / count, at % count)) {
        let case = |at| cases().swap_remove(at);
        let answers = [case(first), case(second)].map(|(message, body)| {
            let bytes = answer(message.code, &body);
            (bytes, body)
        });
        let [(one, body), (other, next)] = answers;
        let bytes = [one, other].concat();
        for cut in 0..=bytes.len() {
            let mut pair = Pair::asking(case(first).0);
            pair.push(case(second).0);
            let (before, after) = bytes.split_at(cut);
            pair.peer.say(before);
            let mut answers = pair.answers();
            pair.peer.say(after);
            pair.peer.say(OTHERS);
            answers.extend(pair.answers());
            assert_eq!(bodies(&answers), [&body[..], &next], "cut at {cut}");
            assert!(pair.wire.is_idle());
            assert_eq!(pair.rest(), OTHERS);
        }
    }
}

#[test]
fn an_answer_that_ends_too_early_is_a_hang_up() {
    for at in 0..cases().len() {
        let (message, body) = cases().swap_remove(at);
        let bytes = answer(message.code, &body);
        for cut in 0..bytes.len() {
            // The other end is closed, with the request read or not, or says that it is done.
            for how in 0..3 {
                let mut pair = Pair::asking(cases().swap_remove(at).0);
                pair.peer.say(&bytes[..cut]);
                match how {
                    0 => pair.peer.socket.shutdown(Shutdown::Write).unwrap(),
                    1 => drop(pair.peer),
                    _ => {
                        pair.peer.read_all();
                        drop(pair.peer);
                    }
                }
                assert_hung_up(&pair.wire.advance().unwrap_err());
            }
        }
    }
}

/// Whether this header is one of an answer to the message.
fn is_right(header: &[u8], message: &Message) -> bool {
    let (fields, _) = header.as_chunks();
    let [code, flags, size] = [0, 1, 2].map(|at| u32::from_ne_bytes(fields[at]));
    let sizes = match message.reply {
        Reply::None => vec![],
        Reply::Ack => vec![8],
        Reply::Bases => vec![message.body.len()],
        Reply::Like => vec![0, message.body.len()],
        Reply::Body(sizes) => sizes.to_vec(),
        Reply::Any => (0..=message::LONGEST).collect(),
    };
    // The version is 1, and it is an answer; whether one was asked for may be said.
    code == message.code && [0b0101, 0b1101].contains(&flags) && sizes.contains(&(size as usize))
}

#[test]
fn each_bit_of_a_header_counts() {
    for at in 0..cases().len() {
        let (message, body) = cases().swap_remove(at);
        let right = answer(message.code, &body);
        for bit in 0..8 * HEADER {
            let mut bytes = right.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let is_right = is_right(&bytes[..HEADER], &message);
            // Those that have an answer before them, too: its header is seen later.
            for before in 0..2 {
                let mut pair = Pair::new();
                for _ in 0..before {
                    pair.push(barrier());
                }
                pair.push(cases().swap_remove(at).0);
                assert!(pair.advance().is_none());
                for _ in 0..before {
                    pair.peer.answer(FrontendReq::GET_FEATURES, &[0; 8]);
                }
                pair.peer.say(&bytes);
                let mut outcome = pair.wire.advance();
                for _ in 0..before {
                    assert_eq!(outcome.unwrap().unwrap().body, [0; 8]);
                    outcome = pair.wire.advance();
                }
                match outcome {
                    Ok(_) => assert!(is_right, "bit {bit}"),
                    Err(DaemonFailure::NoPostcopy) => {
                        // Its body would be the request's.
                        assert!(message.is_table_change() && message.reply == Reply::Ack);
                        let size = &bytes[8..HEADER];
                        assert_eq!(size, u32::to_ne_bytes(message.body.len() as u32));
                    }
                    Err(failure) => {
                        assert_protocol(&failure, "request");
                        assert!(!is_right, "bit {bit}");
                        // No more was taken than all answers have.
                        assert!(pair.rest().len() + message.least_answer() >= bytes.len());
                    }
                }
            }
        }
    }
}

#[test]
fn bases_that_were_not_asked_for_are_named() {
    let asked = [
        vec![Message::add_region(region(0), Reply::Ack)],
        vec![Message::set_table(regions(), Reply::Ack)],
        vec![Message::add_region(region(0), Reply::None), barrier()],
        vec![Message::set_table(regions(), Reply::None), barrier()],
    ];
    for messages in asked {
        let bytes = answer(messages[0].code, &messages[0].body);
        let mut pair = Pair::new();
        messages.into_iter().for_each(|message| pair.push(message));
        assert!(pair.advance().is_none());
        pair.peer.say(&bytes);
        let failure = pair.failure();
        assert!(matches!(failure, DaemonFailure::NoPostcopy), "{failure:?}");
    }
}
