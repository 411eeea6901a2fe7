//! Creating guest RAM: 1 TiB against 1 GiB, lazily, for each kind of backing.
//!
//! `cargo bench --bench create` prints the ratios of the two in this run: the best time of each,
//! measured in turn, because others use the machine too. Both cost per region, not per byte.

use std::time::{Duration, Instant};

use guest_memory_shm::{BackingSource, GuestMemoryShm, RamOptions};
use vm_memory::GuestAddress;

const ROUNDS: u32 = 2000;

fn main() {
    // Cargo runs benches as tests too.
    let test = std::env::args().any(|arg| arg == "--test");
    let rounds = if test { 1 } else { ROUNDS };
    println!(
        "{:<12}{:>14}{:>14}{:>8}",
        "backing", "small", "large", "ratio"
    );
    // POSIX shm is refused where it does not fit into /dev/shm, so it grows less here.
    for (name, backing, small, large) in [
        ("memfd", BackingSource::Memfd, 1 << 30, 1 << 40),
        ("POSIX shm", BackingSource::PosixShm, 1 << 20, 1 << 30),
    ] {
        let (mut of_small, mut of_large) = (Duration::MAX, Duration::MAX);
        for _ in 0..rounds {
            of_small = of_small.min(create(&backing, small));
            of_large = of_large.min(create(&backing, large));
        }
        let ratio = of_large.as_secs_f64() / of_small.as_secs_f64();
        println!("{name:<12}{of_small:>14.1?}{of_large:>14.1?}{ratio:>8.3}");
    }
}

fn create(backing: &BackingSource, size: u64) -> Duration {
    let options = RamOptions::new().with_backing(backing.clone());
    let start = Instant::now();
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(options, [(GuestAddress(0), size)])
        .build()
        .expect("lazy RAM needs no memory");
    let elapsed = start.elapsed();
    for region in memory.arc_regions() {
        assert_eq!(region.backing().allocated().expect("fstat works"), 0);
    }
    elapsed
}
