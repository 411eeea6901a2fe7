//! Regions that come and go under several daemons while I/O runs, and one that a daemon refuses.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_memory_shm::mock::Fault;
use vm_memory::GuestAddress;

use crate::args::Args;
use crate::daemon::{LocalDaemon, Pattern};
use crate::facts::size;
use crate::failure::{Failure, OrFail, Result, in_words};
use crate::ram::{PLUG_SIZE, Ram};
use crate::report::Report;
use crate::session::{Endpoint, Session};
use crate::worker::{Guest, Usable, Worker};

/// The disk of each daemon in this process.
const DISK_SIZE: u64 = 4 << 20;

/// How long I/O may take to reach a region that was added.
const PATIENCE: Duration = Duration::from_secs(60);

/// The daemons, in their order: another process, if there is one, and those in this process.
struct Daemons {
    foreign: Option<PathBuf>,
    local: Vec<LocalDaemon>,
}

impl Daemons {
    fn start(args: &Args) -> Result<Self> {
        let foreign = args.socket.clone();
        let count = args.daemons - u64::from(foreign.is_some());
        let local = |_| LocalDaemon::start(args.disk.unwrap_or(DISK_SIZE), Pattern::Daemon);
        Ok(Self {
            local: (0..count).map(local).collect::<Result<_>>()?,
            foreign,
        })
    }

    fn endpoints(&self) -> Vec<Endpoint<'_>> {
        let foreign = self.foreign.iter().map(|path| Endpoint::Socket(path));
        foreign
            .chain(self.local.iter().map(Endpoint::Local))
            .collect()
    }

    /// The n-th of all, counted from 1, if it is in this process.
    fn local(&self, nth: u64) -> Option<&LocalDaemon> {
        let at = nth.checked_sub(1 + u64::from(self.foreign.is_some()))?;
        self.local.get(usize::try_from(at).ok()?)
    }

    /// The names of those in this process that map a region that starts there.
    fn who_holds(&self, start: GuestAddress) -> Vec<String> {
        let first = 1 + usize::from(self.foreign.is_some());
        let holds = |daemon: &LocalDaemon| {
            let table = daemon.daemon().table();
            table.iter().any(|region| region.guest_addr == start)
        };
        let names = self.local.iter().enumerate();
        names
            .filter(|(_, daemon)| holds(daemon))
            .map(|(at, _)| format!("daemon {}", first + at))
            .collect()
    }
}

pub(crate) fn run(args: &Args, regions: u64, ram: &Arc<Ram>) -> Result<()> {
    let daemons = Daemons::start(args)?;
    if let Some(nth) = args.refuse
        && daemons.local(nth).is_none()
    {
        let problem = match nth {
            1 if args.socket.is_some() => "daemon 1 is the one at --socket".to_owned(),
            _ => format!("the daemons are 1 to {}, see --daemons", args.daemons),
        };
        return Err(Failure::usage(format!(
            "--refuse {nth}: {problem}; only one in this process can be told to refuse"
        )));
    }
    let endpoints = daemons.endpoints();
    let mut report = Report::default();
    report.section(format_args!(
        "Guest RAM: {} around a PCI hole, shared with {} daemon{}",
        size(args.ram),
        endpoints.len(),
        if endpoints.len() == 1 { "" } else { "s" }
    ));
    report.block(ram.memory());
    report.sandbox(crate::enter_sandbox(args, !daemons.local.is_empty())?);

    let guest = Arc::new(Guest::default());
    let mut workers = Vec::new();
    for (nth, endpoint) in endpoints.iter().enumerate() {
        let session = Session::start(nth, endpoint, ram.clone(), args.deadline)?;
        let ours = nth > 0 || daemons.foreign.is_none() || args.overwrite;
        if nth == 0 {
            for region in ram.memory().arc_regions() {
                guest.give(region.range());
            }
        }
        workers.push(Worker::start(nth, session, ours, &guest)?);
    }

    let mut hotplug = Hotplug {
        ram,
        guest: &guest,
        workers: workers.len(),
        plugged: Vec::new(),
        slowest: Duration::ZERO,
    };
    report.section("Hotplug, while I/O runs with every daemon in all regions");
    let middle = regions.div_ceil(2);
    for nth in 1..=regions {
        if nth == middle
            && let Some(daemon) = args.refuse
        {
            hotplug.refused(nth, daemon, &daemons, &mut report)?;
        }
        hotplug.plug(nth)?;
    }
    report.line(
        "added",
        format_args!("{regions} regions of {}, told to all", size(PLUG_SIZE)),
    );
    let (carried, gone) = hotplug.unplug_all(&daemons)?;
    report.line("carried", format_args!("{} of checked I/O", size(carried)));
    report.line(
        "removed",
        format_args!("{gone} regions, and no daemon or guest holds them"),
    );
    report.line("slowest change", format_args!("{:.1?}", hotplug.slowest));

    let sessions: Vec<Session> = workers
        .into_iter()
        .map(Worker::end)
        .collect::<Result<_>>()?;
    let data = match daemons.foreign.is_some() && !args.overwrite {
        true => "what daemon 1 gave was the same through two regions, all else is right",
        false => "every byte that was read is what was written",
    };
    report.line("data", data);
    for session in sessions {
        session.end()?;
    }
    report.print()
}

/// The VMM's part.
struct Hotplug<'a> {
    ram: &'a Ram,
    guest: &'a Guest,
    workers: usize,
    plugged: Vec<Arc<Usable>>,
    slowest: Duration,
}

impl Hotplug<'_> {
    /// Adds the n-th region, lets the guest use it, and waits until all daemons did I/O in it.
    fn plug(&mut self, nth: u64) -> Result<()> {
        let region = self.ram.another_plug(nth)?;
        let range = region.range();
        let start = Instant::now();
        let added = self.ram.space().insert(region);
        // No daemon may lag, so there is nothing in the report.
        drop(added.or_fail(|| format!("cannot hot-add region {nth}"))?);
        self.slowest = self.slowest.max(start.elapsed());
        let usable = self.guest.give(range);
        self.guest.wait_used(&usable, self.workers, PATIENCE)?;
        self.plugged.push(usable);
        Ok(())
    }

    /// Has a daemon refuse the n-th region, and checks that none keeps it.
    fn refused(
        &mut self,
        nth: u64,
        daemon: u64,
        daemons: &Daemons,
        report: &mut Report,
    ) -> Result<()> {
        let region = self.ram.another_plug(nth)?;
        let start = region.range().start_addr();
        if let Some(local) = daemons.local(daemon) {
            local.daemon().inject(1, Fault::Refuse);
        }
        let Err(refused) = self.ram.space().insert(region) else {
            return Err(Failure::new(format!(
                "daemon {daemon} did not refuse region {nth}"
            )));
        };
        report.line("refused", in_words(&refused.to_string(), crate::WORDS));
        let mut holders = daemons.who_holds(start);
        if self
            .ram
            .memory()
            .arc_regions()
            .iter()
            .any(|region| region.range().start_addr() == start)
        {
            holders.push("the guest".to_owned());
        }
        if !holders.is_empty() {
            let holders = holders.join(", ");
            return Err(Failure::new(format!(
                "region {nth} was refused, and kept by {holders}"
            )));
        }
        report.line("kept by", "none: neither the guest nor a daemon has it");
        Ok(())
    }

    /// Has the guest give all regions back and removes them, the last one first. Tells how many
    /// bytes they carried, and how many they were.
    fn unplug_all(&mut self, daemons: &Daemons) -> Result<(u64, usize)> {
        let (mut carried, mut gone) = (0, 0);
        while let Some(region) = self.plugged.pop() {
            self.guest.take(&region);
            let range = region.range();
            let start = Instant::now();
            let removed = self.ram.space().remove(range);
            drop(removed.or_fail(|| format!("cannot remove {range}"))?);
            self.slowest = self.slowest.max(start.elapsed());
            let holders = daemons.who_holds(range.start_addr());
            if !holders.is_empty() {
                let holders = holders.join(", ");
                return Err(Failure::new(format!(
                    "{range} was removed, and kept by {holders}"
                )));
            }
            carried += region.carried();
            gone += 1;
        }
        Ok((carried, gone))
    }
}
