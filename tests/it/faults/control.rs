//! Operations that do what none may, and are found.

use std::fmt;
use std::fs::{File, read_link};
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::play::failures_of;
use super::{Operation, Outcome, Stage, says_something};
use crate::isolation::in_own_process;

/// Each with what is said about it.
const BAD: [(Operation, &str); 6] = [
    (
        Operation::new("a descriptor", |stage| {
            attempt(stage, || std::mem::forget(File::open("/dev/null")))
        }),
        "and left",
    ),
    (
        Operation::new("a thread", |stage| {
            attempt(stage, || drop(std::thread::spawn(std::thread::park)))
        }),
        "and left",
    ),
    (
        Operation::new("a panic", |stage| attempt(stage, || panic!("of a test"))),
        "panicked: of a test",
    ),
    (
        Operation::new("a panic that is caught", |stage| {
            attempt(stage, || drop(catch_unwind(|| panic!("of a test"))))
        }),
        "and left",
    ),
    (
        Operation::new("a poison", |stage| {
            static POISONED: AtomicBool = AtomicBool::new(false);
            match POISONED.swap(false, Ordering::Relaxed) {
                true => refused(),
                false => attempt(stage, || POISONED.store(true, Ordering::Relaxed)),
            }
        }),
        "the next: it was refused",
    ),
    (
        Operation::new("silence", |stage| {
            attempt(stage, || drop(says_something(&Silence)))
        }),
        "panicked",
    ),
];

/// Makes a call that may fail; `fails` is what comes then.
fn attempt(stage: &Stage, fails: impl FnOnce()) -> Outcome {
    match stage.attacked(|| read_link("/proc/self/exe")) {
        Ok(_) => Outcome::Done,
        Err(_) => {
            fails();
            refused()
        }
    }
}

fn refused() -> Outcome {
    Outcome::Refused("a test says so".to_owned())
}

#[derive(Debug)]
struct Silence;

impl fmt::Display for Silence {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}

impl std::error::Error for Silence {}

#[test]
fn what_is_left_panics_or_stays_broken_is_found() {
    // Cases of a choice may be none of these.
    if std::env::var_os("FAULTS").is_some() {
        return;
    }
    in_own_process(|| {
        for (operation, expected) in &BAD {
            // It does stay: no need to wait for it.
            let patience = Duration::from_millis(1);
            let Some(failures) = failures_of(std::slice::from_ref(operation), patience) else {
                return;
            };
            assert!(!failures.is_empty(), "{} is not found", operation.name);
            for failure in failures {
                assert!(failure.contains(expected), "{failure}");
            }
        }
    });
}
