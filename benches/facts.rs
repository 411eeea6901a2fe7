//! Asking for the facts about running RAM: how long `stats` and `extents` take.
//!
//! `cargo bench --bench facts` prints the median times for 64 GiB of RAM around a PCI hole in
//! which 10,000 scattered pages are allocated, for 4 GiB of which all but one page is (so nothing
//! is known without looking), touched and mapped, and for as much that was allocated and never
//! touched.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use guest_memory_shm::{GuestMemoryShm, GuestRange, RamOptions, ram_around_hole};
use nix::fcntl::posix_fallocate;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;

fn main() {
    // Cargo runs benches as tests too.
    let test = std::env::args().any(|arg| arg == "--test");
    let (rounds, populated) = if test { (1, 16 << 20) } else { (9, 4 * GIB) };
    println!(
        "{:<34}{:>12}{:>16}{:>16}",
        "RAM", "stats", "extents, 2 MiB", "extents, 4 KiB"
    );

    let sparse = ram(64 * GIB);
    let mut random = 1u64;
    for _ in 0..if test { 10 } else { 10_000 } {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let page = (random >> 33) % (64 * GIB / PAGE);
        // The hole is as large as the RAM above it.
        let addr = if page * PAGE < 3 * GIB {
            page * PAGE
        } else {
            page * PAGE + GIB
        };
        sparse
            .write_obj(1u8, GuestAddress(addr))
            .expect("there is RAM");
    }
    report("64 GiB, 10,000 scattered pages", &sparse, rounds);
    drop(sparse);

    let full = ram(populated);
    for at in (PAGE..populated).step_by(4096) {
        let addr = if at < 3 * GIB { at } else { at + GIB };
        full.write_obj(1u8, GuestAddress(addr))
            .expect("there is RAM");
    }
    report("4 GiB touched, but for a page", &full, rounds);
    drop(full);

    let allocated = ram(populated);
    let backing = allocated.iter().next().expect("there is one").backing();
    let len = i64::try_from(populated - PAGE).expect("small");
    posix_fallocate(backing.as_fd(), 4096, len).expect("there is memory");
    report("4 GiB allocated, but for a page", &allocated, rounds);
}

fn ram(size: u64) -> GuestMemoryShm {
    let hole = GuestRange::new(GuestAddress(3 * GIB), GIB).expect("a range");
    let ranges = ram_around_hole(size, hole).expect("ranges");
    let builder = GuestMemoryShm::<()>::builder().add_ram(RamOptions::new(), ranges);
    builder.build().expect("lazy RAM needs no memory")
}

fn report(name: &str, memory: &GuestMemoryShm, rounds: usize) {
    let stats = median(rounds, || drop(memory.stats().expect("known")));
    let coarse = median(rounds, || drop(memory.extents(2 << 20).expect("known")));
    let fine = median(rounds, || drop(memory.extents(4096).expect("known")));
    println!("{name:<34}{stats:>12.1?}{coarse:>16.1?}{fine:>16.1?}");
}

fn median(rounds: usize, work: impl Fn()) -> Duration {
    let mut times: Vec<Duration> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}
