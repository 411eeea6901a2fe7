//! Access to guest memory through vm-memory's generic traits: `GuestMemoryMmap` and
//! `GuestMemoryShm` side by side, and `GuestMemoryShm` as it is published by an `AddressSpace`,
//! which a reader takes anew for each batch of 256 accesses. Then the two once more on the
//! concrete type, as a VMM's own code calls them, where `GuestMemoryShm` has methods of its own.
//!
//! `cargo bench --bench access` ends with two tables of the ratios of the two in this run; a
//! filter (`-- write_obj`, `-- concrete`) leaves out what it does not name. Addresses are spread
//! over all regions, so that a look-up cannot profit from the one before it.

use std::hint::black_box;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use guest_memory_shm::{AddressSpace, GuestMemoryShm};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

const REGIONS: [u64; 5] = [1, 2, 8, 64, 509];
const REGION_SIZE: u64 = 1 << 20;
/// Room between regions, as memory slots have it.
const STRIDE: u64 = 2 << 20;
/// Addresses per measured batch.
const BATCH: u64 = 256;

const OPERATIONS: [&str; 6] = [
    "read_obj",
    "write_obj",
    "load",
    "get_slice",
    "get_host_address",
    "virtqueue",
];

/// Those that `GuestMemoryShm` has as methods of its own.
const CONCRETE: [&str; 4] = ["write_obj", "read_obj", "write_slice", "read_slice"];
/// The bytes of such a slice: a descriptor of a virtqueue and more.
const SLICE: usize = 64;

const RAM: &str = "the address is RAM";

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700))
        .sample_size(50)
        .configure_from_args();
    let mut rows = Vec::new();
    for (at, operation) in OPERATIONS.into_iter().enumerate() {
        for regions in REGIONS {
            let (mmap, shm, addresses) = both(regions);
            let mut group = criterion.benchmark_group(format!("{operation}/{regions}"));
            group.throughput(Throughput::Elements(BATCH));
            let call = Operations::<GuestMemoryMmap>::ALL[at];
            touch(&mmap, &addresses);
            let theirs = measure(&mut group, "GuestMemoryMmap", || {
                call(black_box(&mmap), &addresses)
            });
            let call = Operations::<GuestMemoryShm>::ALL[at];
            touch(&shm, &addresses);
            let ours = measure(&mut group, "GuestMemoryShm", || {
                call(black_box(&shm), &addresses)
            });
            let published = AddressSpace::new(shm.clone()).memory();
            let held = measure(&mut group, "AddressSpace", || {
                call(&black_box(&published).memory(), &addresses)
            });
            group.finish();
            if let (Some(theirs), Some(ours), Some(held)) = (theirs, ours, held) {
                rows.push((operation, regions, theirs, ours, held));
            }
        }
    }
    let mut concrete = Vec::new();
    for (at, operation) in CONCRETE.into_iter().enumerate() {
        for regions in REGIONS {
            let (mmap, shm, addresses) = both(regions);
            let mut group = criterion.benchmark_group(format!("concrete {operation}/{regions}"));
            group.throughput(Throughput::Elements(BATCH));
            touch(&mmap, &addresses);
            let theirs = measure(&mut group, "GuestMemoryMmap", || {
                on_mmap::ALL[at](black_box(&mmap), &addresses)
            });
            touch(&shm, &addresses);
            let ours = measure(&mut group, "GuestMemoryShm", || {
                on_shm::ALL[at](black_box(&shm), &addresses)
            });
            group.finish();
            if let (Some(theirs), Some(ours)) = (theirs, ours) {
                concrete.push((operation, regions, theirs, ours));
            }
        }
    }
    criterion.final_summary();
    print(&rows);
    print_concrete(&concrete);
}

/// The same regions in either memory, and the addresses that are accessed.
fn both(regions: u64) -> (GuestMemoryMmap, GuestMemoryShm, Vec<GuestAddress>) {
    let ranges: Vec<(GuestAddress, usize)> = (0..regions)
        .map(|n| (GuestAddress(n * STRIDE), 1 << 20))
        .collect();
    (
        GuestMemoryMmap::from_ranges(&ranges).expect("there is memory"),
        GuestMemoryShm::from_ranges(&ranges).expect("there is memory"),
        addresses(regions),
    )
}

/// The ratios of this run: how many times as fast `GuestMemoryShm` is, and what taking it from an
/// `AddressSpace` costs.
fn print(rows: &[(&str, u64, f64, f64, f64)]) {
    println!(
        "{:<18}{:>8}{:>20}{:>19}{:>9}{:>18}{:>9}",
        "operation",
        "regions",
        "GuestMemoryMmap ns",
        "GuestMemoryShm ns",
        "ratio",
        "AddressSpace ns",
        "cost"
    );
    for (operation, regions, theirs, ours, held) in rows {
        println!(
            "{operation:<18}{regions:>8}{theirs:>20.2}{ours:>19.2}{:>9.2}{held:>18.2}{:>9.3}",
            theirs / ours,
            held / ours
        );
    }
}

/// As [`print`], for calls on the concrete type.
fn print_concrete(rows: &[(&str, u64, f64, f64)]) {
    println!(
        "\n{:<18}{:>8}{:>20}{:>19}{:>9}",
        "on the type itself", "regions", "GuestMemoryMmap ns", "GuestMemoryShm ns", "ratio",
    );
    for (operation, regions, theirs, ours) in rows {
        let ratio = theirs / ours;
        println!("{operation:<18}{regions:>8}{theirs:>20.2}{ours:>19.2}{ratio:>9.2}");
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
            // One page of each region, with room for a slice: the caches of the memory itself are
            // not what is measured.
            GuestAddress((state % regions) * STRIDE + (state >> 32) % (4032 / 8) * 8)
        })
        .inspect(|addr| assert!(addr.0 % STRIDE < REGION_SIZE))
        .collect()
}

/// Allocates the pages before the clock starts.
fn touch<M: GuestMemoryBackend>(memory: &M, addresses: &[GuestAddress]) {
    for addr in addresses {
        memory.write_obj(0u64, *addr).expect(RAM);
    }
}

/// Measures one operation, a batch at a time; gives the best time of an access in ns (others use
/// the machine too), or nothing if it was filtered out.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    kind: &str,
    batch: impl Fn() -> u64,
) -> Option<f64> {
    let mut samples = Vec::new();
    group.bench_function(kind, |bencher| {
        bencher.iter_custom(|batches| {
            let start = Instant::now();
            for _ in 0..batches {
                black_box(batch());
            }
            let elapsed = start.elapsed();
            samples.push(elapsed.as_secs_f64() * 1e9 / (batches * BATCH) as f64);
            elapsed
        });
    });
    samples.sort_by(f64::total_cmp);
    samples.first().copied()
}

/// The operations, as seen by code that is generic over the memory, like virtio-queue and the
/// devices on it.
struct Operations<M>(PhantomData<M>);

impl<M: GuestMemoryBackend> Operations<M> {
    /// In the order of `OPERATIONS`.
    const ALL: [fn(&M, &[GuestAddress]) -> u64; OPERATIONS.len()] = [
        Self::read_obj,
        Self::write_obj,
        Self::load,
        Self::get_slice,
        Self::get_host_address,
        Self::virtqueue,
    ];

    #[inline(never)]
    fn read_obj(memory: &M, addresses: &[GuestAddress]) -> u64 {
        fold(addresses, |addr| memory.read_obj::<u64>(addr).expect(RAM))
    }

    #[inline(never)]
    fn write_obj(memory: &M, addresses: &[GuestAddress]) -> u64 {
        fold(addresses, |addr| {
            memory.write_obj(addr.0, addr).expect(RAM);
            0
        })
    }

    #[inline(never)]
    fn load(memory: &M, addresses: &[GuestAddress]) -> u64 {
        fold(addresses, |addr| {
            memory.load::<u64>(addr, Ordering::Acquire).expect(RAM)
        })
    }

    #[inline(never)]
    fn get_slice(memory: &M, addresses: &[GuestAddress]) -> u64 {
        fold(addresses, |addr| {
            let slice = GuestMemoryBackend::get_slice(memory, addr, 8).expect(RAM);
            slice.ptr_guard().as_ptr().addr() as u64
        })
    }

    #[inline(never)]
    fn get_host_address(memory: &M, addresses: &[GuestAddress]) -> u64 {
        fold(addresses, |addr| {
            memory.get_host_address(addr).expect(RAM).addr() as u64
        })
    }

    /// What a device does for one request: it looks for an available descriptor, reads it and
    /// the header that it points to, writes a status and the used element, and publishes it.
    #[inline(never)]
    fn virtqueue(memory: &M, addresses: &[GuestAddress]) -> u64 {
        fold(addresses, |addr| {
            let idx: u16 = memory.load(addr, Ordering::Acquire).expect(RAM);
            let head: u16 = memory.read_obj(addr).expect(RAM);
            let descriptor: [u64; 2] = memory.read_obj(addr).expect(RAM);
            let kind: u32 = memory.read_obj(addr).expect(RAM);
            memory.write_obj(0u8, addr).expect(RAM);
            memory.write_obj([7u32, 512], addr).expect(RAM);
            memory.write_obj(idx, addr).expect(RAM);
            memory.write_obj(kind, addr).expect(RAM);
            memory.store(idx, addr, Ordering::Release).expect(RAM);
            descriptor[0] ^ u64::from(head)
        })
    }
}

/// Adding the answers up costs less than telling the compiler that each is needed.
#[inline(always)]
fn fold(addresses: &[GuestAddress], access: impl Fn(GuestAddress) -> u64) -> u64 {
    addresses.iter().fold(0, |all, addr| all ^ access(*addr))
}

/// The accesses, as seen by code that names the type.
macro_rules! concrete {
    ($module:ident, $memory:ty) => {
        mod $module {
            use super::*;

            type Memory = $memory;

            /// In the order of `CONCRETE`.
            pub(super) const ALL: [fn(&Memory, &[GuestAddress]) -> u64; CONCRETE.len()] =
                [write_obj, read_obj, write_slice, read_slice];

            #[inline(never)]
            fn write_obj(memory: &Memory, addresses: &[GuestAddress]) -> u64 {
                fold(addresses, |addr| {
                    memory.write_obj(addr.0, addr).expect(RAM);
                    0
                })
            }

            #[inline(never)]
            fn read_obj(memory: &Memory, addresses: &[GuestAddress]) -> u64 {
                fold(addresses, |addr| memory.read_obj::<u64>(addr).expect(RAM))
            }

            #[inline(never)]
            fn write_slice(memory: &Memory, addresses: &[GuestAddress]) -> u64 {
                let bytes = black_box([1; SLICE]);
                fold(addresses, |addr| {
                    memory.write_slice(&bytes, addr).expect(RAM);
                    0
                })
            }

            #[inline(never)]
            fn read_slice(memory: &Memory, addresses: &[GuestAddress]) -> u64 {
                fold(addresses, |addr| {
                    let mut bytes = [0; SLICE];
                    memory.read_slice(&mut bytes, addr).expect(RAM);
                    u64::from(bytes[0])
                })
            }
        }
    };
}

concrete!(on_mmap, GuestMemoryMmap);
concrete!(on_shm, GuestMemoryShm);
