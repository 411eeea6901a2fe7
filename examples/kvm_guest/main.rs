//! Hotplug under a running guest: RAM that KVM, the guest's code and a vhost-user daemon all see,
//! or none of them. `kvm_guest --help` tells what it does.
//!
//! - `machine`: the address space and its two listeners, the virtqueue, the disk;
//! - `guest`: the vCPU and the few instructions that it runs;
//! - `run`: what happens, in order, and the report of it; `args`: the command line;
//! - `failure`, `rim`: what the examples have in common.

mod args;
#[path = "../common/failure.rs"]
mod failure;
#[cfg(target_arch = "x86_64")]
mod guest;
#[cfg(target_arch = "x86_64")]
mod machine;
#[path = "../common/rim.rs"]
mod rim;
#[cfg(target_arch = "x86_64")]
mod run;

use std::process::ExitCode;

use args::Args;
use failure::{Result, Words};
use rim::fold_lines;

/// The remedies of the crate's errors, as far as this program has them.
const WORDS: Words = &[
    ("restart it or reconnect to it", "run this again"),
    (
        "connect it anew (AddressSpace::reconnect), detach it, or attach it without requiring \
         it (AddressSpace::attach)",
        "run this again",
    ),
    ("connect it anew and attach it then", "run this again"),
    (
        ", restart the daemon or allow more with VhostUserShare::with_deadline",
        "",
    ),
    ("listener \"", "\""),
];

fn main() -> ExitCode {
    env_logger::init();
    rim::run("kvm_guest", |args: &Args| {
        let indent = |line: &str| if line.starts_with(' ') { VALUES } else { 2 };
        rim::print(&fold_lines(&run(args)?, indent))
    })
}

/// Where the values of the report begin.
const VALUES: usize = 16;

#[cfg(target_arch = "x86_64")]
fn run(args: &Args) -> Result<String> {
    match run::open(&args.device)? {
        Some(kvm) => run::run(args, &kvm),
        None => Ok(format!(
            "kvm_guest: there is no {} here, so no guest was run: KVM is not offered by this \
             machine, or not passed on to this container\n",
            args.device.display()
        )),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run(_args: &Args) -> Result<String> {
    Ok("kvm_guest: the guest's code is for x86-64, so no guest was run\n".to_owned())
}
