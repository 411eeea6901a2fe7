//! Each misbehaviour, as the frontend meets it and as the daemon's table shows it.

use super::*;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;
use vhost::vhost_user::VhostUserFrontend;

/// A daemon with one region in its table, and a second region to add.
struct Setup {
    memory: GuestMemoryMmap,
    daemon: MockDaemon,
    frontend: Frontend,
}

impl Setup {
    fn new(builder: MockDaemonBuilder) -> Setup {
        let memory = guest(&[(0, 1 << 20), (1 << 30, 1 << 16)]);
        let daemon = builder.start_unnamed().unwrap();
        let (mut frontend, _) = negotiated(&daemon);
        frontend.add_mem_region(&infos(&memory)[0]).unwrap();
        frontend.get_features().unwrap();
        Setup {
            memory,
            daemon,
            frontend,
        }
    }

    fn add(&mut self) -> vhost::Result<()> {
        self.frontend
            .add_mem_region(&infos(&self.memory)[1])
            .map(drop)
    }

    /// How many regions the daemon holds, checked against the memory.
    fn held(&self) -> usize {
        let table = self.daemon.table();
        assert_eq!(table, expected_table(&self.memory)[..table.len()]);
        table.len()
    }
}

#[test]
fn a_refused_change_is_not_applied_and_the_connection_stays() {
    let mut setup = Setup::new(MockDaemon::builder().with_fault(2, Fault::Refuse));
    let error = setup.add().unwrap_err();
    assert!(
        error.to_string().contains("backend internal error"),
        "{error}"
    );
    assert_eq!(setup.held(), 1);
    assert_eq!(setup.daemon.pending_faults(), 0);
    setup.add().unwrap();
    assert_eq!(setup.held(), 2);
    // Removals and whole tables are changes too.
    setup.daemon.inject(2, Fault::Refuse);
    let regions = infos(&setup.memory);
    setup.frontend.set_mem_table(&regions).unwrap();
    assert!(setup.frontend.remove_mem_region(&regions[1]).is_err());
    assert_eq!(setup.held(), 2);
    setup.daemon.inject(1, Fault::Refuse);
    assert!(setup.frontend.set_mem_table(&regions[..1]).is_err());
    assert_eq!(setup.held(), 2);
    assert!(setup.daemon.is_connected());
}

#[test]
fn without_acknowledgements_a_refusal_is_a_hang_up() {
    let mut setup = Setup::new(MockDaemon::builder().without_reply_ack());
    setup.daemon.inject(1, Fault::Refuse);
    setup.add().unwrap();
    assert!(setup.frontend.get_features().is_err());
    setup.daemon.wait_disconnected(LIMIT).unwrap();
    assert_eq!(setup.held(), 1);
}

#[test]
fn a_late_answer_comes_after_the_change_was_applied() {
    let delay = Duration::from_millis(200);
    for builder in [
        MockDaemon::builder(),
        MockDaemon::builder().without_reply_ack(),
    ] {
        let mut setup = Setup::new(builder);
        setup.daemon.inject(1, Fault::AnswerLate(delay));
        let start = Instant::now();
        setup.add().unwrap();
        setup.frontend.get_features().unwrap();
        assert!(start.elapsed() >= delay, "{:?}", start.elapsed());
        assert_eq!(setup.held(), 2);
    }
}

#[test]
fn a_front_end_that_leaves_ends_the_wait_for_a_late_answer() {
    let mut setup = Setup::new(MockDaemon::builder().without_reply_ack());
    setup
        .daemon
        .inject(1, Fault::AnswerLate(Duration::from_secs(3600)));
    setup.add().unwrap();
    let Setup {
        daemon, frontend, ..
    } = setup;
    drop(frontend);
    daemon.wait_disconnected(LIMIT).unwrap();
    assert_eq!(daemon.table().len(), 2);
}

#[test]
fn a_silent_daemon_answers_nothing_until_it_hangs_up() {
    let mut setup = Setup::new(MockDaemon::builder());
    setup.daemon.inject(1, Fault::NeverAnswer);
    setup.daemon.clear_requests();
    let (sender, answer) = mpsc::channel();
    let mut frontend = setup.frontend.clone();
    let region = infos(&setup.memory)[1];
    let waiting = thread::spawn(move || {
        let result = frontend.add_mem_region(&region).map(drop);
        sender.send(result).unwrap();
    });
    setup.daemon.wait_requests(1, LIMIT).unwrap();
    assert!(answer.recv_timeout(Duration::from_millis(100)).is_err());
    assert_eq!(setup.held(), 1);
    assert!(setup.daemon.is_connected());
    setup.daemon.hang_up();
    assert!(answer.recv_timeout(LIMIT).unwrap().is_err());
    waiting.join().unwrap();
    setup.daemon.wait_disconnected(LIMIT).unwrap();
    assert!(setup.add().is_err());
}

#[test]
fn a_daemon_that_hangs_up_before_applied_nothing() {
    let mut setup = Setup::new(MockDaemon::builder());
    setup.daemon.inject(1, Fault::HangUpBefore);
    assert!(setup.add().is_err());
    setup.daemon.wait_disconnected(LIMIT).unwrap();
    assert_eq!(setup.held(), 1);
}

#[test]
fn a_daemon_that_hangs_up_after_applied_the_change() {
    for builder in [
        MockDaemon::builder(),
        MockDaemon::builder().without_reply_ack(),
    ] {
        let mut setup = Setup::new(builder);
        setup.daemon.inject(1, Fault::HangUpAfter);
        let added = setup.add();
        assert!(added.is_err() || setup.frontend.get_features().is_err());
        setup.daemon.wait_disconnected(LIMIT).unwrap();
        assert_eq!(setup.held(), 2);
    }
}

#[test]
fn a_daemon_may_say_done_apply_nothing_and_hang_up() {
    let mut setup = Setup::new(MockDaemon::builder());
    setup.daemon.inject(1, Fault::AnswerThenHangUp);
    setup.add().unwrap();
    assert!(setup.frontend.get_features().is_err());
    setup.daemon.wait_disconnected(LIMIT).unwrap();
    assert_eq!(setup.held(), 1);
}

#[test]
fn a_change_that_the_daemon_cannot_apply_is_refused_by_itself() {
    // No fault: the second region overlaps the first, and vhost-user-backend hangs up after its
    // answer, as it does after every error.
    let memory = guest(&[(0, 1 << 20)]);
    let overlapping = guest(&[(0x8000, 1 << 20)]);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (mut frontend, _) = negotiated(&daemon);
    frontend.add_mem_region(&infos(&memory)[0]).unwrap();
    assert!(frontend.add_mem_region(&infos(&overlapping)[0]).is_err());
    daemon.wait_disconnected(LIMIT).unwrap();
    assert_eq!(daemon.table(), expected_table(&memory));
}

/// More than a bit for each page up to the end of the second region.
const LOG: u64 = 64 << 10;

/// A file that can be a dirty log of both regions.
fn log_region(log: &std::fs::File) -> vhost::VhostUserDirtyLogRegion {
    vhost::VhostUserDirtyLogRegion {
        mmap_size: LOG,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(log),
    }
}

#[test]
fn a_fault_at_a_log_leaves_changes_alone_and_may_show_after_the_log_was_taken() {
    use std::os::unix::fs::FileExt;
    for (kind, taken) in [
        (Fault::Refuse, false),
        (Fault::HangUpBefore, false),
        (Fault::HangUpAfter, true),
        (Fault::AnswerNonsense, true),
    ] {
        let mut setup = Setup::new(MockDaemon::builder());
        setup.daemon.inject_at_log(1, kind);
        setup.add().unwrap();
        let writer = setup.daemon.writer().unwrap();
        let log = memfd(LOG);
        setup
            .frontend
            .set_log_base(0, Some(log_region(&log)))
            .unwrap_err();
        assert_eq!(setup.daemon.pending_faults(), 0);
        // Also when the connection is over.
        setup.daemon.hang_up();
        setup.daemon.wait_disconnected(LIMIT).unwrap();
        assert!(setup.daemon.writer().is_none());
        assert!(writer.write(GuestAddress(0x5000)));
        let mut bits = [0];
        log.read_exact_at(&mut bits, 0).unwrap();
        assert_eq!(bits[0], u8::from(taken) << 5, "{kind:?}");
    }
}

#[test]
fn a_daemon_may_apply_a_change_and_say_nothing_or_nonsense() {
    for kind in [Fault::NeverAnswerAfter, Fault::AnswerNonsense] {
        let setup = Setup::new(MockDaemon::builder());
        let frozen = setup.daemon.writer().unwrap().frozen();
        let writer = setup.daemon.writer().unwrap();
        setup.daemon.inject(1, kind);
        let frontend = setup.frontend.clone();
        let region = infos(&setup.memory)[1];
        let adds = thread::spawn(move || {
            let mut frontend = frontend;
            frontend.add_mem_region(&region).unwrap_err();
        });
        let deadline = Instant::now() + LIMIT;
        while setup.held() < 2 && Instant::now() < deadline {
            thread::yield_now();
        }
        assert!(writer.write(GuestAddress(1 << 30)), "{kind:?}");
        assert!(!frozen.write(GuestAddress(1 << 30)));
        setup.daemon.hang_up();
        adds.join().unwrap();
    }
}

#[test]
fn an_answer_that_comes_twice_is_met_by_the_next_request() {
    let mut setup = Setup::new(MockDaemon::builder());
    setup.daemon.inject(1, Fault::AnswerTwice);
    setup.add().unwrap();
    assert_eq!(setup.held(), 2);
    assert!(setup.frontend.get_features().is_err());
    assert!(setup.daemon.is_connected());
}

#[test]
fn an_answer_to_another_request_takes_the_place_of_the_right_one() {
    let mut setup = Setup::new(MockDaemon::builder());
    setup.daemon.inject(1, Fault::AnswerOther);
    assert!(setup.add().is_err());
    assert_eq!(setup.held(), 2);
    assert!(setup.daemon.is_connected());
}

#[test]
fn a_daemon_hangs_up_within_its_answer() {
    let mut setup = Setup::new(MockDaemon::builder());
    setup.daemon.inject(1, Fault::HangUpWithinAnswer);
    assert!(setup.add().is_err());
    setup.daemon.wait_disconnected(LIMIT).unwrap();
    assert_eq!(setup.held(), 2);
}
