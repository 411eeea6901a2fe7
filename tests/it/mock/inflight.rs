//! In-flight buffers: a daemon dies with requests in flight, at each step of a request, and the
//! next one completes each of them once.

use super::*;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight};

const QUEUE_SIZE: u16 = 16;
/// Requests in flight, one sector each.
const REQUESTS: u16 = 4;
const BUFFERS: u64 = 0x40000;
pub(crate) const STEPS: [RequestStep; 7] = [
    RequestStep::Taken,
    RequestStep::Marked,
    RequestStep::CarriedOut,
    RequestStep::Listed,
    RequestStep::Used,
    RequestStep::Unmarked,
    RequestStep::Counted,
];

type Driver<'a> = BlkDriver<&'a GuestMemoryMmap>;

/// What the frontend keeps while daemons come and go.
struct Kept {
    shape: VhostUserInflight,
    file: File,
}

impl Kept {
    fn new(frontend: &mut Frontend, queues: u16) -> Kept {
        let wanted = VhostUserInflight::new(0, 0, queues, QUEUE_SIZE);
        let (shape, file) = frontend.get_inflight_fd(&wanted).unwrap();
        Kept { shape, file }
    }

    fn send(&self, frontend: &mut Frontend) {
        let fd = self.file.as_raw_fd();
        frontend.set_inflight_fd(&self.shape, fd).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.shape.mmap_size as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn half(&self, at: u64) -> u16 {
        let mut half = [0; 2];
        self.file.read_exact_at(&mut half, at).unwrap();
        u16::from_ne_bytes(half)
    }

    /// The heads that are marked in the region of queue 0.
    fn marked(&self) -> Vec<u16> {
        let bytes = self.bytes();
        let is_marked = |head: &u16| bytes[16 + 16 * usize::from(*head)] == 1;
        (0..QUEUE_SIZE).filter(is_marked).collect()
    }

    fn used_idx(&self) -> u16 {
        self.half(14)
    }
}

fn with_inflight(disk: Vec<u8>) -> MockDaemon {
    let builder = MockDaemon::builder().with_disk_contents(disk);
    builder.with_inflight().start_unnamed().unwrap()
}

fn driver(memory: &GuestMemoryMmap, rings: u64) -> Driver<'_> {
    let driver = BlkDriver::new(memory, GuestAddress(rings), QUEUE_SIZE).unwrap();
    driver.with_deadline(LIMIT)
}

/// Submits writes of a sector each, filled with 1 and more.
fn submit(memory: &GuestMemoryMmap, driver: &mut Driver<'_>) {
    for index in 0..u64::from(REQUESTS) {
        let buffer = GuestAddress(BUFFERS + 512 * index);
        memory.write_slice(&[index as u8 + 1; 512], buffer).unwrap();
        driver.submit_write(index, &[(buffer, 512)]).unwrap();
    }
}

/// Connects with `kept` and `driver` on queue 0.
fn connect(
    memory: &GuestMemoryMmap,
    daemon: &MockDaemon,
    kept: Option<&Kept>,
    driver: &Driver<'_>,
) -> (Frontend, Kept) {
    let (mut frontend, _) = negotiated(daemon);
    let fresh = Kept::new(&mut frontend, 1);
    kept.unwrap_or(&fresh).send(&mut frontend);
    frontend.set_mem_table(&infos(memory)).unwrap();
    start(memory, &mut frontend, driver);
    (frontend, fresh)
}

fn half_at(memory: &GuestMemoryMmap, base: GuestAddress, offset: u64) -> u16 {
    memory.read_obj(GuestAddress(base.0 + offset)).unwrap()
}

/// The first descriptors of all requests, as they were submitted.
fn heads(memory: &GuestMemoryMmap, driver: &Driver<'_>) -> Vec<u16> {
    let avail = driver.ring_layout().avail;
    let head = |index| half_at(memory, avail, 4 + 2 * u64::from(index));
    (0..REQUESTS).map(head).collect()
}

/// The first descriptors on the used ring, in the order of completion.
fn used(memory: &GuestMemoryMmap, driver: &Driver<'_>) -> Vec<u16> {
    let ring = driver.ring_layout().used;
    let head = |index| half_at(memory, ring, 4 + 8 * u64::from(index));
    (0..half_at(memory, ring, 2)).map(head).collect()
}

fn sectors(daemon: &MockDaemon) -> Vec<u8> {
    let mut disk = vec![0; 512 * usize::from(REQUESTS)];
    daemon.disk().read(0, &mut disk).unwrap();
    disk.chunks(512)
        .map(|sector| {
            assert!(sector.iter().all(|byte| *byte == sector[0]));
            sector[0]
        })
        .collect()
}

/// How many requests are marked, on the used ring, and counted by the buffer, where the daemon
/// died as the `count`th request came to `step`.
fn expected(step: RequestStep, count: u16) -> (u16, u16, u16) {
    let before = count - 1;
    match step {
        RequestStep::Taken => (before, 0, 0),
        RequestStep::Marked => (count, 0, 0),
        RequestStep::CarriedOut | RequestStep::Listed => (REQUESTS - before, before, before),
        RequestStep::Used => (REQUESTS - before, count, before),
        RequestStep::Unmarked => (REQUESTS - count, count, before),
        RequestStep::Counted => (REQUESTS - count, count, count),
        _ => panic!("{step:?} is new"),
    }
}

/// A session's tests go on from here with the next daemon.
#[test]
fn each_step_leaves_the_buffer_as_it_is_specified() {
    let cases = STEPS
        .iter()
        .flat_map(|step| (1..=REQUESTS).map(|count| (*step, count)));
    for (step, count) in cases {
        let memory = guest(&[(0, 1 << 20)]);
        let mut driver = driver(&memory, 0);
        submit(&memory, &mut driver);
        let daemon = with_inflight(vec![0; 4096]);
        daemon.hold_requests(u64::from(count), step);
        let (frontend, kept) = connect(&memory, &daemon, None, &driver);
        daemon.wait_held(LIMIT).unwrap();
        let at_death = kept.bytes();
        match count % 3 {
            0 => daemon.hang_up(),
            1 => drop(frontend),
            _ => {}
        }
        if count % 3 != 2 {
            daemon.wait_disconnected(LIMIT).unwrap();
        }
        drop(daemon);
        assert_eq!(kept.bytes(), at_death, "{step:?} {count}");
        let completed = used(&memory, &driver);
        let left = (kept.marked().len() as u16, completed.len() as u16);
        let state = (left.0, left.1, kept.used_idx());
        assert_eq!(state, expected(step, count), "{step:?} {count}");

        let next = with_inflight(vec![0; 4096]);
        let (_frontend, _) = connect(&memory, &next, Some(&kept), &driver);
        driver.wait_all().unwrap();
        // What a request does to the buffer ends after the guest has seen it.
        let state = || (kept.marked(), kept.used_idx());
        let until = Instant::now() + LIMIT;
        while state() != (vec![], REQUESTS) && Instant::now() < until {
            thread::yield_now();
        }
        assert_eq!(state(), (vec![], REQUESTS), "{step:?} {count}");
    }
}

#[test]
fn what_was_in_flight_is_carried_out_again_in_the_order_in_which_it_was_taken() {
    let write_twice = |memory: &GuestMemoryMmap, driver: &mut Driver<'_>| {
        for value in [1_u8, 2] {
            let buffer = GuestAddress(BUFFERS + 512 * u64::from(value));
            memory.write_slice(&[value; 512], buffer).unwrap();
            driver.submit_write(0, &[(buffer, 512)]).unwrap();
        }
    };
    let memory = guest(&[(0, 1 << 20)]);
    // Control: a daemon that nothing happens to does it the other way round, as it may.
    let daemon = with_inflight(vec![0; 4096]);
    let mut plain = driver(&memory, 0);
    write_twice(&memory, &mut plain);
    let _connection = connect(&memory, &daemon, None, &plain);
    plain.wait_all().unwrap();
    assert_eq!(sectors(&daemon)[0], 1);
    drop(daemon);

    let first = with_inflight(vec![0; 4096]);
    let mut driver = driver(&memory, 0);
    write_twice(&memory, &mut driver);
    first.hold_requests(2, RequestStep::Marked);
    let (_frontend, kept) = connect(&memory, &first, None, &driver);
    first.wait_held(LIMIT).unwrap();
    drop(first);
    let second = with_inflight(vec![0; 4096]);
    let _connection = connect(&memory, &second, Some(&kept), &driver);
    driver.wait_all().unwrap();
    assert_eq!(sectors(&second)[0], 2);
}

#[test]
fn a_batch_that_was_used_and_is_still_marked_is_not_carried_out_again() {
    let memory = guest(&[(0, 1 << 20)]);
    let mut driver = driver(&memory, 0);
    submit(&memory, &mut driver);
    let first = with_inflight(vec![0; 4096]);
    first.hold_requests(u64::from(REQUESTS), RequestStep::Marked);
    let (_frontend, kept) = connect(&memory, &first, None, &driver);
    first.wait_held(LIMIT).unwrap();
    drop(first);

    // A daemon that completes requests 0 and 2 in one batch, and dies before it unmarks them.
    let heads = heads(&memory, &driver);
    let layout = driver.ring_layout();
    for (slot, request) in [(0, 0), (1, 2)] {
        let head = heads[request];
        let entry = GuestAddress(layout.used.0 + 4 + 8 * slot);
        memory.write_obj(u32::from(head), entry).unwrap();
        memory
            .write_obj(0_u8, GuestAddress(layout.statuses.0 + u64::from(head)))
            .unwrap();
        let next = kept.half(12);
        let at = 16 + 16 * u64::from(head) + 6;
        kept.file.write_all_at(&next.to_ne_bytes(), at).unwrap();
        kept.file.write_all_at(&head.to_ne_bytes(), 12).unwrap();
    }
    let index = GuestAddress(layout.used.0 + 2);
    memory.write_obj(2_u16, index).unwrap();

    let second = with_inflight(vec![0; 4096]);
    let _connection = connect(&memory, &second, Some(&kept), &driver);
    driver.wait_all().unwrap();
    assert_eq!(sectors(&second), [0, 2, 0, 4]);
    assert_eq!(used(&memory, &driver).len(), usize::from(REQUESTS));
}

#[test]
fn a_stopped_queue_goes_on_with_the_same_buffer() {
    let memory = guest(&[(0, 1 << 20)]);
    let mut driver = driver(&memory, 0);
    let daemon = with_inflight(vec![0; 4096]);
    let (mut frontend, _) = negotiated(&daemon);
    let kept = Kept::new(&mut frontend, 1);
    kept.send(&mut frontend);
    frontend.set_mem_table(&infos(&memory)).unwrap();
    for round in 1..4 {
        submit(&memory, &mut driver);
        start(&memory, &mut frontend, &driver);
        driver.wait_all().unwrap();
        let base = frontend.get_vring_base(0).unwrap();
        assert_eq!(base, round * u32::from(REQUESTS));
        // Else it would be started by its kick, and the messages after that wait while it is held.
        frontend.set_vring_enable(0, false).unwrap();
    }
    // Also from the beginning, as after a reset of the guest: the buffer counts as its ring does.
    driver.reset().unwrap();
    submit(&memory, &mut driver);
    daemon.hold_requests(1, RequestStep::Used);
    start(&memory, &mut frontend, &driver);
    daemon.wait_held(LIMIT).unwrap();
    drop(daemon);
    let second = with_inflight(vec![0; 4096]);
    let _connection = connect(&memory, &second, Some(&kept), &driver);
    driver.wait_all().unwrap();
    assert_eq!(
        sectors(&second),
        [1, 2, 3, 0],
        "the latest was completed first"
    );
}

#[test]
fn held_requests_go_on_when_they_are_released_with_and_without_a_buffer() {
    for builder in [MockDaemon::builder(), MockDaemon::builder().with_inflight()] {
        let memory = guest(&[(0, 1 << 20)]);
        let daemon = builder.start_unnamed().unwrap();
        let (mut frontend, _) = negotiated(&daemon);
        frontend.set_mem_table(&infos(&memory)).unwrap();
        let mut driver = driver(&memory, 0);
        submit(&memory, &mut driver);
        daemon.hold_requests(3, RequestStep::Used);
        start(&memory, &mut frontend, &driver);
        daemon.wait_held(LIMIT).unwrap();
        assert_eq!(used(&memory, &driver).len(), 3);
        assert_eq!(sectors(&daemon), [1, 2, 3, 0], "no buffer was set");
        daemon.release_requests();
        driver.wait_all().unwrap();
        assert_eq!(sectors(&daemon), [1, 2, 3, 4]);
        let error = daemon.wait_held(Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    }
}

#[test]
fn the_buffer_is_a_sealed_memfd_of_exactly_the_size_that_its_queues_need() {
    let daemon = with_inflight(vec![0; 4096]);
    let (mut frontend, offered) = negotiated(&daemon);
    assert!(offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
    let kept = Kept::new(&mut frontend, 1);
    let shape = (
        kept.shape.mmap_offset,
        kept.shape.num_queues,
        kept.shape.queue_size,
    );
    assert_eq!(shape, (0, 1, QUEUE_SIZE));
    assert_eq!(kept.shape.mmap_size, 16 + 16 * u64::from(QUEUE_SIZE));
    assert_eq!(kept.file.metadata().unwrap().len(), kept.shape.mmap_size);
    assert!(kept.bytes().iter().all(|byte| *byte == 0));
    for len in [0, kept.shape.mmap_size + 1] {
        let error = kept.file.set_len(len).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    }
    // One queue more than there are, and a queue larger than the device takes.
    for (queues, size) in [(2, 16), (1, 1025)] {
        let daemon = with_inflight(vec![0; 4096]);
        let (mut frontend, _) = negotiated(&daemon);
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        assert!(frontend.get_inflight_fd(&wanted).is_err());
        daemon.wait_disconnected(LIMIT).unwrap();
    }
}

#[test]
fn each_fault_of_the_buffer_is_as_it_says_and_the_next_buffer_is_right() {
    let size = 16 + 16 * u64::from(QUEUE_SIZE);
    let wanted = VhostUserInflight::new(0, 0, 1, QUEUE_SIZE);
    for (fault, said, len) in [
        (InflightFault::TooSmall, size / 2, size / 2),
        (InflightFault::ShortFile, size, size / 2),
        (InflightFault::Unsealed, size, size),
    ] {
        let daemon = with_inflight(vec![0; 4096]);
        daemon.inject_at_inflight(2, fault);
        let (mut frontend, _) = negotiated(&daemon);
        frontend.get_inflight_fd(&wanted).unwrap();
        let (shape, file) = frontend.get_inflight_fd(&wanted).unwrap();
        assert_eq!(
            (shape.mmap_size, file.metadata().unwrap().len()),
            (said, len)
        );
        let truncated = file.set_len(0).is_ok();
        assert_eq!(truncated, fault == InflightFault::Unsealed);
        assert_eq!(daemon.pending_faults(), 0);
        // Each of them is too short by now, and the daemon takes none of them.
        assert!(frontend.set_inflight_fd(&shape, file.as_raw_fd()).is_err());
        let (shape, file) = frontend.get_inflight_fd(&wanted).unwrap();
        frontend.set_inflight_fd(&shape, file.as_raw_fd()).unwrap();
    }

    let daemon = with_inflight(vec![0; 4096]);
    daemon.inject_at_inflight(1, InflightFault::NoDescriptor);
    daemon.inject_at_inflight(2, InflightFault::Refuse);
    let (mut frontend, _) = negotiated(&daemon);
    assert!(frontend.get_inflight_fd(&wanted).is_err());
    frontend.get_features().unwrap();
    assert!(frontend.get_inflight_fd(&wanted).is_err());
    daemon.wait_disconnected(LIMIT).unwrap();
}

/// Bytes of one message, as the specification has them.
fn message(request: FrontendReq, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = [request.into(), flags, body.len() as u32].map(u32::to_ne_bytes);
    [&header.concat(), body].concat()
}

#[test]
fn a_buffer_that_cannot_be_is_refused_by_an_answer_or_a_hang_up() {
    let reply_ack = VhostUserProtocolFeatures::REPLY_ACK.bits();
    let inflight = VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits();
    let mut whole = [272_u64, 0].map(u64::to_ne_bytes).concat();
    whole.extend([1_u16, QUEUE_SIZE, 0, 0].map(u16::to_ne_bytes).concat());
    // No descriptor, no whole body.
    for body in [&whole[..], &whole[..20]] {
        for features in [inflight, inflight | reply_ack] {
            let daemon = with_inflight(vec![0; 4096]);
            let mut stream: UnixStream = daemon.connect().unwrap();
            let negotiate = FrontendReq::SET_PROTOCOL_FEATURES;
            let negotiate = message(negotiate, 1, &features.to_ne_bytes());
            stream.write_all(&negotiate).unwrap();
            let set = message(FrontendReq::SET_INFLIGHT_FD, 1 | 8, body);
            stream.write_all(&set).unwrap();
            let mut answer = [0; 20];
            match features & reply_ack {
                0 => {
                    assert_eq!(stream.read(&mut answer).unwrap(), 0);
                }
                _ => {
                    let refused = 1_u64.to_ne_bytes();
                    let expected = message(FrontendReq::SET_INFLIGHT_FD, 1 | 4, &refused);
                    stream.read_exact(&mut answer).unwrap();
                    assert_eq!(answer[..], expected);
                }
            }
        }
    }
}

#[test]
fn who_does_not_ask_for_it_is_offered_none_of_it() {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (mut frontend, offered) = negotiated(&daemon);
    let opt_in = VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::BACKEND_SEND_FD;
    assert!(!offered.intersects(opt_in));
    // A frontend that acknowledges it all the same is hung up on.
    let all = offered | opt_in;
    frontend.set_protocol_features(all).unwrap();
    let wanted = VhostUserInflight::new(0, 0, 1, QUEUE_SIZE);
    assert!(frontend.get_inflight_fd(&wanted).is_err());
    daemon.wait_disconnected(LIMIT).unwrap();
}
