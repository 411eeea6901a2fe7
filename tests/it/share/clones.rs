//! Another user of the connection, which must have no request under way meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::sync::mpsc;
use std::thread::JoinHandle;

use guest_memory_shm::MemoryListener;
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
        if clone.add_mem_region(&region).is_ok() {
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
    done.expect("it waited for a lock")
}

#[test]
fn a_change_waits_for_no_lock_of_the_frontend() {
    for acks in [true, false] {
        let builder = MockDaemon::builder();
        let peer = Peer::start(match acks {
            true => builder,
            false => builder.without_reply_ack(),
        });
        let (share, vmm) = peer.share();
        let space = AddressSpace::new(memory(&[0]));
        let id = space.attach("blk", share.with_deadline(LIMIT)).unwrap();

        let waits = wait_on_clone(&peer, &vmm.frontend, acks);
        let (report, share) = in_time(&peer, move || {
            let report = space.insert(regions(&[10]).remove(0));
            // Neither does its end wait.
            let share = space.detach(id).unwrap();
            let reason = share.broken().map(ToString::to_string);
            drop(share);
            (report.unwrap(), reason)
        });
        assert_eq!(report.stale()[0].name(), "blk");
        let reason = share.unwrap();
        assert!(reason.contains("within 200ms"), "{reason}");
        waits.join().unwrap();
    }
}

/// The answer to a GET_QUEUE_NUM that another user of the connection is to have sent.
fn answer_to_another(mut daemon: &UnixStream) {
    let header = [17, 1 | 4, 8].map(u32::to_ne_bytes);
    daemon.write_all(header.as_flattened()).unwrap();
    daemon.write_all(&1_u64.to_ne_bytes()).unwrap();
}

#[test]
fn an_answer_to_somebody_elses_request_breaks_the_share_and_says_so() {
    for features in [Features::REPLY_ACK, Features::empty()] {
        let (ours, mut daemon) = UnixStream::pair().unwrap();
        let mut other = ours.try_clone().unwrap();
        let share = VhostUserShare::new(ours, features).unwrap();
        let mut share = share.with_deadline(PATIENCE);
        let memory = memory(&[0]);
        let now = Instant::now();
        let mut exchange = share.begin_update(&memory, now).unwrap();
        assert!(exchange.advance(now).is_none());
        answer_to_another(&daemon);
        assert!(exchange.advance(now).unwrap().is_err());
        drop(exchange);
        let error = share.broken().unwrap();
        assert!(matches!(error.failure(), Some(DaemonFailure::Protocol(_))));
        let text = "the answer to request 17, which another user of the connection made, or one \
                    that came twice: no other request may be under way meanwhile";
        assert!(support::chain(error).contains(text), "{error:?}");

        // It says no more, and the connection is its owner's.
        other.write_all(b"still here").unwrap();
        drop((other, share));
        let mut said = Vec::new();
        daemon.read_to_end(&mut said).unwrap();
        assert!(said.ends_with(b"still here"));
    }
}

/// Its request timed out, and the answer comes when nobody waits for it.
#[test]
fn an_answer_that_somebody_else_gave_up_waiting_for_passes_for_none_of_ours() {
    for features in [Features::REPLY_ACK, Features::empty()] {
        let (ours, mut daemon) = UnixStream::pair().unwrap();
        let share = VhostUserShare::new(ours, features).unwrap();
        let mut share = share.with_deadline(PATIENCE);
        answer_to_another(&daemon);
        let error = share.update_memory(&memory(&[0])).unwrap_err();
        let broken = share.broken().unwrap().to_string();
        assert!(matches!(error.failure(), Some(DaemonFailure::Protocol(_))));
        assert_eq!(broken, error.to_string());
        let text = "there is an answer that nothing asked for";
        assert!(support::chain(&error).contains(text), "{error:?}");
        // Nothing was sent, and what was there is there: the end is a reset because of it.
        drop(share);
        let mut said = Vec::new();
        let end = daemon.read_to_end(&mut said).unwrap_err();
        assert_eq!(end.kind(), ErrorKind::ConnectionReset);
        assert!(said.is_empty());
    }
}
