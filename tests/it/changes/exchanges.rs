//! Listeners that are told in steps: side by side, in which order, and since when.

use super::*;
use crate::support::may_have_descriptors;

/// Attaches scripts that are told in steps, or at once, as their names say: "steps" or not.
fn attach(
    space: &AddressSpace,
    log: &Said,
    names: impl IntoIterator<Item = (&'static str, bool)>,
) -> Vec<ListenerId<Script>> {
    let [at_once, in_steps] = both_ways();
    let attach = |(name, is_in_steps)| {
        let told = if is_in_steps { &in_steps } else { &at_once };
        let one = Script {
            told: told.clone(),
            ..script(name, log)
        };
        space.attach(name, one).unwrap()
    };
    let ids = names.into_iter().map(attach).collect();
    said(log);
    ids
}

/// From now on it is told by an exchange that waits for these, and then says these.
fn tell_by(space: &AddressSpace, id: &ListenerId<Script>, waits: Vec<Wait>, says: Vec<Line>) {
    let told = Told::InSteps(waits, says);
    space
        .with_listener(id, |script| script.told = told)
        .unwrap();
}

#[test]
fn neighbours_with_exchanges_are_told_side_by_side() {
    for line in [Line::event, Line::pipe, Line::socket] {
        let (space, log) = (space(), Said::default());
        let ids = attach(&space, &log, ["a", "b", "c", "d"].map(|name| (name, true)));
        // Each waits for the one after it: told one after the other, the first would wait in vain.
        let lines: [Line; 3] = std::array::from_fn(|_| line());
        for (at, id) in ids.iter().enumerate() {
            let waits = lines.get(at).cloned().map(Wait::Word);
            let says = at.checked_sub(1).map(|before| lines[before].clone());
            tell_by(
                &space,
                id,
                waits.into_iter().collect(),
                says.into_iter().collect(),
            );
        }
        for _ in 0..50 {
            space.insert(region(4)).told_all();
            let told = self::lines(&log);
            let begin = ["a", "b", "c", "d"].map(|name| format!("{name}begins [0, 4]"));
            assert_eq!(told[..4], begin, "all begin, in order");
            assert_eq!(told[4..], ["d[0, 4]", "c[0, 4]", "b[0, 4]", "a[0, 4]"]);
            space.remove((GuestAddress(4 * MIB), MIB)).told_all();
            said(&log);
        }
    }
}

#[test]
fn one_without_an_exchange_parts_its_neighbours_and_comes_in_its_turn() {
    let (space, log) = (space(), Said::default());
    let kinds = ["a", "b", "C", "d", "e", "F", "G", "h"];
    // Capital letters are told at once.
    let kinds = kinds.map(|name| (name, name.to_lowercase() == name));
    let ids = attach(&space, &log, kinds);
    let at_last = |script: &mut Script| script.answers = vec![(script.updates + 2, refused)];
    space.with_listener(&ids[7], at_last).unwrap();
    space.insert(region(4)).told_all();
    let told = lines(&log)
        .join(" ")
        .replace("[0, 4]", "")
        .replace("begins ", "-");
    assert_eq!(told, "a- b- a b C d- e- d e F G h- h");

    // And in reverse, when it is undone.
    space.insert(region(8)).unwrap_err();
    let told = lines(&log).join(" ").replace("begins ", "-");
    let (told, undone) = told.split_at(told.find("h[0, 4, 8]").unwrap() + "h[0, 4, 8]".len());
    assert_eq!(
        told.replace("[0, 4, 8]", ""),
        "a- b- a b C d- e- d e F G h- h"
    );
    assert_eq!(
        undone.trim().replace("[0, 4]", ""),
        "h- h G F e- d- e d C b- a- b a"
    );
    for id in &ids {
        assert_eq!(held(&space, id, all), [0, 4]);
    }
}

#[test]
fn of_neighbours_one_that_refuses_stops_those_after_them() {
    for required in [false, true] {
        for at in 0..3 {
            let (space, log) = (space(), Said::default());
            let names = [
                ("a", true),
                ("b", true),
                ("c", true),
                ("D", false),
                ("e", true),
            ];
            let [_, told] = both_ways();
            // One that is away refuses if it is required.
            let answer = if required { away } else { refused };
            let ids: Vec<_> = names
                .into_iter()
                .enumerate()
                .map(|(place, (name, in_steps))| {
                    let one = Script {
                        answers: Vec::from_iter((place == at).then_some((2, answer as fn() -> _))),
                        told: if in_steps { told.clone() } else { Told::AtOnce },
                        ..script(name, &log)
                    };
                    attach_as(&space, name, required, one).unwrap()
                })
                .collect();
            said(&log);
            let error = chain(&space.insert(region(4)).unwrap_err());
            let does = if required { "is away" } else { "refuses" };
            assert!(
                error.contains(&format!("{:?} {does}", names[at].0)),
                "{error}"
            );
            let told = lines(&log).join(" ").replace("begins ", "-");
            assert_eq!(
                told,
                "a-[0, 4] b-[0, 4] c-[0, 4] a[0, 4] b[0, 4] c[0, 4] c-[0] b-[0] a-[0] c[0] b[0] \
                 a[0]"
            );
            for id in &ids {
                assert_eq!(held(&space, id, all), [0]);
            }
        }
    }
}

#[test]
fn one_is_told_by_its_exchange_when_it_is_attached_and_refreshed_too() {
    let (space, log) = (space(), Said::default());
    let line = Line::pipe();
    line.say();
    let one = Script {
        told: Told::InSteps(vec![Wait::Past, Wait::Word(line.clone())], Vec::new()),
        ..script("a", &log)
    };
    let a = space.attach("a", one).unwrap();
    assert_eq!(lines(&log), ["abegins [0]", "a[0]"]);
    line.say();
    space.refresh(&a).unwrap();
    assert_eq!(lines(&log), ["abegins [0]", "a[0]"]);
    assert!(!line.hears());
}

/// A listener that notes when it is told, and since when its time counts.
struct Clock {
    in_steps: bool,
    /// For each time: since when, when it begins, when it ends.
    times: Vec<[Instant; 3]>,
}

struct Ticks<'a>(&'a mut Clock, [Instant; 2]);

impl MemoryListener for Clock {
    fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        Ok(())
    }
    fn update(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        let begins = Instant::now();
        // The time that it takes is to be seen.
        while begins.elapsed() < Duration::from_millis(2) {}
        self.times.push([begins, begins, Instant::now()]);
        Ok(())
    }
    fn begin_update<'a>(
        &'a mut self,
        _: &GuestMemoryShm,
        begun: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        let times = [begun, Instant::now()];
        match self.in_steps {
            true => Some(Box::new(Ticks(self, times))),
            false => None,
        }
    }
}

impl Exchange for Ticks<'_> {
    fn advance(&mut self, now: Instant) -> Option<Result<(), ListenerError>> {
        let [since, begins] = self.1;
        if now < begins + Duration::from_millis(2) {
            return None;
        }
        self.0.times.push([since, begins, Instant::now()]);
        Some(Ok(()))
    }
    fn waits_for(&self) -> WaitFor<'_> {
        WaitFor::moment(self.1[1] + Duration::from_millis(2))
    }
}

#[test]
fn the_time_of_exchanges_counts_and_that_of_other_listeners_does_not() {
    let space = space();
    let kinds = [true, true, false, true, false, false, true];
    let attach = |in_steps| {
        let times = Vec::new();
        space.attach("clock", Clock { in_steps, times }).unwrap()
    };
    let ids = kinds.map(attach);
    let refuses = space.attach(
        "last",
        Script {
            answers: vec![(2, refused)],
            ..script("last", &Said::default())
        },
    );
    refuses.unwrap();
    let before = Instant::now();
    space.insert(region(4)).unwrap_err();
    // Attached, told, put back.
    let times = |at: usize| {
        let times = space.with_listener(&ids[at], |clock| clock.times.clone());
        <[_; 3]>::try_from(times.unwrap()).unwrap()
    };
    let took = |[_, begins, ends]: [Instant; 3]| ends - begins;
    let clocks: [[[Instant; 3]; 3]; 7] = std::array::from_fn(times);
    let told = clocks.map(|clock| clock[1]);
    let since = |at: usize| told[at][0];
    // Neighbours begin at the same time, which is that of the change.
    assert_eq!(since(0), since(1));
    assert!(since(0) >= before);
    // What the third one takes is left out, and what the first two have taken is not.
    assert!(since(3) - since(0) >= took(told[2]));
    let counted = told[3][1] - since(3);
    assert!(counted >= took(told[0]), "{counted:?}");
    let left_out = took(told[2]) + took(told[4]) + took(told[5]);
    assert!(since(6) - since(0) >= left_out);
    let counted = told[6][1] - since(6);
    assert!(counted >= took(told[0]) + took(told[3]), "{counted:?}");
    // Undoing has its own time, and goes the other way.
    let undone = clocks.map(|clock| clock[2]);
    assert!(undone[6][0] >= told[6][2]);
    assert!(undone[3][0] - undone[6][0] >= took(undone[4]) + took(undone[5]));
    assert_eq!(undone[0][0], undone[1][0]);
}

#[test]
fn a_moment_that_has_passed_is_not_waited_for() {
    let (space, log) = (space(), Said::default());
    let ids = attach(&space, &log, [("a", true), ("b", true)]);
    let line = Line::event();
    // It is called again and again, while the other waits for it.
    tell_by(
        &space,
        &ids[0],
        vec![Wait::Past, Wait::Past],
        vec![line.clone()],
    );
    tell_by(&space, &ids[1], vec![Wait::Word(line)], Vec::new());
    space.insert(region(4)).told_all();
    assert_eq!(lines(&log)[2..], ["a[0, 4]", "b[0, 4]"]);
}

#[test]
fn hundreds_are_told_side_by_side_and_put_back() {
    const COUNT: usize = 300;
    if !may_have_descriptors(4096) {
        return;
    }
    let (space, log) = (space(), Said::default());
    let ids = attach(&space, &log, std::iter::repeat_n(("one", true), COUNT));
    // Each waits for the one after it, the last one for nothing.
    let lines: Vec<Line> = (1..COUNT).map(|_| Line::event()).collect();
    for (at, id) in ids.iter().enumerate() {
        let waits = lines.get(at).cloned().map(Wait::Word);
        let says = at.checked_sub(1).map(|before| lines[before].clone());
        tell_by(
            &space,
            id,
            waits.into_iter().collect(),
            says.into_iter().collect(),
        );
    }
    space.insert(region(4)).told_all();
    assert_eq!(said(&log).len(), 2 * COUNT);
    let refuse = |script: &mut Script| script.answers = vec![(script.updates + 1, refused)];
    space.with_listener(&ids[COUNT / 2], refuse).unwrap();
    space.remove((GuestAddress(4 * MIB), MIB)).unwrap_err();
    assert_eq!(said(&log).len(), 4 * COUNT);
    for id in &ids {
        assert_eq!(held(&space, id, all), [0, 4]);
    }
    space.remove((GuestAddress(4 * MIB), MIB)).told_all();
    assert!(
        space
            .listeners()
            .unwrap()
            .iter()
            .all(|one| one.stale().is_none())
    );
}
