//! What the benches of accesses share: the two memories, the addresses, and the clock.

use std::hint::black_box;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion};
use guest_memory_shm::GuestMemoryShm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

pub(crate) const REGIONS: [u64; 5] = [1, 2, 8, 64, 509];
const REGION_SIZE: u64 = 1 << 20;
/// Room between regions, as memory slots have it.
const STRIDE: u64 = 2 << 20;
/// Addresses per measured batch.
pub(crate) const BATCH: u64 = 256;

pub(crate) const OPERATIONS: [&str; 6] = [
    "read_obj",
    "write_obj",
    "load",
    "get_slice",
    "get_host_address",
    "virtqueue",
];

pub(crate) const RAM: &str = "the address is RAM";

pub(crate) fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700))
        .sample_size(50)
        .configure_from_args()
}

/// The same regions in either memory, and the addresses that are accessed.
pub(crate) fn both(regions: u64) -> (GuestMemoryMmap, GuestMemoryShm, Vec<GuestAddress>) {
    let ranges: Vec<(GuestAddress, usize)> = (0..regions)
        .map(|n| (GuestAddress(n * STRIDE), 1 << 20))
        .collect();
    (
        GuestMemoryMmap::from_ranges(&ranges).expect("there is memory"),
        GuestMemoryShm::from_ranges(&ranges).expect("there is memory"),
        addresses(regions),
    )
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
pub(crate) fn touch<M: GuestMemoryBackend>(memory: &M, addresses: &[GuestAddress]) {
    for addr in addresses {
        memory.write_obj(0u64, *addr).expect(RAM);
    }
}

/// Measures one operation, a batch at a time; gives the best time of an access in ns (others use
/// the machine too), or nothing if it was filtered out.
pub(crate) fn measure(
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

/// Adding the answers up costs less than telling the compiler that each is needed.
#[inline(always)]
pub(crate) fn fold(addresses: &[GuestAddress], access: impl Fn(GuestAddress) -> u64) -> u64 {
    addresses.iter().fold(0, |all, addr| all ^ access(*addr))
}

/// The operations, as seen by code that is generic over the memory, like virtio-queue and the
/// devices on it.
pub(crate) struct Operations<M>(PhantomData<M>);

impl<M: GuestMemoryBackend> Operations<M> {
    /// In the order of `OPERATIONS`.
    pub(crate) const ALL: [fn(&M, &[GuestAddress]) -> u64; OPERATIONS.len()] = [
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
