//! Panics of listeners that are told side by side, at each place where they are called.

use std::panic::panic_any;

use super::panics::{Bomb, PLACES, Place, WAYS, panics};
use super::*;

/// One that panics among neighbours, at this place in the order of attachment.
fn among(at: usize, place: Place, how: fn()) -> (AddressSpace, Said, Vec<ListenerId<Script>>) {
    let (space, log) = (space(), Said::default());
    let [_, in_steps] = both_ways();
    let attach = |name| {
        let neighbour = Script {
            told: in_steps.clone(),
            ..script(name, &log)
        };
        space.attach(name, neighbour).unwrap()
    };
    let names = ["a", "b", "c", "d"];
    let mut ids: Vec<_> = names[..at].iter().map(|name| attach(name)).collect();
    space.attach("bad", panics(&[2], place, how)).unwrap();
    ids.extend(names[at..].iter().map(|name| attach(name)));
    said(&log);
    (space, log, ids)
}

#[test]
fn who_panics_at_any_place_refuses_and_all_are_put_back() {
    for (how, text) in WAYS {
        for place in PLACES {
            for at in [0, 2, 4] {
                let (space, log, ids) = among(at, place, how);
                let error = chain(&space.insert(region(4)).unwrap_err());
                assert!(error.contains("\"bad\" refuses"), "{error}");
                assert!(error.contains(text), "{error}");
                assert_eq!(present(&space), [0]);
                for id in &ids {
                    assert_eq!(held(&space, id, all), [0], "{place:?} {at}");
                }
                let stale = |listener: &ListenerStatus| listener.stale().is_some();
                assert!(!space.listeners().unwrap().iter().any(stale));
                // Those that had begun are told to the end. It had not begun yet, or had no
                // exchange, where those after it have not begun either.
                let told = match place {
                    Place::Update | Place::Begin => at,
                    _ => ids.len(),
                };
                let lines = lines(&log);
                let count = |what: &str| lines.iter().filter(|line| line.ends_with(what)).count();
                assert_eq!(count("begins [0, 4]"), told, "{lines:?}");
                assert_eq!(count("[0, 4]"), 2 * told, "{lines:?}");
                assert_eq!(count("begins [0]"), told, "{lines:?}");

                space.insert(region(4)).told_all();
                for id in &ids {
                    assert_eq!(held(&space, id, all), [0, 4]);
                }
            }
        }
    }
}

#[test]
fn two_that_panic_at_once_are_one_refusal_and_all_are_put_back() {
    for first in &PLACES[1..] {
        for second in &PLACES[1..] {
            let (space, log) = (space(), Said::default());
            let [_, told] = both_ways();
            let neighbour = Script {
                told,
                ..script("a", &log)
            };
            let a = space.attach("a", neighbour).unwrap();
            space.attach("b", panics(&[2], *first, WAYS[0].0)).unwrap();
            space.attach("c", panics(&[2], *second, WAYS[2].0)).unwrap();
            let error = chain(&space.insert(region(4)).unwrap_err());
            // In the order of attachment, whichever panicked first.
            assert!(error.contains("\"b\" refuses"), "{error}");
            assert_eq!(held(&space, &a, all), [0]);
            // That of the second one is still to come, if the first did not even begin.
            if *first == Place::Begin {
                space.insert(region(4)).unwrap_err();
            }
            space.insert(region(4)).told_all();
            assert_eq!(held(&space, &a, all), [0, 4]);
        }
    }
}

/// Its exchange panics when it is dropped, at its end or before.
struct Litter(fn());

struct Dropped(fn(), usize);

impl MemoryListener for Litter {
    fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        Ok(())
    }
    fn update(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        unreachable!("it has an exchange")
    }
    fn begin_update<'a>(
        &'a mut self,
        _: &GuestMemoryShm,
        _: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        Some(Box::new(Dropped(self.0, 0)))
    }
}

impl Exchange for Dropped {
    fn advance(&mut self, _: Instant) -> Option<Result<(), ListenerError>> {
        self.1 += 1;
        (self.1 > 1).then_some(Ok(()))
    }
    fn waits_for(&self) -> WaitFor<'_> {
        WaitFor::moment(Instant::now())
    }
}

impl Drop for Dropped {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn a_panic_of_an_exchange_that_is_dropped_is_nothing() {
    for (how, _) in WAYS {
        let (space, log) = (space(), Said::default());
        let [_, told] = both_ways();
        space.attach("a", Litter(how)).unwrap();
        let beside = Script {
            told,
            ..script("b", &log)
        };
        let b = space.attach("b", beside).unwrap();
        let c = space.attach("c", Litter(how)).unwrap();
        for _ in 0..3 {
            space.insert(region(4)).told_all();
            assert_eq!(held(&space, &b, all), [0, 4]);
            space.remove((GuestAddress(4 * MIB), MIB)).told_all();
        }
        space.refresh(&c).unwrap();
        space.detach(c).unwrap();
    }
}

#[test]
fn two_panics_of_one_exchange_are_its_refusal() {
    struct Both;
    impl MemoryListener for Both {
        fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
        fn update(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            unreachable!("it has an exchange")
        }
        fn begin_update<'a>(
            &'a mut self,
            memory: &GuestMemoryShm,
            _: Instant,
        ) -> Option<Box<dyn Exchange + 'a>> {
            Some(Box::new(Doubly(memory.num_regions() > 1)))
        }
    }
    struct Doubly(bool);
    impl Exchange for Doubly {
        fn advance(&mut self, _: Instant) -> Option<Result<(), ListenerError>> {
            match self.0 {
                true => panic_any(Bomb),
                false => Some(Ok(())),
            }
        }
        fn waits_for(&self) -> WaitFor<'_> {
            unreachable!("it ends at once")
        }
    }
    impl Drop for Doubly {
        fn drop(&mut self) {
            assert!(!self.0, "an exchange's bug");
        }
    }
    let (space, log) = (space(), Said::default());
    let [_, told] = both_ways();
    let beside = Script {
        told,
        ..script("a", &log)
    };
    let a = space.attach("a", beside).unwrap();
    space.attach("b", Both).unwrap();
    let error = chain(&space.insert(region(4)).unwrap_err());
    assert!(error.contains("\"b\" refuses"), "{error}");
    assert_eq!(held(&space, &a, all), [0]);
    assert!(space.listeners().unwrap()[1].stale().is_none());
}
