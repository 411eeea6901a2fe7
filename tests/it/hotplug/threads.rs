//! Threads that do checked I/O through daemons and memory, while regions come and go.

use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_memory_shm::mock::BlkDriver;
use guest_memory_shm::{PublishedMemory, SessionOptions, VhostUserSession};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::isolation::{PAGE, in_own_process};
use crate::proc::leaves_nothing_but_heaps;

const ROUNDS: u64 = 2_000;
const DAEMONS: u64 = 2;
const READERS: u64 = 2;
/// Regions that come and go, in MiB.
const PLACES: [u64; 3] = [16, 18, 64];

/// The pattern of a page, which its address and its turn make.
fn pattern(addr: u64, turn: u64) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    for (at, word) in (0u64..).zip(page.chunks_mut(8)) {
        let value = (addr ^ turn << 32)
            .wrapping_add(at)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&value.to_ne_bytes());
    }
    page
}

/// What the guest may use: readers of the lock have buffers there.
type Usable = RwLock<Vec<u64>>;

/// Writes a page, has the daemon write it to its disk and read it back to another page, and
/// compares. Both pages lie in regions that may be used now, and are the worker's own.
fn work(
    worker: u64,
    space: &AddressSpace,
    id: &ListenerId<VhostUserSession>,
    usable: &Usable,
    ended: &AtomicBool,
) -> u64 {
    let memory = space.published();
    let rings = GuestAddress(0x1000 + worker * 0x4000);
    let mut driver = BlkDriver::new(memory.clone(), rings, 16)
        .unwrap()
        .with_deadline(PATIENCE);
    let ring = driver.session_ring().unwrap();
    let start = |session: &mut VhostUserSession| session.start_ring(0, ring);
    space.with_listener(id, start).unwrap().unwrap();
    let mut turn = 0;
    while !ended.load(Ordering::Relaxed) {
        let places = usable.read().unwrap();
        turn += 1;
        let place = |nth: u64| places[((turn + nth) % places.len() as u64) as usize];
        let page = |nth: u64| GuestAddress(place(nth) * MIB + (1 + 2 * worker + nth) * 0x8000);
        let (one, other) = (page(0), page(1));
        let written = pattern(one.0, turn);
        // A batch of a virtqueue: the memory is taken once.
        let held = memory.memory();
        held.write_slice(&written, one).unwrap();
        held.write_slice(&[0; PAGE as usize], other).unwrap();
        let sector = turn % 8 * (PAGE / 512);
        driver.write(sector, &[(one, PAGE as u32)]).unwrap();
        driver.read(sector, &[(other, PAGE as u32)]).unwrap();
        let mut read = [0; PAGE as usize];
        held.read_slice(&mut read, other).unwrap();
        assert!(
            read == written,
            "worker {worker}, turn {turn}: {one:?} by way of {other:?}"
        );
    }
    turn
}

/// Looks at memory without a daemon: every region that is there has its pattern.
fn look(memory: &PublishedMemory, ended: &AtomicBool, seen: &AtomicU64) {
    while !ended.load(Ordering::Relaxed) {
        let held = memory.memory();
        for region in GuestMemoryBackend::iter(&*held).skip(1) {
            let addr = region.start_addr();
            let stamp: u64 = held.read_obj(addr).unwrap();
            assert_eq!(stamp, addr.0);
            let mut page = [0; PAGE as usize];
            held.read_slice(&mut page, GuestAddress(addr.0 + PAGE))
                .unwrap();
            assert!(page == pattern(addr.0, 0), "{addr:?}");
            seen.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn plug(place: u64) -> GuestRegionShm {
    let region = region(place);
    let at = vm_memory::MemoryRegionAddress;
    region.write_obj(place * MIB, at(0)).unwrap();
    region
        .write_slice(&pattern(place * MIB, 0), at(PAGE))
        .unwrap();
    region
}

fn scenario() {
    let (space, usable, ended) = (space(), RwLock::new(vec![0]), AtomicBool::new(false));
    let daemons: Vec<_> = (0..DAEMONS)
        .map(|_| {
            MockDaemon::builder()
                .with_disk_size(64 << 10)
                .start_unnamed()
                .unwrap()
        })
        .collect();
    let devices: Vec<_> = daemons
        .iter()
        .map(|daemon| {
            let (socket, options) = (daemon.connect().unwrap(), SessionOptions::new(0));
            let session = VhostUserSession::on_socket(socket, options).unwrap();
            space.attach("device", session).unwrap()
        })
        .collect();
    let seen = AtomicU64::new(0);
    let turns = std::thread::scope(|scope| {
        let (space, usable, ended, seen) = (&space, &usable, &ended, &seen);
        // However this ends, the others end too.
        let _end = EndOnDrop(ended);
        let workers: Vec<_> = (0u64..)
            .zip(devices)
            .map(|(worker, id)| {
                scope.spawn(move || {
                    let _end = EndOnDrop(ended);
                    work(worker, space, &id, usable, ended)
                })
            })
            .collect();
        for _ in 0..READERS {
            let memory = space.published();
            scope.spawn(move || {
                let _end = EndOnDrop(ended);
                look(&memory, ended, seen);
            });
        }
        for round in 0..ROUNDS {
            if ended.load(Ordering::Relaxed) {
                break;
            }
            let place = PLACES[(round % 3) as usize];
            space.insert(plug(place)).told_all();
            usable.write().unwrap().push(place);
            if round % 3 == 2 {
                for place in PLACES {
                    usable.write().unwrap().retain(|other| *other != place);
                    space.remove((GuestAddress(place * MIB), MIB)).told_all();
                }
                assert_eq!(published(space).len(), 1);
            }
        }
        ended.store(true, Ordering::Relaxed);
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .sum::<u64>()
    });
    assert!(turns > ROUNDS / 10, "{turns} turns only");
    assert!(seen.into_inner() > 0);
    for daemon in &daemons {
        assert_eq!(mapped(daemon), published(&space));
    }
}

struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn io_is_right_during_thousands_of_changes() {
    in_own_process(|| leaves_nothing_but_heaps(scenario));
}
