//! What a daemon asks and says by itself, on a channel beside the connection.

use guest_memory_shm::SessionMessage;
use guest_memory_shm::mock::{BackendRequest, ChannelFault};
use vhost::vhost_user::message::BackendReq;

use super::peer::memfd;
use super::*;
use crate::proc::descriptors_of;

fn with_channel() -> SessionOptions {
    options().with_backend_channel()
}

fn builder() -> MockDaemonBuilder {
    MockDaemon::builder().with_backend_channel()
}

fn on(daemon: &MockDaemon, options: SessionOptions) -> VhostUserSession {
    VhostUserSession::on_socket(daemon.connect().unwrap(), options).unwrap()
}

fn pair() -> (MockDaemon, VhostUserSession) {
    let daemon = builder().start_unnamed().unwrap();
    let session = on(&daemon, with_channel());
    (daemon, session)
}

fn change() -> BackendRequest {
    BackendRequest::new(BackendReq::CONFIG_CHANGE_MSG)
}

fn next(session: &mut VhostUserSession) -> SessionMessage {
    session.receive().unwrap().unwrap()
}

/// The connection itself is none the worse.
fn assert_whole(session: &mut VhostUserSession) {
    assert!(session.broken().is_none());
    assert_eq!(session.config(0, 8).unwrap().len(), 8);
}

#[test]
fn changes_of_the_configuration_are_told_and_answered_where_an_answer_is_wanted() {
    let (daemon, mut session) = pair();
    assert!(session.channel().is_some());
    assert!(session.receive().unwrap().is_none());
    daemon.notify_config_change().unwrap();
    for _ in 0..2 {
        daemon
            .send_backend_request(&change().with_answer())
            .unwrap();
    }
    daemon.notify_config_change().unwrap();
    for _ in 0..4 {
        let message = next(&mut session);
        assert!(message.is_config_change() && !message.is_asking());
        // That it is answered twice would show at the next answer.
        session.answer(message, 1).unwrap();
    }
    assert!(session.receive().unwrap().is_none());
    for _ in 0..2 {
        assert_eq!(daemon.backend_answer(PATIENCE).unwrap(), 0);
    }
    let other = BackendRequest::new(BackendReq::SHARED_OBJECT_REMOVE);
    daemon.send_backend_request(&other.with_answer()).unwrap();
    let message = next(&mut session);
    session.answer(message, 7).unwrap();
    assert_eq!(daemon.backend_answer(PATIENCE).unwrap(), 7);
    assert_whole(&mut session);
}

#[test]
fn other_requests_come_with_their_bodies_and_descriptors_and_are_answered_by_the_caller() {
    let (daemon, mut session) = pair();
    for value in [0, 1] {
        let request = BackendRequest::new(BackendReq::SHARED_OBJECT_LOOKUP).with_body([7; 16]);
        let (file, copy) = (memfd(1), memfd(1));
        let request = request.add_descriptor(file.try_clone().unwrap().into());
        let request = request.add_descriptor(copy.into()).with_answer();
        daemon.send_backend_request(&request).unwrap();
        let mut message = next(&mut session);
        assert_eq!(message.code(), u32::from(BackendReq::SHARED_OBJECT_LOOKUP));
        assert_eq!(message.body(), [7; 16]);
        assert!(message.is_asking() && !message.is_config_change());
        assert_eq!(message.take_descriptors().len(), 2);
        assert_eq!(message.take_descriptors().len(), 0);
        drop(request);
        assert_eq!(descriptors_of(&file), 1);
        session.answer(message, value).unwrap();
        assert_eq!(daemon.backend_answer(PATIENCE).unwrap(), value);
    }
    // One that waits for nothing, and one that is not known to anybody.
    daemon
        .send_backend_request(&BackendRequest::new(999_u32))
        .unwrap();
    let message = next(&mut session);
    assert_eq!((message.code(), message.is_asking()), (999, false));
    session.answer(message, 0).unwrap();
    assert_whole(&mut session);
}

#[test]
fn descriptors_that_were_not_agreed_on_are_closed() {
    let daemon = builder().start_unnamed().unwrap();
    let options = with_channel().without_protocol_features(Features::BACKEND_SEND_FD);
    let mut session = on(&daemon, options);
    let file = memfd(1);
    let request = BackendRequest::new(BackendReq::SHARED_OBJECT_ADD);
    let request = request.add_descriptor(file.try_clone().unwrap().into());
    daemon.send_backend_request(&request).unwrap();
    drop(request);
    let mut message = next(&mut session);
    assert_eq!(message.take_descriptors().len(), 0);
    assert_eq!(descriptors_of(&file), 1);
    assert_whole(&mut session);
}

#[test]
fn without_acknowledgements_nothing_waits_for_an_answer() {
    let daemon = builder().without_reply_ack().start_unnamed().unwrap();
    let mut session = on(&daemon, with_channel());
    for request in [change(), BackendRequest::new(BackendReq::SHARED_OBJECT_ADD)] {
        daemon.send_backend_request(&request.with_answer()).unwrap();
        let message = next(&mut session);
        assert!(!message.is_asking());
        session.answer(message, 0).unwrap();
    }
    let silent = daemon
        .backend_answer(Duration::from_millis(10))
        .unwrap_err();
    assert_eq!(silent.kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn there_is_a_channel_only_where_both_sides_want_one() {
    for (builder, options) in [
        (builder(), options()),
        (MockDaemon::builder(), with_channel()),
        (
            builder(),
            with_channel().without_protocol_features(Features::BACKEND_REQ),
        ),
    ] {
        let daemon = builder.start_unnamed().unwrap();
        let mut session = on(&daemon, options);
        assert!(session.channel().is_none());
        assert!(session.receive().unwrap().is_none());
        let refused = daemon.notify_config_change().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::NotConnected);
    }
}

#[test]
fn the_end_of_a_channel_leaves_the_session_whole() {
    for (fault, text) in [
        (
            ChannelFault::Nonsense,
            "request 4294967295, flags 0xffffffff, 4294967295 bytes",
        ),
        (ChannelFault::HangUp, "unexpected end of file"),
    ] {
        let (daemon, mut session) = pair();
        daemon.notify_config_change().unwrap();
        daemon.inject_at_channel(1, fault);
        daemon.notify_config_change().unwrap();
        // What came before it is taken.
        assert!(next(&mut session).is_config_change());
        let ended = session.receive().unwrap_err();
        assert!(matches!(ended, SessionError::Channel { .. }), "{ended}");
        let text = format!("the channel for the daemon's own requests cannot be used: {text}");
        assert_eq!(chain(&ended), text);
        assert!(session.channel().is_none());
        assert!(session.receive().unwrap().is_none());
        assert_whole(&mut session);
    }
}

#[test]
fn the_rest_of_a_request_is_waited_for_without_waiting() {
    let (daemon, mut session) = pair();
    daemon.inject_at_channel(1, ChannelFault::CutShort);
    daemon.notify_config_change().unwrap();
    for _ in 0..2 {
        assert!(session.receive().unwrap().is_none());
        assert!(session.channel().is_some());
        assert_whole(&mut session);
    }
    // What comes next is no rest of it: the first word of a header for the second one.
    daemon.notify_config_change().unwrap();
    session.receive().unwrap_err();
    assert_whole(&mut session);
}

#[test]
fn a_channel_that_ended_is_no_longer_answered_on() {
    let (daemon, mut session) = pair();
    let request = || BackendRequest::new(BackendReq::SHARED_OBJECT_ADD).with_answer();
    daemon.send_backend_request(&request()).unwrap();
    let first = next(&mut session);
    daemon.send_backend_request(&request()).unwrap();
    let second = next(&mut session);
    daemon.inject_at_channel(1, ChannelFault::HangUp);
    daemon.notify_config_change().unwrap();
    let ended = session.answer(first, 0).unwrap_err();
    assert!(matches!(ended, SessionError::Channel { .. }), "{ended}");
    assert!(session.channel().is_none());
    session.answer(second, 0).unwrap();
    assert_whole(&mut session);
}

#[test]
fn a_new_connection_has_a_new_channel_and_no_answers_of_the_old_one() {
    let place = Place::new();
    let daemon = place.serve(builder());
    let options = with_channel().with_device_in_order();
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
    let request = || BackendRequest::new(BackendReq::SHARED_OBJECT_ADD).with_answer();
    daemon.send_backend_request(&request()).unwrap();
    let old = vmm.with(next);
    assert!(old.is_asking());
    drop(daemon);
    let daemon = place.serve(builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    vmm.with(|session| session.answer(old, 1)).unwrap();
    // The next answer is to what the new one asks.
    daemon.send_backend_request(&request()).unwrap();
    let new = vmm.with(next);
    vmm.with(|session| session.answer(new, 0)).unwrap();
    assert_eq!(daemon.backend_answer(PATIENCE).unwrap(), 0);
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));

    // A daemon without one.
    drop(daemon);
    let daemon = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    assert!(vmm.with(|session| session.channel().is_none()));
    drop(daemon);
}
