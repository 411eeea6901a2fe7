//! Fault injection: each system call of what the crate does fails in turn, in each way that it
//! may.
//!
//! An operation runs in a thread with a seccomp filter that asks a supervisor about each call
//! (seccomp_unotify(2)); threads that it starts inherit the filter. The first run only lists the
//! calls. Then there is one run for each call, each time that it comes, and each error that it may
//! fail by ([`call::Call::errors`]); and one in which it fails from the first time on, where the
//! error is a state ([`call::Call::may_last`]).
//!
//! After each run the operation was done, as looking at its effect shows, or it gave an error that
//! says something (but a signal, EINTR, is no failure); nothing panicked or hung; no descriptor,
//! mapping, reservation, thread or name is left; every listener holds what readers see, or is
//! called stale; and the same operation succeeds without a fault. Which calls are not played, and
//! why, stands at [`call::Call::is_exempt`]. What fails to give something back leaves that, and it
//! is swept up: munmap(2) and unlink(2).
//!
//! Played is a sample, by the seed `FAULTS_SEED` or one that is printed: each call of each
//! operation, and each error of each call. `FAULTS=all` plays all, `FAULTS=text` those whose
//! description contains the text, such as one that a failure printed.
#![cfg(target_arch = "x86_64")]

mod call;
mod control;
mod filter;
mod known;
mod peers;
mod play;
mod ram;
mod spaces;
mod stage;

use play::{Operation, Outcome, play, says_something};
use stage::Stage;

use crate::isolation::{HugePool, in_own_process};

#[test]
fn each_system_call_of_a_build_may_fail() {
    in_own_process(|| play(ram::BUILDS));
}

#[test]
fn a_path_is_looked_at_once_before_it_is_opened() {
    in_own_process(|| {
        ram::looks();
    });
}

#[test]
fn each_system_call_on_ram_may_fail() {
    in_own_process(|| play(ram::USES));
}

#[test]
fn each_system_call_on_huge_pages_may_fail() {
    in_own_process(|| {
        if let Some(_pool) = HugePool::with_available(2 << 20, 16) {
            play(ram::HUGE);
        }
    });
}

#[test]
fn each_system_call_of_a_share_may_fail() {
    in_own_process(|| play(peers::SHARES));
}

#[test]
fn each_system_call_of_a_plug_may_fail() {
    in_own_process(|| play(spaces::SPACES));
}

#[test]
fn each_system_call_of_a_daemon_may_fail() {
    in_own_process(|| {
        play(peers::DAEMONS);
        play(spaces::DAEMONS);
    });
}
