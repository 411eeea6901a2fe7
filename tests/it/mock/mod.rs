//! The daemon and the driver against each other, and the driver against a real daemon.

mod backend_channel;
mod data;
mod descriptors;
mod faults;
pub(crate) mod inflight;
mod life;
mod peer;
mod table;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use guest_memory_shm::mock::*;
use guest_memory_shm::{FileIdentity, GuestMemoryShm, SessionOptions, VhostUserSession};

use crate::frontend::{DISK, agree, start_queue};

/// Long enough for a busy machine; no test that passes waits for it.
const LIMIT: Duration = Duration::from_secs(20);

/// Where the tests put the rings: in the first region.
const RINGS: GuestAddress = GuestAddress(0);

fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("mock-test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

/// Guest memory with one memfd per region.
fn guest(regions: &[(u64, usize)]) -> GuestMemoryMmap {
    let ranges = regions.iter().map(|(start, size)| {
        let file = FileOffset::new(memfd(*size as u64), 0);
        (GuestAddress(*start), *size, Some(file))
    });
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

fn infos(memory: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
        .collect()
}

/// The table that a daemon with all of `memory` must hold.
fn expected_table(memory: &GuestMemoryMmap) -> Vec<MockRegion> {
    memory
        .iter()
        .map(|region| {
            let file = region.file_offset().unwrap();
            let metadata = file.file().metadata().unwrap();
            MockRegion {
                guest_addr: region.start_addr(),
                size: region.len(),
                mmap_offset: file.start(),
                identity: FileIdentity {
                    dev: metadata.dev(),
                    ino: metadata.ino(),
                },
            }
        })
        .collect()
}

fn user_address(memory: &GuestMemoryMmap, addr: GuestAddress) -> Option<u64> {
    Some(memory.get_host_address(addr).ok()? as u64)
}

fn negotiated(daemon: &MockDaemon) -> (Frontend, VhostUserProtocolFeatures) {
    agree(daemon.connect().unwrap(), VhostUserProtocolFeatures::all()).unwrap()
}

/// Starts queue 0 with `driver`.
fn start(memory: &GuestMemoryMmap, frontend: &mut Frontend, driver: &BlkDriver<&GuestMemoryMmap>) {
    start_queue(frontend, 0, driver, |addr| user_address(memory, addr));
}

/// A driver on queue 0, which the daemon has been told of.
fn started<'a>(
    memory: &'a GuestMemoryMmap,
    frontend: &mut Frontend,
    queue_size: u16,
) -> BlkDriver<&'a GuestMemoryMmap> {
    let driver = BlkDriver::new(memory, RINGS, queue_size)
        .unwrap()
        .with_deadline(LIMIT);
    start(memory, frontend, &driver);
    driver
}

fn pattern(size: usize, seed: u8) -> Vec<u8> {
    (0..size).map(|i| (i / 7) as u8 ^ seed).collect()
}

/// Writes `data` to the disk from sector 0 on by way of `memory` at `buffer`, reads it back to the
/// same place, and compares.
fn round_trip(
    memory: &GuestMemoryMmap,
    frontend: &mut Frontend,
    buffer: GuestAddress,
    data: &[u8],
) {
    let mut driver = started(memory, frontend, 16);
    let length = u32::try_from(data.len()).unwrap();
    memory.write_slice(data, buffer).unwrap();
    driver.write(0, &[(buffer, length)]).unwrap();
    driver.flush().unwrap();
    memory.write_slice(&vec![0; data.len()], buffer).unwrap();
    driver.read(0, &[(buffer, length)]).unwrap();
    let mut back = vec![0; data.len()];
    memory.read_slice(&mut back, buffer).unwrap();
    assert_eq!(back, data);
    frontend.get_vring_base(0).unwrap();
}

/// The changes of the table among the requests, by name and guest address.
fn changes(daemon: &MockDaemon) -> Vec<(&'static str, u64)> {
    let mut changes = Vec::new();
    for request in daemon.requests() {
        match request {
            LoggedRequest::SetMemTable(regions) => {
                changes.extend(regions.iter().map(|region| ("set", region.guest_addr.0)));
            }
            LoggedRequest::AddMemRegion(region) => changes.push(("add", region.guest_addr.0)),
            LoggedRequest::RemoveMemRegion(region) => changes.push(("rem", region.guest_addr.0)),
            _ => {}
        }
    }
    changes
}
