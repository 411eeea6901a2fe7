//! Memory that changes under daemons: a model of all that can happen, what other VMMs get wrong,
//! and I/O meanwhile.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use guest_memory_shm::mock::MockDaemon;
use guest_memory_shm::{
    AddressSpace, AddressSpaceError, GuestMemoryShm, GuestRegionShm, ListenerId, RamOptions,
    VhostUserShare,
};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::{GuestAddress, GuestAddressSpace};

use crate::frontend::agree;
use crate::support::ToldAll;

mod logger;
mod many;
mod model;
mod others;
mod tasks;
mod threads;

const MIB: u64 = 1 << 20;
/// For what comes at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(10);

type Share = VhostUserShare;

/// A region of 1 MiB.
fn region(at_mib: u64) -> GuestRegionShm {
    GuestRegionShm::new((GuestAddress(at_mib * MIB), MIB), &RamOptions::new()).unwrap()
}

fn space() -> AddressSpace {
    AddressSpace::new(GuestMemoryShm::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

fn connect(daemon: &MockDaemon) -> (Frontend, Features) {
    agree(daemon.connect().unwrap(), Features::all()).unwrap()
}

/// A share with the only copy of its socket: nothing else keeps the connection.
fn share(daemon: &MockDaemon, limit: Duration) -> Share {
    let (frontend, features) = connect(daemon);
    let share = VhostUserShare::new(&frontend, features);
    share.unwrap().with_deadline(limit)
}

/// Changes the deadline of a daemon that is attached.
fn set_limit(space: &AddressSpace, id: &ListenerId<Share>, limit: Duration) {
    let changed = space.with_listener(id, |share| share.set_deadline(limit));
    changed.unwrap();
}

/// Connects to a daemon whose old connection ended, as a VMM does.
fn reconnect(
    space: &AddressSpace,
    id: &ListenerId<Share>,
    daemon: &MockDaemon,
) -> Result<(), AddressSpaceError> {
    daemon.wait_disconnected(PATIENCE).unwrap();
    let (frontend, features) = connect(daemon);
    space.reconnect(id, &frontend, features)
}

/// The regions that readers see: address and file.
fn published(space: &AddressSpace) -> Vec<(GuestAddress, u64)> {
    let regions = space.published().memory().arc_regions();
    let place =
        |region: &GuestRegionShm| (region.range().start_addr(), region.backing().identity().ino);
    regions.iter().map(|region| place(region)).collect()
}

/// The regions that a daemon maps: address and file.
fn mapped(daemon: &MockDaemon) -> Vec<(GuestAddress, u64)> {
    let table = daemon.table();
    table
        .iter()
        .map(|region| (region.guest_addr, region.identity.ino))
        .collect()
}
