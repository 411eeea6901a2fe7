//! A daemon's session: connect, start a ring, plug RAM, and go on when the daemon was restarted.
//! It is a disk in this process here, so that the example runs by itself.

use std::path::Path;

use guest_memory_shm::mock::{BlkDriver, MockDaemon};
use guest_memory_shm::{
    AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions, SessionOptions, VhostUserSession,
};
use vm_memory::{GuestAddress, GuestAddressSpace};

/// VIRTIO_BLK_F_FLUSH: what the guest's driver knows.
const FLUSH: u64 = 1 << 9;
const PLUG: GuestAddress = GuestAddress(4 << 30);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::temp_dir().join(format!("session-{}", std::process::id()));
    std::fs::create_dir(&directory)?;
    let path = directory.join("disk.sock");
    let done = run(&path);
    std::fs::remove_dir_all(&directory)?;
    done
}

fn run(path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let daemon = MockDaemon::builder().start(path)?;
    let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let space = AddressSpace::new(boot);

    // Without in-flight buffers only a device that completes in order can go on after a restart.
    let options = SessionOptions::new(FLUSH).with_device_in_order();
    let disk = space.attach("disk", VhostUserSession::connect(path, options)?)?;

    // What a guest does: its driver sets a queue up, in RAM.
    let mut driver = BlkDriver::new(space.published(), GuestAddress(0x1000), 16)?;
    let ring = driver.session_ring()?; // SessionRing::new(size, addresses, kick, call)
    space.with_listener(&disk, |session| session.start_ring(0, ring))??;

    let region = GuestRegionShm::new((PLUG, 1 << 20), &RamOptions::new())?;
    assert!(space.insert(region)?.stale().is_empty()); // the daemon was there
    space.published().memory().write_slice(&[7; 512], PLUG)?;
    driver.write(1, &[(PLUG, 512)])?;
    let mut sector = [0; 512];
    daemon.disk().read(512, &mut sector)?;
    println!("The disk holds what is in the plugged RAM: {}", sector[0]);

    drop(daemon);
    let waits = driver.submit_read(1, &[(GuestAddress(0x8000), 512)])?;
    let restarted = MockDaemon::builder().with_disk_contents(vec![9; 4096]);
    let _daemon = restarted.start(path)?;
    space.reconnect_session(&disk)?; // features, memory, rings
    driver.wait(waits)?;
    let read: u8 = space.published().memory().read_obj(GuestAddress(0x8000))?;
    println!("Its successor completed what waited: {read}");
    Ok(())
}
