//! Daemons that are killed while they do I/O: what was completed is on the disk, and what was
//! under way is completed later, once.

use std::fs;
use std::path::Path;

use guest_memory_shm::mock::{BlkError, RequestId};

use super::*;
use crate::mock::inflight::STEPS;

/// Bytes of a request, and how many there are: half of them in the region that is plugged.
const BLOCK: u32 = 64 << 10;
const BLOCKS: u64 = 5;
/// So many bytes in a second are so few that a daemon is killed long before all are written.
const SLOW: Option<u64> = Some(4 << 10);

const LEFT_OUT: [Features; 4] = [
    Features::empty(),
    Features::REPLY_ACK,
    Features::CONFIGURE_MEM_SLOTS,
    Features::REPLY_ACK.union(Features::CONFIGURE_MEM_SLOTS),
];

fn content(round: u64, block: u64) -> Vec<u8> {
    vec![(1 + round * BLOCKS + block) as u8; BLOCK as usize]
}

impl Vmm {
    /// Has blocks written, without waiting for it.
    fn submit(&mut self, round: u64, blocks: impl Iterator<Item = u64>) -> Vec<(u64, RequestId)> {
        let memory = self.space.published().memory();
        let mut submit = |block| {
            let half = if block % 2 == 0 { MIB / 2 } else { PLUG.0 };
            let buffer = GuestAddress(half + block / 2 * u64::from(BLOCK));
            let content = content(round, block);
            memory.write_slice(&content, buffer).unwrap();
            let sector = block * u64::from(BLOCK / SECTOR);
            let request = self.driver.submit_write(sector, &[(buffer, BLOCK)]);
            (block, request.unwrap())
        };
        blocks.map(&mut submit).collect()
    }

    /// Those that are not completed, once the daemon is gone; the others are no more waited for.
    fn left_of(mut self, requests: &[(u64, RequestId)]) -> (Self, Vec<(u64, RequestId)>) {
        self.driver = self.driver.with_deadline(Duration::ZERO);
        let mut left = requests.to_vec();
        left.retain(|(_, request)| match self.driver.wait(*request) {
            Ok(()) | Err(BlkError::UnknownRequest(_)) => false,
            Err(BlkError::TimedOut { .. }) => true,
            Err(error) => panic!("{error}"),
        });
        self.driver = self.driver.with_deadline(PATIENCE);
        (self, left)
    }

    /// Waits for these, each of which is completed once.
    fn wait_once(&mut self, requests: &[(u64, RequestId)]) {
        for (_, request) in requests {
            self.driver.wait(*request).unwrap();
            let again = self.driver.wait(*request);
            assert!(matches!(again, Err(BlkError::UnknownRequest(_))));
        }
        assert_eq!(self.driver.in_flight(), 0);
    }

    /// Has the device reset, and these submitted again, as another guest would do it.
    fn submit_again(&mut self, round: u64, left: &[(u64, RequestId)]) -> Vec<(u64, RequestId)> {
        self.with(VhostUserSession::forget_rings);
        self.driver.reset().unwrap();
        self.with(|session| session.start_ring(0, self.ring()))
            .unwrap();
        self.submit(round, left.iter().map(|(block, _)| *block))
    }

    /// The other way: all that is left is made available again, in the ring as it is.
    fn resubmit(&mut self) {
        self.with(VhostUserSession::forget_rings);
        self.driver.resubmit().unwrap();
        let ring = self.ring().with_base(self.driver.used_index());
        self.with(|session| session.start_ring(0, ring)).unwrap();
    }
}

#[track_caller]
fn holds(disk: &[u8], round: u64, block: u64) {
    let start = block as usize * BLOCK as usize;
    let found = &disk[start..start + BLOCK as usize];
    assert!(found == content(round, block), "{round}, {block}");
}

/// An image, and a VMM with a ring at a slow daemon that serves it. `None`: the test is skipped.
fn at_slow_daemon(image: &Path, options: SessionOptions) -> Option<(Vmm, StorageDaemon)> {
    fs::write(image, vec![0; 1 << 20]).unwrap();
    let daemon = StorageDaemon::start(image, SLOW)?;
    let vmm = Vmm::started(VhostUserSession::connect(&daemon.socket, options).unwrap());
    vmm.space.insert(region(PLUG)).told_all();
    Some((vmm, daemon))
}

fn killed(mut daemon: StorageDaemon) {
    daemon.process.kill();
}

/// It may complete out of order: the guest submits again what it has no completion for.
#[test]
fn a_daemon_that_is_killed_again_and_again_loses_nothing_that_it_completed() {
    for left_out in LEFT_OUT {
        let place = Place::new();
        let image = place.0.path().join("image");
        let options = options().without_protocol_features(left_out);
        let Some((mut vmm, mut daemon)) = at_slow_daemon(&image, options) else {
            return;
        };
        let agreed = vmm.with(|session| session.protocol_features());
        assert_eq!(agreed & LEFT_OUT[3], LEFT_OUT[3] - left_out);
        for round in 0..4 {
            // Every other one is fast, and killed in the middle of its writes, or after them.
            let slow = round % 2 == 0;
            let requests = vmm.submit(round, 0..BLOCKS);
            vmm.driver.wait(requests[0].1).unwrap();
            killed(daemon);
            let left;
            (vmm, left) = vmm.left_of(&requests);
            assert!(!left.is_empty() || !slow, "{left_out:?}, {round}");
            let disk = fs::read(&image).unwrap();
            for (block, _) in requests.iter().filter(|request| !left.contains(request)) {
                holds(&disk, round, *block);
            }

            daemon = StorageDaemon::start(&image, None).unwrap();
            vmm.space.reconnect_session(&vmm.disk).unwrap();
            assert!(vmm.with(|session| session.needs_reset()));
            let again = match round < 2 {
                true => vmm.submit_again(round, &left),
                false => {
                    vmm.resubmit();
                    left
                }
            };
            vmm.wait_once(&again);
            let disk = fs::read(&image).unwrap();
            (0..BLOCKS).for_each(|block| holds(&disk, round, block));

            // With nothing under way, and another memory when it is back.
            killed(daemon);
            let removed = vmm.space.remove((PLUG, MIB)).unwrap();
            assert!(removed.stale()[0].is(&vmm.disk));
            daemon = StorageDaemon::start(&image, if slow { None } else { SLOW }).unwrap();
            vmm.space.reconnect_session(&vmm.disk).unwrap();
            vmm.submit_again(round, &[]);
            vmm.space.insert(region(PLUG)).told_all();
        }
    }
}

/// With one request at a time any device is in order: it goes on where it was.
#[test]
fn a_request_under_way_at_a_daemon_that_is_killed_is_completed_by_the_next() {
    for left_out in LEFT_OUT {
        let place = Place::new();
        let image = place.0.path().join("image");
        let options = options()
            .with_device_in_order()
            .without_protocol_features(left_out);
        let Some((mut vmm, mut daemon)) = at_slow_daemon(&image, options) else {
            return;
        };
        for round in 0..3 {
            let first = vmm.submit(round, 0..1);
            vmm.wait_once(&first);
            let second = vmm.submit(round, 1..2);
            killed(daemon);
            let left;
            (vmm, left) = vmm.left_of(&second);
            assert_eq!(left, second);
            holds(&fs::read(&image).unwrap(), round, 0);

            daemon = StorageDaemon::start(&image, None).unwrap();
            vmm.space.reconnect_session(&vmm.disk).unwrap();
            assert!(!vmm.with(|session| session.needs_reset()));
            vmm.wait_once(&second);
            let disk = fs::read(&image).unwrap();
            (0..2).for_each(|block| holds(&disk, round, block));

            // With nothing under way, and another memory when it is back.
            killed(daemon);
            let removed = vmm.space.remove((PLUG, MIB)).unwrap();
            assert!(removed.stale()[0].is(&vmm.disk));
            daemon = StorageDaemon::start(&image, SLOW).unwrap();
            vmm.space.reconnect_session(&vmm.disk).unwrap();
            vmm.space.insert(region(PLUG)).told_all();
        }
    }
}

/// Wherever it dies in the middle of four requests, the next connection goes on: in order, or by
/// what is noted in an in-flight buffer.
#[test]
fn each_request_is_completed_once_wherever_a_daemon_dies() {
    let cases = LEFT_OUT.map(|left_out| [(left_out, false), (left_out, true)]);
    for (left_out, notes) in cases.into_iter().flatten() {
        let place = Place::new();
        let mut builder = MockDaemon::builder().with_disk_size(1 << 20);
        let mut options = options().without_protocol_features(left_out);
        match notes {
            true => builder = builder.with_inflight(),
            false => options = options.with_device_in_order(),
        }
        let daemon = builder.start(place.socket()).unwrap();
        let mut vmm = Vmm::started(VhostUserSession::connect(place.socket(), options).unwrap());
        vmm.space.insert(region(PLUG)).told_all();
        let places = STEPS.iter().flat_map(|step| [(*step, 1), (*step, 3)]);
        for (round, (step, nth)) in (0..).zip(places) {
            daemon.hold_requests(nth, step);
            let requests = vmm.submit(round, 0..4);
            daemon.wait_held(PATIENCE).unwrap();
            daemon.hang_up();
            vmm.space.reconnect_session(&vmm.disk).unwrap();
            vmm.wait_once(&requests);
            let mut disk = vec![0; 4 * BLOCK as usize];
            daemon.disk().read(0, &mut disk).unwrap();
            (0..4).for_each(|block| holds(&disk, round, block));
        }
    }
}
