//! Deadlines, on a clock that the test makes up; the daemon answers when it is told to.

use std::time::Instant;

use super::stage::UPDATE;
use super::*;

const LIMIT: Duration = Duration::from_secs(10);
const MOMENT: Duration = Duration::from_nanos(1);

fn pair(features: Features) -> (VhostUserShare, impl FnMut() -> bool) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = Mutex::default();
    let share = VhostUserShare::new(ours, features).unwrap();
    (share.with_deadline(LIMIT), move || serve(&theirs, &script))
}

#[test]
fn all_messages_of_a_change_have_one_deadline() {
    let (mut share, mut answers) = pair(SLOTS);
    let begun = Instant::now();
    let mut update = share.begin(UPDATE, table(&[0, 1, 2]), begun);
    assert!(update.advance(begun).is_none());
    assert_eq!(update.waits_for().until(), begun + LIMIT);
    // An answer long after the other: their times do not add up.
    assert!(answers());
    assert!(update.advance(begun + LIMIT - MOMENT).is_none());
    // An addition and its question: what has come by the deadline counts.
    assert!(answers() && answers());
    let late = update.advance(begun + LIMIT).unwrap();
    assert_failed!(late, DaemonFailure::Silent(LIMIT));
    drop(update);
    assert_eq!(starts(share.table()), [0]);
    assert!(share.broken().unwrap().to_string().contains("within 10s"));
}

#[test]
fn a_daemon_that_has_answered_all_is_not_silent_however_late_that_is_looked_at() {
    for features in [SLOTS, SLOTS | ACK, ACK] {
        let (mut share, mut answers) = pair(features);
        share.slots = Some(8);
        let begun = Instant::now();
        let mut update = share.begin(UPDATE, table(&[0]), begun);
        assert!(update.advance(begun).is_none());
        // The change and its question. Then this process was stopped, or another listener slow.
        assert!(answers() && answers());
        update.advance(begun + 2 * LIMIT).unwrap().unwrap();
        drop(update);
        assert_eq!(starts(share.table()), [0]);
        assert!(share.broken().is_none());
    }
}

#[test]
fn without_any_time_nothing_is_sent() {
    let (share, mut answers) = pair(SLOTS | ACK);
    let mut share = share.with_deadline(Duration::ZERO);
    let silent = share.update_table(&table(&[0]));
    assert_failed!(silent, DaemonFailure::Silent(Duration::ZERO));
    assert!(!answers(), "it hears nothing");
}

#[test]
fn a_daemon_has_more_time_for_what_it_is_newly_told_of() {
    let ranges = [(GuestAddress(0), 1 << 30), (GuestAddress(1 << 32), 1 << 30)];
    let memory = GuestMemoryShm::<()>::from_ranges(&ranges).unwrap();
    let both = memory.memory_table();
    for (features, seconds) in [(SLOTS | ACK, 5), (ACK, 10)] {
        let (mut share, _answers) = pair(features);
        share.held = both.clone();
        share.held.remove(&both.regions()[1]);
        let begun = Instant::now();
        let update = share.begin(UPDATE, both.clone(), begun);
        let deadline = begun + LIMIT + Duration::from_secs(seconds);
        assert_eq!(update.waits_for().until(), deadline);
    }
}

#[test]
fn a_change_that_is_given_up_breaks_the_share() {
    let (mut share, mut answers) = pair(SLOTS | ACK);
    let begun = Instant::now();
    let mut update = share.begin(UPDATE, table(&[0]), begun);
    assert!(update.advance(begun).is_none());
    drop(update);
    let reason = share.broken().unwrap();
    assert!(matches!(reason, ShareError::GivenUp { .. }), "{reason}");
    assert!(answers());
    assert!(!answers(), "it hears nothing more");
}

#[test]
fn a_change_that_is_forgotten_breaks_the_share_at_the_next_one() {
    let (mut share, mut answers) = pair(SLOTS | ACK);
    share.slots = Some(8);
    let begun = Instant::now();
    let mut update = share.begin(UPDATE, table(&[0]), begun);
    assert!(update.advance(begun).is_none());
    std::mem::forget(update);
    // Its answers must not pass for those to the next one.
    assert!(answers() && answers());
    let error = share.update_table(&table(&[1])).unwrap_err();
    assert!(matches!(error, ShareError::Broken { .. }), "{error}");
    let reason = share.broken().unwrap();
    assert!(matches!(reason, ShareError::GivenUp { .. }), "{reason}");
    assert_eq!(starts(share.table()), [0; 0]);
    assert!(!answers(), "it hears nothing more");
}
