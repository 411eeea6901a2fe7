//! Requests that are wrong in each way that there is, and discarding and zeroing.

use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;
use vm_memory::GuestAddress;

use super::frontend::{DATA, Guest, NEXT, RawQueue, Used, WRITE};
use super::*;

const IN: u32 = 0;
const OUT: u32 = 1;
const DISCARD: u32 = 11;
const ZERO: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const UNTOUCHED: u8 = 0xaa;

const HEADER: u64 = RawQueue::HEADER;
const STATUS: u64 = RawQueue::STATUS;
const INDIRECT: u16 = 4;

#[test]
fn no_chain_harms_the_daemon() {
    let place = Place::new();
    let image = place.image(8192);
    let daemon = place.daemon(&image);
    let mut queue = Guest::connect(daemon.socket()).into_raw();
    // Where the table for indirect chains is: one that leads into itself.
    let table = 0x3_0000;
    for index in 0..4u64 {
        let at = |offset| GuestAddress(table + index * 16 + offset);
        queue.guest.memory.write_obj(HEADER, at(0)).unwrap();
        queue.guest.memory.write_obj(16u32, at(8)).unwrap();
        queue.guest.memory.write_obj(NEXT, at(12)).unwrap();
        queue.guest.memory.write_obj(0u16, at(14)).unwrap();
    }
    let outside = 1 << 40;
    let data = DATA.0;
    let status = (STATUS, 1, WRITE, 0);
    let header = (HEADER, 16, NEXT, 1);
    for (name, kind, chain, expected) in [
        // These have no place for a status.
        ("only a header", IN, &[(HEADER, 16, 0, 0)][..], UNTOUCHED),
        ("nothing at all", IN, &[(HEADER, 0, 0, 0)], UNTOUCHED),
        (
            "an empty status",
            IN,
            &[header, (STATUS, 0, WRITE, 0)],
            UNTOUCHED,
        ),
        (
            "a status outside",
            IN,
            &[header, (outside, 1, WRITE, 0)],
            UNTOUCHED,
        ),
        (
            "a status at the end of all addresses",
            IN,
            &[header, (u64::MAX, 2, WRITE, 0)],
            UNTOUCHED,
        ),
        (
            "a chain that loops",
            IN,
            &[header, (data, 512, NEXT, 0)],
            UNTOUCHED,
        ),
        (
            "a link out of the table",
            IN,
            &[(HEADER, 16, NEXT, 16)],
            UNTOUCHED,
        ),
        (
            "an indirect table that loops",
            IN,
            &[(table, 64, INDIRECT, 0)],
            UNTOUCHED,
        ),
        (
            "an indirect table outside",
            IN,
            &[(outside, 64, INDIRECT, 0)],
            UNTOUCHED,
        ),
        (
            "an indirect table of no entry",
            IN,
            &[(table, 8, INDIRECT, 0)],
            UNTOUCHED,
        ),
        // These have one.
        ("no header", IN, &[status], IOERR),
        (
            "a short header",
            IN,
            &[(HEADER, 15, NEXT, 1), status],
            IOERR,
        ),
        (
            "a header outside",
            IN,
            &[(outside, 16, NEXT, 1), status],
            IOERR,
        ),
        (
            "no whole sector",
            IN,
            &[header, (data, 511, NEXT | WRITE, 2), status],
            IOERR,
        ),
        (
            "data outside",
            IN,
            &[header, (outside, 512, NEXT | WRITE, 2), status],
            IOERR,
        ),
        (
            "data that wraps",
            IN,
            &[header, (u64::MAX - 1, 512, NEXT | WRITE, 2), status],
            IOERR,
        ),
        (
            "data across the end",
            IN,
            &[header, ((4 << 20) - 256, 512, NEXT | WRITE, 2), status],
            IOERR,
        ),
        (
            "more than the disk",
            IN,
            &[header, (data, 8704, NEXT | WRITE, 2), status],
            IOERR,
        ),
        (
            "much more",
            IN,
            &[header, (data, 0xffff_fe00, NEXT | WRITE, 2), status],
            IOERR,
        ),
        (
            "data outside to write",
            OUT,
            &[header, (outside, 512, NEXT, 2), status],
            IOERR,
        ),
        ("an unknown type", 99, &[header, status], UNSUPP),
        ("zoned commands", 15, &[header, status], UNSUPP),
        ("reading nothing", IN, &[header, status], OK),
        (
            "a status after the data",
            IN,
            &[header, (STATUS - 512, 513, WRITE, 0)],
            OK,
        ),
        (
            "a header in pieces",
            IN,
            &[(HEADER, 3, NEXT, 1), (HEADER + 3, 13, NEXT, 2), status],
            OK,
        ),
        (
            "a chain that loops after its status",
            IN,
            &[header, (STATUS, 1, WRITE | NEXT, 0)],
            IOERR,
        ),
    ] {
        queue.put_header(kind, 0);
        let used = queue.chain(chain);
        assert_eq!(used.status, expected, "{name}: {used:?}");
        // The daemon is alive, and nothing has happened to the disk.
        assert_eq!(
            queue.request(IN, 15, 512, WRITE),
            Used {
                len: 513,
                status: OK
            },
            "{name}"
        );
        let mut sector = [0; 512];
        queue.guest.memory.read_slice(&mut sector, DATA).unwrap();
        assert_eq!(sector, pattern(0, 8192)[7680..], "{name}");
    }
    for sector in [16, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        for (kind, flags) in [(IN, WRITE), (OUT, 0)] {
            assert_eq!(queue.request(kind, sector, 512, flags).status, IOERR);
        }
    }
    assert_eq!(fs::read(&image).unwrap(), pattern(0, 8192));
    daemon.end(Signal::SIGTERM);
}

#[test]
fn ranges_are_checked_before_any_of_them_is_touched() {
    let place = Place::new();
    let image = place.image(8192);
    let daemon = place.daemon(&image);
    let mut queue = Guest::connect(daemon.socket()).into_raw();
    let many = vec![(0, 1, 0); 33];
    for (kind, ranges, expected) in [
        (DISCARD, &[(0, 1, 0), (16, 1, 0)][..], IOERR),
        (ZERO, &[(0, 1, 0), (16, 1, 0)], IOERR),
        (ZERO, &[(0, 1, 0), (0, 17, 0)], IOERR),
        (ZERO, &[(0, 1, 0), (u64::MAX, 1, 0)], IOERR),
        (ZERO, &[(0, 1, 0), (0, u32::MAX, 0)], IOERR),
        (ZERO, &[(0, 1, 0), (0, 1, 2)], UNSUPP),
        // Only zeroing knows the flag "unmap".
        (DISCARD, &[(0, 1, 0), (0, 1, 1)], UNSUPP),
        (DISCARD, &[], IOERR),
        (ZERO, &many, IOERR),
    ] {
        assert_eq!(
            queue.ranges(kind, ranges).status,
            expected,
            "{kind} {ranges:?}"
        );
    }
    for len in [1, 15, 17] {
        assert_eq!(queue.request(ZERO, 0, len, 0).status, IOERR);
    }
    assert_eq!(fs::read(&image).unwrap(), pattern(0, 8192));
    assert_eq!(queue.ranges(ZERO, &many[..32]).status, OK);
    daemon.end(Signal::SIGTERM);
}

/// Discards and zeroes an image in `place`, with and without its space given back.
fn discard_and_zero(place: &Place) {
    const LEN: usize = 1 << 20;
    let image = place.image(LEN);
    let blocks = || {
        File::open(&image).unwrap().sync_all().unwrap();
        fs::metadata(&image).unwrap().blocks() * 512
    };
    let all = blocks();
    assert!(all >= LEN as u64);
    let daemon = place.daemon(&image);
    let mut queue = Guest::connect(daemon.socket()).into_raw();
    let mut expected = pattern(0, LEN);
    let quarter = u32::try_from(LEN / 512 / 4).unwrap();
    let bytes = LEN / 4;
    for (index, (kind, flags, freed)) in [(DISCARD, 0, 1), (ZERO, 0, 1), (ZERO, 1, 2)]
        .into_iter()
        .enumerate()
    {
        let sector = index as u64 * u64::from(quarter);
        assert_eq!(queue.ranges(kind, &[(sector, quarter, flags)]).status, OK);
        expected[index * bytes..][..bytes].fill(0);
        assert!(fs::read(&image).unwrap() == expected, "{index}");
        // File systems need some blocks to say where others are.
        let left = all - freed * bytes as u64;
        assert!(blocks().abs_diff(left) <= 64 << 10, "{index}");
    }
    // Parts of a block, in two ranges of one request.
    let last = u64::from(3 * quarter);
    let parts = [(last + 1, 1, 0), (last + 5, 2, 1)];
    assert_eq!(queue.ranges(ZERO, &parts).status, OK);
    for (start, sectors, _) in parts {
        let start = usize::try_from(start).unwrap() * 512;
        expected[start..start + sectors as usize * 512].fill(0);
    }
    assert!(fs::read(&image).unwrap() == expected);
    // It reads the same to the guest, and is writable again.
    let len = u32::try_from(LEN).unwrap();
    assert_eq!(queue.request(IN, 0, len, WRITE).status, OK);
    let mut found = vec![1; LEN];
    queue.guest.memory.read_slice(&mut found, DATA).unwrap();
    assert!(found == expected);
    queue
        .guest
        .memory
        .write_slice(&pattern(1, LEN), DATA)
        .unwrap();
    assert_eq!(queue.request(OUT, 0, len, 0).status, OK);
    assert!(fs::read(&image).unwrap() == pattern(1, LEN));
    daemon.end(Signal::SIGTERM);
}

#[test]
fn discarding_gives_space_back_and_zeroing_only_when_told() {
    discard_and_zero(&Place::new());
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_zero_by_itself() {
    // tmpfs has holes, but no FALLOC_FL_ZERO_RANGE.
    discard_and_zero(&Place::in_shm());
}
