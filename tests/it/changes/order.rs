//! Changes: their order, what readers see, who lags and who refuses.

use std::time::{Duration, Instant};

use super::*;

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
    // c may hold a part of what it refused.
    assert_eq!(
        lines(&log),
        ["a[0, 4]", "b[0, 4]", "c[0, 4]", "c[0]", "b[0]", "a[0]"]
    );
    assert_eq!(present(&space), [0]);
    for id in [&a, &b, &c, &d] {
        assert_eq!(held(&space, id, all), [0]);
    }
    assert_eq!(
        chain(&error),
        "nothing was changed: listener \"c\" refuses the region 0x400000..=0x4fffff (1 MiB): no \
         room"
    );

    space.insert(region(4)).told_all();
    assert_eq!(present(&space), [0, 4]);
    for id in [a, b, c, d] {
        assert_eq!(held(&space, &id, all), [0, 4]);
    }
}

#[test]
fn all_are_asked_before_any_is_told() {
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
        readers: Some(space.published()),
        answers: vec![(4, refused), (7, refused)],
        ..script("a", &log)
    };
    space.attach("a", watching).unwrap();
    space.insert(region(4)).told_all();
    space.remove((GuestAddress(4 * MIB), MIB)).told_all();
    // Refused, and undone.
    space.insert(region(4)).unwrap_err();
    space.insert(region(4)).told_all();
    space.remove((GuestAddress(4 * MIB), MIB)).unwrap_err();
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
        readers: Some(space.published()),
        ..script("a", &log)
    };
    space.attach("a", watching).unwrap();
    said(&log);
    let report = space
        .transaction()
        .insert(region(0))
        .insert(region(2))
        .remove((GuestAddress(0), MIB))
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
    // What is impossible is found before any listener is told.
    let twice = space.transaction().insert(region(9)).insert(region(9));
    assert!(matches!(
        twice.commit(),
        Err(AddressSpaceError::Memory(MemoryError::Range(
            InvalidRange::Overlap { .. }
        )))
    ));
    // Whichever of them is lower, the text says which is there.
    let over = GuestRegionShm::new((GuestAddress(MIB), 2 * MIB), &RamOptions::new());
    let error = space.insert(over.unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "guest range 0x100000..=0x2fffff (2 MiB) overlaps 0x200000..=0x2fffff (1 MiB), which is \
         there already: move or shorten it, or remove what is there first"
    );
    let gone = space
        .transaction()
        .insert(region(9))
        .remove((GuestAddress(5 * MIB), MIB));
    assert!(matches!(
        gone.commit(),
        Err(AddressSpaceError::Memory(MemoryError::NoSuchRegion { .. }))
    ));
    let twice = space
        .transaction()
        .remove((GuestAddress(0), MIB))
        .remove((GuestAddress(0), MIB));
    assert!(matches!(
        twice.commit(),
        Err(AddressSpaceError::Memory(MemoryError::NoSuchRegion {
            found: None,
            ..
        }))
    ));
    assert_eq!(said(&log), []);
    assert_eq!(present(&space), [0, 2]);
}

#[test]
fn removing_many_regions_costs_no_more_than_inserting_them() {
    const COUNT: u64 = 2000;
    let ranges: Vec<_> = (0..COUNT)
        .map(|at| (GuestAddress(at * 0x3000), 0x1000))
        .collect();
    let builder = GuestMemoryShm::<()>::builder().add_ram(RamOptions::new(), ranges.clone());
    let space = AddressSpace::new(builder.build().unwrap());
    let round = |_| {
        let start = Instant::now();
        let report = ranges
            .iter()
            .rev()
            .fold(space.transaction(), |change, range| change.remove(*range))
            .commit();
        let removing = start.elapsed();
        let removed = report.unwrap().into_removed();
        assert!(
            removed
                .iter()
                .map(|region| region.range().start_addr())
                .eq(ranges.iter().rev().map(|range| range.0))
        );
        let start = Instant::now();
        let change = removed
            .into_iter()
            .fold(space.transaction(), Transaction::insert);
        change.commit().told_all();
        (removing, start.elapsed())
    };
    let rounds: Vec<_> = (0..5).map(round).collect();
    // One at a time takes hundreds of times as long: each makes an index.
    let best = |of: fn(&(Duration, Duration)) -> Duration| rounds.iter().map(of).min().unwrap();
    let (removing, inserting) = (best(|round| round.0), best(|round| round.1));
    assert!(removing < 20 * inserting, "{removing:?} {inserting:?}");
    assert_eq!(space.published().memory().num_regions(), COUNT as usize);
}

#[test]
fn who_is_away_lags_or_stops_everything() {
    let both = both_ways().into_iter();
    for (told, stops) in both.flat_map(|told| [(told.clone(), false), (told, true)]) {
        let (space, log) = (space(), Said::default());
        let a = space.attach("a", script("a", &log)).unwrap();
        let dying = Script {
            // To put it back is tried, too.
            answers: if stops {
                vec![(2, away), (3, away)]
            } else {
                vec![(2, away)]
            },
            told: told.clone(),
            ..script("b", &log)
        };
        let b = attach_as(&space, "b", stops, dying).unwrap();
        let c = space.attach("c", script("c", &log)).unwrap();
        let done = space.insert(region(4));
        let now: &[u64] = if stops { &[0] } else { &[0, 4] };
        assert_eq!(present(&space), now);
        assert_eq!(held(&space, &a, all), now);
        assert_eq!(held(&space, &c, all), now);
        let status = space.listeners().unwrap().remove(1);
        assert_eq!(status.to_string(), "\"b\" is stale (it died)");
        assert_eq!(status.is_required(), stops);
        let lagging = match done {
            Ok(report) => report.stale().to_vec(),
            Err(AddressSpaceError::Change {
                listener,
                error,
                stale,
                ..
            }) => {
                assert!(error.is_away());
                assert_eq!(
                    (listener.as_str(), error.range()),
                    ("b", Some(region(4).range()))
                );
                stale
            }
            Err(other) => panic!("{other}"),
        };
        assert_eq!(lagging.len(), 1);
        assert!(lagging[0].is(&b));

        // Back, it is told the present memory, by itself or with the next change.
        if stops {
            space.insert(region(4)).told_all();
        } else {
            space.refresh(&b).unwrap();
        }
        assert_eq!(held(&space, &b, all), [0, 4]);
        assert!(space.listeners().unwrap()[1].stale().is_none());
    }
}

#[test]
fn who_cannot_be_put_back_is_stale_until_the_next_change() {
    for told in both_ways() {
        let (space, log) = (space(), Said::default());
        let stuck = Script {
            answers: vec![(3, refused)],
            told: told.clone(),
            ..script("a", &log)
        };
        let a = space.attach("a", stuck).unwrap();
        let refusing = Script {
            answers: vec![(2, refused)],
            told,
            ..script("b", &log)
        };
        space.attach("b", refusing).unwrap();
        let error = space.insert(region(4)).unwrap_err();
        assert!(
            error.to_string().starts_with(
                "nothing was changed, but \"a\" is stale (it could not be put back: no room): \
             listener \"b\""
            ),
            "{error}"
        );
        assert_eq!(held(&space, &a, all), [0, 4]);
        assert_eq!(present(&space), [0]);
        space.insert(region(6)).told_all();
        assert_eq!(held(&space, &a, all), [0, 6]);
        assert!(space.listeners().unwrap()[0].stale().is_none());
    }
}

#[test]
fn an_error_says_what_came_of_it_and_the_way_out() {
    let (space, log) = (space(), Said::default());
    let dying = |name, at| Script {
        answers: vec![(at, away), (at + 1, away)],
        ..script(name, &log)
    };
    let error = space.attach("a", dying("a", 1)).unwrap_err();
    assert_eq!(
        chain(&error),
        "listener \"a\" was not attached because it is away and cannot be told of the memory, \
         and is stale; connect it anew and attach it then: it died"
    );
    let b = space.attach_required("b", dying("b", 2)).unwrap();
    let error = space.refresh(&b).unwrap_err();
    assert_eq!(
        chain(&error),
        "listener \"b\" is stale, and the others were not told anything: it is away and cannot be \
         told of the memory; bring it back (AddressSpace::reconnect_session for a session, \
         reconnect for a share, refresh for any other listener), or detach it: it died"
    );
    space.detach(b).unwrap();
    space.attach_required("c", dying("c", 2)).unwrap();
    let error = space.insert(region(4)).unwrap_err();
    assert_eq!(
        chain(&error),
        "nothing was changed, but \"c\" is stale: listener \"c\" is away and cannot be told of \
         the region 0x400000..=0x4fffff (1 MiB); bring it back (AddressSpace::reconnect_session \
         for a session, reconnect for a share, refresh for any other listener), detach it, or \
         attach it without requiring it (AddressSpace::attach): it died"
    );
    let error = space.remove((GuestAddress(64 * MIB), MIB)).unwrap_err();
    assert!(
        chain(&error).starts_with("no region of 1 MiB starts at"),
        "{error}"
    );
}
