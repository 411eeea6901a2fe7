//! Access to guest memory through vm-memory's generic traits: `GuestMemoryMmap` and
//! `GuestMemoryShm` side by side, and `GuestMemoryShm` as it is published by an `AddressSpace`,
//! which a reader takes anew for each batch of 256 accesses.
//!
//! `cargo bench --bench access` ends with a table of the ratios of the two in this run; a filter
//! (`-- write_obj`) leaves out what it does not name. Addresses are spread over all regions, so
//! that a look-up cannot profit from the one before it. Calls on the concrete type have a bench of
//! their own, `access_on_type`: in one program they change what the compiler inlines here.

mod memories;

use std::hint::black_box;

use criterion::Throughput;
use guest_memory_shm::{AddressSpace, GuestMemoryShm};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use memories::{BATCH, OPERATIONS, Operations, REGIONS, both, criterion, measure, touch};

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
