//! Guest RAM: built by options, with a report of what it became, and accessed.

use std::error::Error;

use guest_memory_shm::{GuestMemoryShm, GuestRange, RamOptions, Reserve, ram_around_hole};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

fn main() -> Result<(), Box<dyn Error>> {
    // 4 GiB around a PCI hole. It takes no memory yet: pages come when they are touched.
    let pci_hole = GuestRange::new(GuestAddress(3 << 30), 1 << 30)?;
    let options = RamOptions::new().with_name("ram").with_reserve(Reserve::On);
    let (memory, report) = GuestMemoryShm::<()>::builder()
        .add_ram(options, ram_around_hole(4 << 30, pci_hole)?)
        .build_with_report()?;
    println!("Built: {memory}");
    println!("Without effect here: {report}");

    // Objects and slices, as with vm-memory's `Bytes`.
    let high = GuestAddress(4 << 30);
    memory.write_obj(0xcafe_u16, high)?;
    memory.write_slice(b"hello", GuestAddress(0x1000))?;
    let mut text = [0; 5];
    memory.read_slice(&mut text, GuestAddress(0x1000))?;
    let number: u16 = memory.read_obj(high)?;
    println!("Read back: {number:#x}, {}", text.escape_ascii());

    // What is in the hole is no RAM.
    if let Err(error) = memory.write_obj(1_u8, pci_hole.start_addr()) {
        println!("In the hole: {error}");
    }

    // For a device: a piece of memory that others write to at any time, so never a `&mut [u8]`.
    let buffer = memory.get_slice(high, 4096)?;
    buffer.write_obj(0xbeef_u16, 0)?;
    println!("After the device: {:#x}", memory.read_obj::<u16>(high)?);

    // Two pages were touched; and this descriptor is what a daemon would be sent.
    println!("\n{}", memory.stats()?);
    for region in memory.iter() {
        let (range, backing) = (region.range(), region.backing());
        let (kind, seals, offset) = (backing.kind(), backing.seals(), region.offset());
        println!("{range}: offset {offset:#x} of a {kind}, seals: {seals}");
    }
    Ok(())
}
