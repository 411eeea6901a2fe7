//! RAM in QEMU's words: strings that its -object takes are read, checked, and written.

use std::error::Error;

use guest_memory_shm::{
    BackingSource, GuestMemoryShm, NodeSet, NumaPolicy, PageSize, Populate, RamOptions, Sealing,
};
use vm_memory::GuestAddress;

fn main() -> Result<(), Box<dyn Error>> {
    println!("Read, and written again:");
    for text in [
        "memory-backend-shm,id=low,size=512M",
        "memory-backend-memfd,id=high,size=2G,prealloc=on,prealloc-threads=2",
        "memory-backend-memfd,size=0x40000000,hugetlb=on,hugetlbsize=2M,host-nodes=0,policy=bind",
        "memory-backend-file,size=1G,mem-path=/var/tmp,share=on,align=2M,discard-data=on",
    ] {
        let options: RamOptions = text.parse()?;
        println!("  {options}");
    }

    println!("Refused, with the property, the value and what to do:");
    for text in [
        "memory-backend-shm,size=64X",
        "memory-backend-shm,size=64M,share=off",
        "memory-backend-memfd,size=64M,policy=bind",
        "memory-backend-memfd,size=64M,hugetlb=on,hugetlbsize=3M",
        "memory-backend-file,size=64M",
    ] {
        match text.parse::<RamOptions>() {
            Ok(options) => println!("  {options} was not refused"),
            Err(error) => println!("  {text}\n    {error}"),
        }
    }

    println!("The same by methods:");
    let options = RamOptions::new()
        .with_name("fast")
        .with_size(1 << 30)
        .with_backing(BackingSource::Memfd)
        .with_sealing(Sealing::Sealed)
        .with_page_size(PageSize::Transparent)
        .with_populate(Populate::Lazy)
        .with_numa(NumaPolicy::Interleave(
            NodeSet::from_nodes([0]).ok_or("no such node")?,
        ));
    println!("  {options}");
    assert_eq!(options.to_string().parse::<RamOptions>()?, options);

    // What reads well may still have no effect on this machine: building says so.
    let (memory, report) = GuestMemoryShm::<()>::builder()
        .add_ram(options, [(GuestAddress(0), 1 << 30)])
        .build_with_report()?;
    println!("Built: {memory}\n{report}");
    Ok(())
}
