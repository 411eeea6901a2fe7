//! What is on the disk: sizes that are no multiple of a sector, read-only disks, several queues.

use std::os::unix::fs::FileExt;

use guest_memory_shm::mock::BlkError;
use nix::sys::signal::Signal;
use vm_memory::GuestAddress;

use super::frontend::{DATA, Guest, WRITE};
use super::*;

const RO: u64 = 1 << 5;
const DISCARD_AND_ZERO: u64 = 1 << 13 | 1 << 14;

#[track_caller]
fn io_error<T: std::fmt::Debug>(result: Result<T, BlkError>) {
    assert!(
        matches!(result, Err(BlkError::Status { status: 1, .. })),
        "{result:?}"
    );
}

#[test]
fn an_image_of_any_size_keeps_it_and_loses_nothing() {
    for len in [1, 511, 512, 513, 1000, 4096, 4097, 70_000] {
        let place = Place::new();
        let image = place.image(len);
        let daemon = place.daemon(&image);
        let mut guest = Guest::connect(daemon.socket());
        let capacity = len.next_multiple_of(512);
        assert_eq!(guest.capacity(), capacity as u64);

        // The disk is the image, and zeroes after it.
        let mut expected = pattern(0, len);
        expected.resize(capacity, 0);
        let size = u32::try_from(capacity).unwrap();
        assert_eq!(guest.read(0, size).unwrap(), expected);
        let sectors = u64::try_from(capacity / 512).unwrap();
        io_error(guest.read(sectors, 512));
        io_error(guest.read(0, size + 512));
        io_error(guest.read(u64::MAX / 512, 1024));
        io_error(guest.read(0, 100));

        // Zeroes may be written there, and nothing else: then nothing at all is written.
        let mut next = pattern(1, capacity);
        if len < capacity {
            io_error(guest.write(0, &next));
            next[len..].fill(0);
            next[capacity - 1] = 1;
            io_error(guest.write(0, &next));
            assert_eq!(guest.read(0, size).unwrap(), expected);
            next[capacity - 1] = 0;
        }
        io_error(guest.write(1, &next));
        guest.write(0, &next).unwrap();
        guest.drivers[0].flush().unwrap();
        assert_eq!(guest.read(0, size).unwrap(), next);
        assert_eq!(fs::read(&image).unwrap(), next[..len]);

        // Neither discarding nor zeroing changes the length.
        let mut queue = guest.into_raw();
        let whole = [(0, size / 512, 0)];
        assert_eq!(queue.ranges(11, &whole).status, 0);
        assert_eq!(fs::read(&image).unwrap(), vec![0; len]);
        assert_eq!(queue.ranges(13, &whole).status, 0);
        assert_eq!(fs::read(&image).unwrap(), vec![0; len]);
        daemon.end(Signal::SIGTERM);
    }
}

#[test]
fn a_read_only_disk_says_so_and_is_never_written() {
    let place = Place::new();
    let image = place.image(8192);
    let daemon = BlkDaemon::start(&place.socket(), &image, &["--read-only"]);
    let mut guest = Guest::connect(daemon.socket());
    assert_eq!(guest.features() & (RO | DISCARD_AND_ZERO), RO);
    assert_eq!(guest.read(0, 8192).unwrap(), pattern(0, 8192));
    io_error(guest.write(0, &[7; 512]));
    guest.drivers[0].flush().unwrap();
    let mut queue = guest.into_raw();
    for kind in [11, 13] {
        assert_eq!(queue.ranges(kind, &[(0, 1, 0)]).status, 1);
    }
    assert_eq!(fs::read(&image).unwrap(), pattern(0, 8192));
    daemon.end(Signal::SIGTERM);

    // The same without the option.
    let daemon = place.daemon(&image);
    let mut guest = Guest::connect(daemon.socket());
    let features = guest.features() & (RO | DISCARD_AND_ZERO);
    assert_eq!(features, DISCARD_AND_ZERO);
    guest.write(0, &[7; 512]).unwrap();
    assert_eq!(fs::read(&image).unwrap()[..512], [7; 512]);
    daemon.end(Signal::SIGTERM);
}

#[test]
fn several_queues_carry_requests_at_the_same_time() {
    const LEN: u32 = 64 << 10;
    const ROUNDS: u64 = 50;
    let place = Place::new();
    let image = place.path("disk.img");
    let queues = 4u64;
    sparse(&image, queues * ROUNDS * u64::from(LEN));
    let daemon = BlkDaemon::start(&place.socket(), &image, &["--queues", "4"]);
    let mut guest = Guest::connect_with(daemon.socket(), 4);
    assert_eq!(guest.queues(), 4);
    let memory = &guest.memory;
    std::thread::scope(|scope| {
        for (queue, driver) in (0..queues).zip(&mut guest.drivers) {
            scope.spawn(move || {
                let [out, back] =
                    [0, 1].map(|half| GuestAddress(DATA.0 + (2 * queue + half) * u64::from(LEN)));
                for round in 0..ROUNDS {
                    let bytes = pattern(queue * ROUNDS + round, LEN as usize);
                    let sector = (round * queues + queue) * u64::from(LEN / 512);
                    memory.write_slice(&bytes, out).unwrap();
                    // In two pieces, the second one first.
                    let half = GuestAddress(out.0 + u64::from(LEN / 2));
                    let pieces = [(half, LEN / 2), (out, LEN / 2)];
                    driver.write(sector, &pieces).unwrap();
                    let half = GuestAddress(back.0 + u64::from(LEN / 2));
                    driver
                        .read(sector, &[(half, LEN / 2), (back, LEN / 2)])
                        .unwrap();
                    let mut found = vec![0; LEN as usize];
                    memory.read_slice(&mut found, back).unwrap();
                    assert!(found == bytes, "queue {queue} in round {round}");
                }
            });
        }
    });
    let file = File::open(&image).unwrap();
    let mut found = vec![0; LEN as usize];
    for place in 0..queues * ROUNDS {
        let (round, queue) = (place / queues, place % queues);
        file.read_exact_at(&mut found, place * u64::from(LEN))
            .unwrap();
        let mut expected = pattern(queue * ROUNDS + round, LEN as usize);
        expected.rotate_left(LEN as usize / 2);
        assert!(found == expected, "{place}");
    }
    daemon.end(Signal::SIGTERM);
}

#[test]
fn the_serial_is_the_name_of_the_image() {
    for (name, serial) in [
        ("short", &b"short\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..]),
        ("a-name-of-more-than-20-bytes", b"a-name-of-more-than-"),
    ] {
        let place = Place::new();
        let image = place.path(name);
        sparse(&image, 512);
        let daemon = place.daemon(&image);
        let mut queue = Guest::connect(daemon.socket()).into_raw();
        let used = queue.request(8, 0, 20, WRITE);
        assert_eq!((used.status, used.len), (0, 21));
        let mut found = [0; 20];
        queue.guest.memory.read_slice(&mut found, DATA).unwrap();
        assert_eq!(found, serial);
        assert_eq!(queue.request(8, 0, 19, WRITE).status, 1);
        daemon.end(Signal::SIGTERM);
    }
}
