//! The address space with listeners that play by a script.

use std::sync::{Arc, Barrier, Mutex};

use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::error::Error;
use crate::options::RamOptions;

const MIB: u64 = 1 << 20;

/// What was said, by whom: `("a", "update 0 4")`.
type Said = Arc<Mutex<Vec<(&'static str, String)>>>;

struct Script {
    name: &'static str,
    said: Said,
    /// What the n-th update answers; all others are taken.
    answers: Vec<(usize, fn() -> ListenerError)>,
    updates: usize,
    limit: usize,
    waits: bool,
    held: Vec<u64>,
    /// What readers see while it is told.
    readers: Option<GuestMemoryAtomic<GuestMemoryShm>>,
}

fn mib(memory: &GuestMemoryShm) -> Vec<u64> {
    memory
        .iter()
        .map(|region| region.range().start_addr().0 / MIB)
        .collect()
}

impl MemoryListener for Script {
    fn check(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        if memory.num_regions() > self.limit {
            return Err(ListenerError::refused("too many"));
        }
        Ok(())
    }

    fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        self.updates += 1;
        let mut what = format!("{:?}", mib(memory));
        if let Some(readers) = &self.readers {
            what += &format!(" while readers see {:?}", mib(&readers.memory()));
        }
        self.said.lock().unwrap().push((self.name, what));
        if let Some((_, error)) = self.answers.iter().find(|(at, _)| *at == self.updates) {
            return Err(error());
        }
        self.held = mib(memory);
        Ok(())
    }

    fn waits(&self) -> bool {
        self.waits
    }
}

fn script(name: &'static str, said: &Said) -> Script {
    Script {
        name,
        said: said.clone(),
        answers: Vec::new(),
        updates: 0,
        limit: usize::MAX,
        waits: false,
        held: Vec::new(),
        readers: None,
    }
}

fn refused() -> ListenerError {
    ListenerError::refused("no room")
}

fn away() -> ListenerError {
    ListenerError::away("it died")
}

fn space() -> AddressSpace {
    AddressSpace::new(GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

fn region(at: u64) -> GuestRegionShm {
    GuestRegionShm::new(GuestAddress(at * MIB), MIB, &RamOptions::new()).unwrap()
}

fn present(space: &AddressSpace) -> Vec<u64> {
    mib(&space.memory().memory())
}

fn said(said: &Said) -> Vec<(&'static str, String)> {
    std::mem::take(&mut said.lock().unwrap())
}

fn held<L: MemoryListener>(
    space: &AddressSpace,
    id: &ListenerId<L>,
    of: fn(&L) -> &[u64],
) -> Vec<u64> {
    space
        .with_listener(id, |listener| of(listener).to_vec())
        .unwrap()
}

fn all(script: &Script) -> &[u64] {
    &script.held
}

#[test]
fn they_are_told_in_order_and_undone_in_reverse() {
    let (space, log) = (space(), Said::default());
    let a = space.attach("a", script("a", &log)).unwrap();
    let b = space.attach("b", script("b", &log)).unwrap();
    let c = Script {
        answers: vec![(2, refused)],
        ..script("c", &log)
    };
    let c = space.attach("c", c).unwrap();
    let d = space.attach("d", script("d", &log)).unwrap();
    said(&log);

    let error = space.insert(region(4)).unwrap_err();
    let told: Vec<_> = said(&log)
        .into_iter()
        .map(|(who, what)| format!("{who}{what}"))
        .collect();
    // c may hold a part of what it refused.
    assert_eq!(
        told,
        ["a[0, 4]", "b[0, 4]", "c[0, 4]", "c[0]", "b[0]", "a[0]"]
    );
    assert_eq!(present(&space), [0]);
    for id in [&a, &b, &c, &d] {
        assert_eq!(held(&space, id, all), [0]);
    }
    let text = error.to_string();
    assert_eq!(
        text,
        "nothing was changed: listener \"c\" refuses the region 0x400000..=0x4fffff (1 MiB): no room"
    );

    space.insert(region(4)).unwrap();
    assert_eq!(present(&space), [0, 4]);
    for id in [a, b, c, d] {
        assert_eq!(held(&space, &id, all), [0, 4]);
    }
}

#[test]
fn everybody_is_asked_before_anybody_is_told() {
    let (space, log) = (space(), Said::default());
    space.attach("a", script("a", &log)).unwrap();
    let full = Script {
        limit: 1,
        ..script("b", &log)
    };
    space.attach("b", full).unwrap();
    said(&log);
    let error = space.insert(region(4)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(": listener \"b\" refuses the region"),
        "{error}"
    );
    assert_eq!(said(&log), []);
}

#[test]
fn readers_lose_memory_before_listeners_and_get_it_after_them() {
    let (space, log) = (space(), Said::default());
    let watching = Script {
        readers: Some(space.memory()),
        answers: vec![(4, refused), (7, refused)],
        ..script("a", &log)
    };
    space.attach("a", watching).unwrap();
    space.insert(region(4)).unwrap();
    space.remove(GuestAddress(4 * MIB), MIB).unwrap();
    // Refused, and undone.
    space.insert(region(4)).unwrap_err();
    space.insert(region(4)).unwrap();
    space.remove(GuestAddress(4 * MIB), MIB).unwrap_err();
    let told: Vec<_> = said(&log).into_iter().map(|(_, what)| what).collect();
    assert_eq!(
        told,
        [
            "[0] while readers see [0]",
            "[0, 4] while readers see [0]",
            "[0] while readers see [0]",
            "[0, 4] while readers see [0]",
            "[0] while readers see [0]",
            "[0, 4] while readers see [0]",
            "[0] while readers see [0]",
            // It is put back before readers see the region again.
            "[0, 4] while readers see [0]",
        ]
    );
    assert_eq!(present(&space), [0, 4]);
}

#[test]
fn a_region_that_is_replaced_is_never_seen_in_both_shapes() {
    let (space, log) = (space(), Said::default());
    let watching = Script {
        readers: Some(space.memory()),
        ..script("a", &log)
    };
    space.attach("a", watching).unwrap();
    said(&log);
    let report = space
        .transaction()
        .insert(region(0))
        .insert(region(2))
        .remove(GuestAddress(0), MIB)
        .commit()
        .unwrap();
    assert_eq!(report.removed().len(), 1);
    assert_eq!(
        said(&log),
        [("a", "[0, 2] while readers see []".to_owned())]
    );

    // Nothing is nothing.
    let report = space.transaction().commit().unwrap();
    assert_eq!(report.removed().len(), 0);
    assert_eq!(said(&log), []);
    // What cannot be is found before anybody hears of it.
    let twice = space.transaction().insert(region(9)).insert(region(9));
    assert!(matches!(twice.commit(), Err(Error::Overlap { .. })));
    let gone = space
        .transaction()
        .insert(region(9))
        .remove(GuestAddress(5 * MIB), MIB);
    assert!(matches!(gone.commit(), Err(Error::NoSuchRegion { .. })));
    assert_eq!(said(&log), []);
    assert_eq!(present(&space), [0, 2]);
}

#[test]
fn who_is_away_lags_or_stops_everything() {
    for (attendance, stops) in [(Attendance::MayLag, false), (Attendance::Required, true)] {
        let (space, log) = (space(), Said::default());
        let a = space.attach("a", script("a", &log)).unwrap();
        let dying = Script {
            // To put it back is tried, too.
            answers: if stops {
                vec![(2, away), (3, away)]
            } else {
                vec![(2, away)]
            },
            ..script("b", &log)
        };
        let b = space.attach_as("b", attendance, dying).unwrap();
        let c = space.attach("c", script("c", &log)).unwrap();
        let done = space.insert(region(4));
        let now: &[u64] = if stops { &[0] } else { &[0, 4] };
        assert_eq!(present(&space), now);
        assert_eq!(held(&space, &a, all), now);
        assert_eq!(held(&space, &c, all), now);
        let stale = space.listeners()[1].stale().map(str::to_owned);
        assert_eq!(stale.as_deref(), Some("it died"));
        let lagging = match done {
            Ok(report) => report.stale().to_vec(),
            Err(Error::AddressSpace(error)) => match *error {
                AddressSpaceError::Away {
                    listener,
                    stale,
                    region,
                    ..
                } => {
                    assert_eq!(
                        (listener.as_str(), region),
                        ("b", Some(self::region(4).range()))
                    );
                    stale
                }
                other => panic!("{other}"),
            },
            Err(other) => panic!("{other}"),
        };
        assert_eq!(lagging.len(), 1);
        assert_eq!((lagging[0].name(), lagging[0].reason()), ("b", "it died"));

        // Back, it is told the present memory, by itself or with the next change.
        if stops {
            space.insert(region(4)).unwrap();
        } else {
            space.refresh(&b).unwrap();
        }
        assert_eq!(held(&space, &b, all), [0, 4]);
        assert_eq!(space.listeners()[1].stale(), None);
    }
}

#[test]
fn who_cannot_be_put_back_is_stale_until_the_next_change() {
    let (space, log) = (space(), Said::default());
    let stuck = Script {
        answers: vec![(3, refused)],
        ..script("a", &log)
    };
    let a = space.attach("a", stuck).unwrap();
    let refusing = Script {
        answers: vec![(2, refused)],
        ..script("b", &log)
    };
    space.attach("b", refusing).unwrap();
    let error = space.insert(region(4)).unwrap_err();
    assert!(
        error.to_string().starts_with(
            "nothing was changed, but \"a\" is stale (it could not be put back: no room): listener \"b\""
        ),
        "{error}"
    );
    assert_eq!(held(&space, &a, all), [0, 4]);
    assert_eq!(present(&space), [0]);
    space.insert(region(6)).unwrap();
    assert_eq!(held(&space, &a, all), [0, 6]);
    assert_eq!(space.listeners()[0].stale(), None);
}

#[test]
fn a_listener_that_panics_refuses() {
    struct Panics(bool);
    impl MemoryListener for Panics {
        fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
        fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
            assert!(memory.num_regions() < 2, "as it was told to");
            Ok(())
        }
        fn waits(&self) -> bool {
            self.0
        }
    }
    // Here, and beside another, on another thread.
    for waits in [false, true] {
        let (space, log) = (space(), Said::default());
        space.attach("a", Panics(waits)).unwrap();
        let other = Script {
            waits,
            ..script("b", &log)
        };
        let b = space.attach("b", other).unwrap();
        let error = space.insert(region(4)).unwrap_err().to_string();
        assert!(error.contains("\"a\" refuses"), "{error}");
        assert!(error.contains("panicked"), "{error}");
        assert_eq!(held(&space, &b, all), [0]);
        assert_eq!(present(&space), [0]);
        let stale = |listener: &ListenerStatus| listener.stale().is_some();
        assert!(!space.listeners().iter().any(stale));
    }
}

/// It returns only when all of them have been told.
struct Meets(Arc<Barrier>, usize);

impl MemoryListener for Meets {
    fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        Ok(())
    }
    fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        if memory.num_regions() > 1 {
            self.0.wait();
            self.1 += 1;
        }
        Ok(())
    }
    fn waits(&self) -> bool {
        true
    }
}

#[test]
fn neighbours_that_wait_are_told_side_by_side() {
    let space = space();
    let barrier = Arc::new(Barrier::new(5));
    let ids: Vec<_> = (0..5)
        .map(|at| {
            space
                .attach(format!("{at}"), Meets(barrier.clone(), 0))
                .unwrap()
        })
        .collect();
    for _ in 0..50 {
        space.insert(region(4)).unwrap();
        space.remove(GuestAddress(4 * MIB), MIB).unwrap();
    }
    for id in ids {
        assert_eq!(space.detach(id).unwrap().1, 50);
    }
}

#[test]
fn one_that_does_not_wait_parts_its_neighbours() {
    let (space, log) = (space(), Said::default());
    for (name, waits) in [("a", true), ("b", false), ("c", true)] {
        let one = Script {
            waits,
            ..script(name, &log)
        };
        space.attach(name, one).unwrap();
    }
    said(&log);
    space.insert(region(4)).unwrap();
    let order: Vec<_> = said(&log).into_iter().map(|(who, _)| who).collect();
    assert_eq!(order, ["a", "b", "c"]);
}

#[test]
fn attaching_undoes_itself_and_gives_the_listener_back() {
    let (space, log) = (space(), Said::default());
    let refusing = Script {
        answers: vec![(1, refused)],
        ..script("a", &log)
    };
    let error = space.attach("a", refusing).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"a\" refuses the memory: no room"),
        "{error}"
    );
    assert!(error.into_listener().held.is_empty());
    assert_eq!(said(&log).last().unwrap().1, "[]");

    // One that was only asked is not told anything.
    let full = Script {
        limit: 0,
        ..script("b", &log)
    };
    let error = space.attach("b", full).unwrap_err();
    assert!(matches!(Error::from(error), Error::AddressSpace(_)));
    assert_eq!(said(&log), []);
    assert_eq!(space.listeners(), []);
}

#[test]
fn a_detached_listener_is_told_no_more_and_its_name_is_void() {
    let (space, other) = (space(), self::space());
    let log = Said::default();
    let a = space.attach("a", script("a", &log)).unwrap();
    let copy = a.clone();
    let gone = |done: Result<()>| matches!(done, Err(Error::AddressSpace(error)) if matches!(*error, AddressSpaceError::NoSuchListener));
    assert!(gone(other.with_listener(&a, |_| ())));
    let listener = space.detach(a).unwrap();
    assert_eq!(listener.held, [0]);
    assert!(gone(space.refresh(&copy)));
    space.insert(region(4)).unwrap();
    assert_eq!(listener.held, [0]);
}

/// Takes one region more, or not.
struct Regions(Arc<Mutex<Vec<String>>>, Option<u64>);

impl RegionListener for Regions {
    fn region_add(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        let at = region.range().start_addr().0 / MIB;
        self.0.lock().unwrap().push(format!("+{at}"));
        match self.1 {
            Some(refused) if refused == at => Err(ListenerError::refused("full")),
            _ => Ok(()),
        }
    }
    fn region_remove(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        let at = region.range().start_addr().0 / MIB;
        self.0.lock().unwrap().push(format!("-{at}"));
        Ok(())
    }
}

#[test]
fn regions_go_from_above_and_come_from_below_and_the_one_that_failed_is_named() {
    let space = space();
    let log = Arc::new(Mutex::new(Vec::new()));
    let id = space
        .attach("dma", PerRegion::new(Regions(log.clone(), Some(8))))
        .unwrap();
    space
        .transaction()
        .insert(region(6))
        .insert(region(4))
        .commit()
        .unwrap();
    let change = space
        .transaction()
        .remove(GuestAddress(4 * MIB), MIB)
        .remove(GuestAddress(6 * MIB), MIB)
        .insert(region(8))
        .insert(region(2));
    let error = change.commit().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"dma\" refuses the region 0x800000..="),
        "{error}"
    );
    assert_eq!(
        *log.lock().unwrap(),
        ["+0", "+4", "+6", "-6", "-4", "+2", "+8", "-2", "+4", "+6"]
    );
    let held = space.with_listener(&id, |dma| dma.regions().len()).unwrap();
    assert_eq!(held, 3);
}

#[test]
fn a_listener_of_regions_that_was_away_is_told_all_of_them_when_it_begins_anew() {
    struct Dma(Arc<Mutex<bool>>);
    impl RegionListener for Dma {
        fn region_add(&mut self, _: &GuestRegionShm) -> Result<(), ListenerError> {
            match *self.0.lock().unwrap() {
                true => Err(away()),
                false => Ok(()),
            }
        }
        fn region_remove(&mut self, _: &GuestRegionShm) -> Result<(), ListenerError> {
            panic!("it is not there");
        }
    }
    let (space, gone) = (space(), Arc::new(Mutex::new(false)));
    let dma = space
        .attach_as(
            "dma",
            Attendance::Required,
            PerRegion::new(Dma(gone.clone())),
        )
        .unwrap();
    *gone.lock().unwrap() = true;
    // To be put back it is told nothing: it stays stale.
    for _ in 0..2 {
        let error = space.insert(region(4)).unwrap_err().to_string();
        assert!(
            error
                .starts_with("nothing was changed, but \"dma\" is stale: listener \"dma\" is away"),
            "{error}"
        );
    }
    *gone.lock().unwrap() = false;
    space.refresh(&dma).unwrap_err();
    space.with_listener(&dma, PerRegion::begin_anew).unwrap();
    space.refresh(&dma).unwrap();
    space.insert(region(4)).unwrap();
    let held = space.with_listener(&dma, |dma| dma.regions().len());
    assert_eq!(held.unwrap(), 2);
}

#[test]
fn a_removed_region_stays_mapped_while_somebody_reads_it() {
    let space = space();
    space.insert(region(4)).unwrap();
    let address = GuestAddress(4 * MIB);
    let held = space.memory().memory();
    held.write_obj(42_u64, address).unwrap();
    drop(space.remove(address, MIB).unwrap());

    assert_eq!(held.read_obj::<u64>(address).unwrap(), 42);
    assert!(space.memory().memory().read_obj::<u64>(address).is_err());
}
