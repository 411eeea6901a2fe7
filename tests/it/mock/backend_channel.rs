//! Requests of the daemon's own, on the backend channel.

use super::*;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vhost::vhost_user::message::{BackendReq, VhostUserSharedMsg};
use vhost::vhost_user::{
    FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandlerMut,
};

/// What vhost's end of the channel was asked for.
#[derive(Default)]
struct Asked {
    changes: u64,
    /// Body and inode of SHARED_OBJECT_LOOKUP.
    lookup: Option<(Vec<u8>, u64)>,
}

impl VhostUserFrontendReqHandlerMut for Asked {
    fn handle_config_change(&mut self) -> HandlerResult<u64> {
        self.changes += 1;
        match self.changes {
            1 | 2 => Ok(0),
            _ => Err(std::io::Error::from_raw_os_error(5)),
        }
    }

    fn shared_object_lookup(
        &mut self,
        uuid: &VhostUserSharedMsg,
        fd: &dyn AsRawFd,
    ) -> HandlerResult<u64> {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let inode = std::fs::metadata(path).unwrap().ino();
        self.lookup = Some((uuid.uuid.as_bytes().to_vec(), inode));
        Ok(0)
    }
}

fn with_channel() -> (MockDaemon, Frontend) {
    let builder = MockDaemon::builder().with_backend_channel();
    let daemon = builder.start_unnamed().unwrap();
    let (frontend, offered) = negotiated(&daemon);
    let features = VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::BACKEND_SEND_FD
        | VhostUserProtocolFeatures::CONFIG;
    assert!(offered.contains(features));
    (daemon, frontend)
}

/// A daemon with a channel, and the frontend's end of it.
fn with_raw_channel() -> (MockDaemon, Frontend, UnixStream) {
    let (daemon, mut frontend) = with_channel();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    frontend.set_backend_request_fd(&theirs).unwrap();
    (daemon, frontend, ours)
}

fn fields<const N: usize>(fields: [u32; N]) -> Vec<u8> {
    fields.map(u32::to_ne_bytes).concat()
}

#[test]
fn the_frontend_is_told_of_changes_and_its_answers_come_back() {
    let (daemon, mut frontend) = with_channel();
    let asked = Arc::new(Mutex::new(Asked::default()));
    let mut handler = FrontendReqHandler::new(Arc::clone(&asked)).unwrap();
    handler.set_reply_ack_flag(true);
    let socket = handler.get_tx_raw_fd();
    frontend.set_backend_request_fd(&socket).unwrap();

    daemon.notify_config_change().unwrap();
    handler.handle_request().unwrap();
    let change = BackendRequest::new(BackendReq::CONFIG_CHANGE_MSG).with_answer();
    for expected in [0, -5_i64] {
        daemon.send_backend_request(&change).unwrap();
        assert_eq!(handler.handle_request().is_ok(), expected == 0);
        let answer = daemon.backend_answer(LIMIT).unwrap();
        assert_eq!(answer.cast_signed(), expected);
    }
    assert_eq!(asked.lock().unwrap().changes, 3);

    let file = memfd(4096);
    let inode = file.metadata().unwrap().ino();
    let lookup = BackendRequest::new(BackendReq::SHARED_OBJECT_LOOKUP)
        .with_body([7; 16])
        .add_descriptor(file.into())
        .with_answer();
    daemon.send_backend_request(&lookup).unwrap();
    handler.handle_request().unwrap();
    assert_eq!(daemon.backend_answer(LIMIT).unwrap(), 0);
    let lookup = asked.lock().unwrap().lookup.take();
    assert_eq!(lookup, Some((vec![7; 16], inode)));
    frontend.get_features().unwrap();
}

#[test]
fn any_request_goes_out_as_it_is_and_an_answer_must_be_one_to_it() {
    let (daemon, _frontend, mut channel) = with_raw_channel();
    let request = BackendRequest::new(999_u32).with_body([1, 2, 3]);
    daemon.send_backend_request(&request).unwrap();
    let mut bytes = [0; 15];
    channel.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..], [fields([999, 1, 3]), vec![1, 2, 3]].concat());
    let error = daemon.backend_answer(LIMIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");

    let asking = request.with_answer();
    daemon.send_backend_request(&asking).unwrap();
    channel.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[4..8], (1_u32 | 8).to_ne_bytes());
    let error = daemon.backend_answer(Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error:?}");
    // It is still waited for.
    channel.write_all(&fields([999, 5, 8, 42, 1])).unwrap();
    assert_eq!(daemon.backend_answer(LIMIT).unwrap(), 42 | 1 << 32);

    // To another request, of another length, without the flag of an answer.
    for wrong in [
        fields([998, 5, 8, 0, 0]),
        fields([999, 5, 4, 0]),
        fields([999, 1, 8, 0, 0]),
    ] {
        daemon.send_backend_request(&asking).unwrap();
        channel.write_all(&wrong).unwrap();
        let error = daemon.backend_answer(LIMIT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error:?}");
    }
    daemon.send_backend_request(&asking).unwrap();
    drop(channel);
    let error = daemon.backend_answer(LIMIT).unwrap_err();
    let ends = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
    assert!(ends.contains(&error.kind()), "{error:?}");
}

#[test]
fn each_fault_shows_on_the_channel_and_the_connection_stays() {
    for (fault, expected) in [
        (ChannelFault::Nonsense, vec![0xff; 12]),
        (ChannelFault::CutShort, fields([2])),
        (ChannelFault::HangUp, vec![]),
    ] {
        let (daemon, frontend, mut channel) = with_raw_channel();
        daemon.inject_at_channel(2, fault);
        daemon.notify_config_change().unwrap();
        let mut first = [0; 12];
        channel.read_exact(&mut first).unwrap();
        assert_eq!(first[..], fields([2, 1, 0]));
        daemon.notify_config_change().unwrap();
        assert_eq!(daemon.pending_faults(), 0);
        frontend.get_features().unwrap();
        // The channel ends with the daemon, if it has not before.
        if fault == ChannelFault::HangUp {
            assert_eq!(channel.read(&mut first).unwrap(), 0);
            assert!(daemon.notify_config_change().is_err());
            frontend.get_features().unwrap();
        }
        drop(daemon);
        let mut rest = Vec::new();
        channel.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, expected, "{fault:?}");
    }
}

#[test]
fn a_channel_belongs_to_its_connection() {
    let (daemon, frontend) = with_channel();
    let error = daemon.notify_config_change().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    drop(frontend);
    daemon.wait_disconnected(LIMIT).unwrap();

    let (mut frontend, _) = negotiated(&daemon);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    daemon.notify_config_change().unwrap();
    drop(frontend);
    daemon.wait_disconnected(LIMIT).unwrap();
    let mut all = Vec::new();
    channel.read_to_end(&mut all).unwrap();
    assert_eq!(all, fields([2, 1, 0]));
    let error = daemon.notify_config_change().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
}
