//! Access to guest memory through vm-memory's generic traits: `GuestMemoryMmap` and
//! `GuestMemoryShm` side by side, and `GuestMemoryShm` as it is published by an `AddressSpace`,
//! which a reader takes anew for each batch of 256 accesses.
//!
//! `cargo bench --bench access` ends with a table of the ratios of the two in this run; a filter
//! (`-- write_obj`) leaves out what it does not name. Addresses are spread over all regions, so
//! that a look-up cannot profit from the one before it. Calls on the concrete type have a bench of
//! their own, `access_on_type`: in one program, each changes what the compiler inlines in the other.

mod memories;

use std::hint::black_box;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use criterion::Throughput;
use guest_memory_shm::{AddressSpace, GuestMemoryShm};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

use memories::{BATCH, RAM, REGIONS, both, criterion, fold, measure, touch};

const OPERATIONS: [&str; 6] = [
    "read_obj",
    "write_obj",
    "load",
    "get_slice",
    "get_host_address",
    "virtqueue",
];

fn main() {
    let mut criterion = criterion();
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
            let published = AddressSpace::new(shm.clone()).published();
            let held = measure(&mut group, "AddressSpace", || {
                call(&black_box(&published).memory(), &addresses)
            });
            group.finish();
            if let (Some(theirs), Some(ours), Some(held)) = (theirs, ours, held) {
                rows.push((operation, regions, theirs, ours, held));
            }
        }
    }
    criterion.final_summary();
    print(&rows);
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
