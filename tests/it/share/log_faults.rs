//! Daemons that log, and whose answers to the log never come.

use std::collections::BTreeSet;
use std::sync::Mutex;

use guest_memory_shm::mock::MockWriter;

use super::log::{PAGE, drain, logging, pages};
use super::relay::{SET_LOG_BASE, relay};
use super::*;

const LIMIT: Duration = Duration::from_millis(500);

/// A daemon that logs, and what writes as it does.
fn logging_writer(peer: &Peer) -> (VhostUserShare, MockWriter) {
    let (mut share, _) = logging(peer);
    share = share.with_deadline(LIMIT);
    (share, peer.daemon.writer().unwrap())
}

/// Has the daemon write to the page at this address.
#[track_caller]
fn write(writer: &MockWriter, at: u64) -> u64 {
    assert!(writer.write(GuestAddress(at)), "it does not map {at:#x}");
    at / PAGE
}

fn reconnect(peer: &Peer, share: &mut VhostUserShare, to: &GuestMemoryShm) -> MockWriter {
    peer.daemon.hang_up();
    peer.daemon.wait_disconnected(PATIENCE).unwrap();
    peer.connect_also(Features::LOG_SHMFD).reconnect(share);
    share.update_memory(to).unwrap();
    peer.daemon.writer().unwrap()
}

#[test]
fn what_a_daemon_notes_in_a_log_that_it_never_answers_is_harvested_before_and_after_reconnecting()
{
    for builder in [
        MockDaemon::builder(),
        MockDaemon::builder().without_mem_slots(),
    ] {
        for kind in [
            Fault::HangUpAfter,
            Fault::NeverAnswerAfter,
            Fault::AnswerNonsense,
        ] {
            let (small, large) = (memory(&[0, 10]), memory(&[0, 10, 300]));
            // The log that goes before a table that grows, and the one after a table that shrinks.
            for (from, to) in [(&small, &large), (&large, &small)] {
                let peer = Peer::start(builder.clone());
                let (mut share, writer) = logging_writer(&peer);
                share.update_memory(from).unwrap();
                share.start_log().unwrap();
                let before = write(&writer, 10 * MIB);
                peer.daemon.inject_at_log(1, kind);
                share.update_memory(to).unwrap_err();
                assert_eq!(peer.daemon.pending_faults(), 0);

                let noted = write(&writer, 10 * MIB + PAGE);
                let dirty = drain(&mut share);
                assert!(
                    dirty.contains(&before) && dirty.contains(&noted),
                    "{dirty:?}"
                );
                // It does not know yet that it was hung up on; nor that there is a new one.
                let later = write(&writer, 10 * MIB + 2 * PAGE);
                let now = reconnect(&peer, &mut share, to);
                let after = write(&writer, 10 * MIB + 3 * PAGE);
                let by_the_new = write(&now, 10 * MIB + 4 * PAGE);
                let dirty = drain(&mut share);
                let all = BTreeSet::from([later, after, by_the_new]);
                assert!(dirty.is_superset(&all), "{kind:?}: {all:?} {dirty:?}");
                let last = write(&writer, 10 * MIB + 5 * PAGE);
                assert!(pages(&share.stop_log().dirty).contains(&last));
            }
        }
    }
}

#[test]
fn nothing_is_dirty_that_was_not_written_when_the_log_before_a_table_fails() {
    let peer = Peer::start(MockDaemon::builder().without_mem_slots());
    let (mut share, writer) = logging_writer(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    share.start_log().unwrap();
    let noted = write(&writer, 10 * MIB);
    peer.daemon.inject_at_log(1, Fault::HangUpAfter);
    share.update_memory(&with(&first, &[300])).unwrap_err();
    assert_eq!(drain(&mut share), BTreeSet::from([noted]));
    assert_eq!(drain(&mut share), BTreeSet::new());
}

#[test]
fn what_a_daemon_holds_without_logging_counts_when_it_ends_and_again_when_the_log_stops() {
    let peer = Peer::start(MockDaemon::builder().without_mem_slots());
    let (mut share, writer) = logging_writer(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    share.start_log().unwrap();
    // The log after the table: it has all regions anew, and none of them is logged.
    peer.daemon.inject_at_log(2, Fault::HangUpBefore);
    share.update_memory(&with(&first, &[20])).unwrap_err();
    let unlogged = [0, 10, 20].map(|start| write(&writer, start * MIB + 7 * PAGE));
    let dirty = drain(&mut share);
    assert!(dirty.is_superset(&unlogged.into()), "{dirty:?}");
    assert_eq!(
        drain(&mut share),
        BTreeSet::new(),
        "each harvest would be whole"
    );

    write(&writer, 20 * MIB);
    let stopped = share.stop_log();
    assert!(pages(&stopped.dirty).contains(&(20 * MIB / PAGE)));
    assert_eq!(stopped.former_daemons.len(), 1);
}

#[test]
fn a_daemon_that_was_hung_up_on_is_named_once_with_its_process_and_the_reason() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = logging_writer(&peer);
    let first = memory(&[0]);
    share.update_memory(&first).unwrap();
    share.start_log().unwrap();
    for fault in [Fault::NeverAnswer, Fault::HangUpBefore, Fault::NeverAnswer] {
        peer.daemon.inject(1, fault);
        share.update_memory(&with(&first, &[10])).unwrap_err();
        reconnect(&peer, &mut share, &first);
    }
    let stopped = share.stop_log();
    let [daemon] = &stopped.former_daemons[..] else {
        panic!("{stopped:?}");
    };
    // This one.
    assert_eq!(daemon.process, Some(std::process::id()));
    assert!(daemon.reason.contains("within 500ms"), "{daemon}");

    // A log that starts anew has nothing to say of those before it.
    share.start_log().unwrap();
    assert_eq!(share.stop_log().former_daemons, []);
}

#[test]
fn one_that_could_reach_no_ram_and_one_that_goes_on_are_not_named() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = logging_writer(&peer);
    share.start_log().unwrap();
    peer.daemon.inject_at_log(1, Fault::HangUpBefore);
    share.update_memory(&memory(&[0])).unwrap_err();
    reconnect(&peer, &mut share, &memory(&[0]));
    assert_eq!(share.stop_log().former_daemons, []);
}

#[test]
fn one_that_was_replaced_while_it_was_well_is_named() {
    let (first, second) = (
        Peer::start(MockDaemon::builder()),
        Peer::start(MockDaemon::builder()),
    );
    let (mut share, writer) = logging_writer(&first);
    let memory = memory(&[0]);
    share.update_memory(&memory).unwrap();
    share.start_log().unwrap();
    reconnect(&second, &mut share, &memory);
    let noted = write(&writer, PAGE);
    let stopped = share.stop_log();
    assert!(pages(&stopped.dirty).contains(&noted));
    let reason = &stopped.former_daemons[0].reason;
    assert_eq!(reason, "another connection took its place");
}

#[test]
fn a_process_that_is_dead_is_not_named_and_one_that_is_stopped_is() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [0x42; 65536]).unwrap();
    for dies in [true, false] {
        let Some(mut daemon) = StorageDaemon::start(&image, None) else {
            return;
        };
        let stream = UnixStream::connect(&daemon.socket).unwrap();
        let vmm = Vmm::negotiate_also(stream, Features::LOG_SHMFD);
        let mut share = vmm.share().with_deadline(LIMIT);
        let first = memory(&[0]);
        share.update_memory(&first).unwrap();
        share.start_log().unwrap();
        match dies {
            true => daemon.process.kill(),
            false => daemon.process.stop(),
        }
        share.update_memory(&with(&first, &[10])).unwrap_err();
        let named: Vec<_> = share
            .stop_log()
            .former_daemons
            .iter()
            .map(|former| former.process)
            .collect();
        match dies {
            true => assert_eq!(named, []),
            false => assert_eq!(named, [Some(daemon.process.0.id())]),
        }
        drop(daemon);
        let _ = fs::remove_file(image.with_extension("sock"));
    }
}

#[test]
fn a_daemon_may_make_the_log_longer_and_none_can_make_it_shorter() {
    let peer = Peer::start(MockDaemon::builder());
    let daemon = UnixStream::connect(peer.daemon.path().unwrap()).unwrap();
    let logs = Arc::new(Mutex::new(Vec::new()));
    let sent = Arc::clone(&logs);
    let (stream, relay) = relay(daemon, move |request, file| {
        if request == SET_LOG_BASE {
            let file = file.expect("it comes with the log");
            sent.lock().unwrap().push(file.try_clone().unwrap());
        }
    });
    let vmm = Vmm::negotiate_also(stream, Features::LOG_SHMFD);
    let mut share = vmm.share();
    let first = memory(&[0]);
    share.update_memory(&first).unwrap();
    share.start_log().unwrap();
    logs.lock().unwrap()[0].set_len(1 << 30).unwrap();
    share.update_memory(&with(&first, &[1000])).unwrap();
    drop((share, vmm));
    relay.join().unwrap();
    let logs = logs.lock().unwrap();
    let inode = |file: &File| file.metadata().unwrap().ino();
    assert!(logs.len() > 2 && logs.iter().all(|log| inode(log) == inode(&logs[0])));
    assert_eq!(logs[0].metadata().unwrap().len(), 1 << 30);
    logs[0].set_len(0).unwrap_err();
}

#[test]
fn a_daemon_that_hangs_up_right_after_its_answer_did_not_take_the_log() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = logging_writer(&peer);
    let first = memory(&[0]);
    share.update_memory(&first).unwrap();
    peer.daemon.inject_at_log(1, Fault::AnswerThenHangUp);
    let gone = share.start_log().unwrap_err();
    assert!(
        matches!(gone.failure(), Some(DaemonFailure::HungUp(_))),
        "{gone}"
    );
    assert!(!share.is_logging());

    reconnect(&peer, &mut share, &first);
    share.start_log().unwrap();
    // The one after the table.
    peer.daemon.inject_at_log(2, Fault::AnswerThenHangUp);
    let gone = share.update_memory(&with(&first, &[10])).unwrap_err();
    assert!(
        matches!(gone.failure(), Some(DaemonFailure::HungUp(_))),
        "{gone}"
    );
    let named = share.stop_log();
    assert_eq!(named.former_daemons.len(), 1);
}
