//! Any messages, and a peer that reads, answers and fails at any time, beside a plain model.

use std::io::ErrorKind;

use super::*;

/// A generator of numbers that are the same each time (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next().to_ne_bytes()[0])
            .take(count)
            .collect()
    }

    fn message(&mut self) -> Message {
        let reply = [Reply::Ack, Reply::None, Reply::Bases][self.below(3)];
        let some = &regions()[..=self.below(regions().len())];
        let one = region(self.below(regions().len()));
        match self.below(10) {
            0 => barrier(),
            1 => Message::max_slots(),
            2 => Message::set_table(some, reply),
            3 | 4 => Message::add_region(one, reply),
            5 if reply != Reply::Bases => Message::remove_region(one, reply),
            6 => Message::set_log(PAGE, log()),
            7 => filler(self.below(300)).with_reply(Reply::Like),
            8 => filler(self.below(300)).with_reply(Reply::Any),
            _ => filler(self.below(300)),
        }
    }

    /// The body of an answer to a message, if it has one.
    fn body(&mut self, message: &Message) -> Option<Vec<u8>> {
        let size = match message.reply {
            Reply::None => return None,
            Reply::Ack => 8,
            Reply::Bases => message.body.len(),
            Reply::Like => [0, message.body.len()][self.below(2)],
            Reply::Body(sizes) => sizes[self.below(sizes.len())],
            Reply::Any => self.below(message::LONGEST + 1),
        };
        Some(self.bytes(size))
    }
}

/// A peer that handles messages as daemons do, and a pair that it is of.
struct World {
    pair: Pair,
    rng: Rng,
    /// Where messages end that the peer has not handled, and their answers.
    to_handle: VecDeque<(usize, Vec<u8>)>,
    to_say: VecDeque<u8>,
    /// The bodies of answers that are to come.
    wanted: VecDeque<Vec<u8>>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let pair = Pair::new();
        for socket in [&pair.ours, &pair.peer.socket] {
            // As a rule so small that it is often full.
            setsockopt(socket, SndBuf, &rng.below(8000)).unwrap();
        }
        Self {
            pair,
            rng,
            to_handle: VecDeque::new(),
            to_say: VecDeque::new(),
            wanted: VecDeque::new(),
        }
    }

    fn push(&mut self, message: Message) {
        let (code, body) = (message.code, self.rng.body(&message));
        self.pair.push(message);
        if let Some(body) = body {
            let end = self.pair.expected.bytes.len();
            self.to_handle.push_back((end, answer(code, &body)));
            self.wanted.push_back(body);
        }
    }

    fn advance(&mut self) {
        for answer in self.pair.answers() {
            let wanted = self.wanted.pop_front().unwrap();
            assert_eq!(answer.body, wanted);
            assert!(answer.request.allows(wanted.len()));
        }
    }

    fn read(&mut self, most: usize) {
        self.pair.peer.read(most);
        let read = self.pair.peer.bytes.len();
        let handled = self.to_handle.partition_point(|(end, _)| *end <= read);
        for (_, answer) in self.to_handle.drain(..handled) {
            self.to_say.extend(answer);
        }
    }

    fn say(&mut self, most: usize) {
        let count = most.min(self.to_say.len());
        let bytes: Vec<u8> = self.to_say.iter().take(count).copied().collect();
        match self.pair.peer.socket.write(&bytes) {
            Ok(count) => drop(self.to_say.drain(..count)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn step(&mut self) {
        match self.rng.below(8) {
            0 | 1 => {
                for _ in 0..=self.rng.below(6) {
                    let message = self.rng.message();
                    self.push(message);
                }
            }
            2 | 3 => self.advance(),
            4 | 5 => {
                let most = 1 + self.rng.below(3000);
                self.read(most);
            }
            _ => {
                let most = 1 + self.rng.below(60);
                self.say(most);
            }
        }
    }

    /// The peer does all it can until the wire is idle, which may not wait for anything else.
    fn end(&mut self) {
        self.push(barrier());
        self.advance();
        while !self.pair.wire.is_idle() {
            while self.pair.peer.read_all() > 0 {}
            self.read(1);
            self.say(usize::MAX);
            // Where the user has too many descriptors on their way, it is a moment.
            let is_short = matches!(self.pair.wire.blocked, Blocked::Short(_));
            assert!(self.pair.is_ready() || is_short);
            self.advance();
        }
        self.pair.check_peer_got_all();
        assert!(self.wanted.is_empty() && self.to_say.is_empty());
        let Wire {
            sent,
            awaited,
            with_fds,
            ..
        } = self.pair.wire;
        assert_eq!((sent, awaited, with_fds), (0, 0, 0));
        assert!(self.pair.wire.received.is_empty());
        assert!(self.pair.rest().is_empty());
    }
}

#[test]
fn all_answers_arrive_in_order_whatever_the_pieces() {
    for seed in 0..100 {
        let mut world = World::new(seed);
        for _ in 0..3 {
            (0..150).for_each(|_| world.step());
            world.end();
        }
    }
}

/// What becomes of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Idle,
    Waiting,
    HungUp,
    Refused,
}

/// A message as the model sees it: its code, the size of its body, and its reply.
type Seen = (u32, usize, Reply);

/// What comes of these bytes after these messages: the bodies of the answers, the end, and how
/// many bytes may have been taken.
fn model(messages: &[Seen], said: &[u8], hangs_up: bool) -> (Vec<Vec<u8>>, End, usize) {
    let (mut bodies, mut at, mut end) = (Vec::new(), 0, End::Idle);
    let mut least = Vec::new();
    for (code, size, reply) in messages {
        let sizes = match reply {
            Reply::None => continue,
            Reply::Ack => vec![8],
            Reply::Bases => vec![*size],
            Reply::Like => vec![0, *size],
            Reply::Body(sizes) => sizes.to_vec(),
            Reply::Any => (0..=message::LONGEST).collect(),
        };
        least.push(HEADER + sizes.iter().min().unwrap());
        if end != End::Idle {
            continue;
        }
        let rest = &said[at..];
        let missing = if hangs_up { End::HungUp } else { End::Waiting };
        let Some((header, rest)) = rest.split_at_checked(HEADER) else {
            end = missing;
            continue;
        };
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let is_fine = field(0) == *code && [5, 13].contains(&field(4));
        let size = field(8) as usize;
        if !is_fine || !sizes.contains(&size) {
            end = End::Refused;
            continue;
        }
        let Some(body) = rest.get(..size) else {
            // Then all of this one may be taken.
            end = missing;
            continue;
        };
        bodies.push(body.to_vec());
        at += HEADER + size;
    }
    let may_take = match end {
        End::Idle => at,
        End::Refused => at + least[bodies.len()..].iter().sum::<usize>(),
        End::Waiting | End::HungUp => said.len(),
    };
    (bodies, end, may_take)
}

#[test]
fn a_peer_that_answers_anything_is_judged_as_a_plain_reading_of_it_says() {
    let mut ends = [0; 4];
    for seed in 0..6000 {
        let mut rng = Rng(seed);
        let mut pair = Pair::new();
        let mut messages: Vec<Message> = (0..rng.below(10)).map(|_| rng.message()).collect();
        messages.push(barrier());
        let mut answers = Vec::new();
        for message in &messages {
            answers.extend(rng.body(message).map(|body| answer(message.code, &body)));
        }
        let seen = |message: &Message| (message.code, message.body.len(), message.reply);
        let seen: Vec<Seen> = messages.iter().map(seen).collect();
        messages.into_iter().for_each(|message| pair.push(message));

        for _ in 0..rng.below(3) {
            let at = rng.below(answers.len());
            match rng.below(5) {
                0 => answers.insert(at, answers[at].clone()),
                1 => answers.swap(at, 0),
                2 => answers.push(OTHERS.to_vec()),
                3 if answers.len() > 1 => drop(answers.remove(at)),
                _ => {
                    let byte = rng.below(answers[at].len());
                    answers[at][byte] ^= 1 << rng.below(8);
                }
            }
        }
        let mut said = answers.concat();
        let hangs_up = rng.below(4) == 0;
        if rng.below(3) == 0 {
            said.truncate(rng.below(said.len()));
        }

        let mut bodies = Vec::new();
        let mut failure = None;
        let mut rest = &said[..];
        assert!(pair.advance().is_none());
        while failure.is_none() && !rest.is_empty() {
            let (piece, others) = rest.split_at(rest.len().min(1 + rng.below(80)));
            pair.peer.say(piece);
            rest = others;
            failure = take(&mut pair.wire, &mut bodies);
        }
        pair.peer.say(rest);
        let Pair {
            mut wire,
            peer,
            ours,
            ..
        } = pair;
        let peer = Some(peer).filter(|_| !hangs_up);
        failure = failure.or_else(|| take(&mut wire, &mut bodies));
        let end = match failure {
            None if wire.is_idle() => End::Idle,
            None => End::Waiting,
            Some(DaemonFailure::HungUp(_)) => End::HungUp,
            Some(DaemonFailure::Protocol(_) | DaemonFailure::NoPostcopy) => End::Refused,
            Some(other) => panic!("{other:?}"),
        };
        let (expected, expected_end, may_take) = model(&seen, &said, hangs_up);
        assert_eq!((bodies, end), (expected, expected_end), "seed {seed}");
        ends[end as usize] += 1;

        drop(peer);
        let left = rest_of(&ours);
        assert!(said.ends_with(&left), "seed {seed}");
        assert!(said.len() - left.len() <= may_take, "seed {seed}");
        if end == End::Idle {
            assert_eq!(said.len() - left.len(), may_take);
        }
    }
    assert!(ends.iter().all(|count| *count > 200), "{ends:?}");
}

/// Takes the answers that are there, up to a failure.
fn take(wire: &mut Wire, bodies: &mut Vec<Vec<u8>>) -> Option<DaemonFailure> {
    loop {
        match wire.advance() {
            Ok(Some(answer)) => bodies.push(answer.body),
            Ok(None) => return None,
            Err(failure) => return Some(failure),
        }
    }
}
