//! A balloon gives pages back to the host: what becomes free, what does not, and how to forbid it.

use std::error::Error;

use guest_memory_shm::{DiscardAccumulator, GuestMemoryShm, Populate, PopulateOptions};
use vm_memory::GuestAddress;

fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?;
    let allocated = || memory.stats().map(|stats| stats.allocated() >> 10);
    memory.populate(PopulateOptions::new(Populate::Prefault))?;
    memory.write_obj(0xcafe_u16, GuestAddress(0x2000))?;
    println!("Populated: {} KiB are allocated", allocated()?);

    // Half a page, two pages, and half a page: only whole pages become free.
    let discarded = memory.discard((GuestAddress(0x1800), 0x3000))?;
    let (freed, kept) = (discarded.freed, discarded.kept());
    println!("Discarded: {freed} bytes are free and {kept} stay");
    println!("           {} KiB are allocated", allocated()?);
    // Reading the page allocates it again, in whichever process.
    let number: u16 = memory.read_obj(GuestAddress(0x2000))?;
    println!("           the page reads as {number}");
    println!("           {} KiB are allocated", allocated()?);

    // While a device has pages pinned, the guest must not get others in their place.
    let pinned = memory.inhibit_discards();
    if let Err(error) = memory.discard((GuestAddress(1 << 20), 1 << 20)) {
        println!("Inhibited: {error}");
    }
    drop(pinned);
    let discarded = memory.discard((GuestAddress(1 << 20), 1 << 20))?;
    println!("           and then {} KiB are free", discarded.freed >> 10);

    // Balloons report pages of 4 KiB. Huge pages are freed as a whole only: this collects them,
    // and passes on at once what is backed by pages of 4 KiB, as here.
    let mut accumulator = DiscardAccumulator::new();
    let mut freed = 0;
    for page in (8 << 20..12 << 20).step_by(4096) {
        freed += accumulator.add(&memory, (GuestAddress(page), 4096))?.freed;
    }
    let pending = accumulator.pending();
    println!("Collected: {} KiB are free, {pending} wait", freed >> 10);
    println!("           {} KiB are allocated", allocated()?);
    Ok(())
}
