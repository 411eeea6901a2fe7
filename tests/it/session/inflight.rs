//! In-flight buffers: a daemon dies with requests in flight, and the next one completes each of
//! them once.

use guest_memory_shm::mock::{InflightFault, RequestStep};
use vhost::vhost_user::message::FrontendReq;
use vm_memory::ByteValued;

use super::peer::{self, Peer};
use super::steps::until_back;
use super::*;
use crate::mock::inflight::STEPS;

/// Requests in flight, one sector each.
const REQUESTS: u16 = 4;
const DISK: usize = 64 << 10;
/// On sectors of completed requests: that they are not carried out again.
const MARKER: u8 = 0xee;
/// The bytes of a buffer for one ring of the largest size.
const NEEDED: u64 = 16 + 16 * 1024;

type Driver = BlkDriver<PublishedMemory>;

/// How the VMM connects to the next daemon.
#[derive(Clone, Copy, Debug)]
enum Way {
    AtOnce,
    InSteps,
}

impl Way {
    fn reconnect(self, vmm: &Vmm) {
        match self {
            Self::AtOnce => vmm.space.reconnect_session(&vmm.disk).unwrap(),
            Self::InSteps => until_back(vmm).unwrap(),
        }
        assert!(!vmm.with(|session| session.needs_reset()));
    }
}

fn serve(place: &Place, disk: Vec<u8>) -> MockDaemon {
    let builder = MockDaemon::builder().with_disk_contents(disk);
    builder.with_inflight().start(place.socket()).unwrap()
}

fn contents(daemon: &MockDaemon) -> Vec<u8> {
    let mut disk = vec![0; DISK];
    daemon.disk().read(0, &mut disk).unwrap();
    disk
}

/// Submits a write of each of these sectors, filled with its number and 1.
fn submit(space: &AddressSpace, driver: &mut Driver, sectors: std::ops::Range<u16>) {
    for sector in sectors {
        let buffer = GuestAddress(BUFFER.0 + u64::from(sector) * 512);
        let memory = space.published().memory();
        memory
            .write_slice(&[sector as u8 + 1; 512], buffer)
            .unwrap();
        let sector = u64::from(sector);
        driver.submit_write(sector, &[(buffer, SECTOR)]).unwrap();
    }
}

fn half_at<T: ByteValued>(space: &AddressSpace, base: GuestAddress, offset: u64) -> T {
    let memory = space.published().memory();
    memory.read_obj(GuestAddress(base.0 + offset)).unwrap()
}

/// The first descriptors of requests: of those that were made available, and of those on the used
/// ring.
fn heads(space: &AddressSpace, driver: &Driver) -> [Vec<u16>; 2] {
    let layout = driver.ring_layout();
    [(layout.avail, 2), (layout.used, 8)].map(|(ring, size)| {
        let head = |at: u16| half_at(space, ring, 4 + size * u64::from(at));
        (0..half_at(space, ring, 2)).map(head).collect()
    })
}

/// Each request was completed once.
fn assert_completed_once(space: &AddressSpace, driver: &Driver, about: &str) {
    let [available, used] = heads(space, driver).map(|mut heads| {
        heads.sort_unstable();
        heads
    });
    assert_eq!(available, used, "{about}");
}

/// What the first sectors are filled with.
fn sectors(daemon: &MockDaemon, count: u16) -> Vec<u8> {
    let disk = contents(daemon);
    let sectors = disk.chunks(512).take(usize::from(count));
    let filling = |sector: &[u8]| {
        assert!(sector.iter().all(|byte| *byte == sector[0]));
        sector[0]
    };
    sectors.map(filling).collect()
}

fn connect(place: &Place, options: SessionOptions) -> Vmm {
    Vmm::new(VhostUserSession::connect(place.socket(), options).unwrap())
}

fn start(vmm: &Vmm) -> Result<(), SessionError> {
    vmm.with(|session| session.start_ring(0, vmm.ring()))
}

#[test]
fn requests_are_completed_once_wherever_their_daemon_died() {
    let steps = STEPS
        .iter()
        .flat_map(|step| (1..=REQUESTS).map(move |count| (*step, count)));
    let ways = [Way::AtOnce, Way::InSteps];
    for (step, count, way) in steps.flat_map(|(step, count)| ways.map(|way| (step, count, way))) {
        let about = format!("{count}th request at {step:?}, {way:?}");
        let place = Place::new();
        let first = serve(&place, vec![0; DISK]);
        first.hold_requests(u64::from(count), step);
        let mut vmm = connect(&place, options());
        submit(&vmm.space, &mut vmm.driver, 0..REQUESTS);
        start(&vmm).unwrap();
        first.wait_held(PATIENCE).unwrap();
        let mut disk = contents(&first);
        drop(first);

        let [available, used] = heads(&vmm.space, &vmm.driver);
        let mut after = Vec::new();
        for (index, head) in available.iter().enumerate() {
            let is_done = used.contains(head);
            if is_done {
                let sector = &mut disk[512 * index..][..512];
                assert_eq!(sector, [index as u8 + 1; 512], "{about}");
                sector.fill(MARKER);
            }
            after.push(if is_done { MARKER } else { index as u8 + 1 });
        }
        let second = serve(&place, disk);
        way.reconnect(&vmm);
        vmm.driver.wait_all().unwrap();
        assert_completed_once(&vmm.space, &vmm.driver, &about);
        assert_eq!(sectors(&second, REQUESTS), after, "{about}");
        vmm.copies(40, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
        assert_completed_once(&vmm.space, &vmm.driver, &about);
    }
}

#[test]
fn requests_are_completed_once_by_daemons_that_die_one_after_the_other() {
    for way in [Way::AtOnce, Way::InSteps] {
        let place = Place::new();
        let mut daemon = serve(&place, vec![0; DISK]);
        daemon.hold_requests(u64::from(REQUESTS), RequestStep::Marked);
        let mut vmm = connect(&place, options());
        submit(&vmm.space, &mut vmm.driver, 0..REQUESTS);
        start(&vmm).unwrap();
        // All are marked by the first; each of the others comes to its step with one of them.
        for step in [&STEPS[2..], &STEPS[2..5]].concat() {
            daemon.wait_held(PATIENCE).unwrap();
            let disk = contents(&daemon);
            drop(daemon);
            daemon = serve(&place, disk);
            daemon.hold_requests(1, step);
            way.reconnect(&vmm);
        }
        daemon.wait_held(PATIENCE).unwrap();
        let disk = contents(&daemon);
        drop(daemon);
        let last = serve(&place, disk);
        way.reconnect(&vmm);
        vmm.driver.wait_all().unwrap();
        assert_completed_once(&vmm.space, &vmm.driver, "at last");
        assert_eq!(sectors(&last, REQUESTS), [1, 2, 3, 4]);
    }
}

#[test]
fn rings_of_different_sizes_share_a_buffer() {
    let place = Place::new();
    let serve = |disk: Vec<u8>| {
        let builder = MockDaemon::builder().with_queues(2).with_inflight();
        let builder = builder.with_disk_contents(disk);
        builder.start(place.socket()).unwrap()
    };
    let mut daemon = serve(vec![0; DISK]);
    let vmm = connect(&place, options());
    let driver = |(at, size)| {
        let driver = BlkDriver::new(vmm.space.published(), GuestAddress(at), size).unwrap();
        driver.with_deadline(PATIENCE)
    };
    let mut drivers = [(0x20000, 16), (0x30000, 64)].map(driver);
    for (index, driver) in (0..).zip(&drivers) {
        let ring = driver.session_ring().unwrap();
        vmm.with(|session| session.start_ring(index, ring)).unwrap();
    }
    // One daemon dies with requests of ring 1, the next one with those of ring 0, too.
    for (ring, first) in [(1, 4), (0, 0)] {
        daemon.hold_requests(u64::from(REQUESTS), RequestStep::Marked);
        submit(&vmm.space, &mut drivers[ring], first..first + REQUESTS);
        daemon.wait_held(PATIENCE).unwrap();
        let disk = contents(&daemon);
        drop(daemon);
        daemon = serve(disk);
        if ring == 1 {
            // What was left is carried out after the others are there.
            daemon.hold_requests(1, RequestStep::CarriedOut);
            vmm.space.reconnect_session(&vmm.disk).unwrap();
            daemon.wait_held(PATIENCE).unwrap();
            daemon.release_requests();
        }
    }
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    for driver in &mut drivers {
        driver.wait_all().unwrap();
        assert_completed_once(&vmm.space, driver, "at last");
    }
    assert_eq!(sectors(&daemon, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn a_buffer_is_kept_over_a_daemon_that_dies_while_no_ring_runs() {
    let place = Place::new();
    let first = serve(&place, vec![0; DISK]);
    let mut vmm = connect(&place, options());
    start(&vmm).unwrap();
    vmm.copies(40, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
    let base = vmm.with(|session| session.stop_ring(0)).unwrap();
    let disk = contents(&first);
    drop(first);
    let second = serve(&place, disk);
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    let gives = LoggedRequest::Other(FrontendReq::SET_INFLIGHT_FD.into());
    assert!(second.requests().contains(&gives));
    second.hold_requests(2, RequestStep::Used);
    submit(&vmm.space, &mut vmm.driver, 0..REQUESTS);
    let ring = vmm.ring().with_base(base);
    vmm.with(|session| session.start_ring(0, ring)).unwrap();
    second.wait_held(PATIENCE).unwrap();
    let disk = contents(&second);
    drop(second);
    let third = serve(&place, disk);
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    vmm.driver.wait_all().unwrap();
    assert_completed_once(&vmm.space, &vmm.driver, "at last");
    assert_eq!(sectors(&third, REQUESTS), [1, 2, 3, 4]);
}

#[test]
fn a_daemon_that_notes_nothing_any_more_needs_a_reset_or_a_device_in_order() {
    let place = Place::new();
    let first = serve(&place, vec![0; DISK]);
    let vmm = connect(&place, options());
    start(&vmm).unwrap();
    drop(first);
    let _second = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    assert!(vmm.with(|session| session.needs_reset()));
}

/// Its buffer says that what the next daemon has completed is in flight.
#[test]
fn a_buffer_that_a_daemon_did_not_take_is_given_to_no_other() {
    let place = Place::new();
    let first = serve(&place, vec![0; DISK]);
    first.hold_requests(u64::from(REQUESTS), RequestStep::Marked);
    let mut vmm = connect(&place, options().with_device_in_order());
    submit(&vmm.space, &mut vmm.driver, 0..REQUESTS);
    start(&vmm).unwrap();
    first.wait_held(PATIENCE).unwrap();
    drop(first);
    let second = place.serve(MockDaemon::builder());
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    vmm.driver.wait_all().unwrap();
    let disk = contents(&second);
    drop(second);
    let third = serve(&place, disk);
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    vmm.copies(40, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
    assert_completed_once(&vmm.space, &vmm.driver, "at last");
    let gives = LoggedRequest::Other(FrontendReq::SET_INFLIGHT_FD.into());
    assert!(!third.requests().contains(&gives));
    assert!(!vmm.with(|session| session.needs_reset()));
}

#[test]
fn each_buffer_that_cannot_be_is_refused_and_the_next_one_is_taken() {
    let half = NEEDED / 2;
    let texts = [
        (
            InflightFault::NoDescriptor,
            "it has no descriptor".to_owned(),
        ),
        (
            InflightFault::TooSmall,
            format!("it has {half} bytes, {NEEDED} are needed"),
        ),
        (
            InflightFault::ShortFile,
            format!("it is {NEEDED} bytes at 0x0, and its file has {half}"),
        ),
    ];
    for (fault, text) in texts {
        let place = Place::new();
        let daemon = serve(&place, vec![0; DISK]);
        let mut vmm = connect(&place, options());
        daemon.inject_at_inflight(1, fault);
        let refused = start(&vmm).unwrap_err();
        assert!(
            matches!(refused, SessionError::Inflight { .. }),
            "{refused}"
        );
        let all = format!(
            "the daemon's in-flight buffer cannot be used: {text}; leave INFLIGHT_SHMFD out \
             (SessionOptions::without_protocol_features), or mend the daemon"
        );
        assert_eq!(refused.to_string(), all);
        assert!(vmm.with(|session| session.broken().is_none()));
        start(&vmm).unwrap();
        vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
    }
    // Nobody but daemons reads it: seals are their business.
    let place = Place::new();
    let daemon = serve(&place, vec![0; DISK]);
    let mut vmm = connect(&place, options());
    daemon.inject_at_inflight(1, InflightFault::Unsealed);
    start(&vmm).unwrap();
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

#[test]
fn a_daemon_that_hangs_up_instead_of_a_buffer_is_connected_to_again() {
    let place = Place::new();
    let daemon = serve(&place, vec![0; DISK]);
    let mut vmm = connect(&place, options());
    daemon.inject_at_inflight(1, InflightFault::Refuse);
    let refused = start(&vmm).unwrap_err();
    let text = "the daemon hung up when told to share its in-flight buffer";
    assert!(refused.to_string().starts_with(text), "{refused}");
    assert!(vmm.with(|session| session.broken().is_some()));
    vmm.space.reconnect_session(&vmm.disk).unwrap();
    start(&vmm).unwrap();
    vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
}

#[test]
fn a_ring_that_is_larger_than_its_notes_is_refused_before_a_word() {
    let place = Place::new();
    let daemon = serve(&place, vec![0; DISK]);
    let vmm = connect(&place, options().with_max_ring_size(8));
    daemon.clear_requests();
    let refused = start(&vmm).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "a ring of 16 descriptors: it is to be a power of two, at most 8"
    );
    assert_eq!(daemon.requests(), []);
}

fn on_peer(
    answer: impl Fn(&peer::Told) -> Option<peer::Answer> + Send + 'static,
) -> (Peer, std::os::unix::net::UnixStream) {
    let features = Features::MQ | Features::REPLY_ACK | Features::INFLIGHT_SHMFD;
    Peer::new(features, answer)
}

/// Which files it was given as buffers.
fn buffers(peer: &Peer) -> Vec<u64> {
    let given = peer.take_all(FrontendReq::SET_INFLIGHT_FD);
    given.iter().map(|told| told.inode().unwrap()).collect()
}

#[test]
fn the_buffer_is_the_same_until_the_device_is_reset() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let (first, socket) = on_peer(|_| None);
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&memory).unwrap();
    session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap();
    session
        .start_ring(1, driver.session_ring().unwrap())
        .unwrap();
    let [buffer] = buffers(&first)[..] else {
        panic!("one buffer for all rings");
    };
    for _ in 0..3 {
        let (next, socket) = on_peer(|_| None);
        session.reconnect_on(socket);
        session.update_memory(&memory).unwrap();
        let told = next.take();
        let code = |told: &peer::Told| told.code;
        let at = |wanted: FrontendReq| told.iter().position(|told| told.is(wanted)).unwrap();
        let codes: Vec<_> = told.iter().map(code).collect();
        assert!(
            at(FrontendReq::SET_INFLIGHT_FD) < at(FrontendReq::SET_VRING_NUM),
            "{codes:?}"
        );
        let given = &told[at(FrontendReq::SET_INFLIGHT_FD)];
        assert_eq!(given.inode(), Some(buffer));
        assert!(
            !told
                .iter()
                .any(|told| told.is(FrontendReq::GET_INFLIGHT_FD))
        );
        session.stop_ring(1).unwrap();
        session
            .start_ring(1, driver.session_ring().unwrap())
            .unwrap();
        assert!(buffers(&next).is_empty(), "it has it");
    }
    session.forget_rings();
    let (last, socket) = on_peer(|_| None);
    session.reconnect_on(socket);
    session.update_memory(&memory).unwrap();
    session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap();
    let [fresh] = buffers(&last)[..] else {
        panic!("one buffer");
    };
    assert_ne!(fresh, buffer);
}

#[test]
fn answers_that_are_no_buffer_are_refused() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let shape = |size: u64, offset: u64| {
        let mut body = [size, offset].map(u64::to_ne_bytes).concat();
        body.extend([2_u16, 1024].map(u16::to_ne_bytes).concat());
        body
    };
    let needed = 2 * NEEDED;
    let cases = [
        (Vec::new(), 1, Some("its answer has 0 bytes".to_owned())),
        (vec![0; 19], 1, Some("its answer has 19 bytes".to_owned())),
        (shape(needed, 0), 2, Some("it has 2 descriptors".to_owned())),
        (
            shape(needed, u64::MAX),
            1,
            Some(format!("it is {needed} bytes at {:#x}, and", u64::MAX)),
        ),
        (
            shape(needed, 1),
            1,
            Some(format!(
                "it is {needed} bytes at 0x1, and its file has {needed}"
            )),
        ),
        // With and without the padding at its end.
        (shape(needed, 0), 1, None),
        ([shape(needed, 0), vec![0; 4]].concat(), 1, None),
    ];
    for (body, count, text) in cases {
        let (peer, socket) = on_peer(move |told| {
            let asks = told.is(FrontendReq::GET_INFLIGHT_FD);
            let fds = (0..count).map(|_| peer::memfd(needed).into()).collect();
            asks.then(|| (body.clone(), fds))
        });
        let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
        session.update_memory(&memory).unwrap();
        let started = session.start_ring(0, driver.session_ring().unwrap());
        match text {
            None => started.unwrap(),
            Some(text) => {
                let refused = started.unwrap_err().to_string();
                assert!(refused.contains(&text), "{refused}");
                assert!(buffers(&peer).is_empty());
            }
        }
        assert!(session.broken().is_none());
    }
}

#[test]
fn a_buffer_that_the_daemon_does_not_take_back_is_asked_for_anew() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let refuses = std::sync::atomic::AtomicBool::new(true);
    let (peer, socket) = on_peer(move |told| {
        let refused = told.is(FrontendReq::SET_INFLIGHT_FD)
            && refuses.swap(false, std::sync::atomic::Ordering::Relaxed);
        refused.then(|| peer::number(1))
    });
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&memory).unwrap();
    let refused = session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap_err();
    let text = "the daemon refused to share its in-flight buffer";
    assert!(refused.to_string().starts_with(text), "{refused}");
    session
        .start_ring(0, driver.session_ring().unwrap())
        .unwrap();
    let given = buffers(&peer);
    assert_eq!(given.len(), 2);
    assert_ne!(given[0], given[1]);
}

/// A session with a hand-written daemon, and a ring that runs.
fn noted(features: Features) -> (GuestMemoryShm, Peer, VhostUserSession) {
    let memory = GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let (peer, socket) = Peer::new(features, |_| None);
    let mut session = VhostUserSession::on_socket(socket, options()).unwrap();
    session.update_memory(&memory).unwrap();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    let ring = driver.session_ring().unwrap();
    session.start_ring(0, ring).unwrap();
    (memory, peer, session)
}

#[test]
fn a_buffer_that_was_cut_off_is_not_handed_on() {
    let features = Features::REPLY_ACK | Features::INFLIGHT_SHMFD;
    let (memory, peer, mut session) = noted(features);
    let told = peer.take_all(FrontendReq::SET_INFLIGHT_FD);
    let file = told[0].file.as_ref().unwrap();
    file.set_len(NEEDED - 1).unwrap();
    let (_peer, socket) = Peer::new(features, |_| None);
    session.reconnect_on(socket);
    let refused = session.update_memory(&memory).unwrap_err();
    assert!(
        matches!(refused, SessionError::Inflight { .. }),
        "{refused}"
    );
}

#[test]
fn a_ring_that_the_buffer_has_no_room_for_is_not_started() {
    let features = Features::REPLY_ACK | Features::INFLIGHT_SHMFD;
    let (memory, _peer, mut session) = noted(features);
    let (_peer, socket) = Peer::new(features | Features::MQ, |told| {
        let asks = told.is(FrontendReq::GET_QUEUE_NUM);
        asks.then(|| peer::number(4))
    });
    session.reconnect_on(socket);
    session.update_memory(&memory).unwrap();
    assert_eq!(session.rings(), 4);
    let driver = BlkDriver::new(&memory, GuestAddress(0x10000), 16).unwrap();
    let refused = session.start_ring(1, driver.session_ring().unwrap());
    let refused = refused.unwrap_err().to_string();
    assert_eq!(refused, "there is no ring 1: the daemon has 1");
}
