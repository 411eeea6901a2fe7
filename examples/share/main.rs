//! The main job: guest RAM that a vhost-user-blk daemon shares, and a disk that is copied through
//! it. `share --help` tells what it can do.
//!
//! How a VMM does it, in the order of the files:
//!
//! - `ram`: guest RAM on one descriptor around a PCI hole, and regions to hot-add;
//! - `session`: negotiation, the memory table, the virtqueue, hotplug, each within a time limit;
//! - `hotplug`, `worker`: many regions that come and go under many daemons while I/O runs;
//! - `disk`: requests whose buffers lie in several regions, several of them in flight;
//! - `copy`, `selftest`: what is done with it; no reference to guest RAM is ever made;
//! - `daemon`: the daemon in this process; `args`, `report`, `failure`: the rim.

mod args;
mod copy;
mod daemon;
mod disk;
mod failure;
mod hotplug;
mod ram;
mod report;
mod selftest;
mod session;
mod worker;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use args::Args;
use copy::{Input, Output};
use daemon::{LocalDaemon, Pattern};
use failure::{Failure, OrFail, Result};
use ram::Ram;
use report::{Report, size};
use session::Session;

/// The disk of the daemon in this process, unless something else decides.
const DISK_SIZE: u64 = 64 << 20;

fn main() -> ExitCode {
    env_logger::init();
    let done = match Args::try_parse() {
        Ok(args) => run(&args),
        Err(help) if !help.use_stderr() => help.print().or_fail(|| "cannot print the help"),
        Err(error) => Err(usage(&error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Where even that fails, the exit status is all that is left to say.
            let _ = writeln!(std::io::stderr(), "share: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// What is done with the disk.
enum Job {
    SelfTest,
    ReadTo(Output),
    WriteFrom(Input),
}

fn run(args: &Args) -> Result<()> {
    // What can fail without the daemon fails before it is bothered.
    let ram = Arc::new(Ram::new(args.ram, &args.ram_options())?);
    if let Some(regions) = args.hotplug {
        return hotplug::run(args, regions, &ram);
    }
    let job = match (&args.read_to, &args.write_from) {
        (Some(file), _) => Job::ReadTo(Output::create(file)?),
        (_, Some(file)) => Job::WriteFrom(Input::open(file)?),
        _ => Job::SelfTest,
    };
    let (path, local) = match &args.socket {
        Some(path) => (path.clone(), None),
        None => {
            let daemon = LocalDaemon::start(disk_size(args, &job), Pattern::Daemon)?;
            (daemon.socket(), Some(daemon))
        }
    };

    let mut session = Session::start(0, &path, ram, args.time_limit)?;
    let mut report = Report::default();
    session.plug()?;
    report.section(format_args!(
        "Guest RAM: {} around a PCI hole, and {} hot-added",
        size(args.ram),
        size(session.ram.plug().range().size())
    ));
    report.block(session.ram.memory());
    report.daemon(&path, local.is_some(), &session)?;
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
            let bar = progress("reading", capacity);
            let (bytes, time) = timed(|| output.fill(session, &bar))?;
            report.io("read", bytes, time);
            let (path, time) = timed(|| output.complete())?;
            let value = format!("{}, written back in {time:.1?}", path.display());
            report.line("complete", value);
            Ok(Some(Pattern::Daemon))
        }
        (Job::WriteFrom(mut input), local) => {
            let bar = progress("writing", input.len());
            let (bytes, time) = timed(|| input.drain(session, &bar))?;
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
            let bar = progress("reading", capacity);
            let (bytes, time) = timed(|| selftest::read_pattern(session, &bar))?;
            report.io("read", bytes, time);
            let bar = progress("writing", capacity);
            let (bytes, time) = timed(|| selftest::write_pattern(session, &bar))?;
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
            let bar = progress("reading", capacity);
            let (bytes, time) = timed(|| selftest::read_twice(session, &bar))?;
            report.io("read", bytes, time);
            report.line("verified", "two reads through different buffers are equal");
            report.line("written", "nothing: the disk belongs to somebody else");
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
    let refused = selftest::read_into_removed(session)?;
    report.line("out of reach", refused);
    Ok(())
}

/// How long it takes.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let done = work()?;
    Ok((done, start.elapsed()))
}

/// A bar on standard error, if that is a terminal.
fn progress(doing: &'static str, bytes: u64) -> ProgressBar {
    let template = "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(bytes)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(doing)
        .with_finish(ProgressFinish::AndClear)
}

/// clap's paragraph as one line.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let paragraph = text.lines().take_while(|line| !line.trim().is_empty());
    let line = paragraph.map(str::trim).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    Failure::new(format!("{line}; see share --help"))
}
