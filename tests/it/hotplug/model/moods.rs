//! Listeners with moods: they panic, and so do the errors and payloads that they leave.

use std::collections::{BTreeSet, VecDeque};
use std::error::Error;
use std::fmt;
use std::panic::panic_any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, Weak};
use std::time::Instant;

use guest_memory_shm::{
    AddressSpace, Exchange, GuestMemoryShm, ListenerError, MemoryListener, WaitFor,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::super::MIB;

/// What the panics say that are meant to be.
const ON_PURPOSE: &str = "on purpose";

/// How a listener takes one call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Mood {
    /// With text.
    Panics(Place),
    /// With a payload whose drop panics.
    PanicsTwice(Place),
    Refuses(Faulty),
    Leaves(Faulty),
}

/// Where one panics that is told in steps; any other does it as soon as it is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Place {
    Begin,
    Step,
    WaitsFor,
}

/// What of an error panics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Faulty {
    Display,
    Source,
    Drop,
}

impl Mood {
    /// Whether it answers that it is away; all others refuse.
    pub(super) fn leaves(self) -> bool {
        matches!(self, Mood::Leaves(_))
    }

    /// Whether one that is told in steps begins, at least.
    pub(super) fn begins(self) -> bool {
        self.place() != Some(Place::Begin)
    }

    fn place(self) -> Option<Place> {
        match self {
            Mood::Panics(place) | Mood::PanicsTwice(place) => Some(place),
            _ => None,
        }
    }

    /// One of four, and one of the three kinds of each.
    pub(super) fn pick(number: u64, kind: u64) -> Mood {
        let faulty = [Faulty::Display, Faulty::Source, Faulty::Drop][kind as usize];
        let place = [Place::Begin, Place::Step, Place::WaitsFor][kind as usize];
        match number {
            0 => Mood::Panics(place),
            1 => Mood::PanicsTwice(place),
            2 => Mood::Refuses(faulty),
            _ => Mood::Leaves(faulty),
        }
    }

    fn answer(self) -> ListenerError {
        match self {
            Mood::Panics(_) => panic!("{ON_PURPOSE}"),
            Mood::PanicsTwice(_) => panic_any(Bomb),
            Mood::Refuses(faulty) => ListenerError::refused(Cause(faulty)),
            Mood::Leaves(faulty) => ListenerError::away(Cause(faulty)),
        }
    }
}

/// A payload whose drop panics.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("{ON_PURPOSE}");
    }
}

#[derive(Debug)]
struct Cause(Faulty);

impl Cause {
    fn panic_if(&self, faulty: Faulty) {
        assert!(self.0 != faulty, "{ON_PURPOSE}");
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.panic_if(Faulty::Display);
        f.write_str("no room")
    }
}

impl Error for Cause {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.panic_if(Faulty::Source);
        None
    }
}

impl Drop for Cause {
    fn drop(&mut self) {
        self.panic_if(Faulty::Drop);
    }
}

/// How a listener will take its next calls, and what it holds.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) check: Option<Mood>,
    /// Of the updates to come; those after it are taken.
    pub(super) updates: VecDeque<Option<Mood>>,
    /// In MiB.
    pub(super) held: BTreeSet<u64>,
}

/// Takes everything, unless its plan says otherwise; and tries to call the address space.
pub(super) struct Moody {
    pub(super) plan: Arc<Mutex<Plan>>,
    pub(super) space: Weak<AddressSpace>,
    pub(super) in_steps: bool,
}

impl Moody {
    /// No listener gets in while a change is under way.
    fn meddle(&self) {
        let Some(space) = self.space.upgrade() else {
            return;
        };
        assert!(space.listeners().is_err());
        assert!(space.transaction().commit().is_err());
        drop(format!("{space:?}"));
    }

    /// Notes what it is told, and how it is to take that.
    fn hear(&self, memory: &GuestMemoryShm) -> Option<Mood> {
        self.meddle();
        let mut plan = self.plan.lock().unwrap();
        let starts = GuestMemoryBackend::iter(memory).map(|region| region.start_addr().0 / MIB);
        plan.held = starts.collect();
        plan.updates.pop_front().flatten()
    }
}

/// A listener that is told in two steps.
struct Hears<'a> {
    moody: &'a Moody,
    mood: Option<Mood>,
    is_first: bool,
}

impl Hears<'_> {
    fn panic_at(&self, place: Place) {
        self.moody.meddle();
        if let Some(mood) = self.mood.filter(|mood| mood.place() == Some(place)) {
            drop(mood.answer());
        }
    }
}

impl Exchange for Hears<'_> {
    fn advance(&mut self, _: Instant) -> Option<Result<(), ListenerError>> {
        self.moody.meddle();
        if std::mem::take(&mut self.is_first) {
            return None;
        }
        self.panic_at(Place::Step);
        let mood = self.mood.take();
        Some(mood.map_or(Ok(()), |mood| Err(mood.answer())))
    }
    fn waits_for(&self) -> WaitFor<'_> {
        self.panic_at(Place::WaitsFor);
        WaitFor::moment(Instant::now())
    }
}

impl Drop for Hears<'_> {
    fn drop(&mut self) {
        self.moody.meddle();
    }
}

impl MemoryListener for Moody {
    fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        self.meddle();
        // The lock is not held any more when it panics.
        let mood = self.plan.lock().unwrap().check.take();
        mood.map_or(Ok(()), |mood| Err(mood.answer()))
    }

    fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        let mood = self.hear(memory);
        mood.map_or(Ok(()), |mood| Err(mood.answer()))
    }

    fn begin_update<'a>(
        &'a mut self,
        memory: &GuestMemoryShm,
        _: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        if !self.in_steps {
            return None;
        }
        let hears = Hears {
            mood: self.hear(memory),
            moody: self,
            is_first: true,
        };
        hears.panic_at(Place::Begin);
        Some(Box::new(hears))
    }
}

/// Makes this process's logger one that panics at every third line of the crate, but for the
/// daemons', which are no part of what is tested; and has panics on purpose say nothing.
pub(super) fn install() {
    struct Panics;

    impl log::Log for Panics {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            static LINES: AtomicUsize = AtomicUsize::new(0);
            let target = record.target();
            if target.starts_with("guest_memory_shm") && !target.contains("::mock") {
                let line = LINES.fetch_add(1, Ordering::Relaxed);
                assert!(!line.is_multiple_of(3), "{ON_PURPOSE}");
            }
        }
        fn flush(&self) {}
    }

    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Panics).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let payload = info.payload();
            let text = payload.downcast_ref::<String>();
            let mood = payload.is::<Bomb>() || payload.is::<Mood>();
            if !mood && text.is_none_or(|text| text != ON_PURPOSE) {
                shown(info);
            }
        }));
    });
}
