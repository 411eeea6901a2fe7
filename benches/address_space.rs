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

use std::error::Error;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use guest_memory_shm::mock::{BlkDevice, Fault, MockDaemon};
use guest_memory_shm::{
    AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions, TableRegion, VhostUserShare,
};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Features};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::GuestAddress;

const PLUG: GuestAddress = GuestAddress(1 << 42);
const SIZE: u64 = 2 << 20;
const GIB: usize = 1 << 30;
/// How long a daemon takes that has other work to do first.
const LATE: Duration = Duration::from_millis(3);

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    // Cargo runs benches as tests too.
    let test = std::env::args().any(|arg| arg == "--test");
    let rounds = std::env::var("ROUNDS").ok();
    let rounds = rounds.and_then(|rounds| rounds.parse().ok());
    let rounds = if test { 3 } else { rounds.unwrap_or(2000) };

    println!(
        "insert and remove of a region of 2 MiB, best and median of {rounds} rounds each, us"
    );
    println!(
        "{:<10}{:>18}{:>24}{:>20}{:>16}{:>16}",
        "daemons",
        "bare messages",
        "with the question",
        "AddressSpace",
        "ratio",
        "to the question"
    );
    for daemons in [1, 4, 16] {
        plug(daemons, rounds, None)?;
    }
    println!(
        "and where the daemons take {LATE:?} for each change, each of them longer than the CPUs \
         need:"
    );
    for daemons in [1, 4, 16] {
        plug(daemons, rounds.div_ceil(10), Some(LATE))?;
    }
    println!();
    size_of_ram(rounds)?;
    println!();
    reconnect(if test { 1 } else { 20 })
}

/// Repeated measurements: the best and the median of them.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn best(&self) -> f64 {
        self.sorted()[0]
    }

    fn median(&self) -> f64 {
        self.sorted()[self.0.len() / 2]
    }

    fn sorted(&self) -> Vec<f64> {
        let mut times: Vec<_> = self.0.iter().map(|time| time.as_secs_f64() * 1e6).collect();
        times.sort_by(f64::total_cmp);
        times
    }
}

fn connect(daemon: &MockDaemon) -> Result<(Frontend, Features), Failure> {
    let mut frontend = Frontend::from_stream(daemon.connect()?, 1);
    let wanted = Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK;
    let device = BlkDevice::negotiate(&mut frontend, wanted)?;
    assert_eq!(device.protocol_features(), wanted);
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    Ok((frontend, wanted))
}

fn memory(size: usize) -> Result<GuestMemoryShm, Failure> {
    Ok(GuestMemoryShm::from_ranges(&[(GuestAddress(0), size)])?)
}

fn region() -> Result<GuestRegionShm, Failure> {
    Ok(GuestRegionShm::new((PLUG, SIZE), &RamOptions::new())?)
}

fn plug(count: usize, rounds: usize, late: Option<Duration>) -> Result<(), Failure> {
    let start = || MockDaemon::builder().start_unnamed();
    let theirs: Vec<_> = (0..count).map(|_| start()).collect::<Result<_, _>>()?;
    let ours: Vec<_> = (0..count).map(|_| start()).collect::<Result<_, _>>()?;
    let memory = memory(GIB)?;
    let mut bare = Bare::connect(&theirs, &memory)?;
    let space = attach(&ours, memory)?;

    if let Some(late) = late {
        // The bare side has two exchanges in each round.
        let all = theirs.iter().map(|daemon| (daemon, 4));
        for (daemon, changes) in all.chain(ours.iter().map(|daemon| (daemon, 2))) {
            for change in 1..=changes * rounds as u64 {
                daemon.inject(change, Fault::AnswerLate(late));
            }
        }
    }

    let (mut messages, mut question, mut space_times) =
        (Times::default(), Times::default(), Times::default());
    for _ in 0..rounds {
        messages.0.push(timed(|| bare.exchange(false))?);
        question.0.push(timed(|| bare.exchange(true))?);
        space_times.0.push(timed(|| change(&space))?);
    }
    println!(
        "{count:<10}{:>9.0}{:>9.0}{:>15.0}{:>9.0}{:>11.0}{:>9.0}{:>8.2}{:>8.2}{:>8.2}{:>8.2}",
        messages.best(),
        messages.median(),
        question.best(),
        question.median(),
        space_times.best(),
        space_times.median(),
        space_times.best() / messages.best(),
        space_times.median() / messages.median(),
        space_times.best() / question.best(),
        space_times.median() / question.median(),
    );
    Ok(())
}

fn attach(daemons: &[MockDaemon], memory: GuestMemoryShm) -> Result<AddressSpace, Failure> {
    let space = AddressSpace::new(memory);
    for daemon in daemons {
        let (frontend, features) = connect(daemon)?;
        space.attach("daemon", VhostUserShare::new(&frontend, features)?)?;
    }
    Ok(space)
}

/// What the bench measures on our side.
fn change(space: &AddressSpace) -> Result<(), Failure> {
    for report in [space.insert(region()?)?, space.remove((PLUG, SIZE))?] {
        assert!(report.stale().is_empty(), "a daemon is away");
    }
    Ok(())
}

/// A thread for each daemon, which sends it the given messages.
struct Bare {
    threads: Vec<(Sender<Step>, Receiver<()>)>,
}

enum Step {
    Add(GuestRegionShm),
    Remove(GuestRegionShm),
    Question,
}

impl Bare {
    fn connect(daemons: &[MockDaemon], memory: &GuestMemoryShm) -> Result<Self, Failure> {
        let mut threads = Vec::new();
        for daemon in daemons {
            let (mut frontend, _) = connect(daemon)?;
            for region in memory.memory_table().regions() {
                frontend.add_mem_region(&region.into())?;
            }
            let (sender, steps) = channel();
            let (done, receiver) = channel();
            std::thread::spawn(move || {
                for step in steps {
                    answer(&mut frontend, &step).expect("the daemon takes it");
                    drop(step);
                    if done.send(()).is_err() {
                        break;
                    }
                }
            });
            threads.push((sender, receiver));
        }
        Ok(Self { threads })
    }

    fn exchange(&mut self, question: bool) -> Result<(), Failure> {
        let region = region()?;
        self.all(|| Step::Add(region.clone()))?;
        if question {
            self.all(|| Step::Question)?;
        }
        self.all(|| Step::Remove(region.clone()))?;
        if question {
            self.all(|| Step::Question)?;
        }
        Ok(())
    }

    fn all(&self, step: impl Fn() -> Step) -> Result<(), Failure> {
        for (sender, _) in &self.threads {
            sender.send(step())?;
        }
        for (_, receiver) in &self.threads {
            receiver.recv()?;
        }
        Ok(())
    }
}

fn answer(frontend: &mut Frontend, step: &Step) -> vhost::Result<()> {
    let info =
        |region: &GuestRegionShm| VhostUserMemoryRegionInfo::from(&TableRegion::from(region));
    match step {
        Step::Add(region) => frontend.add_mem_region(&info(region)).map(drop),
        Step::Remove(region) => frontend.remove_mem_region(&info(region)),
        Step::Question => frontend.get_features().map(drop),
    }
}

/// Whether a change costs more where there is more RAM.
fn size_of_ram(rounds: usize) -> Result<(), Failure> {
    let (small, large) = (MockDaemon::builder(), MockDaemon::builder());
    let (small, large) = ([small.start_unnamed()?], [large.start_unnamed()?]);
    let (few, many) = (
        attach(&small, memory(GIB)?)?,
        attach(&large, memory(1024 * GIB)?)?,
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

/// A daemon that comes back to 509 regions.
fn reconnect(rounds: usize) -> Result<(), Failure> {
    const REGIONS: u64 = 509;
    let mut builder = GuestMemoryShm::<()>::builder();
    for slot in 0..REGIONS {
        // A descriptor for each, as hotplug makes them.
        builder = builder.add_ram(RamOptions::new(), [(GuestAddress(slot * 2 * SIZE), SIZE)]);
    }
    let memory = builder.build()?;
    let table = memory.memory_table();
    let infos: Vec<VhostUserMemoryRegionInfo> = table.regions().iter().map(Into::into).collect();

    let (bare, ours) = (MockDaemon::builder(), MockDaemon::builder());
    let (bare, ours) = (bare.start_unnamed()?, ours.start_unnamed()?);
    let space = AddressSpace::new(memory);
    let (frontend, features) = connect(&ours)?;
    let share = space.attach("daemon", VhostUserShare::new(&frontend, features)?)?;
    drop(frontend);

    let (mut bare_times, mut space_times) = (Times::default(), Times::default());
    for _ in 0..rounds {
        let (mut frontend, _) = connect(&bare)?;
        bare_times.0.push(timed(|| {
            for info in &infos {
                frontend.add_mem_region(info)?;
            }
            Ok(())
        })?);
        drop(frontend);
        bare.wait_disconnected(Duration::from_secs(60))?;

        ours.hang_up();
        ours.wait_disconnected(Duration::from_secs(60))?;
        let (frontend, features) = connect(&ours)?;
        space_times
            .0
            .push(timed(|| Ok(space.reconnect(&share, &frontend, features)?))?);
        assert_eq!(ours.table().len() as u64, REGIONS);
    }
    println!("reconnect with {REGIONS} regions: best and median of {rounds} rounds each, ms");
    println!(
        "bare {:.2} {:.2}   AddressSpace {:.2} {:.2}   ratio {:.3} {:.3}",
        bare_times.best() / 1e3,
        bare_times.median() / 1e3,
        space_times.best() / 1e3,
        space_times.median() / 1e3,
        space_times.best() / bare_times.best(),
        space_times.median() / bare_times.median()
    );
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}
