//! Random operations, faults and panics against a naive model of an address space under daemons.
//!
//! `MODEL_SEED=n` runs the sequence of one seed alone, `MODEL_SEEDS=n` as many as that. In front
//! of the daemons are two listeners with moods, who panic in every way there is, and the logger
//! panics, too.

use std::sync::Arc;

use guest_memory_shm::AddressSpaceError;

use super::*;
use crate::isolation::in_own_process;
use crate::proc::leaves_nothing_but_heaps;

mod change;
mod moods;
mod peer;
mod world;

use world::World;

const SEEDS: u64 = 60;
const STEPS: usize = 60;
/// Where regions may be, in MiB: 0 is always there.
const PLACES: u64 = 12;
/// How long a silent daemon holds all up. The others are given more than they ever need.
const LIMIT: Duration = Duration::from_millis(500);
/// Daemons are silent in every so many sequences only: each costs its limit.
const SILENCE: u64 = 10;

/// Sebastiano Vigna's splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % end
    }
}

/// It failed because of this listener.
#[track_caller]
fn expect_failure<T>(done: Result<T, AddressSpaceError>, name: &str, away: bool, what: &str) {
    let error = done.err().unwrap_or_else(|| panic!("{what}: it happened"));
    let (AddressSpaceError::Change {
        listener,
        error: failed,
        ..
    }
    | AddressSpaceError::Attach {
        listener,
        error: failed,
        ..
    }
    | AddressSpaceError::Refresh {
        listener,
        error: failed,
        ..
    }) = &error
    else {
        panic!("{what}: {error}");
    };
    assert_eq!(
        (failed.is_away(), listener.as_str()),
        (away, name),
        "{what}: {error}"
    );
}

#[track_caller]
fn expect_replaced<T>(done: Result<T, AddressSpaceError>, what: &str) {
    match done.err() {
        Some(AddressSpaceError::MirrorReplaced) => {}
        other => panic!("{what}: {other:?}"),
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let mut history = Vec::new();
    for _ in 0..STEPS {
        history.push(String::from("..."));
        let what = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.step()));
        let last = history.len() - 1;
        match what {
            Ok(what) => history[last] = what,
            Err(panic) => {
                eprintln!("MODEL_SEED={seed}, after:\n  {}", history.join("\n  "));
                std::panic::resume_unwind(panic);
            }
        }
        let history = history.join("\n  ");
        world.check(&format!("MODEL_SEED={seed}, after:\n  {history}"));
    }
}

#[test]
fn whatever_happens_is_what_the_model_says() {
    let number = |name| {
        std::env::var(name)
            .ok()
            .and_then(|n: String| n.parse().ok())
    };
    let seeds = match number("MODEL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("MODEL_SEEDS").unwrap_or(SEEDS),
    };
    println!("seeds {seeds:?}, {STEPS} steps each");
    in_own_process(|| {
        moods::install();
        // The first one has the loggers and buffers of the process made.
        run(seeds.start);
        for seed in seeds.clone() {
            leaves_nothing_but_heaps(|| run(seed));
        }
    });
}
