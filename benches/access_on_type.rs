//! Access to guest memory on the concrete type, as a VMM's own code calls it, where
//! `GuestMemoryShm` has methods of its own: `GuestMemoryMmap` and `GuestMemoryShm` side by side.
//! (`GuestMemoryMmap` also as generic code calls it, because the faster of the two ways counts.)
//!
//! `cargo bench --bench access_on_type` ends with a table as `access` has it, and takes a filter
//! as it does.

mod memories;

use std::hint::black_box;

use criterion::Throughput;
use guest_memory_shm::GuestMemoryShm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use memories::{
    BATCH, OPERATIONS, Operations, RAM, REGIONS, both, criterion, fold, measure, touch,
};

const CONCRETE: [&str; 4] = ["write_obj", "read_obj", "write_slice", "read_slice"];
/// The bytes of such a slice: a descriptor of a virtqueue and more.
const SLICE: usize = 64;

fn main() {
    let mut criterion = criterion();
    let mut rows = Vec::new();
    for (at, operation) in CONCRETE.into_iter().enumerate() {
        for regions in REGIONS {
            let (mmap, shm, addresses) = both(regions);
            let mut group =
                criterion.benchmark_group(format!("{operation} on the type/{regions}"));
            group.throughput(Throughput::Elements(BATCH));
            touch(&mmap, &addresses);
            let theirs = measure(&mut group, "GuestMemoryMmap", || {
                on_mmap::ALL[at](black_box(&mmap), &addresses)
            });
            // What is inlined differs: the faster one counts.
            let generic = OPERATIONS.iter().position(|other| *other == operation);
            let generic = generic.and_then(|at| {
                measure(&mut group, "GuestMemoryMmap, generic", || {
                    Operations::<GuestMemoryMmap>::ALL[at](black_box(&mmap), &addresses)
                })
            });
            let theirs = theirs.map(|theirs| theirs.min(generic.unwrap_or(theirs)));
            touch(&shm, &addresses);
            let ours = measure(&mut group, "GuestMemoryShm", || {
                on_shm::ALL[at](black_box(&shm), &addresses)
            });
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
        "on the type itself", "regions", "GuestMemoryMmap ns", "GuestMemoryShm ns", "ratio",
    );
    for (operation, regions, theirs, ours) in rows {
        let ratio = theirs / ours;
        println!("{operation:<18}{regions:>8}{theirs:>20.2}{ours:>19.2}{ratio:>9.2}");
    }
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
