//! Hotplug under a running guest: RAM that KVM, the guest's code and a vhost-user daemon all see,
//! or none of them. `kvm_guest --help` tells what it does.
//!
//! - `machine`: the address space and its two listeners, the virtqueue, the disk;
//! - `guest`: the vCPU and the few instructions that it runs;
//! - `run`: what happens, in order, and the report of it; `args`: the command line.

mod args;
#[path = "../share/failure.rs"]
mod failure;
#[cfg(target_arch = "x86_64")]
mod guest;
#[cfg(target_arch = "x86_64")]
mod machine;
#[cfg(target_arch = "x86_64")]
mod run;

use std::io::{Write, stderr, stdout};
use std::process::ExitCode;

use clap::Parser;

use args::Args;
use failure::{Failure, OrFail, Result};

fn main() -> ExitCode {
    env_logger::init();
    let text = match Args::try_parse() {
        Ok(args) => run(&args),
        Err(help) if !help.use_stderr() => Ok(help.render().to_string()),
        Err(error) => Err(usage(&error)),
    };
    let done = text.and_then(|text| {
        let mut out = stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .or_fail(|| "cannot print the report")
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Where even that fails, the exit status is all that is left to say.
            let _ = writeln!(stderr(), "kvm_guest: {failure}");
            ExitCode::FAILURE
        }
    }
}

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

/// clap's paragraph as one line.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let paragraph = text.lines().take_while(|line| !line.trim().is_empty());
    let line = paragraph.map(str::trim).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    Failure::new(format!("{line}; see kvm_guest --help"))
}
