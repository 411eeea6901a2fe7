//! Configuration, status, reset, and messages of the caller's own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use guest_memory_shm::SessionMessage;
use vhost::vhost_user::message::FrontendReq;

use super::peer::{self, Peer, Told, memfd};
use super::*;
use crate::proc::descriptors_of;

const GREETING: u32 = 1000;
const QUESTION: u32 = 1001;

fn features() -> Features {
    Features::MQ
        | Features::REPLY_ACK
        | Features::CONFIG
        | Features::STATUS
        | Features::RESET_DEVICE
        | Features::CONFIGURE_MEM_SLOTS
}

fn with_status() -> SessionOptions {
    let options = options().with_device_in_order();
    options.with_protocol_features(Features::STATUS)
}

fn on(socket: UnixStream, options: SessionOptions) -> VhostUserSession {
    VhostUserSession::on_socket(socket, options).unwrap()
}

fn memory() -> GuestMemoryShm {
    GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

/// What it was told as the device status.
fn statuses(told: &[Told]) -> Vec<u8> {
    let told = told.iter().filter(|told| told.is(FrontendReq::SET_STATUS));
    told.map(|told| told.body[0]).collect()
}

/// Goes on with another daemon; what that one was told.
fn moved(session: &mut VhostUserSession, memory: &GuestMemoryShm) -> (Peer, Vec<Told>) {
    let (peer, socket) = Peer::new(features(), |_| None);
    session.reconnect_on(socket);
    session.update_memory(memory).unwrap();
    let told = peer.take();
    (peer, told)
}

#[test]
fn the_status_is_told_asked_for_and_told_again_after_the_rings() {
    let memory = memory();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let (peer, socket) = Peer::new(features(), |told| {
        // It has cleared FEATURES_OK, and set DEVICE_NEEDS_RESET.
        told.is(FrontendReq::GET_STATUS).then(|| peer::number(0x47))
    });
    let mut session = on(socket, with_status());
    assert!(session.protocol_features().contains(Features::STATUS));
    session.update_memory(&memory).unwrap();
    session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap();
    peer.take();
    for status in [1, 3, 0xb, 0xf] {
        session.set_status(status).unwrap();
    }
    assert_eq!(statuses(&peer.take()), [1, 3, 0xb, 0xf]);
    assert_eq!(session.status().unwrap(), 0x47);

    let (_peer, told) = moved(&mut session, &memory);
    let at = |code| told.iter().rposition(|told| told.is(code)).unwrap();
    assert!(at(FrontendReq::SET_VRING_ENABLE) < at(FrontendReq::SET_STATUS));
    assert_eq!(statuses(&told), [0xf]);
}

#[test]
fn a_status_that_is_refused_is_not_told_again() {
    let memory = memory();
    let (_peer, socket) = Peer::new(features(), |told| {
        let refused = told.is(FrontendReq::SET_STATUS) && told.body[0] == 0xf;
        refused.then(|| peer::number(1))
    });
    let mut session = on(socket, with_status());
    session.update_memory(&memory).unwrap();
    session.set_status(0xb).unwrap();
    let refused = session.set_status(0xf).unwrap_err();
    let text = "the daemon refused to exchange the device status";
    assert!(refused.to_string().starts_with(text), "{refused}");
    let (_peer, told) = moved(&mut session, &memory);
    assert_eq!(statuses(&told), [0xb]);
}

#[test]
fn a_ring_that_is_started_again_wakes_daemon_and_guest() {
    let memory = memory();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let (_peer, socket) = Peer::new(features(), |_| None);
    let mut session = on(socket, with_status());
    session.update_memory(&memory).unwrap();
    let ring = driver.session_ring().unwrap();
    session.start_ring(0, ring).unwrap();
    let woken = || [driver.kick(), driver.call()].map(|event| event.read().ok());
    assert_eq!(woken(), [Some(1), Some(1)]);
    assert_eq!(woken(), [None, None]);
    let (_peer, _) = moved(&mut session, &memory);
    assert_eq!(woken(), [Some(1), Some(1)]);
}

#[test]
fn what_was_not_agreed_on_is_refused_by_name() {
    let (peer, socket) = Peer::new(features(), |_| None);
    // The session knows of the status only where the caller sets it.
    let without = Features::RESET_DEVICE | Features::CONFIG;
    let mut session = on(socket, options().without_protocol_features(without));
    peer.take();
    for (refused, what) in [
        (session.set_status(1), "STATUS"),
        (session.status().map(drop), "STATUS"),
        (session.reset_device(), "RESET_DEVICE"),
        (session.config(0, 8).map(drop), "CONFIG"),
        (session.set_config(0, &[1]), "CONFIG"),
    ] {
        let text = format!("the daemon does not offer {what}, which this needs");
        assert_eq!(refused.unwrap_err().to_string(), text);
    }
    assert!(peer.take().is_empty());
}

#[test]
fn after_a_reset_there_is_no_ring_and_no_status() {
    let memory = memory();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let (peer, socket) = Peer::new(features(), |_| None);
    let mut session = on(socket, with_status());
    session.update_memory(&memory).unwrap();
    session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap();
    session.set_status(0xf).unwrap();
    peer.take();
    session.reset_device().unwrap();
    assert_eq!(peer.take_all(FrontendReq::RESET_DEVICE).len(), 1);
    let refused = session.stop_ring(0).unwrap_err();
    assert!(matches!(
        refused,
        SessionError::RingState { runs: false, .. }
    ));

    let (peer, told) = moved(&mut session, &memory);
    assert!(statuses(&told).is_empty());
    assert!(
        !told
            .iter()
            .any(|told| told.is(FrontendReq::SET_VRING_ENABLE))
    );
    session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap();
    assert_eq!(peer.take_all(FrontendReq::SET_VRING_ENABLE).len(), 1);
}

#[test]
fn a_reset_that_is_refused_changes_nothing() {
    let memory = memory();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let (_peer, socket) = Peer::new(features(), |told| {
        told.is(FrontendReq::RESET_DEVICE).then(|| peer::number(1))
    });
    let mut session = on(socket, with_status());
    session.update_memory(&memory).unwrap();
    session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap();
    let refused = session.reset_device().unwrap_err();
    let text = "the daemon refused to reset the device";
    assert!(refused.to_string().starts_with(text), "{refused}");
    session.stop_ring(0).unwrap();
}

#[test]
fn the_configuration_is_written_and_read_back() {
    let space = Arc::new(Mutex::new(vec![0_u8; 200]));
    let (_peer, socket) = Peer::new(features(), move |told| {
        let mut space = space.lock().unwrap();
        let word = |at: usize| u32::from_ne_bytes(told.body[at..at + 4].try_into().unwrap());
        let sets = told.is(FrontendReq::SET_CONFIG);
        if !sets && !told.is(FrontendReq::GET_CONFIG) {
            return None;
        }
        // As libvhost-user reads: from the beginning, whatever it is asked for.
        let start = if sets { word(0) } else { 0 };
        let place = start as usize..(start + word(4)) as usize;
        let Some(part) = space.get_mut(place) else {
            return Some((Vec::new(), Vec::new()));
        };
        if sets {
            part.copy_from_slice(&told.body[12..]);
            return Some(peer::number(0));
        }
        Some(([&told.body[..12], part].concat(), Vec::new()))
    });
    let mut session = on(socket, options());
    session.set_config(194, &[1, 2, 3]).unwrap();
    assert_eq!(session.config(192, 8).unwrap(), [0, 0, 1, 2, 3, 0, 0, 0]);
    assert_eq!(session.config(0, 200).unwrap().len(), 200);
    let refused = session.config(200, 1).unwrap_err();
    let text = "the daemon does not offer this part of its configuration, which this needs";
    assert_eq!(refused.to_string(), text);
    for refused in [
        session.config(0, 257).map(drop),
        session.config(0, usize::MAX).map(drop),
        session.config(0, 0).map(drop),
        session.config(8, 0).map(drop),
        session.config(u32::MAX, usize::MAX).map(drop),
        session.set_config(250, &[0; 7]),
        session.set_config(0, &[0; 257]),
        session.set_config(0, &[]),
    ] {
        let refused = refused.unwrap_err();
        assert!(refused.to_string().contains("past byte 256"), "{refused}");
    }
    assert!(session.broken().is_none());
}

#[test]
fn messages_that_the_session_sends_by_itself_are_refused_before_a_word() {
    let (peer, socket) = Peer::new(features(), |_| None);
    let mut session = on(socket, options());
    peer.take();
    // By number, as the specification has them.
    let own = (2..15_u32).chain([16, 18, 21, 31, 32, 34, 36, 37, 38, 39, 40]);
    for code in own {
        for refused in [
            session.send(SessionMessage::new(code)),
            session.request(SessionMessage::new(code)).map(drop),
        ] {
            let text = format!(
                "message {code} is one that the session sends by itself: use its own calls"
            );
            assert_eq!(refused.unwrap_err().to_string(), text);
        }
    }
    assert!(peer.take().is_empty());
}

#[test]
fn a_message_goes_with_its_body_and_descriptor() {
    for acks in [true, false] {
        let mut features = features();
        features.set(Features::REPLY_ACK, acks);
        let (peer, socket) = Peer::new(features, |_| None);
        let mut session = on(socket, options());
        peer.take();
        let file = memfd(1);
        let inode = file.metadata().unwrap().ino();
        let message = SessionMessage::new(GREETING).with_body([7; 4096]);
        let message = message.with_descriptor(file.try_clone().unwrap());
        session.send(message).unwrap();
        // It was handled by then.
        let told = peer.take_all(FrontendReq::GET_FEATURES);
        assert_eq!(told.len(), 1, "the question after it");
        session
            .send(SessionMessage::new(GREETING).with_descriptor(file))
            .unwrap();
        let told = peer.take();
        assert_eq!((told[0].code, told[0].inode()), (GREETING, Some(inode)));
    }
}

#[test]
fn a_message_that_is_refused_leaves_the_session_whole() {
    let (_peer, socket) = Peer::new(features(), |told| {
        (told.code == GREETING).then(|| peer::number(5))
    });
    let mut session = on(socket, options());
    let refused = session.send(SessionMessage::new(GREETING)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the daemon refused to take message 1000: it may not know that, or not as it was said: \
         look at its log"
    );
    assert!(
        chain(&refused).ends_with("its answer is 5"),
        "{}",
        chain(&refused)
    );
    session.send(SessionMessage::new(QUESTION)).unwrap();
}

/// A peer that answers a question with this.
fn answering(body: Vec<u8>, files: Vec<File>) -> (Peer, VhostUserSession) {
    let (peer, socket) = Peer::new(features(), move |told| {
        let copy = |file: &File| OwnedFd::from(file.try_clone().unwrap());
        let fds = files.iter().map(copy).collect();
        (told.code == QUESTION).then(|| (body.clone(), fds))
    });
    (peer, on(socket, options()))
}

#[test]
fn an_answer_comes_with_its_body_and_descriptors() {
    for (size, count) in [(0, 0), (0, 1), (1, 3), (4096, 0), (4096, 253)] {
        let file = memfd(1);
        let files = (0..count).map(|_| file.try_clone().unwrap()).collect();
        let (_peer, mut session) = answering(vec![9; size], files);
        for _ in 0..2 {
            let question = SessionMessage::new(QUESTION).with_body([1]);
            let mut answer = session.request(question).unwrap();
            assert_eq!((answer.code(), answer.is_asking()), (QUESTION, false));
            assert_eq!(answer.body(), vec![9; size]);
            assert_eq!(answer.take_descriptors().len(), count);
        }
        assert_eq!(session.config(0, 8).unwrap(), [0; 8]);
    }
}

#[test]
fn an_answer_that_is_too_long_ends_the_connection() {
    let (_peer, mut session) = answering(vec![9; 4097], Vec::new());
    let refused = session.request(SessionMessage::new(QUESTION)).unwrap_err();
    let SessionError::Share(error) = &refused else {
        panic!("{refused}");
    };
    assert!(
        matches!(error.failure(), Some(DaemonFailure::Protocol(_))),
        "{refused}"
    );
    assert!(session.broken().is_some());
}

#[test]
fn descriptors_that_nothing_asked_for_are_closed() {
    let file = memfd(1);
    let copy = file.try_clone().unwrap();
    let (_peer, socket) = Peer::new(features(), move |told| {
        let fds = (0..5).map(|_| copy.try_clone().unwrap().into()).collect();
        told.is(FrontendReq::GET_CONFIG)
            .then(|| (told.body.clone(), fds))
    });
    let mut session = on(socket, options());
    for _ in 0..3 {
        // After a question whose descriptors are kept, too.
        session
            .request(SessionMessage::new(FrontendReq::GET_QUEUE_NUM))
            .unwrap();
        session.config(0, 8).unwrap();
    }
    // Its own, and the one to copy.
    assert_eq!(descriptors_of(&file), 2);
}
