//! Which messages are sent, in which order, and what is refused before.

use super::Said::{Add, Barrier, Remove, Set, Slots};
use super::*;

#[test]
fn only_the_difference_is_sent_and_a_question_shows_that_it_was_taken() {
    let (set, more) = (Set(vec![0, 2]), Set(vec![2, 3, 5]));
    for (features, first, second) in [
        (
            SLOTS | ACK,
            vec![Slots, Add(0), Add(2), Barrier],
            vec![Remove(0), Add(3), Add(5), Barrier],
        ),
        (
            SLOTS,
            vec![Slots, Add(0), Barrier, Add(2), Barrier],
            vec![Remove(0), Barrier, Add(3), Barrier, Add(5), Barrier],
        ),
        (ACK, vec![set.clone(), Barrier], vec![more.clone(), Barrier]),
        (Features::empty(), vec![set, Barrier], vec![more, Barrier]),
    ] {
        let (mut share, daemon) = share(features);
        share.update_table(&table(&[0, 2])).unwrap();
        assert_eq!(daemon.said(), first);
        let mut next = share.table().clone();
        next.remove(&next.regions()[0].clone());
        table(&[3, 5])
            .regions()
            .iter()
            .for_each(|new| next.insert(new));
        share.update_table(&next).unwrap();
        assert_eq!(daemon.said(), second);
        share.update_table(&next).unwrap();
        assert_eq!(daemon.said(), []);
    }
}

#[test]
fn a_check_asks_for_the_slots_once_and_what_is_too_much_is_not_sent() {
    let (mut share, daemon) = share(SLOTS | ACK);
    share.check_table(&MemoryTable::default()).unwrap();
    assert_eq!(daemon.said(), [], "nothing changes: nothing to ask");
    let nine: Vec<u64> = (0..9).collect();
    share.check_table(&table(&nine[..8])).unwrap();
    for _ in 0..2 {
        let refused = share.update_table(&table(&nine));
        assert!(matches!(refused, Err(ShareError::Table(_))));
    }
    assert_eq!(daemon.said(), [Slots]);
    assert!(share.broken().is_none());

    let daemon = reconnect(&mut share, SLOTS | ACK);
    daemon.fail(0, Way::HangUp);
    assert_failed!(share.check_table(&table(&[0])), DaemonFailure::HungUp(_));
    let broken = share.check_table(&MemoryTable::default());
    assert!(matches!(broken, Err(ShareError::Broken { .. })));
}
