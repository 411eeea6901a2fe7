//! Writes to the guest's memory as the device makes them, at a moment that the test chooses.

use std::fmt;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};

use super::guest::Memory;

/// The guest's memory as the daemon of one connection maps it, with the log that it notes its
/// writes in.
///
/// It outlives the connection: a daemon that was hung up on goes on like that, until it notices.
/// What the daemon maps stays mapped in this process as long as this lives.
///
/// ```
/// use guest_memory_shm::mock::MockDaemon;
/// use vm_memory::GuestAddress;
///
/// # fn main() -> Result<(), guest_memory_shm::mock::MockError> {
/// let daemon = MockDaemon::builder().start_unnamed()?;
/// let stream = daemon.connect()?;
/// # daemon.wait_connected(std::time::Duration::from_secs(20))?;
/// let writer = daemon.writer().expect("it is connected");
/// drop(stream);
/// assert!(!writer.write(GuestAddress(0x1000)), "it was told of no region");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MockWriter {
    memory: Memory,
}

impl MockWriter {
    pub(super) fn new(memory: Memory) -> Self {
        Self { memory }
    }

    /// Writes one byte, and notes it in the log if the daemon has one for the region. False: it
    /// maps nothing there.
    pub fn write(&self, at: GuestAddress) -> bool {
        self.memory.memory().write_obj(0x5a_u8, at).is_ok()
    }

    /// The memory as the daemon maps it now, whatever it is told later.
    #[must_use]
    pub fn frozen(&self) -> Self {
        let present = self.memory.memory();
        Self {
            memory: GuestMemoryAtomic::from(present.into_inner()),
        }
    }
}

impl fmt::Debug for MockWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let regions = self.memory.memory().num_regions();
        f.debug_struct("MockWriter")
            .field("regions", &regions)
            .finish()
    }
}
