//! The main job: guest RAM that a vhost-user-blk daemon shares, and a disk that is copied through
//! it. `share --help` tells what it can do.
//!
//! How a VMM does it, in the order of the files:
//!
//! - `ram`: guest RAM on one descriptor around a PCI hole, and regions to hot-add;
//! - `session`: negotiation, the memory table, the virtqueue, hotplug, each with a deadline;
//! - `hotplug`, `worker`: many regions that come and go under many daemons while I/O runs;
//! - `disk`: requests whose buffers lie in several regions, several of them in flight;
//! - `copy`, `selftest`: what is done with it; no reference to guest RAM is ever made;
//! - `sandbox`: the system calls that it may make, for `--sandbox`;
//! - `daemon`: the daemon in this process; `args`, `facts`: the command line, and what is
//!   reported;
//! - `bar`, `ending`, `failure`, `report`, `rim`: what the examples have in common.

mod args;
#[path = "../common/bar.rs"]
mod bar;
mod copy;
mod daemon;
mod disk;
#[path = "../common/ending.rs"]
mod ending;
mod facts;
#[path = "../common/failure.rs"]
mod failure;
mod hotplug;
mod ram;
#[path = "../common/report.rs"]
mod report;
#[path = "../common/rim.rs"]
mod rim;
mod sandbox;
mod selftest;
mod session;
mod worker;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use args::Args;
use bar::with_bar;
use copy::{Input, Output};
use daemon::{LocalDaemon, Pattern};
use facts::size;
use failure::{Failure, OrFail, Result, Words};
use ram::Ram;
use report::Report;
use session::{Endpoint, Session};

/// The remedies of the crate's errors, as far as this program has them.
const WORDS: Words = &[
    ("VhostUserShare::with_deadline", "--deadline"),
    ("SessionOptions::with_deadline", "--deadline"),
    ("SessionOptions::with_drain_deadline", "--deadline"),
    (
        "daemon or allow more time",
        "daemon or allow more with --deadline",
    ),
    (
        "restart it or reconnect to it",
        "restart it, and run this again",
    ),
    (
        "bring it back (AddressSpace::reconnect_session for a session, reconnect for a share, \
         refresh for any other listener), detach it, or attach it without requiring it \
         (AddressSpace::attach)",
        "restart it, and run this again",
    ),
    (
        "connect it anew and attach it then",
        "restart it, and run this again",
    ),
    ("or connect anew in this process", "or run this again"),
    (
        "; it is faulty, or the share was given protocol features other than those acknowledged \
         (SET_PROTOCOL_FEATURES)",
        "",
    ),
    (
        "negotiate CONFIGURE_MEM_SLOTS with the daemon or use fewer regions",
        "use fewer regions, or a daemon that offers CONFIGURE_MEM_SLOTS",
    ),
    (
        "leave out hugetlb=on (PageSize::Base)",
        "use --backing memfd",
    ),
    ("use a memfd backing", "use --backing memfd"),
    ("; RAM that stays sparse is allowed by reserve=off", ""),
    ("listener \"", "\""),
];

/// The disk of the daemon in this process, unless something else decides.
const DISK_SIZE: u64 = 64 << 20;

fn main() -> ExitCode {
    rim::run("share", "error", run)
}

/// What is done with the disk.
enum Job {
    SelfTest,
    ReadTo(Output),
    WriteFrom(Input),
}

fn run(args: &Args) -> Result<()> {
    ending::watch()?;
    // What can fail without the daemon fails before it is contacted.
    let ram = Arc::new(Ram::new(args.ram, &args.ram_options())?);
    if let Some(regions) = args.hotplug {
        return hotplug::run(args, regions, &ram);
    }
    let job = match (&args.read_to, &args.write_from) {
        (Some(file), _) => Job::ReadTo(Output::create(file)?),
        (_, Some(file)) => Job::WriteFrom(Input::open(file)?),
        _ => Job::SelfTest,
    };
    let local = match &args.socket {
        Some(_) => None,
        None => Some(LocalDaemon::start(disk_size(args, &job), Pattern::Daemon)?),
    };
    let endpoint = match (&args.socket, &local) {
        (Some(path), _) => Endpoint::Socket(path),
        (None, Some(local)) => Endpoint::Local(local),
        (None, None) => return Err(Failure::new("there is no daemon")),
    };

    let calls = enter_sandbox(args, local.is_some())?;
    let mut session = Session::start(0, &endpoint, ram, args.deadline)?;
    let mut report = Report::default();
    session.plug()?;
    report.section(format_args!(
        "Guest RAM: {} around a PCI hole, and {} hot-added",
        size(args.ram),
        size(session.ram.plug().range().size())
    ));
    report.block(session.ram.memory());
    report.sandbox(calls);
    report.daemon(&endpoint, &session)?;
    report.section("I/O, through buffers in all regions");
    let after = work(job, &mut session, local.as_ref(), &mut report)?;

    report.section("Hotplug");
    let held = session.regions()?;
    report.line(
        "added",
        format_args!("{}, the daemon took it", session.ram.plug().range()),
    );
    report.line(
        "carried",
        format_args!("{} of the I/O", size(session.disk.carried())),
    );
    session.unplug()?;
    let left = session.regions()?;
    report.line(
        "removed",
        format_args!(
            "the daemon gave {} region back and holds {left}",
            held - left
        ),
    );
    if let (Some(local), Some(pattern)) = (&local, after) {
        check_removal(&mut session, local, pattern, &mut report)?;
    }
    session.end()?;
    report.print()
}

/// Installs the filter, if one is wanted. Tells how many calls it allows.
fn enter_sandbox(args: &Args, daemons: bool) -> Result<Option<usize>> {
    let entered = args.sandbox.then(|| sandbox::enter(daemons)).transpose();
    entered.or_fail(|| "cannot install a seccomp filter")
}

fn disk_size(args: &Args, job: &Job) -> u64 {
    args.disk.unwrap_or(match job {
        Job::WriteFrom(input) => input.len(),
        _ => DISK_SIZE,
    })
}

/// Does the job. Gives back what a disk in this process holds afterwards, if that is known.
fn work(
    job: Job,
    session: &mut Session,
    local: Option<&LocalDaemon>,
    report: &mut Report,
) -> Result<Option<Pattern>> {
    let capacity = session.capacity;
    match (job, local) {
        (Job::ReadTo(mut output), _) => {
            let (bytes, time) =
                timed(|| with_bar("reading", capacity, |bar| output.fill(session, bar)))?;
            report.io("read", bytes, time);
            let (path, time) = timed(|| output.complete())?;
            let value = format!("{}, written back in {time:.1?}", path.display());
            report.line("complete", value);
            Ok(Some(Pattern::Daemon))
        }
        (Job::WriteFrom(mut input), local) => {
            let (bytes, time) =
                timed(|| with_bar("writing", input.len(), |bar| input.drain(session, bar)))?;
            report.io("written, flushed", bytes, time);
            if bytes < capacity {
                let rest = size(capacity - bytes);
                report.line("left alone", format_args!("the last {rest} of the disk"));
            }
            match local {
                Some(daemon) => {
                    input.check(daemon)?;
                    report.line("verified", "the daemon's disk holds what the file holds");
                }
                None => report.line("acknowledged", "each write and the flush, by the daemon"),
            }
            Ok(None)
        }
        (Job::SelfTest, Some(daemon)) => {
            let (bytes, time) = timed(|| {
                with_bar("reading", capacity, |bar| {
                    selftest::read_pattern(session, bar)
                })
            })?;
            report.io("read", bytes, time);
            let (bytes, time) = timed(|| {
                with_bar("writing", capacity, |bar| {
                    selftest::write_pattern(session, bar)
                })
            })?;
            selftest::check_pattern(session, daemon)?;
            report.io("written, flushed", bytes, time);
            report.line(
                "verified",
                "the guest read what the daemon's disk held, and",
            );
            report.line("", "the daemon's disk holds what the guest wrote");
            Ok(Some(Pattern::Guest))
        }
        (Job::SelfTest, None) => {
            let (bytes, time) = timed(|| {
                with_bar("reading", capacity, |bar| {
                    selftest::read_twice(session, bar)
                })
            })?;
            report.io("read", bytes, time);
            report.line("verified", "two reads through different buffers are equal");
            report.line("written", "nothing: the disk is not ours");
            Ok(None)
        }
    }
}

/// The daemon in this process can be asked what it holds.
fn check_removal(
    session: &mut Session,
    local: &LocalDaemon,
    pattern: Pattern,
    report: &mut Report,
) -> Result<()> {
    let bytes = selftest::read_again(session, pattern)?;
    let value = format!("{} through the regions that are left", size(bytes));
    report.line("read afterwards", value);
    let plug = session.ram.plug().range().start_addr();
    let table = local.daemon().table();
    if table.iter().any(|region| region.guest_addr == plug) {
        return Err(Failure::new(
            "the daemon still holds the region that was removed",
        ));
    }
    selftest::read_into_removed(session)?;
    report.line(
        "out of reach",
        "the removed region, as it must be: the daemon refused to read into it",
    );
    Ok(())
}

/// How long it takes.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let done = work()?;
    Ok((done, start.elapsed()))
}
