//! Connecting, features, the configuration space.

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

#[test]
fn only_what_the_driver_knows_is_agreed_on() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let session = VhostUserSession::connect(place.socket(), options()).unwrap();
    let version_1 = 1 << 32;
    assert_eq!(session.features() & !DRIVER, version_1);
    let told: Vec<u64> = daemon
        .requests()
        .into_iter()
        .filter_map(|request| match request {
            LoggedRequest::SetFeatures(bits) => Some(bits),
            _ => None,
        })
        .collect();
    assert_eq!(told, [session.features() | 1 << 30]);
    let known = Features::MQ
        | Features::REPLY_ACK
        | Features::CONFIGURE_MEM_SLOTS
        | Features::LOG_SHMFD
        | Features::CONFIG;
    assert!(known.contains(session.protocol_features()));
    assert!(session.protocol_features().contains(Features::REPLY_ACK));
}

#[test]
fn a_daemon_without_a_required_feature_is_refused_by_name() {
    let place = Place::new();
    let _daemon = place.serve(MockDaemon::builder());
    let options = options().with_required(1 << 50);
    let refused = VhostUserSession::connect(place.socket(), options).unwrap_err();
    let missing = 1 << 50;
    assert!(matches!(refused, SessionError::Features { missing: bits, .. } if bits == missing));
    assert!(refused.to_string().contains("0x4000000000000"), "{refused}");
}

#[test]
fn one_that_does_not_listen_yet_is_waited_for_and_one_that_never_does_is_an_error() {
    let place = Place::new();
    let path = place.socket();
    let connects = thread::spawn(move || VhostUserSession::connect(path, options()));
    thread::sleep(Duration::from_millis(50));
    let _daemon = place.serve(MockDaemon::builder());
    connects.join().unwrap().unwrap();

    let nowhere = place.0.path().join("nobody.sock");
    let options = options().with_deadline(Duration::from_millis(50));
    let refused = VhostUserSession::connect(&nowhere, options).unwrap_err();
    let text = format!("no daemon can be reached at {}", nowhere.display());
    assert!(refused.to_string().starts_with(&text), "{refused}");
}

#[test]
fn one_that_never_answers_is_an_error_at_the_deadline() {
    let place = Place::new();
    let _silent = UnixListener::bind(place.socket()).unwrap();
    let options = options().with_deadline(Duration::from_millis(50));
    let late = VhostUserSession::connect(place.socket(), options).unwrap_err();
    let SessionError::Share(error) = &late else {
        panic!("{late}");
    };
    assert!(matches!(error.failure(), Some(DaemonFailure::Silent(_))));
    let text = "the daemon did not answer within 50ms when told to agree on features";
    assert!(late.to_string().starts_with(text), "{late}");
}

#[test]
fn the_configuration_space_is_read() {
    let place = Place::new();
    let _daemon = place.serve(MockDaemon::builder());
    let mut session = VhostUserSession::connect(place.socket(), options()).unwrap();
    let capacity = session.config(0, 8).unwrap();
    let capacity = u64::from_le_bytes(capacity.try_into().unwrap());
    assert_eq!(capacity, (64 << 10) / 512);
    for len in [0, 257] {
        let refused = session.config(0, len).unwrap_err();
        assert!(
            matches!(refused, SessionError::NotOffered { .. }),
            "{refused}"
        );
    }
    assert!(session.broken().is_none());

    let without = options().without_protocol_features(Features::CONFIG);
    drop(session);
    let mut session = VhostUserSession::connect(place.socket(), without).unwrap();
    let refused = session.config(0, 8).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the daemon does not offer CONFIG, which this needs"
    );
}

#[test]
fn one_that_accepts_nobody_any_more_is_an_error_at_the_deadline() {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
    };
    use std::os::fd::AsRawFd;

    let place = Place::new();
    let address = UnixAddr::new(&place.socket()).unwrap();
    let stream = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap()
    };
    let server = stream();
    bind(server.as_raw_fd(), &address).unwrap();
    listen(&server, Backlog::new(1).unwrap()).unwrap();
    let mut waiting = Vec::new();
    loop {
        waiting.push(stream());
        if connect(waiting.last().unwrap().as_raw_fd(), &address).is_err() {
            break;
        }
    }
    let options = options().with_deadline(Duration::from_millis(50));
    let refused = VhostUserSession::connect(place.socket(), options).unwrap_err();
    assert!(matches!(refused, SessionError::Connect { .. }), "{refused}");
}

#[test]
fn limits_that_no_clock_can_express_are_none() {
    let place = Place::new();
    let _daemon = place.serve(MockDaemon::builder());
    let options = options()
        .with_deadline(Duration::MAX)
        .with_drain_deadline(Duration::MAX)
        .with_device_in_order();
    let session = VhostUserSession::connect(place.socket(), options).unwrap();
    let mut vmm = Vmm::started(session);
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
    vmm.with(|session| session.stop_ring(0)).unwrap();
    vmm.space.reconnect_session(&vmm.disk).unwrap();
}

#[test]
fn what_watches_the_connection_sees_the_daemons_end() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder().with_max_mem_slots(7));
    let session = VhostUserSession::connect(place.socket(), options()).unwrap();
    let socket = session.socket().unwrap().try_clone_to_owned().unwrap();
    let ended = |limit| {
        let mut watched = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        poll(&mut watched, limit).unwrap();
        watched[0].revents().unwrap().contains(PollFlags::POLLHUP)
    };
    let vmm = Vmm::new(session);
    assert_eq!(vmm.with(|session| session.max_regions()), Some(7));
    assert!(!ended(PollTimeout::ZERO));
    daemon.hang_up();
    assert!(ended(PollTimeout::try_from(PATIENCE).unwrap()));
    let report = vmm.space.insert(region(PLUG)).unwrap();
    assert!(report.stale()[0].is(&vmm.disk));
    assert!(vmm.with(|session| session.socket().is_none()));
}

#[test]
fn what_does_not_pass_is_not_waited_for() {
    let place = Place::new();
    let file = place.0.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let begun = std::time::Instant::now();
    let refused = VhostUserSession::connect(file.join("blk.sock"), options()).unwrap_err();
    assert!(chain(&refused).contains("Not a directory"), "{refused}");
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_device_may_have_more_rings_than_its_daemon_counts() {
    let place = Place::new();
    let _daemon = place.serve(MockDaemon::builder());
    let options = options().without_protocol_features(Features::MQ);
    let one = VhostUserSession::connect(place.socket(), options.clone()).unwrap();
    assert_eq!(one.rings(), 1);
    drop(one);
    let two = VhostUserSession::connect(place.socket(), options.with_rings(2)).unwrap();
    assert_eq!(two.rings(), 2);
}
