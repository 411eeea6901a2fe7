//! The guest's memory as the daemon maps it.

use std::io;
use std::os::unix::fs::MetadataExt;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::{
    GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::backing::FileIdentity;

/// Guest memory as the daemon maps it, with the bitmap that a shared dirty log needs.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// One region of the table that the daemon's backend holds.
///
/// These are the facts of its mapping, not what the frontend said: two regions with the same
/// `identity` are mappings of one file, the frontend's if its backing has that
/// [`identity`](crate::ShmBacking::identity) too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MockRegion {
    /// Where the region starts in guest memory.
    pub guest_addr: GuestAddress,
    /// Its length in bytes.
    pub size: u64,
    /// Where it starts in the file, in bytes.
    pub mmap_offset: u64,
    /// Which file it is.
    pub identity: FileIdentity,
}

impl MockRegion {
    /// The regions of `memory` in ascending order.
    pub(super) fn table_of<M: GuestMemoryBackend>(memory: &M) -> io::Result<Vec<MockRegion>> {
        memory
            .iter()
            .map(|region| {
                let file = region
                    .file_offset()
                    .ok_or_else(|| io::Error::other("a region of the table has no file"))?;
                let metadata = file.file().metadata()?;
                Ok(MockRegion {
                    guest_addr: region.start_addr(),
                    size: region.len(),
                    mmap_offset: file.start(),
                    identity: FileIdentity {
                        dev: metadata.dev(),
                        ino: metadata.ino(),
                    },
                })
            })
            .collect()
    }
}
