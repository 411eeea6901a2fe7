//! What a thousand reconnections leave: nothing.

use std::collections::VecDeque;
use std::fs;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use super::*;
use crate::isolation::in_own_process;
use crate::proc::{maps, thread_count};

const TIMES: usize = 1000;
/// How many writes are under way at a time.
const DEPTH: u64 = 4;

/// What the process has.
#[derive(Debug)]
struct Counts {
    descriptors: usize,
    threads: usize,
    shared_mappings: usize,
    all_mappings: usize,
}

impl Counts {
    fn now() -> Self {
        let maps = maps();
        let shared = maps.iter().filter(|line| line.permissions.ends_with('s'));
        Self {
            descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
            threads: thread_count(),
            shared_mappings: shared.count(),
            all_mappings: maps.len(),
        }
    }

    /// A leak would be one each time; the C library keeps stacks and heaps, few or none.
    fn exceeds(&self, before: &Self) -> bool {
        let few = TIMES / 10;
        self.descriptors > before.descriptors
            || self.threads > before.threads
            || self.shared_mappings > before.shared_mappings
            || self.all_mappings > before.all_mappings + few
    }
}

/// Writes numbers to the disk, of which `DEPTH` are under way at all times, until nobody wants to
/// know of the next one that is completed. Tells how many were written.
fn write(
    memory: &GuestMemoryShm,
    driver: &mut BlkDriver<PublishedMemory>,
    completed: &Sender<()>,
) -> u64 {
    let buffer = |number| GuestAddress(BUFFER.0 + number % DEPTH * u64::from(SECTOR));
    let mut under_way = VecDeque::new();
    let mut next = 0;
    while completed.send(()).is_ok() {
        while (under_way.len() as u64) < DEPTH {
            memory.write_obj::<u64>(next, buffer(next)).unwrap();
            let sector = next % DEPTH;
            let request = driver.submit_write(sector, &[(buffer(next), SECTOR)]);
            under_way.push_back(request.unwrap());
            next += 1;
        }
        driver.wait(under_way.pop_front().unwrap()).unwrap();
    }
    driver.wait_all().unwrap();
    next
}

#[test]
fn a_thousand_reconnections_under_writes_leave_nothing() {
    in_own_process(|| {
        let place = Place::new();
        let daemon = place.serve(MockDaemon::builder());
        let options = options().with_device_in_order();
        let session = VhostUserSession::connect(place.socket(), options).unwrap();
        let mut vmm = Vmm::started(session);
        vmm.copies(1, BUFFER, GuestAddress(BUFFER.0 + MIB / 2));
        let Vmm {
            space,
            disk,
            mut driver,
        } = vmm;
        let memory = space.published().memory();
        let reconnect = || {
            daemon.hang_up();
            space.reconnect_session(&disk).unwrap();
            // It keeps them.
            daemon.clear_requests();
        };
        let mut reconnect_under_writes = |times| {
            let (sender, completed) = channel();
            thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let sender = sender;
                    write(&memory, &mut driver, &sender)
                });
                for _ in 0..times {
                    // It goes on after each.
                    while completed.try_recv().is_ok() {}
                    completed.recv_timeout(PATIENCE).unwrap();
                    reconnect();
                }
                drop(completed);
                let written = writer.join().unwrap();
                for last in written - DEPTH..written {
                    let mut found = [0; 8];
                    let place = last % DEPTH * u64::from(SECTOR);
                    daemon.disk().read(place, &mut found).unwrap();
                    assert_eq!(u64::from_le_bytes(found), last);
                }
            });
        };
        // What a process makes once stays.
        reconnect_under_writes(10);
        let before = Counts::now();
        reconnect_under_writes(TIMES);
        // A thread that was joined may still be listed, here and before.
        let deadline = Instant::now() + PATIENCE;
        let mut after = Counts::now();
        while after.exceeds(&before) && Instant::now() < deadline {
            thread::yield_now();
            after = Counts::now();
        }
        assert!(!after.exceeds(&before), "{after:?} {before:?}");
    });
}
