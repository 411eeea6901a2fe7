//! A clone of the frontend in another thread, which waits for a silent daemon with the lock held.

use std::sync::mpsc;
use std::thread::JoinHandle;

use guest_memory_shm::CallDeadline;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::*;

const LIMIT: Duration = Duration::from_millis(200);

/// Has a clone of the frontend wait for an answer, in a thread that ends when it is over.
fn wait_on_clone(peer: &Peer, frontend: &Frontend, acks: bool) -> JoinHandle<()> {
    peer.daemon.clear_requests();
    peer.daemon.inject(1, Fault::NeverAnswer);
    let mut clone = frontend.clone();
    let waits = thread::spawn(move || {
        let memory = memory(&[512]);
        let region: VhostUserMemoryRegionInfo = (&memory.memory_table().regions()[0]).into();
        // Without acknowledgements it is the next message that waits.
        if VhostUserFrontend::add_mem_region(&mut clone, &region).is_ok() {
            clone.get_features().unwrap_err();
        }
    });
    // The message is there, and it holds the lock until there is an answer.
    let messages = if acks { 1 } else { 2 };
    peer.daemon.wait_requests(messages, PATIENCE).unwrap();
    waits
}

/// Does the work in another thread, and sends its result; hangs up if there is none.
fn in_time<T: Send + 'static>(peer: &Peer, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let works = thread::spawn(move || sender.send(work()));
    let done = receiver.recv_timeout(PATIENCE);
    peer.daemon.hang_up();
    works.join().unwrap().unwrap();
    done.expect("it waited without a limit")
}

#[test]
fn a_change_does_not_wait_longer_for_a_clone_that_waits_than_for_the_daemon() {
    for acks in [true, false] {
        let builder = MockDaemon::builder();
        let peer = Peer::start(match acks {
            true => builder,
            false => builder.without_reply_ack(),
        });
        let (frontend, device) = peer.connect();
        let share = VhostUserShare::new(frontend.clone(), device.protocol_features());
        let space = AddressSpace::new(memory(&[0]));
        let id = space.attach("blk", share.with_deadline(LIMIT)).unwrap();

        let waits = wait_on_clone(&peer, &frontend, acks);
        let (report, space) = in_time(&peer, move || {
            (space.insert(regions(&[10]).remove(0)), space)
        });
        assert_eq!(report.unwrap().stale()[0].name(), "blk");
        let broken = space.with_listener(&id, |share| share.broken().map(ShareError::to_string));
        let reason = broken.unwrap().unwrap();
        assert!(reason.contains("within 200ms"), "{reason}");
        waits.join().unwrap();
    }
}

#[test]
fn a_share_that_begins_while_a_clone_waits_fails_in_time() {
    let peer = Peer::start(MockDaemon::builder());
    let (frontend, device) = peer.connect();
    let waits = wait_on_clone(&peer, &frontend, true);
    let late = in_time(&peer, move || {
        let share = VhostUserShare::new(frontend, device.protocol_features());
        let mut share = share.with_deadline(LIMIT);
        let late = share.update_memory(&memory(&[0])).unwrap_err();
        assert!(share.broken().is_some());
        // Neither does its end wait.
        drop(share);
        late
    });
    assert!(
        matches!(late.failure(), Some(DaemonFailure::Silent(_))),
        "{late}"
    );
    waits.join().unwrap();
}

#[test]
fn a_reconnection_to_a_frontend_that_a_clone_waits_on_fails_in_time_and_leaves_the_daemon_away() {
    let (first, second) = (
        Peer::start(MockDaemon::builder()),
        Peer::start(MockDaemon::builder()),
    );
    let space = AddressSpace::new(memory(&[0]));
    let share = first.share().0.with_deadline(LIMIT);
    let id = space.attach("blk", share).unwrap();
    first.daemon.hang_up();
    first.daemon.wait_disconnected(PATIENCE).unwrap();

    let (frontend, device) = second.connect();
    let waits = wait_on_clone(&second, &frontend, true);
    let (again, id, space) = in_time(&second, move || {
        let again = space.reconnect(&id, frontend, device.protocol_features());
        (again.map(drop), id, space)
    });
    let failed = support::chain(&again.unwrap_err());
    assert!(failed.contains("within 200ms"), "{failed}");
    assert!(space.listeners().unwrap()[0].stale().is_some());
    waits.join().unwrap();

    let (frontend, device) = first.connect();
    space
        .reconnect(&id, frontend, device.protocol_features())
        .unwrap();
    first.holds(&memory_of(&space).memory_table());
}

fn memory_of(space: &AddressSpace) -> GuestMemoryShm {
    use vm_memory::GuestAddressSpace;
    GuestMemoryShm::clone(&space.published().memory())
}

#[test]
fn a_deadline_ends_calls_of_clones_too_but_not_those_from_before_it() {
    let peer = Peer::start(MockDaemon::builder());
    let (frontend, _) = peer.connect();
    let mut limit = CallDeadline::new(&frontend, LIMIT);
    // The descriptor is known.
    limit.run(|| ()).unwrap();
    let waits = wait_on_clone(&peer, &frontend, true);
    let late = in_time(&peer, move || limit.run(|| frontend.get_features().is_ok()));
    assert!(is_late(&late));
    waits.join().unwrap();

    let (frontend, _) = peer.connect();
    let waits = wait_on_clone(&peer, &frontend, true);
    let late = in_time(&peer, move || {
        let mut limit = CallDeadline::new(&frontend, LIMIT);
        limit.run(|| unreachable!("nothing could end it"))
    });
    assert!(is_late::<()>(&late));
    waits.join().unwrap();
}

fn is_late<T>(answer: &Result<T, ShareError>) -> bool {
    let error = answer.as_ref().err().and_then(ShareError::failure);
    matches!(error, Some(DaemonFailure::Silent(LIMIT)))
}
