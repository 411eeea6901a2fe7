//! `VhostUserShare` over real sockets: what the daemon holds, and what happens when it fails.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest_memory_shm::mock::{
    BlkDriver, BlkError, Fault, LoggedRequest, MockDaemon, MockDaemonBuilder,
};
use guest_memory_shm::{
    AddressSpace, BackingSource, DaemonFailure, GuestMemoryShm, GuestRange, GuestRegionShm,
    InvalidRange, KernelVhost, MemoryTable, RamOptions, ShareError, SlotLimit, TableError,
    TableRegion, TableView, VhostUserShare,
};
use tempfile::TempDir;
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
use vm_memory::{Bytes, GuestAddress};

use crate::fork::dies_of;
use crate::frontend::{agree, start_queue};
use crate::isolation::in_own_process;
use crate::support::{self, StorageDaemon, ToldAll};

mod clones;
mod daemon;
mod faults;
mod kernel;
mod log;
mod log_faults;
mod postcopy;
mod postcopy_faults;
mod postcopy_peer;
mod relay;
mod sockets;
mod table;
mod view;

const MIB: u64 = 1 << 20;
/// For what comes at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(10);
const RINGS: GuestAddress = GuestAddress(0x1000);
const DISK: u64 = 64 << 10;

/// What a VMM has of a daemon beside the share.
struct Vmm {
    frontend: Frontend,
    features: Features,
}

impl Vmm {
    fn negotiate(stream: UnixStream) -> Self {
        Self::negotiate_also(stream, Features::empty())
    }

    fn negotiate_also(stream: UnixStream, more: Features) -> Self {
        let wanted = Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS | more;
        let (frontend, features) = agree(stream, wanted).unwrap();
        Self { frontend, features }
    }

    fn share(&self) -> VhostUserShare {
        let share = VhostUserShare::new(&self.frontend, self.features).unwrap();
        share.with_deadline(PATIENCE)
    }

    fn reconnect(&self, share: &mut VhostUserShare) {
        share.reconnect(&self.frontend, self.features).unwrap();
    }

    /// Starts the queue in `memory`, which the share has sent.
    fn driver<'a>(
        &mut self,
        memory: &'a GuestMemoryShm,
        share: &VhostUserShare,
    ) -> BlkDriver<&'a GuestMemoryShm> {
        let driver = BlkDriver::new(memory, RINGS, 16)
            .unwrap()
            .with_deadline(PATIENCE);
        let translate = |addr| share.table().user_addr(addr);
        start_queue(&mut self.frontend, 0, &driver, translate);
        driver
    }
}

/// A mock on a socket in a directory of its own.
struct Peer {
    daemon: MockDaemon,
    _directory: TempDir,
}

impl Peer {
    fn start(builder: MockDaemonBuilder) -> Peer {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("blk.sock");
        Peer {
            daemon: builder.with_disk_size(DISK).start(socket).unwrap(),
            _directory: directory,
        }
    }

    fn connect(&self) -> Vmm {
        self.connect_also(Features::empty())
    }

    fn connect_also(&self, more: Features) -> Vmm {
        let stream = UnixStream::connect(self.daemon.path().unwrap()).unwrap();
        Vmm::negotiate_also(stream, more)
    }

    /// The share has a copy of the connection: it lasts as long as either of them.
    fn share(&self) -> (VhostUserShare, Vmm) {
        let vmm = self.connect();
        (vmm.share(), vmm)
    }

    /// Asserts that the daemon maps exactly the parts of files that are in `table`.
    #[track_caller]
    fn holds(&self, table: &MemoryTable) {
        let held: Vec<_> = self
            .daemon
            .table()
            .iter()
            .map(|r| (r.guest_addr, r.size, r.mmap_offset, r.identity))
            .collect();
        let expected: Vec<_> = table
            .regions()
            .iter()
            .map(|region| {
                let (range, offset) = (region.range(), region.mmap_offset());
                let identity = region.backing().identity();
                (range.start_addr(), range.size(), offset, identity)
            })
            .collect();
        assert_eq!(held, expected);
    }

    /// The messages about the table since the log was cleared; addresses in MiB.
    fn changes(&self) -> Vec<(&'static str, Vec<u64>)> {
        let mib = |addr: GuestAddress| addr.0 / MIB;
        let requests = self.daemon.requests();
        let changes = requests.iter().filter_map(|request| match request {
            LoggedRequest::SetMemTable(regions) => {
                Some(("SET", regions.iter().map(|r| mib(r.guest_addr)).collect()))
            }
            LoggedRequest::AddMemRegion(region) => Some(("ADD", vec![mib(region.guest_addr)])),
            LoggedRequest::RemoveMemRegion(region) => Some(("REM", vec![mib(region.guest_addr)])),
            _ => None,
        });
        changes.collect()
    }
}

/// Regions of 1 MiB at these addresses in MiB, each on a descriptor of its own.
fn regions(starts: &[u64]) -> Vec<Arc<GuestRegionShm>> {
    starts
        .iter()
        .map(|start| GuestRegionShm::new((GuestAddress(start * MIB), MIB), &RamOptions::new()))
        .map(|region| Arc::new(region.unwrap()))
        .collect()
}

fn memory(starts: &[u64]) -> GuestMemoryShm {
    GuestMemoryShm::from_arc_regions(regions(starts)).unwrap()
}

/// `memory` with the regions at `starts` replaced or added by new ones.
fn with(memory: &GuestMemoryShm, starts: &[u64]) -> GuestMemoryShm {
    let mut all = memory.arc_regions();
    all.retain(|region| !starts.contains(&(region.range().start_addr().0 / MIB)));
    all.extend(regions(starts));
    all.sort_by_key(|region| region.range());
    GuestMemoryShm::from_arc_regions(all).unwrap()
}

fn without(memory: &GuestMemoryShm, starts: &[u64]) -> GuestMemoryShm {
    let mut all = memory.arc_regions();
    all.retain(|region| !starts.contains(&(region.range().start_addr().0 / MIB)));
    all.sort_by_key(|region| region.range());
    GuestMemoryShm::from_arc_regions(all).unwrap()
}
