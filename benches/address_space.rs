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

mod plug;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use guest_memory_shm::mock::{Fault, MockDaemon};

use plug::{
    Bare, Failure, Times, attach, change, in_folder, many_regions, memory, print_head,
    reconnections, timed,
};

const GIB: usize = 1 << 30;
/// How long a daemon takes that has other work to do first.
const LATE: Duration = Duration::from_millis(3);

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
    println!();
    size_of_ram(rounds)?;
    println!();
    in_folder(|folder| {
        reconnect(folder, if test { 1 } else { 20 })
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
