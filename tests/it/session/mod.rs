//! `VhostUserSession`: what is agreed with a daemon, its rings, and what happens when it is gone.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use guest_memory_shm::mock::{BlkDriver, Fault, LoggedRequest, MockDaemon, MockDaemonBuilder};
use guest_memory_shm::{
    AddressSpace, DaemonFailure, GuestMemoryShm, GuestRange, GuestRegionShm, ListenerId,
    PublishedMemory, RamOptions, SessionError, SessionOptions, SessionRing, VhostUserSession,
};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::{GuestAddress, GuestAddressSpace};

use crate::support::{StorageDaemon, ToldAll, chain};

mod agreement;
mod channel;
mod hostile;
mod inflight;
mod killed;
mod leaks;
mod peer;
mod requests;
mod restarts;
mod rings;
mod steps;

const MIB: u64 = 1 << 20;
/// Where a region is plugged.
const PLUG: GuestAddress = GuestAddress(1 << 32);
const RINGS: GuestAddress = GuestAddress(0x1000);
const BUFFER: GuestAddress = GuestAddress(0x8000);
const SECTOR: u32 = 512;
/// For what comes at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(20);

/// FLUSH, SEG_MAX, BLK_SIZE, MQ of a block device.
const DRIVER: u64 = 1 << 9 | 1 << 2 | 1 << 6 | 1 << 12;
const LOG_ALL: u64 = 1 << 26;

fn options() -> SessionOptions {
    SessionOptions::new(DRIVER).with_deadline(PATIENCE)
}

/// A folder with the place of a socket.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("blk.sock")
    }

    fn serve(&self, builder: MockDaemonBuilder) -> MockDaemon {
        builder
            .with_disk_size(64 << 10)
            .start(self.socket())
            .unwrap()
    }
}

/// A VMM with 1 MiB of RAM and a disk.
struct Vmm {
    space: AddressSpace,
    disk: ListenerId<VhostUserSession>,
    driver: BlkDriver<PublishedMemory>,
}

impl Vmm {
    fn new(session: VhostUserSession) -> Self {
        let boot = GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let space = AddressSpace::new(boot);
        let driver = BlkDriver::new(space.published(), RINGS, 16).unwrap();
        let disk = space.attach("disk", session).unwrap();
        Self {
            driver: driver.with_deadline(PATIENCE),
            space,
            disk,
        }
    }

    /// With its ring started.
    fn started(session: VhostUserSession) -> Self {
        let vmm = Self::new(session);
        vmm.with(|session| session.start_ring(0, vmm.ring()))
            .unwrap();
        vmm
    }

    fn with<T>(&self, work: impl FnOnce(&mut VhostUserSession) -> T) -> T {
        self.space.with_listener(&self.disk, work).unwrap()
    }

    fn ring(&self) -> SessionRing {
        self.driver.session_ring().unwrap()
    }

    /// Writes a sector from one buffer and reads it into another.
    fn copies(&mut self, sector: u64, from: GuestAddress, to: GuestAddress) {
        let pattern = [sector as u8 | 0x40; SECTOR as usize];
        let memory = self.space.published().memory();
        memory.write_slice(&pattern, from).unwrap();
        self.driver.write(sector, &[(from, SECTOR)]).unwrap();
        self.driver.read(sector, &[(to, SECTOR)]).unwrap();
        let mut read = [0; SECTOR as usize];
        memory.read_slice(&mut read, to).unwrap();
        assert_eq!(read, pattern);
    }
}

fn region(start: GuestAddress) -> GuestRegionShm {
    GuestRegionShm::new((start, MIB), &RamOptions::new()).unwrap()
}
