//! Bases that a daemon returns while postcopy listens: told, and acknowledged.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::range::GuestRange;

fn listening(features: Features) -> (VhostUserShare<Script>, Told) {
    let told = Told::default();
    let tell = Arc::clone(&told);
    let mut share = share(8, features).with_base_handler(move |range, base| {
        let start = range.start_addr().0 >> 20;
        tell.lock().unwrap().push((start, base));
    });
    share.connection_mut().base = Some(7);
    (share, told)
}

fn range(start: u64) -> GuestRange {
    table(&[start]).regions()[0].range()
}

fn add(start: u64) -> Said {
    Said::AckBases(DaemonRequest::AddRegion(range(start)))
}

fn set(regions: usize) -> Said {
    Said::AckBases(DaemonRequest::SetTable(regions))
}

#[test]
fn each_answer_with_bases_is_acknowledged_by_the_very_next_message() {
    use Said::*;
    let cases = [
        (
            SLOTS | ACK,
            vec![Acks, Slots, Add(1), add(1), Add(4), add(4), Barrier],
            vec![Remove(1), Add(6), add(6), Barrier],
            vec![(6, 7)],
        ),
        (
            SLOTS,
            vec![Slots, Add(1), add(1), Barrier, Add(4), add(4), Barrier],
            vec![Remove(1), Barrier, Add(6), add(6), Barrier],
            vec![(6, 7)],
        ),
        (
            ACK,
            vec![Acks, Set(vec![1, 4]), set(2), Barrier],
            vec![Set(vec![4, 6]), set(2), Barrier],
            vec![(4, 7), (6, 8)],
        ),
        (
            Features::empty(),
            vec![Set(vec![1, 4]), set(2), Barrier],
            vec![Set(vec![4, 6]), set(2), Barrier],
            vec![(4, 7), (6, 8)],
        ),
    ];
    for (features, first, second, mapped) in cases {
        let (mut share, told) = listening(features);
        share.update_table(&table(&[1, 4])).unwrap();
        assert_eq!(share.connection().said, first);
        assert_eq!(told.lock().unwrap().len(), 2);

        share.connection_mut().said.clear();
        told.lock().unwrap().clear();
        let mut next = share.table().clone();
        next.remove(&share.table().regions()[0].clone());
        next.insert(&table(&[6]).regions()[0]);
        share.update_table(&next).unwrap();
        assert_eq!(share.connection().said, second);
        assert_eq!(*told.lock().unwrap(), mapped);
    }
}

#[test]
fn without_bases_nothing_is_acknowledged_and_the_handler_hears_nothing() {
    for features in [SLOTS | ACK, ACK] {
        let (mut share, told) = listening(features);
        share.connection_mut().base = None;
        share.update_table(&table(&[1, 4])).unwrap();
        let said = &share.connection().said;
        assert!(!said.iter().any(|said| matches!(said, Said::AckBases(_))));
        assert_eq!(*told.lock().unwrap(), []);
    }
}

#[test]
fn the_handler_knows_each_base_before_it_is_acknowledged() {
    for (features, at_acks) in [(SLOTS | ACK, vec![1, 2, 3]), (ACK, vec![3])] {
        let (mut share, told) = listening(features);
        share.connection_mut().told = told;
        share.update_table(&table(&[0, 1, 2])).unwrap();
        assert_eq!(share.connection().told_at_acks, at_acks);
    }
}

#[test]
fn fewer_or_more_bases_than_regions_break_the_share() {
    for bases in [1, 3] {
        let (mut share, _) = listening(ACK);
        share.connection_mut().bases = Some(bases);
        let wrong = share.update_table(&table(&[0, 1])).unwrap_err();
        assert!(
            matches!(wrong.failure(), Some(DaemonFailure::Protocol(_))),
            "{wrong}"
        );
        let said = share.connection().said.last();
        assert!(
            matches!(said, Some(Said::Set(_))),
            "nothing is acknowledged"
        );
        assert!(share.broken().is_some());
    }
}

#[test]
fn a_failed_acknowledgement_breaks_the_share() {
    for (features, at) in [(SLOTS | ACK, 4), (SLOTS, 5), (ACK, 1)] {
        let (mut share, told) = listening(features);
        share.connection_mut().fail = Some((at, || DaemonFailure::hung_up("gone")));
        let failed = share.update_table(&table(&[1, 4])).unwrap_err();
        assert!(
            matches!(failed.failure(), Some(DaemonFailure::HungUp(_))),
            "{failed}"
        );
        assert!(matches!(
            share.connection().said.last(),
            Some(Said::AckBases(_))
        ));
        assert!(share.broken().is_some());
        assert_eq!(told.lock().unwrap().len(), 2);
        // The daemon has mapped what it returned the bases of.
        assert_eq!(starts(share.table()), [1, 4]);
        assert!(matches!(
            share.update_table(&table(&[1])),
            Err(ShareError::Broken { .. })
        ));
    }
}

#[test]
fn the_handler_stays_when_the_daemon_is_connected_to_anew() {
    let (mut share, told) = listening(SLOTS | ACK);
    let wanted = table(&[1]);
    share.update_table(&wanted).unwrap();
    let fresh = Script {
        slots: 8,
        base: Some(70),
        ..Script::default()
    };
    let _ = share.reconnect(fresh, SLOTS | ACK);
    share.update_table(&wanted).unwrap();
    assert_eq!(*told.lock().unwrap(), [(1, 7), (1, 70)]);
}

#[test]
fn a_handler_that_panics_breaks_the_share_before_anything_else_is_said() {
    let mut share = share(8, SLOTS | ACK).with_base_handler(|_, _| panic!("a handler's bug"));
    share.connection_mut().base = Some(7);
    let update = catch_unwind(AssertUnwindSafe(|| share.update_table(&table(&[1]))));
    assert!(update.is_err());
    assert_eq!(share.connection().said.last(), Some(&Said::Add(1)));
    assert_eq!(
        share.broken().unwrap().to_string(),
        "the handler of bases panicked"
    );
    let said = share.connection().said.len();
    share.update_table(&table(&[1])).unwrap_err();
    assert_eq!(share.connection().said.len(), said);
}

#[test]
fn a_connection_that_cannot_acknowledge_fails_the_change() {
    use DaemonFailure::NoPostcopy;
    let whole = DaemonRequest::SetTable(1);
    for (features, step) in [
        (SLOTS | ACK, DaemonRequest::AddRegion(range(3))),
        (SLOTS, DaemonRequest::AddRegion(range(3))),
        (ACK, whole),
        (Features::empty(), whole),
    ] {
        let mut share = VhostUserShare::new(Plain(Some(7)), features);
        let failed = share.update_table(&table(&[3])).unwrap_err();
        assert!(
            matches!(
                failed,
                ShareError::Daemon { request, failure: NoPostcopy } if request == step
            ),
            "{failed}"
        );
        assert!(failed.to_string().contains("feature postcopy"), "{failed}");
        assert!(share.broken().is_some());
    }
}

#[test]
fn a_share_with_a_handler_is_shown_sent_and_shared_between_threads() {
    fn is_send_and_sync<T: Send + Sync>(_: &T) {}
    let (share, _) = listening(ACK);
    is_send_and_sync(&share);
    assert!(format!("{share:?}").contains("base_handler: Some(..)"));
    let without = super::share(8, ACK);
    assert!(format!("{without:?}").contains("base_handler: None"));
}
