//! Daemons that die and come back, and what they are told then.

use super::*;

#[test]
fn a_restarted_daemon_is_told_everything_and_goes_on() {
    for acks in [true, false] {
        let place = Place::new();
        let builder = || match acks {
            true => MockDaemon::builder(),
            false => MockDaemon::builder().without_reply_ack(),
        };
        let daemon = place.serve(builder());
        let options = options().with_device_in_order();
        let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
        vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
        drop(daemon);

        let report = vmm.space.insert(region(PLUG)).unwrap();
        assert!(report.stale()[0].is(&vmm.disk));
        // A request that nobody serves yet.
        let waits = vmm.driver.submit_flush().unwrap();
        let daemon = place.serve(builder());
        vmm.space.reconnect_session(&vmm.disk).unwrap();
        vmm.driver.wait(waits).unwrap();
        assert_eq!(daemon.table().len(), 2);
        vmm.copies(2, PLUG, BUFFER);
        assert!(!vmm.with(|session| session.needs_reset()));
    }
}

#[test]
fn a_device_that_may_complete_out_of_order_needs_a_reset() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options()).unwrap());
    drop(daemon);
    let _daemon = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    assert!(vmm.with(|session| session.needs_reset()));
    for refused in [
        vmm.with(|session| session.start_ring(0, vmm.ring())),
        vmm.with(|session| session.stop_ring(0)).map(drop),
    ] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, SessionError::NeedsReset), "{refused}");
    }
    // The guest does that.
    vmm.with(VhostUserSession::forget_rings);
    vmm.driver.reset().unwrap();
    vmm.with(|session| session.start_ring(0, vmm.ring()))
        .unwrap();
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

#[test]
fn nobody_to_reconnect_to_leaves_the_daemon_away() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let options = options()
        .with_deadline(Duration::from_millis(500))
        .with_device_in_order();
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
    drop(daemon);
    let refused = vmm.space.reconnect_session(&vmm.disk).unwrap_err();
    assert!(
        chain(&refused).contains("no daemon can be reached"),
        "{}",
        chain(&refused)
    );
    assert!(vmm.space.listeners().unwrap()[0].stale().is_some());
    let _daemon = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

#[test]
fn a_refused_region_leaves_device_and_session_as_they_were() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options()).unwrap());
    daemon.inject(1, Fault::Refuse);
    let refused = vmm.space.insert(region(PLUG)).unwrap_err();
    assert!(
        chain(&refused).contains("refused to add the region"),
        "{}",
        chain(&refused)
    );
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
    vmm.space.insert(region(PLUG)).told_all();
    vmm.copies(2, PLUG, BUFFER);
}

/// Its rings are in memory that it does not take, and then it does.
#[test]
fn rings_that_cannot_be_started_again_are_not_forgotten() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let options = options().with_device_in_order();
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
    drop(daemon);
    let daemon = place.serve(MockDaemon::builder().with_fault(1, Fault::HangUpAfter));
    vmm.space.reconnect_session(&vmm.disk).unwrap_err();
    drop(daemon);
    let _daemon = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

#[test]
fn a_log_goes_on_with_a_restarted_daemon() {
    let place = Place::new();
    let daemon = place.serve(MockDaemon::builder());
    let options = options().with_device_in_order();
    let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
    vmm.with(|session| session.start_log()).unwrap();
    drop(daemon);
    let daemon = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    let features = daemon
        .requests()
        .into_iter()
        .filter_map(|request| match request {
            LoggedRequest::SetFeatures(bits) => Some(bits & LOG_ALL != 0),
            _ => None,
        });
    assert_eq!(features.collect::<Vec<_>>(), [false, true]);
    drop(vmm.with(VhostUserSession::drain_dirty));
    let to = GuestAddress(BUFFER.0 + MIB / 2);
    vmm.copies(1, BUFFER, to);
    let dirty = vmm.with(VhostUserSession::drain_dirty);
    let page = GuestRange::new(to, 1).unwrap();
    assert!(dirty.iter().any(|range| range.overlaps(&page)), "{dirty:?}");
}
