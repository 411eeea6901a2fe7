//! The daemon's end: what is taken of a memory table, and what is refused and why.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use guest_memory_shm::receive::{ReceiveError, ReceivePolicy, ReceivedRegion, ReceivedTable};
use guest_memory_shm::{AdoptPolicy, GuestMemoryShm, MemoryError, RamOptions, ShmBacking};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::isolation::PAGE;

mod daemon;
mod descriptors;
mod handler;
mod hostile;
mod model;
mod raw;
mod table;
mod wire;

const MIB: u64 = 1 << 20;
/// Where the frontend has the first region, by its own account.
const USER: u64 = 0x7f00_0000_0000;

/// A frontend's memfd, its size not sealed, but that can be.
fn unsealed(len: u64) -> File {
    // Not for the processes that other tests start meanwhile.
    let flags = MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC;
    let file = File::from(memfd_create("theirs", flags).unwrap());
    file.set_len(len).unwrap();
    file
}

/// A frontend's memfd that no process can truncate.
fn sealed(len: u64) -> File {
    let file = unsealed(len);
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

fn region(guest_addr: u64, size: u64, user_addr: u64, mmap_offset: u64) -> ReceivedRegion {
    ReceivedRegion {
        guest_addr: GuestAddress(guest_addr),
        size,
        user_addr,
        mmap_offset,
    }
}

/// A region of 1 MiB that is the `number`-th of a table without any fault: no two are neighbours.
fn good(number: u64) -> ReceivedRegion {
    region(2 * number * MIB, MIB, USER + 2 * number * MIB, 0)
}

fn require_seals() -> ReceivePolicy {
    let seals = AdoptPolicy::new().with_required_seals();
    ReceivePolicy::new().with_descriptors(seals)
}

/// The first `count` good regions, each on a file of its own.
fn table(count: u64) -> ReceivedTable {
    let files = (0..count).map(|_| sealed(MIB));
    map_table((0..count).map(good), files, &require_seals()).unwrap()
}

/// Why the region at this place in the message was not mapped.
#[track_caller]
fn cause_at(place: usize, error: &ReceiveError) -> &MemoryError {
    match error {
        ReceiveError::Region { index, cause, .. } if *index == place => cause,
        _ => panic!("{error:?}"),
    }
}

/// What a daemon without any region makes of SET_MEM_TABLE.
fn map_table(
    regions: impl IntoIterator<Item = impl Into<ReceivedRegion>>,
    files: impl IntoIterator<Item = impl Into<OwnedFd>>,
    policy: &ReceivePolicy,
) -> Result<ReceivedTable, ReceiveError> {
    ReceivedTable::new(policy.clone()).set(regions, files)
}

fn map(regions: &[ReceivedRegion], files: Vec<File>) -> Result<ReceivedTable, ReceiveError> {
    map_table(regions, files, &require_seals())
}
