//! Access to guest memory through vm-memory's generic traits: `GuestMemoryMmap` and
//! `GuestMemoryShm` side by side.
//!
//! `cargo bench --bench access` ends with a table of the ratios of the two in this run; a filter
//! (`-- write_obj`) leaves out what it does not name. Addresses are spread over all regions, so
//! that a look-up cannot profit from the one before it.

use std::hint::black_box;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use guest_memory_shm::GuestMemoryShm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const REGIONS: [u64; 5] = [1, 2, 8, 64, 509];
const REGION_SIZE: u64 = 1 << 20;
/// Room between regions, as memory slots have it.
const STRIDE: u64 = 2 << 20;
/// Addresses per measured batch.
const BATCH: u64 = 256;

const OPERATIONS: [&str; 5] = [
    "read_obj",
    "write_obj",
    "load",
    "get_slice",
    "get_host_address",
];

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700))
        .sample_size(50)
        .configure_from_args();
    let mut rows = Vec::new();
    for operation in OPERATIONS {
        for regions in REGIONS {
            let ranges: Vec<(GuestAddress, usize)> = (0..regions)
                .map(|n| (GuestAddress(n * STRIDE), 1 << 20))
                .collect();
            let mmap = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("there is memory");
            let shm = GuestMemoryShm::<()>::from_ranges(&ranges).expect("there is memory");
            let addresses = addresses(regions);
            let mut group = criterion.benchmark_group(format!("{operation}/{regions}"));
            group.throughput(Throughput::Elements(BATCH));
            let theirs = measure(&mut group, "GuestMemoryMmap", operation, &mmap, &addresses);
            let ours = measure(&mut group, "GuestMemoryShm", operation, &shm, &addresses);
            group.finish();
            if let (Some(theirs), Some(ours)) = (theirs, ours) {
                rows.push((operation, regions, theirs, ours));
            }
        }
    }
    criterion.final_summary();
    print(&rows);
}

/// The ratios of this run: how many times as fast `GuestMemoryShm` is.
fn print(rows: &[(&str, u64, f64, f64)]) {
    println!(
        "{:<18}{:>8}{:>20}{:>19}{:>9}",
        "operation", "regions", "GuestMemoryMmap ns", "GuestMemoryShm ns", "ratio"
    );
    for (operation, regions, theirs, ours) in rows {
        println!(
            "{operation:<18}{regions:>8}{theirs:>20.2}{ours:>19.2}{:>9.2}",
            theirs / ours
        );
    }
}

/// Pseudo-random addresses, aligned, all over the regions.
fn addresses(regions: u64) -> Vec<GuestAddress> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..BATCH)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // One page of each region: the caches of the memory itself are not what is measured.
            GuestAddress((state % regions) * STRIDE + (state >> 32) % (4096 / 8) * 8)
        })
        .inspect(|addr| assert!(addr.0 % STRIDE < REGION_SIZE))
        .collect()
}

/// Measures one operation on one memory; gives the best time of an access in ns (others
/// use the machine too), or nothing if
/// it was filtered out.
fn measure<M: GuestMemoryBackend>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    kind: &str,
    operation: &str,
    memory: &M,
    addresses: &[GuestAddress],
) -> Option<f64> {
    // The pages exist before the clock starts.
    for addr in addresses {
        memory.write_obj(0u64, *addr).expect("the address is RAM");
    }
    match operation {
        "read_obj" => run(group, kind, addresses, |addr| {
            memory.read_obj::<u64>(addr).expect("the address is RAM")
        }),
        "write_obj" => run(group, kind, addresses, |addr| {
            memory.write_obj(addr.0, addr).expect("the address is RAM");
            0
        }),
        "load" => run(group, kind, addresses, |addr| {
            let value = memory.load::<u64>(addr, Ordering::Acquire);
            value.expect("the address is RAM")
        }),
        "get_slice" => run(group, kind, addresses, |addr| {
            let slice = memory.get_slice(addr, 8).expect("the address is RAM");
            slice.ptr_guard().as_ptr().addr() as u64
        }),
        "get_host_address" => run(group, kind, addresses, |addr| {
            let host = memory.get_host_address(addr);
            host.expect("the address is RAM").addr() as u64
        }),
        other => unreachable!("no operation {other}"),
    }
}

fn run(
    group: &mut BenchmarkGroup<'_, WallTime>,
    kind: &str,
    addresses: &[GuestAddress],
    access: impl Fn(GuestAddress) -> u64,
) -> Option<f64> {
    let mut samples = Vec::new();
    group.bench_function(kind, |bencher| {
        bencher.iter_custom(|batches| {
            let start = Instant::now();
            for _ in 0..batches {
                // Folding the answers costs less than telling the compiler that each is needed.
                let fold = |all, addr: &GuestAddress| all ^ access(*addr);
                black_box(black_box(addresses).iter().fold(0, fold));
            }
            let elapsed = start.elapsed();
            samples.push(elapsed.as_secs_f64() * 1e9 / (batches * BATCH) as f64);
            elapsed
        });
    });
    samples.sort_by(f64::total_cmp);
    samples.first().copied()
}
