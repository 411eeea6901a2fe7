//! What the benches of changes share: a region that comes and goes, told to daemons by the bare
//! messages, and as an address space tells them.

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use guest_memory_shm::{
    AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions, SessionOptions, TableRegion,
    VhostUserSession, VhostUserShare,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::GuestAddress;

use crate::frontend::connect;

pub(crate) const PLUG: GuestAddress = GuestAddress(1 << 42);
pub(crate) const SIZE: u64 = 2 << 20;

pub(crate) type Failure = Box<dyn Error>;

/// Repeated measurements: the best and the median of them.
#[derive(Default)]
pub(crate) struct Times(pub(crate) Vec<Duration>);

impl Times {
    pub(crate) fn best(&self) -> f64 {
        self.sorted()[0]
    }

    pub(crate) fn median(&self) -> f64 {
        self.sorted()[self.0.len() / 2]
    }

    fn sorted(&self) -> Vec<f64> {
        let mut times: Vec<_> = self.0.iter().map(|time| time.as_secs_f64() * 1e6).collect();
        times.sort_by(f64::total_cmp);
        times
    }
}

pub(crate) fn memory(size: usize) -> Result<GuestMemoryShm, Failure> {
    Ok(GuestMemoryShm::from_ranges(&[(GuestAddress(0), size)])?)
}

pub(crate) fn region() -> Result<GuestRegionShm, Failure> {
    Ok(GuestRegionShm::new((PLUG, SIZE), &RamOptions::new())?)
}

/// What the bench measures on our side.
pub(crate) fn change(space: &AddressSpace) -> Result<(), Failure> {
    for report in [space.insert(region()?)?, space.remove((PLUG, SIZE))?] {
        assert!(report.stale().is_empty(), "a daemon is away");
    }
    Ok(())
}

/// A thread for each daemon, which sends it the given messages.
pub(crate) struct Bare {
    threads: Vec<(Sender<Step>, Receiver<()>)>,
}

enum Step {
    Add(GuestRegionShm),
    Remove(GuestRegionShm),
    Question,
}

impl Bare {
    pub(crate) fn connect(
        sockets: Vec<UnixStream>,
        memory: &GuestMemoryShm,
    ) -> Result<Self, Failure> {
        let mut threads = Vec::new();
        for socket in sockets {
            let (mut frontend, _) = connect(socket)?;
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

pub(crate) fn timed(work: impl FnOnce() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// The head of the table of [`plug`].
pub(crate) fn print_head(rounds: usize) {
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
}

/// Plugs and unplugs a region under both sides' daemons, in turn, and prints a row.
pub(crate) fn plug(mut bare: Bare, space: &AddressSpace, rounds: usize) -> Result<(), Failure> {
    let (mut messages, mut question, mut space_times) =
        (Times::default(), Times::default(), Times::default());
    for _ in 0..rounds {
        messages.0.push(timed(|| bare.exchange(false))?);
        question.0.push(timed(|| bare.exchange(true))?);
        space_times.0.push(timed(|| change(space))?);
    }
    println!(
        "{:<10}{:>9.0}{:>9.0}{:>15.0}{:>9.0}{:>11.0}{:>9.0}{:>8.2}{:>8.2}{:>8.2}{:>8.2}",
        bare.threads.len(),
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

/// An address space over daemons.
pub(crate) fn attach(
    sockets: Vec<UnixStream>,
    memory: GuestMemoryShm,
) -> Result<AddressSpace, Failure> {
    let space = AddressSpace::new(memory);
    for socket in sockets {
        let (frontend, features) = connect(socket)?;
        space.attach("daemon", VhostUserShare::new(&frontend, features)?)?;
    }
    Ok(space)
}

/// Regions at the same distance, each on a descriptor of its own, as hotplug makes them.
pub(crate) fn many_regions(count: u64) -> Result<GuestMemoryShm, Failure> {
    let mut builder = GuestMemoryShm::<()>::builder();
    for slot in 0..count {
        builder = builder.add_ram(RamOptions::new(), [(GuestAddress(slot * 2 * SIZE), SIZE)]);
    }
    Ok(builder.build()?)
}

/// Daemons that come back to all regions of `memory`: one that is told them by the bare messages,
/// one after the other, one that is a share, and one that is a whole session, in turn.
///
/// The first two are connected to by a call, which waits until they can be, the third by its path.
/// `after_each` is what the bare side says after each region.
pub(crate) fn reconnections(
    memory: &GuestMemoryShm,
    rounds: usize,
    [bare, ours]: [&dyn Fn() -> Result<UnixStream, Failure>; 2],
    session: &Path,
    after_each: fn(&mut Frontend) -> vhost::Result<()>,
) -> Result<(), Failure> {
    let table = memory.memory_table();
    let infos: Vec<VhostUserMemoryRegionInfo> = table.regions().iter().map(Into::into).collect();
    let space = AddressSpace::new(memory.clone());
    let (frontend, features) = connect(ours()?)?;
    let share = space.attach("share", VhostUserShare::new(&frontend, features)?)?;
    drop(frontend);
    let session = VhostUserSession::connect(session, SessionOptions::new(0))?;
    let session = space.attach("session", session)?;

    let (mut bare_regions, mut bare_whole) = (Times::default(), Times::default());
    let (mut shares, mut sessions) = (Times::default(), Times::default());
    for _ in 0..rounds {
        let start = Instant::now();
        let (mut frontend, _) = connect(bare()?)?;
        bare_regions.0.push(timed(|| {
            for info in &infos {
                frontend.add_mem_region(info)?;
                after_each(&mut frontend)?;
            }
            Ok(())
        })?);
        bare_whole.0.push(start.elapsed());
        drop(frontend);

        // Daemons serve one connection at a time, and take the next once this one has ended.
        space.with_listener(&share, VhostUserShare::close)?;
        let (frontend, features) = connect(ours()?)?;
        let reconnected = timed(|| Ok(space.reconnect(&share, &frontend, features)?));
        shares.0.push(reconnected?);
        let reconnected = timed(|| Ok(space.reconnect_session(&session)?));
        sessions.0.push(reconnected?);
    }
    println!(
        "reconnect with {} regions: best and median of {rounds} rounds each, ms",
        infos.len()
    );
    print_beside("regions only", &bare_regions, &shares);
    print_beside("whole session", &bare_whole, &sessions);
    Ok(())
}

fn print_beside(what: &str, bare: &Times, ours: &Times) {
    println!(
        "{what}: bare {:.2} {:.2}   AddressSpace {:.2} {:.2}   ratio {:.3} {:.3}",
        bare.best() / 1e3,
        bare.median() / 1e3,
        ours.best() / 1e3,
        ours.median() / 1e3,
        ours.best() / bare.best(),
        ours.median() / bare.median()
    );
}

/// Runs `work` with a folder for sockets and images, which is removed afterwards.
pub(crate) fn in_folder(work: impl FnOnce(&Path) -> Result<(), Failure>) -> Result<(), Failure> {
    let folder = std::env::temp_dir().join(format!("bench-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let done = work(&folder);
    std::fs::remove_dir_all(&folder)?;
    done
}
