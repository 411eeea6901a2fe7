//! Refusals and failures: what both sides hold after them, and how it goes on.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::range::GuestRange;

/// Two updates, with a log from between them if the daemon can have one.
fn exchange(
    share: &mut VhostUserShare<Script>,
    first: &MemoryTable,
    second: &MemoryTable,
) -> Result<()> {
    share.update_table(first)?;
    if share.log_shmfd {
        share.start_log()?;
    }
    share.update_table(second).map(drop)
}

#[test]
fn a_failure_at_any_step_breaks_the_share_until_it_is_connected_anew() {
    type Make = fn() -> DaemonFailure;
    let ways: [(Make, &str); 3] = [
        (|| DaemonFailure::refused("no"), "refused"),
        (|| DaemonFailure::hung_up("gone"), "hung up"),
        (
            || DaemonFailure::protocol("what"),
            "does not fit the protocol",
        ),
    ];
    let log = Features::LOG_SHMFD;
    let plain = [SLOTS | ACK, SLOTS, ACK, Features::empty()];
    for features in plain
        .into_iter()
        .chain(plain.map(|features| features | log))
    {
        // How many messages a good exchange takes.
        let (first, second) = (table(&[0, 2]), table(&[2, 3]));
        let mut good = share(8, features);
        exchange(&mut good, &first, &second).unwrap();
        let steps = good
            .connection()
            .said
            .iter()
            .filter(|said| **said != Said::Acks)
            .count();

        for (make, word) in ways {
            for step in 0..steps {
                let mut share = share(8, features);
                share.connection_mut().fail = Some((step, make));
                let error = exchange(&mut share, &first, &second)
                    .unwrap_err()
                    .to_string();
                assert!(error.contains(word), "{error}");
                let said = share.connection().said.clone();
                let said: Vec<_> = said.iter().filter(|said| **said != Said::Acks).collect();
                if word == "refused"
                    && matches!(said[step], Said::Add(_) | Said::Remove(_) | Said::Log(_))
                {
                    // The one failure that tells what the daemon holds, and it is still there.
                    assert!(share.broken().is_none());
                    assert_eq!(said[step + 1], &Said::Barrier);
                    assert_eq!(starts(share.table()), share.connection().held);
                    share.update_table(&second).unwrap();
                    assert_eq!(share.connection().held, [2, 3]);
                    assert_eq!(share.table(), &second);
                    continue;
                }
                assert_eq!(share.broken().unwrap().to_string(), error);

                let said = share.connection().said.len();
                assert!(matches!(
                    share.update_table(&first),
                    Err(ShareError::Broken { .. })
                ));
                assert_eq!(
                    share.connection().said.len(),
                    said,
                    "a broken share sends nothing"
                );

                let fresh = Script {
                    slots: 8,
                    ..Script::default()
                };
                let _ = share.reconnect(fresh, features);
                assert_eq!(share.update_table(&second).unwrap().added, 2);
                assert!(share.broken().is_none());
                assert_eq!(share.table(), &second);
                let said = &share.connection().said;
                let last = said.iter().rfind(|said| **said != Said::Barrier);
                assert_eq!(matches!(last, Some(Said::Log(_))), share.is_logging());
            }
        }
    }
}

#[test]
fn what_was_acknowledged_before_a_failure_is_known() {
    let mut share = share(8, SLOTS | ACK);
    share.connection_mut().fail = Some((2, || DaemonFailure::refused("no")));
    assert!(matches!(
        share.update_table(&table(&[0, 2])),
        Err(ShareError::Daemon { request: DaemonRequest::AddRegion(range), .. })
            if range.start_addr() == GuestAddress(2 << 20)
    ));
    assert_eq!(starts(share.table()), [0]);
}

#[test]
fn a_refusal_followed_by_silence_breaks_the_share() {
    let mut share = share(8, SLOTS | ACK);
    share.connection_mut().leaves = true;
    // The second region, after GET_MAX_MEM_SLOTS and the first.
    share.connection_mut().fail = Some((2, || DaemonFailure::refused("no")));
    let refused = share.update_table(&table(&[0, 2])).unwrap_err();
    assert!(
        matches!(refused.failure(), Some(DaemonFailure::Refused(_))),
        "{refused}"
    );
    assert_eq!(share.broken().unwrap().to_string(), refused.to_string());
}

#[test]
fn a_refused_whole_table_breaks_the_share_unless_the_connection_says_it_keeps_the_old_one() {
    for keeps_table in [false, true] {
        let mut share = share(0, Features::empty());
        share.connection_mut().keeps_table = keeps_table;
        share.update_table(&table(&[0, 2])).unwrap();
        let steps = share.connection().said.len();
        share.connection_mut().fail = Some((steps, || DaemonFailure::refused("no")));
        let refused = share.update_table(&table(&[4])).unwrap_err();
        assert!(
            matches!(refused.failure(), Some(DaemonFailure::Refused(_))),
            "{refused}"
        );
        assert_eq!(share.broken().is_none(), keeps_table);
        assert_eq!(starts(share.table()), [0, 2]);
        assert_eq!(share.update_table(&table(&[4])).is_ok(), keeps_table);
    }
}

#[test]
fn a_refused_log_fails_the_update_and_is_sent_by_the_next() {
    use Said::*;
    // A word is 64 pages, so a region of 1 MiB needs 4 of them.
    let (first, second) = (table(&[0]), table(&[0, 2]));
    for features in [SLOTS | ACK, ACK] {
        let features = features | Features::LOG_SHMFD;
        let good = {
            let mut share = share(8, features);
            share.update_table(&first).unwrap();
            share.start_log().unwrap();
            share.connection_mut().said.clear();
            share.update_table(&second).unwrap();
            share.into_connection().said
        };
        let logs = good
            .iter()
            .enumerate()
            .filter(|(_, said)| **said == Log(12));
        let places: Vec<usize> = logs.map(|(at, _)| at).collect();
        assert_eq!(places.len(), 2, "{good:?}");
        for at in places {
            let mut share = share(8, features);
            share.update_table(&first).unwrap();
            share.start_log().unwrap();
            share.connection_mut().said.clear();
            share.connection_mut().fail = Some((at, || DaemonFailure::refused("no")));
            let refused = share.update_table(&second).unwrap_err();
            let text = "refused to take a dirty log of 96 bytes";
            assert!(refused.to_string().contains(text), "{refused}");
            assert!(share.broken().is_none());
            // Before the table it stands in its way, after it it does not undo it.
            let held = if at == 0 { &first } else { &second };
            assert_eq!(share.table(), held);
            // Without it nothing says what is written to these regions, which are all new.
            let unlogged: &[u64] = if at == 0 { &[] } else { &[0, 2] };
            for _ in 0..2 {
                assert_eq!(starts_of(&share.drain_dirty()), unlogged, "in each harvest");
            }

            share.connection_mut().said.clear();
            share.connection_mut().fail = None;
            share.update_table(&second).unwrap();
            assert_eq!(share.table(), &second);
            assert_eq!(
                share
                    .connection()
                    .said
                    .iter()
                    .rfind(|said| **said != Barrier),
                Some(&Log(12))
            );
            share.connection_mut().said.clear();
            share.update_table(&second).unwrap();
            assert_eq!(share.connection().said, []);
            let dirty = share.drain_dirty();
            assert!(
                unlogged.iter().all(|at| starts_of(&dirty).contains(at)),
                "until it came"
            );
            assert_eq!(share.drain_dirty(), []);
        }
    }
}

/// Where the ranges start, in MiB.
fn starts_of(ranges: &[GuestRange]) -> Vec<u64> {
    let starts = ranges.iter().map(|range| range.start_addr().0 >> 20);
    starts.collect()
}

#[test]
fn a_log_that_does_not_start_leaves_nothing_behind() {
    let mut share = share(8, SLOTS | ACK | Features::LOG_SHMFD);
    share.update_table(&table(&[0])).unwrap();
    share.connection_mut().said.clear();
    share.connection_mut().fail = Some((0, || DaemonFailure::refused("no")));
    share.start_log().unwrap_err();
    assert!(!share.is_logging());
    assert!(share.broken().is_none());
    share.connection_mut().fail = None;
    share.start_log().unwrap();
    assert!(share.is_logging());
}

#[test]
fn a_connection_without_logs_refuses_them() {
    let mut share = VhostUserShare::new(Plain(None), ACK | Features::LOG_SHMFD);
    share.update_table(&table(&[0])).unwrap();
    let refused = share.start_log().unwrap_err();
    assert!(
        matches!(refused.failure(), Some(DaemonFailure::Refused(_))),
        "{refused}"
    );
    assert!(!share.is_logging() && share.broken().is_none());
    share.update_table(&table(&[1])).unwrap();
}

/// What passed before the panic is not known: the share must not go on as if nothing had.
#[test]
fn a_connection_that_panics_breaks_the_share() {
    let mut share = share(8, SLOTS | ACK);
    share.update_table(&table(&[0])).unwrap();
    let said = share.connection().said.len();
    share.connection_mut().fail = Some((said - 1, || panic!("a connection's bug")));
    let wanted = table(&[0, 2]);
    let update = catch_unwind(AssertUnwindSafe(|| share.update_table(&wanted)));
    assert!(update.is_err());
    assert_eq!(
        share.broken().unwrap().to_string(),
        "the code of the connection panicked"
    );
    assert_eq!(share.connection().said.len(), said + 1);
    let refused = share.update_table(&wanted).unwrap_err();
    assert!(matches!(refused, ShareError::Broken { .. }), "{refused}");
    assert_eq!(share.connection().said.len(), said + 1);
}
