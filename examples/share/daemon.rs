//! The daemon in this process, and the pattern on its disk.

use std::os::unix::net::UnixStream;

use guest_memory_shm::mock::MockDaemon;

use crate::facts::size;
use crate::failure::{Failure, OrFail, Result};

/// A daemon on a real Unix socket, without a name in any directory: however this process ends,
/// nothing is left of it.
pub(crate) struct LocalDaemon {
    daemon: MockDaemon,
}

impl LocalDaemon {
    /// Starts a daemon with a disk of `disk_size` bytes that hold `pattern`.
    pub(crate) fn start(disk_size: u64, pattern: Pattern) -> Result<Self> {
        let mut contents = Vec::new();
        let too_large = || format!("a disk of {} does not fit in memory", size(disk_size));
        let bytes = usize::try_from(disk_size).or_fail(too_large)?;
        contents.try_reserve_exact(bytes).or_fail(too_large)?;
        contents.resize(bytes, 0);
        pattern.fill(0, &mut contents);
        let daemon = MockDaemon::builder()
            .with_disk_contents(contents)
            .start_unnamed()
            .or_fail(|| "cannot start the daemon")?;
        Ok(Self { daemon })
    }

    pub(crate) fn connect(&self) -> Result<UnixStream> {
        let stream = self.daemon.connect();
        stream.or_fail(|| "cannot connect to the daemon in this process")
    }

    pub(crate) fn daemon(&self) -> &MockDaemon {
        &self.daemon
    }

    /// Compares the daemon's disk at `offset` with `expected`, without the virtqueue.
    pub(crate) fn check_disk(&self, offset: u64, expected: &[u8]) -> Result<()> {
        let mut found = vec![0; expected.len()];
        let read = self.daemon.disk().read(offset, &mut found);
        read.or_fail(|| "cannot look at the daemon's disk")?;
        check_equal(offset, &found, expected, "the daemon's disk")
    }
}

/// What a disk holds: the 8 bytes at each multiple of 8 differ from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// What the daemon's disk begins with.
    Daemon,
    /// What the guest writes.
    Guest,
}

impl Pattern {
    /// Fills `buffer` with what belongs at `offset`, a multiple of 8.
    pub(crate) fn fill(self, offset: u64, buffer: &mut [u8]) {
        let flip = match self {
            Self::Daemon => 0,
            Self::Guest => u64::MAX,
        };
        let mut value = offset.wrapping_mul(Self::FACTOR);
        for word in buffer.chunks_mut(8) {
            word.copy_from_slice(&(value ^ flip).to_le_bytes()[..word.len()]);
            value = value.wrapping_add(Self::FACTOR.wrapping_mul(8));
        }
    }

    /// Odd: multiplying by it modulo 2^64 never makes two offsets equal.
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
}

/// Compares what was found at `offset` of `place` with what belongs there.
pub(crate) fn check_equal(offset: u64, found: &[u8], expected: &[u8], place: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let pairs = found.iter().zip(expected);
    let same = pairs.take_while(|(a, b)| a == b).count();
    let at = offset + same as u64;
    Err(Failure::new(format!(
        "{place} differs at byte {at}: shared memory is not shared"
    )))
}
