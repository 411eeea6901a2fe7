//! Code of others that panics, in the middle of changes: they happen for all listeners or for
//! none.

use std::error::Error as StdError;
use std::fmt;
use std::panic::panic_any;

use super::*;

/// A payload whose drop panics.
pub(super) struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a payload's bug");
    }
}

/// An error that panics in one of the things that are done with errors.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Faulty {
    Display,
    Source,
    Drop,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        assert!(*self != Self::Display, "an error's bug");
        f.write_str("no room")
    }
}

impl StdError for Faulty {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        assert!(*self != Self::Source, "an error's bug");
        None
    }
}

/// `Faulty`, and its drop panics where that is its fault.
#[derive(Debug)]
struct Cause(Faulty);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for Cause {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

impl Drop for Cause {
    fn drop(&mut self) {
        assert!(self.0 != Faulty::Drop, "an error's bug");
    }
}

fn bad(away: bool, fault: Faulty) -> ListenerError {
    match away {
        true => ListenerError::away(Cause(fault)),
        false => ListenerError::refused(Cause(fault)),
    }
}

const FAULTS: [(bool, fn() -> ListenerError); 6] = [
    (false, || bad(false, Faulty::Display)),
    (false, || bad(false, Faulty::Source)),
    (false, || bad(false, Faulty::Drop)),
    (true, || bad(true, Faulty::Display)),
    (true, || bad(true, Faulty::Source)),
    (true, || bad(true, Faulty::Drop)),
];

#[test]
fn an_error_that_panics_is_a_reason_like_any_other() {
    for (away, error) in FAULTS {
        // Told by itself, and beside another.
        for told in both_ways() {
            let (space, log) = (space(), Said::default());
            let a = space.attach("a", script("a", &log)).unwrap();
            let faulty = Script {
                answers: vec![(2, error)],
                told: told.clone(),
                ..script("b", &log)
            };
            let b = space.attach("b", faulty).unwrap();
            let c = Script {
                // No listener after one that refuses is told, unless at the same time.
                answers: Vec::from_iter((away || told.is_in_steps()).then_some((2, error))),
                told,
                ..script("c", &log)
            };
            let c = space.attach_required("c", c).unwrap();
            let text = chain(&space.insert(region(4)).unwrap_err());
            let who = if away {
                "\"c\" is away"
            } else {
                "\"b\" refuses"
            };
            assert!(text.contains(who), "{text}");
            let why = text.contains("panicked") || text.contains("no room");
            assert!(why, "{text}");
            assert_eq!(present(&space), [0]);
            assert_eq!(held(&space, &a, all), [0]);
            // They hold what they held: each was put back, and is told the next one.
            assert!(
                space
                    .listeners()
                    .unwrap()
                    .iter()
                    .all(|one| one.stale().is_none())
            );
            space.insert(region(4)).told_all();
            for id in [&a, &b, &c] {
                assert_eq!(held(&space, id, all), [0, 4]);
            }
        }
    }
}

#[test]
fn who_lags_with_an_error_that_panics_lags_with_a_reason() {
    for (away, error) in FAULTS {
        if !away {
            continue;
        }
        let (space, log) = (space(), Said::default());
        let faulty = Script {
            answers: vec![(2, error)],
            ..script("a", &log)
        };
        let a = space.attach("a", faulty).unwrap();
        let b = space.attach("b", script("b", &log)).unwrap();
        let report = space.insert(region(4)).unwrap();
        assert!(report.stale()[0].is(&a));
        assert_eq!(present(&space), [0, 4]);
        assert_eq!(held(&space, &b, all), [0, 4]);
        space.refresh(&a).unwrap();
        assert_eq!(held(&space, &a, all), [0, 4]);
    }
}

#[test]
fn who_cannot_be_put_back_with_an_error_that_panics_is_stale() {
    for (_, error) in FAULTS {
        let (space, log) = (space(), Said::default());
        let stuck = Script {
            answers: vec![(3, error)],
            ..script("a", &log)
        };
        let a = space.attach("a", stuck).unwrap();
        let refusing = Script {
            answers: vec![(2, refused)],
            ..script("b", &log)
        };
        space.attach("b", refusing).unwrap();
        let text = chain(&space.insert(region(4)).unwrap_err());
        assert!(
            text.contains("\"a\" is stale (it could not be put back: "),
            "{text}"
        );
        assert_eq!(present(&space), [0]);
        assert_eq!(held(&space, &a, all), [0, 4]);
        space.insert(region(6)).told_all();
        assert_eq!(held(&space, &a, all), [0, 6]);
    }
}

/// Where a listener panics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Place {
    /// When it is told at once.
    Update,
    /// When it begins to be told in steps.
    Begin,
    /// At the first step.
    First,
    Later,
    WaitsFor,
}

pub(super) const PLACES: [Place; 5] = [
    Place::Update,
    Place::Begin,
    Place::First,
    Place::Later,
    Place::WaitsFor,
];

/// It panics at one call of each kind, and counts what it is told.
pub(super) struct Panics {
    pub(super) check: bool,
    /// At these updates.
    pub(super) updates: Vec<usize>,
    pub(super) told: usize,
    pub(super) place: Place,
    pub(super) held: Vec<u64>,
    pub(super) how: fn(),
}

pub(super) fn panics(updates: &[usize], place: Place, how: fn()) -> Panics {
    Panics {
        check: false,
        updates: updates.to_vec(),
        told: 0,
        place,
        held: Vec::new(),
        how,
    }
}

impl MemoryListener for Panics {
    fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        if std::mem::take(&mut self.check) {
            (self.how)();
        }
        Ok(())
    }
    fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        self.told += 1;
        self.held = mib(memory);
        self.panic_at(Place::Update);
        Ok(())
    }
    fn begin_update<'a>(
        &'a mut self,
        memory: &GuestMemoryShm,
        _begun: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        if self.place == Place::Update {
            return None;
        }
        self.told += 1;
        self.held = mib(memory);
        self.panic_at(Place::Begin);
        Some(Box::new(Falls(self, 0)))
    }
}

impl Panics {
    fn panic_at(&self, place: Place) {
        if self.place == place && self.updates.contains(&self.told) {
            (self.how)();
        }
    }
}

/// An exchange of two steps.
struct Falls<'a>(&'a mut Panics, usize);

impl Exchange for Falls<'_> {
    fn advance(&mut self, _: Instant) -> Option<Result<(), ListenerError>> {
        self.1 += 1;
        self.0.panic_at(match self.1 {
            1 => Place::First,
            _ => Place::Later,
        });
        (self.1 > 1).then_some(Ok(()))
    }
    fn waits_for(&self) -> WaitFor<'_> {
        self.0.panic_at(Place::WaitsFor);
        WaitFor::moment(Instant::now())
    }
}

pub(super) const WAYS: [(fn(), &str); 3] = [
    (|| panic!("a listener's bug"), "a listener's bug"),
    (|| panic_any(7), "no text"),
    (|| panic_any(Bomb), "no text"),
];

/// How its neighbour is told.
fn beside(place: Place) -> Told {
    let [at_once, in_steps] = both_ways();
    match place {
        Place::Update => at_once,
        _ => in_steps,
    }
}

#[test]
fn a_payload_that_panics_when_it_is_dropped_spoils_no_later_change() {
    for (how, text) in WAYS {
        for place in PLACES {
            let (space, log) = (space(), Said::default());
            let a = space.attach("a", script("a", &log)).unwrap();
            let b = space.attach("b", panics(&[2], place, how)).unwrap();
            let beside = Script {
                told: beside(place),
                ..script("c", &log)
            };
            let c = space.attach("c", beside).unwrap();
            let refused = chain(&space.insert(region(4)).unwrap_err());
            assert!(refused.contains("\"b\" refuses"), "{refused}");
            assert!(refused.contains("it panicked: "), "{refused}");
            assert!(refused.contains(text), "{refused}");
            space.with_listener(&b, |b| b.check = true).unwrap();
            let refused = chain(&space.insert(region(4)).unwrap_err());
            assert!(refused.contains(text), "{refused}");
            for _ in 0..3 {
                space.insert(region(4)).told_all();
                space.remove((GuestAddress(4 * MIB), MIB)).told_all();
            }
            assert_eq!(held(&space, &a, all), [0]);
            assert_eq!(held(&space, &c, all), [0]);
            assert_eq!(held(&space, &b, |b| &b.held), [0]);
        }
    }
}

#[test]
fn who_panics_when_put_back_is_stale_and_the_others_are_put_back() {
    for (how, text) in WAYS {
        for place in PLACES {
            let (space, log) = (space(), Said::default());
            let a = space.attach("a", script("a", &log)).unwrap();
            // Told, put back.
            space.attach("b", panics(&[3], place, how)).unwrap();
            let refusing = Script {
                answers: vec![(2, refused)],
                told: beside(place),
                ..script("c", &log)
            };
            space.attach("c", refusing).unwrap();
            let error = chain(&space.insert(region(4)).unwrap_err());
            assert!(
                error.contains("\"b\" is stale (it could not be put back"),
                "{error}"
            );
            assert!(error.contains(text), "{error}");
            assert_eq!(held(&space, &a, all), [0]);
            assert_eq!(present(&space), [0]);
            space.insert(region(4)).told_all();
        }
    }
}
