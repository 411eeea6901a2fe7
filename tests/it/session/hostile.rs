//! Daemons that lie, guests that do not wait, VMMs that make mistakes.

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;

use guest_memory_shm::{MemoryListener, SessionMessage};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::peer::{Peer, Told, number};
use super::*;

fn memory(ranges: &[(GuestAddress, usize)]) -> GuestMemoryShm {
    GuestMemoryShm::from_ranges(ranges).unwrap()
}

fn boot() -> GuestMemoryShm {
    memory(&[(GuestAddress(0), 1 << 20)])
}

/// Eventfds of a ring.
fn events() -> [EventFd; 2] {
    [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap())
}

/// The ring with this number, in a page of its own.
fn ring(index: u32, [kick, call]: &[EventFd; 2]) -> SessionRing {
    let page = 0x1000 * (u64::from(index) + 1);
    let parts = [0, 0x400, 0x800].map(|offset| GuestAddress(page + offset));
    SessionRing::new(16, parts, kick, call).unwrap()
}

/// Goes on until all is done.
fn steps(session: &mut VhostUserSession, memory: &GuestMemoryShm) -> Result<(), SessionError> {
    while !session.reconnect_in_steps(memory)? {
        super::steps::Wait::of(&session.waits_for()).pass();
    }
    Ok(())
}

/// A daemon with so many rings.
fn with_rings(count: u64, features: Features) -> (Peer, UnixStream) {
    Peer::new(features | Features::MQ, move |told| {
        told.is(FrontendReq::GET_QUEUE_NUM).then(|| number(count))
    })
}

/// Runs this on a thread of its own, which has to end.
fn ends<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, ended) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    ended.recv_timeout(PATIENCE).expect("it hangs")
}

#[test]
fn many_rings_are_started_again_by_a_daemon_that_acknowledges_nothing() {
    const RINGS: u32 = 40;
    let (_peer, socket) = with_rings(RINGS.into(), Features::empty());
    let options = options().with_device_in_order();
    let mut session = VhostUserSession::on_socket(socket, options).unwrap();
    let boot = boot();
    session.update_memory(&boot).unwrap();
    let events = events();
    for index in 0..RINGS {
        session.start_ring(index, ring(index, &events)).unwrap();
    }
    let (peer, socket) = with_rings(RINGS.into(), Features::empty());
    session.reconnect_on(socket);
    session.update_memory(&boot).unwrap();
    let kicks = peer.take_all(FrontendReq::SET_VRING_KICK);
    assert_eq!(kicks.len(), RINGS as usize);
}

#[test]
fn a_ring_that_a_descriptors_message_cannot_name_is_refused() {
    let (peer, socket) = with_rings(u64::MAX, Features::empty());
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&boot()).unwrap();
    peer.take();
    let events = events();
    let refused = session.start_ring(256, ring(3, &events)).unwrap_err();
    assert!(
        matches!(refused, SessionError::NoSuchRing { .. }),
        "{refused}"
    );
    assert!(peer.take().is_empty());
    assert_eq!(session.rings(), 256);
    session.start_ring(255, ring(3, &events)).unwrap();
}

#[test]
fn a_daemon_with_fewer_rings_than_run_is_refused() {
    let (_peer, socket) = with_rings(4, Features::empty());
    let options = options().with_device_in_order();
    let mut session = VhostUserSession::on_socket(socket, options).unwrap();
    let boot = boot();
    session.update_memory(&boot).unwrap();
    let events = events();
    session.start_ring(3, ring(3, &events)).unwrap();
    let (peer, socket) = with_rings(2, Features::empty());
    session.reconnect_on(socket);
    let refused = session.update_memory(&boot).unwrap_err();
    let text = refused.to_string();
    assert_eq!(text, "there is no ring 3: the daemon has 2");
    assert!(peer.take_all(FrontendReq::SET_VRING_NUM).is_empty());
    assert!(session.broken().is_some());
}

#[test]
fn steps_take_no_memory_away_that_a_ring_lies_in() {
    let (peer, socket) = Peer::new(Features::REPLY_ACK, |_| None);
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&boot()).unwrap();
    let events = events();
    session.start_ring(0, ring(0, &events)).unwrap();
    peer.take();
    let without = memory(&[(PLUG, 1 << 20)]);
    let refused = steps(&mut session, &without).unwrap_err();
    assert!(
        matches!(refused, SessionError::RingNotShared { .. }),
        "{refused}"
    );
    assert!(peer.take().is_empty());
    assert!(session.broken().is_none(), "it serves its ring");
}

#[test]
fn a_daemon_keeps_its_connection_if_it_cannot_take_a_memory() {
    let features = Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS;
    let (_peer, socket) = Peer::new(features, |told| {
        told.is(FrontendReq::GET_MAX_MEM_SLOTS).then(|| number(2))
    });
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    let boot = boot();
    session.update_memory(&boot).unwrap();
    session.start_ring(0, ring(0, &events())).unwrap();
    let plugs = (0..2).map(|at| Arc::new(region(GuestAddress(PLUG.0 + at * MIB))));
    let all = boot.arc_regions().into_iter().chain(plugs).collect();
    let many = GuestMemoryShm::from_arc_regions(all).unwrap();
    let refused = steps(&mut session, &many).unwrap_err();
    assert!(
        chain(&refused).contains("has 2 memory slots"),
        "{}",
        chain(&refused)
    );
    assert!(session.broken().is_none(), "it serves its ring");
    steps(&mut session, &boot).unwrap();
}

#[test]
fn a_byte_that_nothing_asked_for_does_not_hide_that_a_daemon_is_gone() {
    for lives in [false, true] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut daemon = theirs.try_clone().unwrap();
        let _peer = Peer::on(theirs, usize::MAX, Features::empty(), |_| None);
        let mut session = VhostUserSession::on_socket(ours, options()).unwrap();
        let boot = boot();
        session.update_memory(&boot).unwrap();
        daemon.write_all(&[7]).unwrap();
        if !lives {
            daemon.shutdown(Shutdown::Both).unwrap();
        }
        // Readable, it would be called again and again.
        let error = steps(&mut session, &boot).unwrap_err();
        assert!(matches!(error, SessionError::NoPath), "{lives}: {error}");
    }
}

#[test]
fn a_full_counter_does_not_hold_a_start() {
    let (_peer, socket) = Peer::new(Features::REPLY_ACK, |_| None);
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&boot()).unwrap();
    // Blocking ones, which the daemon has filled.
    let events = [(); 2].map(|()| EventFd::new(0).unwrap());
    for event in &events {
        event.write(u64::MAX - 1).unwrap();
    }
    let ring = ring(0, &events);
    ends(move || session.start_ring(0, ring)).unwrap();
}

#[test]
fn rings_that_are_forgotten_while_they_are_started_do_not_run() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let options = options().with_device_in_order();
    let vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
    // The guest resets its device before each of the steps.
    for at in 0.. {
        vmm.with(|session| session.reconnect()).unwrap();
        if super::steps::go(&vmm, at).unwrap() {
            assert!(at > 3);
            return;
        }
        vmm.with(|session| session.forget_rings());
        super::steps::until_back(&vmm).unwrap();
        // What it was told on the connection that it has now.
        let told = daemon.requests();
        let is_first = |request: &LoggedRequest| matches!(request, LoggedRequest::SetFeatures(_));
        let first = told.iter().rposition(is_first).unwrap();
        let is_kick =
            |request| request == &LoggedRequest::Other(FrontendReq::SET_VRING_KICK.into());
        assert!(!told[first..].iter().any(is_kick), "{at}");
        vmm.with(|session| session.start_ring(0, vmm.ring()))
            .unwrap();
    }
}

#[test]
fn a_status_is_forgotten_with_the_rings() {
    let serve = || Peer::new(Features::STATUS | Features::REPLY_ACK, |_| None);
    let (_peer, socket) = serve();
    let options = options().with_protocol_features(Features::STATUS);
    let mut session = VhostUserSession::on_socket(socket, options).unwrap();
    let boot = boot();
    session.update_memory(&boot).unwrap();
    session.set_status(0xf).unwrap();
    // The daemon is gone, and the guest resets its device.
    let (peer, socket) = serve();
    session.reconnect_on(socket);
    assert!(session.set_status(0).is_err());
    session.forget_rings();
    session.update_memory(&boot).unwrap();
    assert!(peer.take_all(FrontendReq::SET_STATUS).is_empty());
}

#[test]
fn no_ring_is_started_while_a_reset_is_needed_and_the_daemon_can_log() {
    let offers = |told: &Told| match told {
        told if told.is(FrontendReq::GET_FEATURES) => Some(number(1 << 32 | 1 << 30 | LOG_ALL)),
        told if told.is(FrontendReq::GET_QUEUE_NUM) => Some(number(2)),
        told if told.is(FrontendReq::SET_LOG_BASE) => Some(Default::default()),
        _ => None,
    };
    let features = Features::REPLY_ACK | Features::MQ | Features::LOG_SHMFD;
    let (_peer, socket) = Peer::new(features, offers);
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    let boot = boot();
    session.update_memory(&boot).unwrap();
    let events = events();
    session.start_ring(0, ring(0, &events)).unwrap();
    let (peer, socket) = Peer::new(features, offers);
    session.reconnect_on(socket);
    session.update_memory(&boot).unwrap();
    assert!(session.needs_reset());
    // Or memory that it lies in could be taken away.
    let refused = session.start_ring(1, ring(1, &events)).unwrap_err();
    assert!(matches!(refused, SessionError::NeedsReset), "{refused}");
    session.update_memory(&memory(&[(PLUG, 1 << 20)])).unwrap();
    session.start_log().unwrap();
    assert!(peer.take_all(FrontendReq::SET_VRING_ADDR).is_empty());
    drop(session.stop_log());
    session.forget_rings();
    session.update_memory(&boot).unwrap();
    session.start_ring(1, ring(1, &events)).unwrap();
}

#[test]
fn more_descriptors_than_a_message_has_are_the_callers_mistake() {
    let (_peer, socket) = Peer::new(Features::REPLY_ACK, |_| None);
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    let file = super::peer::memfd(0);
    let mut message = SessionMessage::new(1000_u32);
    for _ in 0..254 {
        message = message.with_descriptor(file.try_clone().unwrap());
    }
    let refused = session.send(message).unwrap_err();
    let text = "a message with 254 descriptors: the kernel sends at most 253 with one";
    assert_eq!(refused.to_string(), text);
    assert!(session.broken().is_none());
}

#[test]
fn an_update_of_its_own_does_not_wait_without_end_for_steps() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let options = options().with_deadline(Duration::from_millis(100));
    let mut session = VhostUserSession::connect(place.socket(), options).unwrap();
    let boot = boot();
    drop(daemon);
    assert!(!session.reconnect_in_steps(&boot).unwrap());
    // One that did not ask before whether it can be told.
    let error = ends(move || MemoryListener::update(&mut session, &boot)).unwrap_err();
    assert!(
        error.reason().contains("no daemon can be reached"),
        "{error}"
    );
}

#[test]
fn a_silent_daemon_is_said_with_what_allows_it_more_time() {
    let (socket, _daemon) = UnixStream::pair().unwrap();
    let options = options().with_deadline(Duration::ZERO);
    let error = VhostUserSession::on_socket(socket, options).unwrap_err();
    let text = chain(&error);
    assert!(
        text.contains("allow more with SessionOptions::with_deadline"),
        "{text}"
    );
}

#[test]
fn a_ring_whose_start_is_refused_in_part_is_stopped() {
    let (peer, socket) = Peer::new(Features::REPLY_ACK, |told| {
        told.is(FrontendReq::SET_VRING_CALL).then(|| number(1))
    });
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&boot()).unwrap();
    let error = session.start_ring(0, ring(0, &events())).unwrap_err();
    assert!(chain(&error).contains("refused to start ring 0"), "{error}");
    assert!(session.broken().is_none());
    // It took the rest all the same.
    let told = peer.take();
    let place = |code| told.iter().position(|told| told.is(code)).unwrap();
    let enabled = place(FrontendReq::SET_VRING_ENABLE);
    assert!(enabled < place(FrontendReq::GET_VRING_BASE));
}

#[test]
fn a_directory_is_no_buffer_for_what_is_in_flight() {
    let features = Features::REPLY_ACK | Features::INFLIGHT_SHMFD;
    let (_peer, socket) = Peer::new(features, |told| {
        told.is(FrontendReq::GET_INFLIGHT_FD).then(|| {
            let mut body = told.body.clone();
            body[..8].copy_from_slice(&48_u64.to_ne_bytes());
            (body, vec![File::open("/").unwrap().into()])
        })
    });
    let options = options().with_max_ring_size(2);
    let mut session = VhostUserSession::on_socket(socket, options).unwrap();
    session.update_memory(&boot()).unwrap();
    let parts = [0x1000, 0x2000, 0x3000].map(GuestAddress);
    let [kick, call] = events();
    let ring = SessionRing::new(2, parts, &kick, &call).unwrap();
    let error = session.start_ring(0, ring).unwrap_err();
    assert!(chain(&error).contains("none of a file"), "{error}");
}

#[test]
fn a_panic_of_an_event_loop_leaves_the_steps_as_they_were() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let options = options().with_device_in_order();
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
    drop(daemon);
    let _daemon = place.serve(MockDaemon::builder());
    for _ in 0..3 {
        let step = || vmm.space.reconnect_in_steps(&vmm.disk, |_| panic!("a bug"));
        let panicked = catch_unwind(AssertUnwindSafe(step));
        assert!(panicked.is_err());
    }
    super::steps::until_back(&vmm).unwrap();
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

#[test]
fn a_daemon_that_answers_byte_by_byte_has_no_more_time() {
    let (socket, mut daemon) = UnixStream::pair().unwrap();
    let (end, ended) = mpsc::channel::<()>();
    let trickle = thread::spawn(move || {
        let pause = Duration::from_millis(50);
        while ended.recv_timeout(pause) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = daemon.write_all(&[0]);
        }
    });
    let options = options().with_deadline(Duration::from_millis(200));
    let error = ends(move || VhostUserSession::on_socket(socket, options)).unwrap_err();
    assert!(
        chain(&error).contains("did not answer within 200ms"),
        "{error}"
    );
    drop(end);
    trickle.join().unwrap();
}
