//! Hotplug: an address space tells its listeners of each change, and all of them take it or none.

use std::error::Error;

use guest_memory_shm::{
    AddressSpace, GuestMemoryShm, GuestRegionShm, ListenerError, RamOptions, RegionAdapter,
    RegionListener,
};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

/// Something that must map each region, as VFIO does, and that can hold `most` of them.
struct Device {
    name: &'static str,
    most: usize,
}

impl RegionListener for Device {
    fn check(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
        if memory.num_regions() > self.most {
            return Err(ListenerError::refused("it can hold no more regions"));
        }
        Ok(())
    }

    fn region_add(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        println!("  {}: map {}", self.name, region.range());
        Ok(())
    }

    fn region_remove(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        println!("  {}: unmap {}", self.name, region.range());
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let boot = GuestMemoryShm::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
    let space = AddressSpace::new(boot);
    println!("Two devices are attached");
    for (name, most) in [("net", 8), ("gpu", 2)] {
        space.attach(name, RegionAdapter::new(Device { name, most }))?;
    }
    // What a device's thread has: it takes the present memory for each batch, and never waits.
    let memory = space.published();

    println!("A region is plugged, and one more");
    let region = |start| GuestRegionShm::new((GuestAddress(start), 2 << 20), &RamOptions::new());
    let report = space.insert(region(1 << 32)?)?;
    println!("  {} listeners were away", report.stale().len());
    memory.memory().write_obj(7_u64, GuestAddress(1 << 32))?;
    if let Err(error) = space.insert(region(2 << 32)?) {
        let cause = error.source().map(ToString::to_string);
        println!("  {error}: {}", cause.unwrap_or_default());
    }

    println!("The region is unplugged");
    let report = space.remove((GuestAddress(1 << 32), 2 << 20))?;
    println!("  {} region was given back", report.removed().len());
    Ok(())
}
