//! Each system call of what the crate does fails, in each way that it may.
#![cfg(target_arch = "x86_64")]

mod call;
mod filter;
mod known;
mod play;
mod ram;
mod stage;
mod watchdog;

use play::{Operation, Outcome, play, says_something};
use stage::Stage;

use crate::isolation::{HugePool, in_own_process};

#[test]
fn each_system_call_of_a_build_may_fail() {
    in_own_process(|| play(ram::BUILDS));
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
