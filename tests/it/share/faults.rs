//! Each misbehaviour of the mock, as the share's owner meets it.

use super::*;

const FAULTS: [Fault; 5] = [
    Fault::Refuse,
    Fault::NeverAnswer,
    Fault::HangUpBefore,
    Fault::HangUpAfter,
    Fault::AnswerThenHangUp,
];

/// Lets a daemon that offers all, one or none of the two features play `fault` at the first change
/// and at later ones, and checks everything about it.
fn play(fault: Fault, builder: &MockDaemonBuilder, acks: bool, slots: bool) {
    let first = memory(&[0]);
    let more = with(&first, &[1]);
    // Each is one change, so that it is known which change meets the fault.
    let updates = match slots {
        true => [
            (&first, "add the region 0x0..=0xfffff (1 MiB)"),
            (&more, "add the region 0x100000..=0x1fffff (1 MiB)"),
            (&first, "remove the region 0x100000..=0x1fffff (1 MiB)"),
        ],
        false => [
            (&first, "take a memory table of 1 region"),
            (&more, "take a memory table of 2 regions"),
            (&first, "take a memory table of 1 region"),
        ],
    };
    for failing in 0..updates.len() {
        let change = failing as u64 + 1;
        let peer = Peer::start(builder.clone().with_fault(change, fault));
        let (mut share, _) = peer.share();
        for (memory, _) in &updates[..failing] {
            share.update_table(&memory.memory_table()).unwrap();
        }
        if fault == Fault::NeverAnswer {
            share = share.with_deadline(Duration::from_millis(100));
        }
        let before = share.table().clone();
        let (memory, text) = updates[failing];
        let error = share.update_table(&memory.memory_table()).unwrap_err();
        let case = format!("{fault:?} at {change}, acks {acks}, slots {slots}: {error:?}");
        match fault {
            Fault::Refuse if acks => {
                assert!(
                    matches!(error.failure(), Some(DaemonFailure::Refused(_))),
                    "{case}"
                );
            }
            Fault::NeverAnswer => {
                assert!(
                    matches!(error.failure(), Some(DaemonFailure::Silent(_))),
                    "{case}"
                );
            }
            _ => assert!(
                matches!(error.failure(), Some(DaemonFailure::HungUp(_))),
                "{case}"
            ),
        }
        assert!(error.to_string().contains(text), "{error}");
        if fault == Fault::NeverAnswer {
            // On a busy machine the limit can be over before the daemon has read the change.
            peer.daemon.wait_disconnected(PATIENCE).unwrap();
        }
        assert_eq!(peer.daemon.pending_faults(), 0, "{case}");
        if fault == Fault::Refuse && acks && slots {
            assert!(!error.to_string().contains("given up"), "{error}");
            survives(&peer, share, &before, &updates.map(|(memory, _)| memory));
            continue;
        }
        assert_eq!(share.broken().unwrap().to_string(), error.to_string());
        if !slots {
            let acknowledged = acks && fault == Fault::AnswerThenHangUp;
            let held = if acknowledged {
                &memory.memory_table()
            } else {
                &before
            };
            assert_eq!(share.table(), held, "{case}");
        }

        peer.daemon.clear_requests();
        for (memory, _) in updates {
            let refused = share.update_table(&memory.memory_table()).unwrap_err();
            assert!(matches!(refused, ShareError::Broken { .. }), "{refused}");
        }
        assert_eq!(peer.daemon.requests(), [], "a broken share sends nothing");

        // It serves one frontend at a time: the one before has gone.
        drop(share);
        let (mut share, _) = peer.share();
        share.update_table(&more.memory_table()).unwrap();
        peer.holds(&more.memory_table());
    }
}

/// A share whose daemon refused a region and stayed: both hold what they held, and it goes on.
fn survives(
    peer: &Peer,
    mut share: VhostUserShare,
    before: &MemoryTable,
    next: &[&GuestMemoryShm],
) {
    assert!(share.broken().is_none());
    assert_eq!(share.table(), before);
    peer.holds(before);
    for memory in next {
        share.update_table(&memory.memory_table()).unwrap();
        assert_eq!(share.table(), &memory.memory_table());
        peer.holds(&memory.memory_table());
    }
    assert!(peer.daemon.is_connected());
}

fn play_all() {
    for fault in FAULTS {
        for (acks, slots) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut builder = MockDaemon::builder();
            if !acks {
                builder = builder.without_reply_ack();
            }
            if !slots {
                builder = builder.without_mem_slots();
            }
            play(fault, &builder, acks, slots);
        }
    }
}

#[test]
fn each_misbehaviour_has_its_error_and_breaks_the_share_unless_what_is_held_is_known() {
    play_all();
}

/// How many descriptors and threads this process has.
fn counts() -> (usize, usize) {
    let count = |path| fs::read_dir(path).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

#[test]
fn misbehaviour_leaves_no_descriptor_and_no_thread() {
    in_own_process(|| {
        // What is made once stays: the second time counts.
        play_all();
        let before = counts();
        play_all();
        // The kernel forgets a thread a moment after it was joined.
        let deadline = Instant::now() + PATIENCE;
        while counts() != before && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!(counts(), before);
        // The counts count.
        let _held = (
            File::open("/dev/null").unwrap(),
            Peer::start(MockDaemon::builder()),
        );
        let now = counts();
        assert!(
            now.0 >= before.0 + 2 && now.1 > before.1,
            "{before:?} {now:?}"
        );
    });
}

#[test]
fn a_child_may_drop_what_its_parent_goes_on_using() {
    in_own_process(|| {
        let memory = memory(&[0, 1, 2]);
        let daemon = MockDaemon::builder().start_unnamed().unwrap();
        let (frontend, features) = agree(daemon.connect().unwrap(), Features::all()).unwrap();
        let mut share = VhostUserShare::new(&frontend, features).unwrap();
        share
            .update_table(&without(&memory, &[2]).memory_table())
            .unwrap();
        let mut parts = Some((share, daemon));
        assert_eq!(dies_of(|| drop(parts.take())), None);
        let (mut share, daemon) = parts.expect("only the child took them");
        share.update_table(&memory.memory_table()).unwrap();
        assert_eq!(daemon.table().len(), 3);
    });
}

#[test]
fn a_share_goes_on_over_a_new_connection_after_each_misbehaviour() {
    for fault in FAULTS {
        let peer = Peer::start(MockDaemon::builder().with_fault(2, fault));
        let (mut share, _) = peer.share();
        let memory = memory(&[0, 1, 2]);
        // Not under the limit: it answers this.
        share
            .update_table(&without(&memory, &[1, 2]).memory_table())
            .unwrap();
        if fault == Fault::NeverAnswer {
            share = share.with_deadline(Duration::from_millis(100));
        }
        assert!(share.update_table(&memory.memory_table()).is_err());
        if fault == Fault::Refuse {
            // It is there, and holds the others: what was under way, too.
            assert!(share.broken().is_none());
            share.update_table(&memory.memory_table()).unwrap();
            peer.holds(&memory.memory_table());
            continue;
        }
        // The daemon serves one frontend at a time: nobody has the old connection any more.
        peer.connect().reconnect(&mut share);
        assert!(share.broken().is_none());
        let mut share = share.with_deadline(PATIENCE);
        share.update_table(&memory.memory_table()).unwrap();
        peer.holds(&memory.memory_table());
        share
            .update_table(&without(&memory, &[1]).memory_table())
            .unwrap();
        peer.holds(&without(&memory, &[1]).memory_table());
    }
}

#[test]
fn a_late_answer_within_the_limit_is_waited_for() {
    let delay = Duration::from_millis(150);
    for builder in [
        MockDaemon::builder(),
        MockDaemon::builder().without_reply_ack(),
    ] {
        let peer = Peer::start(builder.with_fault(1, Fault::AnswerLate(delay)));
        let (mut share, _) = peer.share();
        let memory = memory(&[0, 1]);
        let start = Instant::now();
        share.update_table(&memory.memory_table()).unwrap();
        assert!(start.elapsed() >= delay);
        peer.holds(&memory.memory_table());
        assert_eq!(peer.daemon.pending_faults(), 0);
    }
}

#[test]
fn an_answer_after_the_limit_is_too_late() {
    let hour = Duration::from_secs(3600);
    let peer = Peer::start(MockDaemon::builder().with_fault(1, Fault::AnswerLate(hour)));
    let (share, _) = peer.share();
    let mut share = share.with_deadline(Duration::from_millis(100));
    let late = share
        .update_table(&memory(&[0]).memory_table())
        .unwrap_err();
    assert!(
        matches!(late.failure(), Some(DaemonFailure::Silent(_))),
        "{late}"
    );
    assert!(late.to_string().contains("within 100ms"), "{late}");
    // It hung up, so that the answer is never taken for another one's.
    peer.daemon.wait_disconnected(PATIENCE).unwrap();
}

#[test]
fn after_a_hang_up_the_whole_present_table_is_sent_anew() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = peer.share();
    let first = memory(&[0, 1]);
    share.update_table(&first.memory_table()).unwrap();
    peer.daemon.hang_up();
    peer.daemon.wait_disconnected(PATIENCE).unwrap();
    let now = with(&first, &[2, 3, 4, 5, 6, 7, 8, 9]);
    let lost = share.update_table(&now.memory_table()).unwrap_err();
    assert!(
        matches!(lost.failure(), Some(DaemonFailure::HungUp(_))),
        "{lost}"
    );

    peer.daemon.clear_requests();
    peer.connect().reconnect(&mut share);
    assert_eq!(share.table(), &MemoryTable::default());
    share.update_table(&now.memory_table()).unwrap();
    peer.holds(&now.memory_table());
}

#[test]
fn a_refusal_amid_many_changes_leaves_what_was_acknowledged_and_the_way_back() {
    // Two regions go and three come: each of the five changes is refused once.
    let first = memory(&[0, 1, 2]);
    let second = without(&with(&first, &[3, 4, 5]), &[1, 2]);
    for refused in 1..=5 {
        let peer = Peer::start(MockDaemon::builder());
        let (mut share, _) = peer.share();
        share.update_table(&first.memory_table()).unwrap();
        peer.daemon.inject(refused, Fault::Refuse);
        share.update_table(&second.memory_table()).unwrap_err();
        peer.holds(share.table());
        // Back, as an owner does who wants all of a change or nothing, and then forth.
        for memory in [&first, &second] {
            share.update_table(&memory.memory_table()).unwrap();
            peer.holds(&memory.memory_table());
        }
    }
}
