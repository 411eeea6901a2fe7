//! Connections on which options are set.
#![allow(
    unsafe_code,
    reason = "nix has no SO_PASSPIDFD, and sets it in a macro"
)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SetBool;

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
