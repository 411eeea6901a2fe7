//! Changing guest memory under daemons: `AddressSpace` against the bare messages, that is vhost's
//! `Frontend` driven directly, one thread for each daemon, with the same in-process daemons.
//!
//! `cargo bench --bench address_space` prints the ratios of this run: of the best times, measured
//! in turn, because others use the machine too. `ROUNDS` sets how often.
//!
//! Both sides make a region (memfd, mmap) and drop it. The bare side sends ADD_MEM_REG and
//! REM_MEM_REG, each acknowledged. `AddressSpace` also asks each daemon after each change whether
//! it is still there, because some acknowledge what they refuse and hang up then: "with the
//! question" is the bare exchange with that round trip (GET_FEATURES). All daemons share the CPUs
//! with the bench: many of them at once are limited by these, unless they wait for something.
//!
//! The last table has nothing to compare with: by how much a change exceeds its deadline where
//! daemons never answer, and connecting where none listens.

mod frontend;
mod plug;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use guest_memory_shm::mock::{Fault, MockDaemon};
use guest_memory_shm::{AddressSpace, SessionOptions, VhostUserSession, VhostUserShare};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use frontend::connect;
use plug::{
    Bare, Failure, PLUG, SIZE, Times, attach, change, in_folder, many_regions, memory, print_head,
    reconnections, region, timed,
};

const GIB: usize = 1 << 30;
/// How long a daemon takes that has other work to do first.
const LATE: Duration = Duration::from_millis(3);
/// What daemons that never answer have.
const DEADLINE: Duration = Duration::from_millis(50);

fn main() -> Result<(), Failure> {
    // Cargo runs benches as tests too.
    let test = std::env::args().any(|arg| arg == "--test");
    let rounds = std::env::var("ROUNDS").ok();
    let rounds = rounds.and_then(|rounds| rounds.parse().ok());
    let rounds = if test { 3 } else { rounds.unwrap_or(2000) };

    print_head(rounds);
    for daemons in [1, 4, 16] {
        busy(daemons, rounds, None)?;
    }
    println!(
        "and where the daemons take {LATE:?} for each change, each of them longer than the CPUs \
         need:"
    );
    for daemons in [1, 4, 16, 64] {
        busy(daemons, rounds.div_ceil(10), Some(LATE))?;
    }
    cpu_of_change(64, rounds.div_ceil(20))?;
    println!();
    size_of_ram(rounds)?;
    println!();
    in_folder(|folder| {
        reconnect(folder, if test { 1 } else { 20 })?;
        println!();
        overshoot(folder, if test { 1 } else { 100 })
    })
}

fn busy(count: usize, rounds: usize, late: Option<Duration>) -> Result<(), Failure> {
    let start = || MockDaemon::builder().start_unnamed();
    let theirs: Vec<_> = (0..count).map(|_| start()).collect::<Result<_, _>>()?;
    let ours: Vec<_> = (0..count).map(|_| start()).collect::<Result<_, _>>()?;
    let memory = memory(GIB)?;
    let bare = Bare::connect(sockets(&theirs)?, &memory)?;
    let space = attach(sockets(&ours)?, memory)?;

    if let Some(late) = late {
        // The bare side has two exchanges in each round.
        let all = theirs.iter().map(|daemon| (daemon, 4));
        for (daemon, changes) in all.chain(ours.iter().map(|daemon| (daemon, 2))) {
            for change in 1..=changes * rounds as u64 {
                daemon.inject(change, Fault::AnswerLate(late));
            }
        }
    }
    plug::plug(bare, &space, rounds)
}

/// How long a change takes under daemons that are late, and how much CPU time it costs, that of
/// the daemons included.
fn cpu_of_change(count: usize, rounds: usize) -> Result<(), Failure> {
    let start = || MockDaemon::builder().start_unnamed();
    let daemons: Vec<_> = (0..count).map(|_| start()).collect::<Result<_, _>>()?;
    let space = attach(sockets(&daemons)?, memory(GIB)?)?;
    for daemon in &daemons {
        (1..=2 * rounds as u64).for_each(|change| daemon.inject(change, Fault::AnswerLate(LATE)));
    }
    let cpu = || -> Result<f64, Failure> {
        let used = getrusage(UsageWho::RUSAGE_SELF)?;
        let both = [used.user_time(), used.system_time()];
        Ok(both.iter().map(|time| time.num_microseconds() as f64).sum())
    };
    let (before, mut times) = (cpu()?, Times::default());
    for _ in 0..rounds {
        times.0.push(timed(|| change(&space))?);
    }
    let changes = 2.0 * rounds as f64;
    println!(
        "a change under {count} of them: median {:.1} ms, with {:.1} ms of CPU time",
        times.median() / 2e3,
        (cpu()? - before) / changes / 1e3
    );
    Ok(())
}

fn sockets(daemons: &[MockDaemon]) -> Result<Vec<UnixStream>, Failure> {
    let sockets = daemons.iter().map(MockDaemon::connect);
    Ok(sockets.collect::<Result<_, _>>()?)
}

/// Whether a change costs more where there is more RAM.
fn size_of_ram(rounds: usize) -> Result<(), Failure> {
    let (small, large) = (MockDaemon::builder(), MockDaemon::builder());
    let (small, large) = ([small.start_unnamed()?], [large.start_unnamed()?]);
    let (few, many) = (
        attach(sockets(&small)?, memory(GIB)?)?,
        attach(sockets(&large)?, memory(1024 * GIB)?)?,
    );
    let (mut few_times, mut many_times) = (Times::default(), Times::default());
    for _ in 0..rounds {
        few_times.0.push(timed(|| change(&few))?);
        many_times.0.push(timed(|| change(&many))?);
    }
    println!("insert and remove beside 1 GiB and 1 TiB of RAM, 1 daemon: best and median, us");
    println!(
        "1 GiB {:.1} {:.1}   1 TiB {:.1} {:.1}   ratio {:.3} {:.3}",
        few_times.best(),
        few_times.median(),
        many_times.best(),
        many_times.median(),
        many_times.best() / few_times.best(),
        many_times.median() / few_times.median()
    );
    Ok(())
}

/// Daemons that come back to 509 regions.
fn reconnect(folder: &Path, rounds: usize) -> Result<(), Failure> {
    let (bare, ours) = (MockDaemon::builder(), MockDaemon::builder());
    let (bare, ours) = (bare.start_unnamed()?, ours.start_unnamed()?);
    let path = folder.join("session.sock");
    let _session = MockDaemon::builder().start(&path)?;
    let connect_to = |daemon: &MockDaemon| {
        daemon.wait_disconnected(Duration::from_secs(60))?;
        Ok(daemon.connect()?)
    };
    reconnections(
        &many_regions(509)?,
        rounds,
        [&|| connect_to(&bare), &|| connect_to(&ours)],
        &path,
        |_| Ok(()),
    )
}

/// By how much waits exceed their deadline.
fn overshoot(folder: &Path, rounds: usize) -> Result<(), Failure> {
    println!(
        "{:<52}{:>12}{:>12}",
        format!("past a deadline of {DEADLINE:?}, in {rounds} rounds each"),
        "median, ms",
        "longest, ms"
    );
    for count in [1, 16] {
        let daemons = (0..count).map(|_| MockDaemon::builder().start_unnamed());
        let daemons: Vec<_> = daemons.collect::<Result<_, _>>()?;
        let mut times = Times::default();
        for _ in 0..rounds {
            times.0.push(silent(&daemons)?);
        }
        print_overshoot(&format!("a change, silent daemons: {count}"), &times);
    }
    let nobody = folder.join("nobody.sock");
    let mut times = Times::default();
    for _ in 0..rounds {
        let options = SessionOptions::new(0).with_deadline(DEADLINE);
        times.0.push(timed(|| {
            match VhostUserSession::connect(&nobody, options) {
                Ok(_) => Err("somebody listens".into()),
                Err(_) => Ok(()),
            }
        })?);
    }
    print_overshoot("connecting, where no daemon listens", &times);
    Ok(())
}

/// How long a change takes under daemons that never answer it. No RAM comes, which would have a
/// later deadline.
fn silent(daemons: &[MockDaemon]) -> Result<Duration, Failure> {
    let space = AddressSpace::new(memory(GIB)?.insert_region(region()?.into())?);
    for daemon in daemons {
        let (frontend, features) = connect(daemon.connect()?)?;
        let share = space.attach("daemon", VhostUserShare::new(&frontend, features)?)?;
        space.with_listener(&share, |share| share.set_deadline(DEADLINE))?;
        daemon.inject(1, Fault::NeverAnswer);
    }
    let time = timed(|| {
        let report = space.remove((PLUG, SIZE))?;
        assert_eq!(report.stale().len(), daemons.len());
        Ok(())
    })?;
    drop(space);
    for daemon in daemons {
        daemon.wait_disconnected(Duration::from_secs(60))?;
    }
    Ok(time)
}

fn print_overshoot(what: &str, times: &Times) {
    let past = |micros: f64| micros / 1e3 - DEADLINE.as_secs_f64() * 1e3;
    let longest = times.0.iter().max().map_or(0.0, Duration::as_secs_f64);
    let (median, longest) = (past(times.median()), past(longest * 1e6));
    println!("{what:<52}{median:>12.2}{longest:>12.2}");
}
