//! Refusals and failures: what both sides hold after them, and how it goes on.

use super::*;

/// Two updates, with a log from between them if the daemon can have one.
fn exchange(share: &mut VhostUserShare, first: &MemoryTable, second: &MemoryTable) -> Result<()> {
    share.update_table(first)?;
    if share.log_shmfd {
        share.start_log()?;
    }
    share.update_table(second).map(drop)
}

#[test]
fn a_failure_at_any_message_breaks_the_share_until_it_is_connected_anew() {
    let plain = [SLOTS | ACK, SLOTS, ACK, Features::empty()];
    let with_log = plain.map(|features| features | LOG);
    for features in plain.into_iter().chain(with_log) {
        // Which messages a good exchange takes.
        let (first, second) = (table(&[0, 2]), table(&[2, 3]));
        let (mut good, daemon) = share(features);
        exchange(&mut good, &first, &second).unwrap();
        for (at, message) in daemon.said().iter().enumerate() {
            let is_change = matches!(message, Said::Add(_) | Said::Remove(_) | Said::Set(_));
            let refuses = is_change && features.contains(ACK);
            for (way, word, can) in [
                (Way::Refuse, "refused", refuses),
                (Way::HangUp, "hung up", true),
                (Way::AnswerToAnother, "does not fit", refuses || !is_change),
            ] {
                if !can {
                    continue;
                }
                let (mut share, daemon) = share(features);
                daemon.fail(at, way);
                let error = exchange(&mut share, &first, &second).unwrap_err();
                assert!(error.to_string().contains(word), "{message:?}: {error}");
                if way == Way::Refuse && !matches!(message, Said::Set(_)) {
                    // The one failure that tells what the daemon holds, and it is still there.
                    assert!(daemon.script().held.iter().eq(&starts(share.table())));
                    share.update_table(&second).unwrap();
                    assert!(daemon.script().held.iter().eq(&[2, 3]));
                    continue;
                }
                let broken = share.update_table(&first).unwrap_err();
                assert!(broken.to_string().contains(&error.to_string()), "{broken}");
                // It has let go of the connection.
                daemon.thread.join().unwrap();

                let fresh = reconnect(&mut share, features);
                share.update_table(&second).unwrap();
                let said = fresh.said();
                let last = said.iter().rfind(|said| **said != Said::Barrier);
                assert_eq!(last == Some(&Said::Log), share.is_logging());
            }
        }
    }
}

#[test]
fn what_was_acknowledged_around_a_refusal_is_known() {
    let (mut share, daemon) = share(SLOTS | ACK);
    daemon.fail(2, Way::Refuse);
    let refused = share.update_table(&table(&[0, 2, 4])).unwrap_err();
    assert!(matches!(
        refused,
        ShareError::Daemon { request: DaemonRequest::AddRegion(range), .. }
            if range.start_addr() == GuestAddress(2 << 20)
    ));
    assert_eq!(starts(share.table()), [0, 4]);
    // No region is sent in the place of one that the daemon keeps.
    daemon.said();
    daemon.fail(0, Way::Refuse);
    share.update_table(&table(&[4])).unwrap_err();
    let said = [Said::Remove(4), Said::Remove(0), Said::Barrier];
    assert_eq!(daemon.said(), said);
    assert_eq!(starts(share.table()), [4]);
}

#[test]
fn a_refusal_followed_by_a_hang_up_breaks_the_share_and_is_the_reason() {
    let (mut share, daemon) = share(SLOTS | ACK);
    daemon.fail(2, Way::Refuse);
    daemon.fail(3, Way::HangUp);
    let refused = share.update_table(&table(&[0, 2]));
    assert_failed!(refused, DaemonFailure::Refused(_));
    assert_eq!(daemon.said().pop(), Some(Said::Barrier));
    let reason = share.broken().and_then(ShareError::failure);
    assert!(matches!(reason, Some(DaemonFailure::Refused(_))));
}
