//! What is no connection to a daemon, and connections on which the VMM has set options.
#![allow(
    unsafe_code,
    reason = "nix has no SO_PASSPIDFD, and sets it in a macro"
)]

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};

use guest_memory_shm::{SessionError, SessionOptions, VhostUserSession};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::SetBool;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, socketpair};

use crate::proc::Holdings;

use super::*;

/// That messages come with a pidfd of their sender, as Linux 6.5 can.
#[derive(Clone)]
struct PassPidfd;

nix::setsockopt_impl!(
    PassPidfd,
    libc::SOL_SOCKET,
    libc::SO_PASSPIDFD,
    bool,
    SetBool
);

fn unix(kind: SockType) -> OwnedFd {
    socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

#[test]
fn what_is_no_connected_unix_stream_socket_is_refused_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("listens");
    let packets = SockType::SeqPacket;
    let pair = socketpair(AddressFamily::Unix, packets, None, SockFlag::SOCK_CLOEXEC);
    let (connected_packets, _theirs) = pair.unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let unfit: [(OwnedFd, Errno, &str); 9] = [
        (
            std::io::pipe().unwrap().0.into(),
            Errno::ENOTSOCK,
            "no socket",
        ),
        (
            File::open("/dev/null").unwrap().into(),
            Errno::ENOTSOCK,
            "no socket",
        ),
        (
            UnixListener::bind(path).unwrap().into(),
            Errno::EOPNOTSUPP,
            "one that is not connected, or that listens",
        ),
        (
            unix(SockType::Stream),
            Errno::EOPNOTSUPP,
            "one that is not connected, or that listens",
        ),
        (
            UnixDatagram::unbound().unwrap().into(),
            Errno::EINVAL,
            "one of datagrams",
        ),
        (
            UnixDatagram::pair().unwrap().0.into(),
            Errno::EINVAL,
            "one of datagrams",
        ),
        (
            connected_packets,
            Errno::ESOCKTNOSUPPORT,
            "another kind of socket",
        ),
        (unix(packets), Errno::ENOTCONN, "another kind of socket"),
        (
            connected.into(),
            Errno::ESOCKTNOSUPPORT,
            "another kind of socket",
        ),
    ];
    for (fd, errno, what) in unfit {
        let copy = || fd.try_clone().unwrap();
        let check = |error: ShareError| {
            let ShareError::UnfitSocket { source, .. } = &error else {
                panic!("{what}: {error:?}");
            };
            assert_eq!(source.raw_os_error(), Some(errno as i32), "{what}");
            let text = "a share needs a connected Unix stream socket, and was given ";
            assert_eq!(error.to_string(), format!("{text}{what}"));
        };
        check(VhostUserShare::new(copy(), Features::REPLY_ACK).unwrap_err());
        let stream = UnixStream::from(copy());
        match VhostUserSession::on_socket(stream, SessionOptions::new(0)) {
            Err(SessionError::Share(error)) => check(error),
            other => panic!("{what}: {:?}", other.err()),
        }
        // A share that has another one keeps it.
        let peer = Peer::start(MockDaemon::builder());
        let (mut share, vmm) = peer.share();
        check(share.reconnect(copy(), vmm.features).unwrap_err());
        share.update_memory(&memory(&[0])).unwrap();
    }
}

#[test]
fn a_connection_whose_other_end_is_closed_is_taken_and_nothing_is_sent_to_look() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let copy = ours.try_clone().unwrap();
    VhostUserShare::new(copy, Features::empty()).unwrap();
    let seen = std::io::Read::read(&mut &theirs, &mut [0]).unwrap_err();
    assert_eq!(seen.kind(), ErrorKind::WouldBlock);
    drop(theirs);
    let mut share = VhostUserShare::new(ours, Features::empty()).unwrap();
    let error = share.update_memory(&memory(&[0])).unwrap_err();
    assert!(matches!(error.failure(), Some(DaemonFailure::HungUp(_))));
}

#[test]
fn pidfds_that_the_vmm_has_come_with_messages_are_closed() {
    in_own_process(|| {
        let peer = Peer::start(MockDaemon::builder());
        let stream = UnixStream::connect(peer.daemon.path().unwrap()).unwrap();
        let ours = stream.try_clone().unwrap();
        let mut vmm = Vmm::negotiate(stream);
        if setsockopt(&ours, PassPidfd, &true) == Err(Errno::ENOPROTOOPT) {
            return support::skip("this kernel has no SO_PASSPIDFD");
        }
        let pidfds = || format!("{:?}", Holdings::now()).matches("pidfd").count();
        let mut share = vmm.share();
        let (few, many) = (memory(&[0]), memory(&[0, 10]));
        for memory in [&few, &many, &few] {
            share.update_memory(memory).unwrap();
        }
        assert_eq!(pidfds(), 0);
        // The control: vhost's frontend takes them for nothing.
        let _ = vhost::vhost_user::VhostUserFrontend::get_protocol_features(&mut vmm.frontend);
        assert!(pidfds() > 0);
    });
}

#[test]
fn a_log_leaves_no_pidfd_but_that_of_the_daemon_until_it_is_stopped() {
    in_own_process(|| {
        let pidfds = || format!("{:?}", Holdings::now()).matches("pidfd").count();
        let peer = Peer::start(MockDaemon::builder());
        let vmm = peer.connect_also(Features::LOG_SHMFD);
        let mut share = vmm.share();
        let (few, many) = (memory(&[0]), memory(&[0, 10]));
        share.update_memory(&few).unwrap();
        share.start_log().unwrap();
        for memory in [&few, &many, &few] {
            share.update_memory(memory).unwrap();
            assert!(pidfds() <= 1);
        }
        drop(share.stop_log());
        assert_eq!(pidfds(), 0);
    });
}
