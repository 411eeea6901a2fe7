//! Hotplug under a running guest: RAM that KVM, the guest's code and a vhost-user daemon all see,
//! or none of them. `kvm_guest --help` tells what it does.
//!
//! - `machine`: the address space and its two listeners, the virtqueue, the disk;
//! - `guest`: the vCPU and the few instructions that it runs;
//! - `run`: what happens, in order, and the report of it; `args`: the command line;
//! - `failure`, `report`, `rim`: what the examples have in common.

mod args;
#[path = "../common/failure.rs"]
mod failure;
#[cfg(target_arch = "x86_64")]
mod guest;
#[cfg(target_arch = "x86_64")]
mod machine;
#[path = "../common/report.rs"]
mod report;
#[path = "../common/rim.rs"]
mod rim;
#[cfg(target_arch = "x86_64")]
mod run;

use std::fmt;
use std::process::ExitCode;

use args::Args;
use failure::{Result, Words};
use report::Report;

/// The remedies of the crate's errors, as far as this program has them.
const WORDS: Words = &[
    ("restart it or reconnect to it", "run this again"),
    (
        "bring it back (AddressSpace::reconnect_session for a session, reconnect for a share, \
         refresh for any other listener), detach it, or attach it without requiring it \
         (AddressSpace::attach)",
        "run this again",
    ),
    ("connect it anew and attach it then", "run this again"),
    (
        ", restart the daemon or allow more with VhostUserShare::with_deadline",
        "",
    ),
    (
        ", restart the daemon or allow more with SessionOptions::with_deadline",
        "",
    ),
    ("listener \"", "\""),
];

fn main() -> ExitCode {
    rim::run("kvm_guest", "error", |args| run(args)?.print())
}

#[cfg(target_arch = "x86_64")]
fn run(args: &Args) -> Result<Report> {
    match run::open(&args.device)? {
        Some(kvm) => run::run(args, &kvm),
        None => Ok(no_guest(format_args!(
            "there is no {} here, so no guest was run: KVM is not offered by this machine, or not \
             passed on to this container",
            args.device.display()
        ))),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run(_args: &Args) -> Result<Report> {
    Ok(no_guest(
        "the guest's code is for x86-64, so no guest was run",
    ))
}

/// A report of why no guest was run.
fn no_guest(reason: impl fmt::Display) -> Report {
    let mut report = Report::default();
    report.section(format_args!("kvm_guest: {reason}"));
    report
}
