//! The crate's integration tests, one binary; each module is about one topic.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests: where they fail, the test that called them fails"
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "patterns in tests are cut to bytes, and addresses to usize"
)]

mod access;
mod address_space;
mod adopted;
mod answers;
mod any_size;
mod bad_descriptor;
mod bad_huge_pages;
mod bad_input;
mod bad_system;
mod bitmap;
mod blk_daemon;
mod changes;
mod control_group;
mod discard;
mod discard_accumulator;
mod discard_huge;
mod discard_inhibit;
mod driver;
mod drop_in;
mod examples;
mod faults;
mod files;
mod files_bad;
mod files_huge;
mod files_limits;
mod files_rom;
mod fork;
mod frontend;
mod host_setting;
mod hostile;
mod hotplug;
mod house;
mod isolation;
mod kvm;
mod linux_guest;
mod mapping;
mod mapping_huge;
mod memdev;
mod mock;
mod model;
mod model_collection;
mod no_sigbus;
mod numa;
mod options;
mod options_check;
mod options_qemu;
mod options_round_trip;
mod peers;
mod populate;
mod populate_background;
mod populate_undo;
mod proc;
mod receive;
mod report;
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
mod sandbox;
mod seccomp;
mod session;
mod share;
mod stats;
mod stats_extents;
mod support;
mod threads;
mod transparent;
mod upstream;
mod watchdog;
