//! Data between guest memory and the disk.

use super::*;
use std::os::unix::net::UnixStream;

pub(super) fn ram(ranges: &[(u64, usize)]) -> GuestMemoryShm {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(start, size)| (GuestAddress(*start), *size))
        .collect();
    GuestMemoryShm::from_ranges(&ranges).unwrap()
}

/// A session that the daemon has all of `memory` by.
pub(super) fn session(socket: UnixStream, memory: &GuestMemoryShm) -> VhostUserSession {
    let mut session = VhostUserSession::on_socket(socket, SessionOptions::new(DISK)).unwrap();
    session.update_memory(memory).unwrap();
    session
}

pub(super) fn driver(
    memory: &GuestMemoryShm,
    rings: GuestAddress,
    size: u16,
) -> BlkDriver<&GuestMemoryShm> {
    let driver = BlkDriver::new(memory, rings, size).unwrap();
    driver.with_deadline(LIMIT)
}

pub(super) fn start(
    session: &mut VhostUserSession,
    index: u32,
    driver: &BlkDriver<&GuestMemoryShm>,
) {
    let ring = driver.session_ring().unwrap();
    session.start_ring(index, ring).unwrap();
}

#[test]
fn the_whole_disk_goes_through_two_regions_with_requests_in_flight() {
    const SIZE: usize = 64 * 1024;
    let memory = ram(&[(0, 1 << 20), (1 << 30, 1 << 20)]);
    let daemon = MockDaemon::builder()
        .with_disk_size(SIZE as u64)
        .start_unnamed()
        .unwrap();
    let mut session = session(daemon.connect().unwrap(), &memory);
    let config = session.config(0, 36).unwrap();
    assert_eq!(config[..8], (SIZE as u64 / 512).to_le_bytes());
    assert_eq!(config[12..16], 126_u32.to_le_bytes()); // seg_max
    assert_eq!(config[20..24], 512_u32.to_le_bytes()); // blk_size
    assert_eq!(config[34..], 1_u16.to_le_bytes()); // num_queues
    assert_eq!(session.rings(), 1);

    let mut driver = driver(&memory, RINGS, 64);
    start(&mut session, 0, &driver);
    let data = pattern(SIZE, 0x5a);
    let low = GuestAddress(0x80000);
    let high = GuestAddress((1 << 30) + 0x123);
    memory.write_slice(&data[..SIZE / 2], low).unwrap();
    memory.write_slice(&data[SIZE / 2..], high).unwrap();

    // Eight requests at once, each with one buffer in either region.
    let buffers = |index: u64| {
        [
            (GuestAddress(low.0 + index * 4096), 4096),
            (GuestAddress(high.0 + index * 4096), 4096),
        ]
    };
    for index in 0..8 {
        driver.submit_write(index * 16, &buffers(index)).unwrap();
    }
    driver.wait_all().unwrap();
    driver.flush().unwrap();
    assert_eq!(daemon.disk().flush_count(), 1);
    let mut disk = vec![0; SIZE];
    daemon.disk().read(0, &mut disk).unwrap();
    for index in 0..8 {
        let (from, half) = (index * 4096, SIZE / 2);
        let on_disk = &disk[index * 8192..][..8192];
        let expected = [&data[from..][..4096], &data[half + from..][..4096]].concat();
        assert_eq!(on_disk, expected, "request {index}");
    }

    // The disk changes without the device, and the guest sees it, whichever request it waits for.
    let changed = pattern(SIZE, 0xc3);
    daemon.disk().write(0, &changed).unwrap();
    let requests: Vec<_> = (0..8)
        .map(|index| driver.submit_read(index * 16, &buffers(index)).unwrap())
        .collect();
    for request in requests.into_iter().rev() {
        driver.wait(request).unwrap();
        assert!(matches!(driver.wait(request), Err(BlkError::UnknownRequest(r)) if r == request));
    }
    let mut back = vec![0; SIZE];
    for index in 0..8 {
        for (half, (addr, length)) in buffers(index as u64).into_iter().enumerate() {
            let at = index * 8192 + half * 4096;
            memory
                .read_slice(&mut back[at..at + length as usize], addr)
                .unwrap();
        }
    }
    assert_eq!(back, changed);
    assert_eq!(driver.in_flight(), 0);
}

#[test]
fn a_small_queue_is_reused_many_times_and_refuses_more_than_it_holds() {
    let memory = ram(&[(0, 1 << 20)]);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut session = session(daemon.connect().unwrap(), &memory);
    let mut driver = driver(&memory, RINGS, 4);
    let buffer = GuestAddress(0x10000);

    // No device serves the queue yet: what is submitted stays in flight.
    let first = driver.submit_write(0, &[(buffer, 512)]).unwrap();
    let error = driver.submit_write(0, &[(buffer, 512)]).unwrap_err();
    assert!(
        matches!(
            error,
            BlkError::QueueFull {
                needed: 3,
                free: 1,
                ..
            }
        ),
        "{error}"
    );
    let error = driver.submit_read(0, &[(buffer, 512); 3]).unwrap_err();
    assert!(
        matches!(
            error,
            BlkError::QueueFull {
                needed: 5,
                free: 1,
                ..
            }
        ),
        "{error}"
    );

    start(&mut session, 0, &driver);
    driver.wait(first).unwrap();
    let error = driver.submit_read(0, &[(buffer, 0)]).unwrap_err();
    assert!(matches!(error, BlkError::EmptyBuffer(addr) if addr == buffer));
    for round in 0..300u64 {
        memory.write_obj(round, buffer).unwrap();
        driver.write(round % 8, &[(buffer, 512)]).unwrap();
        let mut stored = [0; 8];
        daemon.disk().read(round % 8 * 512, &mut stored).unwrap();
        assert_eq!(u64::from_le_bytes(stored), round);
    }
    assert_eq!(session.stop_ring(0).unwrap(), 301);
}

#[test]
fn a_request_beyond_the_disk_is_an_io_error_and_the_queue_goes_on() {
    let memory = ram(&[(0, 1 << 20)]);
    let daemon = MockDaemon::builder()
        .with_disk_size(1024)
        .start_unnamed()
        .unwrap();
    let mut session = session(daemon.connect().unwrap(), &memory);
    let mut driver = driver(&memory, RINGS, 16);
    start(&mut session, 0, &driver);
    let buffer = GuestAddress(0x10000);
    let error = driver.write(1, &[(buffer, 1024)]).unwrap_err();
    assert!(
        matches!(error, BlkError::Status { status: 1, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("status 1"), "{error}");
    // An address outside the daemon's table.
    let error = driver.read(0, &[(GuestAddress(1 << 40), 512)]).unwrap_err();
    assert!(
        matches!(error, BlkError::Status { status: 1, .. }),
        "{error}"
    );
    driver.read(1, &[(buffer, 512)]).unwrap();
}

#[test]
fn two_queues_work_side_by_side() {
    let memory = ram(&[(0, 1 << 20)]);
    let daemon = MockDaemon::builder()
        .with_queues(2)
        .start_unnamed()
        .unwrap();
    let mut session = session(daemon.connect().unwrap(), &memory);
    assert_eq!(session.rings(), 2);
    let mut drivers = [0x1000, 0x9000].map(|rings| driver(&memory, GuestAddress(rings), 16));
    for (index, driver) in (0..).zip(&drivers) {
        start(&mut session, index, driver);
    }
    for round in 0..50u64 {
        for (index, driver) in drivers.iter_mut().enumerate() {
            let buffer = GuestAddress(0x20000 + index as u64 * 512);
            memory.write_slice(&[index as u8 + 1; 512], buffer).unwrap();
            driver
                .submit_write(round * 2 + index as u64, &[(buffer, 512)])
                .unwrap();
        }
        for driver in &mut drivers {
            driver.wait_all().unwrap();
        }
    }
    let mut disk = vec![0; 100 * 512];
    daemon.disk().read(0, &mut disk).unwrap();
    for (index, sector) in disk.chunks(512).enumerate() {
        assert_eq!(sector, [index as u8 % 2 + 1; 512], "sector {index}");
    }
}

#[test]
fn a_driver_refuses_a_bad_place_and_names_it() {
    let memory = ram(&[(0, 0x10000)]);
    for size in [0, 1, 2, 3, 12, 0xffff] {
        let error = BlkDriver::new(&memory, RINGS, size).unwrap_err();
        assert!(
            matches!(error, BlkError::QueueSize(s) if s == size),
            "{error}"
        );
    }
    for addr in [8, 0xff00, 0x10000, u64::MAX - 15] {
        let error = BlkDriver::new(&memory, GuestAddress(addr), 64).unwrap_err();
        assert!(error.to_string().contains(&format!("{addr:#x}")), "{error}");
    }
    assert!(BlkDriver::new(&memory, GuestAddress(0x8000), 64).is_ok());
}
