//! Peers that do anything: random answers to a frontend, random messages to a daemon.
//!
//! A conversation is made by a number. Played are some, from the number `HOSTILE_SEED` or one that
//! is printed on; `HOSTILE=number` plays as many conversations as that.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::isolation::in_own_process;
use crate::proc::{Holdings, thread_count};
use crate::watchdog::Watchdog;

mod daemon;
mod frontend;

/// How many conversations are played unless told otherwise.
const SOME: u64 = 60;

/// The random numbers of a conversation (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number less than `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// Numbers at which something may break, and any.
    fn word(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => 1 << self.below(64),
            2 => u64::MAX - self.below(0x2000),
            3 => self.below(64),
            4 => self.below(1 << 20) << 12,
            _ => self.next(),
        }
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let len = self.below(most + 1);
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// Plays conversations, in a process of its own, each with a limit, and asserts that none leaves
/// anything.
fn play(converse: fn(Random)) {
    let number = |name| std::env::var(name).map(|text| text.parse().expect("it is a number"));
    let first = number("HOSTILE_SEED").unwrap_or_else(|_| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.unwrap().as_millis() as u64
    });
    let count = number("HOSTILE").unwrap_or(SOME);
    let watchdog = Watchdog::start();
    // What is made once in a process stays.
    for seed in first..first + 2 {
        converse(Random(seed));
    }
    for seed in first..first + count {
        let failing = Failing(seed);
        watchdog.expect(&format!("HOSTILE_SEED={seed} HOSTILE=1"));
        let now = || (Holdings::beside_heaps(), thread_count());
        let before = now();
        converse(Random(seed));
        // A thread that was joined may still be listed, and a daemon still close.
        let deadline = Instant::now() + Duration::from_secs(10);
        while now() != before && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(now(), before, "something is left");
        std::mem::forget(failing);
    }
    watchdog.end();
}

/// Names the conversation in which a test fails.
struct Failing(u64);

impl Drop for Failing {
    fn drop(&mut self) {
        eprintln!("failed: HOSTILE_SEED={} HOSTILE=1", self.0);
    }
}

#[test]
fn a_daemon_that_answers_anything_does_no_harm() {
    in_own_process(|| play(daemon::converse));
}

#[test]
fn a_frontend_that_sends_anything_does_no_harm_to_the_mock() {
    in_own_process(|| play(frontend::converse));
}
