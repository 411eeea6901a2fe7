//! Daemons whose connections have ended, and what they write until they die.

use std::process::{Command, Stdio};

use super::*;
use crate::range::GuestRange;

/// Bytes.
fn count(dirty: &[GuestRange]) -> u64 {
    dirty.iter().map(GuestRange::size).sum()
}

#[test]
fn addresses_that_are_mapped_anew_count_as_written() {
    let mut share = share(8, SLOTS | ACK | Features::LOG_SHMFD);
    share.update_table(&table(&[0, 10])).unwrap();
    share.start_log().unwrap();
    assert_eq!(share.drain_dirty(), []);
    // Other RAM at 0; what comes at 20 is not used yet.
    let mut next = share.table().clone();
    next.remove(&next.regions()[0].clone());
    let news = table(&[0, 20]);
    news.regions().iter().for_each(|new| next.insert(new));
    share.update_table(&next).unwrap();
    assert_eq!(share.drain_dirty(), [news.regions()[0].range()]);
    assert_eq!(share.drain_dirty(), []);
}

#[test]
fn what_one_wrote_without_logging_before_it_died_counts_when_its_death_is_known() {
    for is_last in [false, true] {
        let mut daemon = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut share = share(0, Features::REPLY_ACK | Features::LOG_SHMFD);
        share.connection_mut().process = Some(daemon.id());
        share.update_table(&table(&[0, 10])).unwrap();
        share.start_log().unwrap();
        // The log after the table: until it comes a daemon may log nothing at all.
        let gone = || DaemonFailure::hung_up("gone");
        let logs = share.connection().said.len() - 1;
        share.connection_mut().fail = Some((logs + 3, gone));
        let refused = share.update_table(&table(&[0, 20])).unwrap_err();
        assert!(
            matches!(refused.failure(), Some(DaemonFailure::HungUp(_))),
            "{refused}"
        );
        assert!(matches!(share.connection().said.last(), Some(Said::Log(_))));

        let whole = 2 << 20;
        assert_eq!(count(&share.drain_dirty()), whole);
        assert_eq!(count(&share.drain_dirty()), 0, "it lives on");
        // It writes, and then:
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        if !is_last {
            assert_eq!(count(&share.drain_dirty()), whole);
            assert_eq!(count(&share.drain_dirty()), 0, "once");
        }
        let stopped = share.stop_log();
        assert_eq!(count(&stopped.dirty), if is_last { whole } else { 0 });
        assert_eq!(stopped.former_daemons, []);
    }
}
