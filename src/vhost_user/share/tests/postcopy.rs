//! Bases that a daemon returns while postcopy listens: told, and acknowledged.

use super::Said::{AckBases, Add, Barrier, Slots};
use super::*;

/// What a handler of bases was told; addresses in MiB.
type Told = Arc<Mutex<Vec<(u64, u64)>>>;

fn listening(features: Features) -> (VhostUserShare, Daemon, Told) {
    let (share, daemon) = share(features);
    let told = Told::default();
    let tell = Arc::clone(&told);
    let mut share = share.with_base_handler(move |range, base| {
        tell.lock()
            .unwrap()
            .push((range.start_addr().0 >> 20, base));
    });
    share.set_postcopy(true);
    daemon.script().base = Some(7);
    (share, daemon, told)
}

#[test]
fn a_daemon_that_goes_before_its_acknowledgement_breaks_the_share() {
    for (features, at) in [(SLOTS | ACK, 4), (SLOTS, 4), (ACK, 1)] {
        let (mut share, daemon, told) = listening(features);
        daemon.fail(at, Way::HangUp);
        let gone = share.update_table(&table(&[1, 4]));
        assert_failed!(gone, DaemonFailure::HungUp(_));
        assert_eq!(daemon.said().pop(), Some(AckBases));
        assert!(share.broken().is_some());
        // It has mapped what it returned the bases of.
        assert_eq!(told.lock().unwrap().len(), 2);
        assert_eq!(starts(share.table()), [1, 4]);
    }
}

#[test]
fn the_handler_stays_when_the_daemon_is_connected_to_anew_and_postcopy_does_not() {
    let (mut share, _first, told) = listening(SLOTS | ACK);
    share.update_table(&table(&[1])).unwrap();
    let second = reconnect(&mut share, SLOTS | ACK);
    share.update_table(&table(&[1])).unwrap();
    assert_eq!(second.said(), [Slots, Add(1), Barrier]);
    share.set_postcopy(true);
    second.script().base = Some(70);
    share.update_table(&table(&[1])).unwrap();
    assert_eq!(*told.lock().unwrap(), [(1, 7), (1, 70)]);
}

#[test]
fn a_handler_that_panics_breaks_the_share_before_anything_else_is_said() {
    let (share, daemon, _) = listening(SLOTS | ACK);
    let mut share = share.with_base_handler(|_, _| panic!("a handler's bug"));
    for _ in 0..2 {
        let broken = share.update_table(&table(&[1])).unwrap_err();
        assert!(matches!(broken, ShareError::Broken { .. }), "{broken}");
    }
    let reason = share.broken().unwrap().to_string();
    assert_eq!(reason, "the handler of bases panicked");
    assert_eq!(daemon.said(), [Slots, Add(1)]);
}

#[test]
fn bases_that_were_not_expected_fail_the_change_and_say_what_to_call() {
    for features in [SLOTS | ACK, ACK] {
        let (mut share, daemon, told) = listening(features);
        share.set_postcopy(false);
        let failed = share.update_table(&table(&[3]));
        assert_failed!(failed, DaemonFailure::NoPostcopy);
        assert!(share.broken().unwrap().to_string().contains("set_postcopy"));
        assert!(told.lock().unwrap().is_empty());
        assert!(!daemon.said().contains(&AckBases));
    }
}

/// With its handler, too.
const _: fn() = || {
    fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<VhostUserShare>();
};
