//! Rings: started, refused, stopped, and the memory that they lie in.

use std::sync::mpsc;

use vhost::vhost_user::message::FrontendReq;

use super::peer::Peer;
use super::*;

fn all_kinds() -> [(&'static str, MockDaemonBuilder); 3] {
    [
        ("all features", MockDaemon::builder()),
        (
            "without REPLY_ACK",
            MockDaemon::builder().without_reply_ack(),
        ),
        ("without slots", MockDaemon::builder().without_mem_slots()),
    ]
}

#[test]
fn a_device_does_its_work_before_and_after_ram_is_plugged() {
    for (kind, builder) in all_kinds() {
        let place = Place::new();
        let _daemon = place.serve(builder);
        let session = VhostUserSession::connect(place.socket(), options()).unwrap();
        let mut vmm = Vmm::started(session);
        vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
        vmm.space.insert(region(PLUG)).told_all();
        vmm.copies(2, BUFFER, PLUG);
        vmm.copies(3, PLUG, BUFFER);
        vmm.space.remove((PLUG, MIB)).told_all();
        vmm.copies(4, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
        assert!(vmm.with(|session| session.broken().is_none()), "{kind}");
    }
}

#[test]
fn a_daemon_without_acknowledgements_is_woken_when_it_has_enabled_the_ring() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let kick = driver.kick().try_clone().unwrap();
    let (looks, seen) = mpsc::channel();
    // It looks at the kick before it answers a question.
    let (peer, socket) = Peer::new(Features::empty(), move |told| {
        if told.is(FrontendReq::GET_FEATURES) {
            looks.send(kick.read().is_ok()).unwrap();
        }
        None
    });
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&memory).unwrap();
    let ring = driver.session_ring().unwrap();
    session.start_ring(0, ring).unwrap();
    let told = peer.take();
    let last: Vec<_> = told[told.len() - 2..]
        .iter()
        .map(|told| told.code)
        .collect();
    let enabled = [FrontendReq::SET_VRING_ENABLE, FrontendReq::GET_FEATURES].map(u32::from);
    assert_eq!(last, enabled);
    assert!(seen.try_iter().all(|kicked| !kicked));
    assert_eq!(driver.kick().read().unwrap(), 1);
}

#[test]
fn a_ring_that_cannot_be_is_refused_before_a_word() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let vmm = Vmm::new(VhostUserSession::connect(place.socket(), options()).unwrap());
    daemon.clear_requests();
    let (kick, call) = (vmm.driver.kick(), vmm.driver.call());
    let ring = |size, at: u64| {
        let parts = [at, at + 0x1000, at + 0x2000].map(GuestAddress);
        SessionRing::new(size, parts, kick, call).unwrap()
    };
    let start = |index, ring| {
        vmm.with(|session| session.start_ring(index, ring))
            .unwrap_err()
            .to_string()
    };
    for size in [0, 1, 3, 0xffff] {
        let text =
            format!("a ring of {size} descriptors: it is to be a power of two, at most 32768");
        assert_eq!(start(0, ring(size, 0x1000)), text);
    }
    let text = start(0, ring(256, MIB - 0x2000));
    assert!(
        text.starts_with("the used ring of ring 0, 2054 bytes at 0x100000, is not"),
        "{text}"
    );
    let rings = vmm.with(|session| session.rings());
    let text = start(77, ring(256, 0x1000));
    assert_eq!(text, format!("there is no ring 77: the daemon has {rings}"));
    let refused = vmm.with(|session| session.stop_ring(0)).unwrap_err();
    assert_eq!(refused.to_string(), "ring 0 does not run");
    assert_eq!(daemon.requests(), []);

    vmm.with(|session| session.start_ring(0, vmm.ring()))
        .unwrap();
    assert_eq!(start(0, vmm.ring()), "ring 0 runs already: stop it first");
}

#[test]
fn memory_that_a_running_ring_lies_in_is_not_taken_away() {
    let place = Place::new();
    let _daemon = place.serve(MockDaemon::builder());
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options()).unwrap());
    vmm.space.insert(region(PLUG)).told_all();
    let refused = vmm.space.remove((GuestAddress(0), MIB)).unwrap_err();
    assert!(
        chain(&refused).contains("descriptor table of ring 0"),
        "{}",
        chain(&refused)
    );
    let replaced = vmm.space.transaction().remove((GuestAddress(0), MIB));
    let refused = replaced
        .insert(region(GuestAddress(0)))
        .commit()
        .unwrap_err();
    assert!(
        chain(&refused).contains("descriptor table of ring 0"),
        "{}",
        chain(&refused)
    );
    vmm.copies(1, PLUG, BUFFER);

    // Stopped, it can, and it goes on where it was.
    let base = vmm.with(|session| session.stop_ring(0)).unwrap();
    assert_eq!(base, 2);
    let ring = vmm.ring().with_base(base);
    vmm.with(|session| session.start_ring(0, ring)).unwrap();
    vmm.copies(2, BUFFER, PLUG);
    vmm.with(|session| session.stop_ring(0)).unwrap();
    vmm.space.remove((GuestAddress(0), MIB)).told_all();
}

#[test]
fn memory_that_a_ring_lies_in_is_not_taken_away_while_its_daemon_is_gone() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let options = options().with_device_in_order();
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
    drop(daemon);
    let home = (GuestAddress(0), MIB);
    // Before that is noticed, when it is known, and on the way back.
    for round in 0..3 {
        let removed = vmm.space.remove(home).map(drop);
        let replaced = vmm.space.transaction().remove(home);
        let replaced = replaced.insert(region(home.0)).commit().map(drop);
        for refused in [removed, replaced] {
            let refused = chain(&refused.unwrap_err());
            assert!(refused.contains("descriptor table of ring 0"), "{refused}");
        }
        match round {
            0 => assert_eq!(vmm.space.insert(region(PLUG)).unwrap().stale().len(), 1),
            _ => {
                let waits = vmm.space.reconnect_in_steps(&vmm.disk, |_| ()).unwrap();
                assert!(waits.is_some());
            }
        }
    }
    let _daemon = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    vmm.copies(1, PLUG, BUFFER);
    // With the device reset, it can be.
    vmm.with(VhostUserSession::forget_rings);
    vmm.space.remove(home).told_all();
}

#[test]
fn a_log_is_started_with_its_feature_and_its_rings_and_ended() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options()).unwrap());
    daemon.clear_requests();
    vmm.with(|session| session.start_log()).unwrap();
    let sets = |daemon: &MockDaemon| {
        let requests = daemon.requests().into_iter();
        let bits = requests.filter_map(|request| match request {
            LoggedRequest::SetFeatures(bits) => Some(bits & LOG_ALL != 0),
            _ => None,
        });
        bits.collect::<Vec<_>>()
    };
    assert_eq!(sets(&daemon), [true]);
    // SET_VRING_ADDR, which says that the used ring is logged.
    assert!(daemon.requests().contains(&LoggedRequest::Other(9)));

    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
    let dirty = vmm.with(VhostUserSession::drain_dirty);
    let holds = |at: u64| {
        let at = GuestRange::new(GuestAddress(at), 1).unwrap();
        dirty.iter().any(|range| range.overlaps(&at))
    };
    assert!(
        holds(BUFFER.0 + MIB / 2),
        "what it read from the disk: {dirty:?}"
    );
    assert!(
        holds(vmm.driver.ring_layout().used.0),
        "the used ring: {dirty:?}"
    );

    let stopped = vmm.with(VhostUserSession::stop_log);
    assert!(stopped.former_daemons.is_empty());
    assert_eq!(sets(&daemon), [true, false]);
}
