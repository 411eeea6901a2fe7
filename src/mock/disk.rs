//! The mock's RAM disk.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::error::{MockError, Result};
use super::lock::lock;

/// Bytes of a sector, the unit of virtio-blk's addresses.
pub(super) const SECTOR_SIZE: u64 = 512;

/// The contents of the mock's disk, readable and writable beside the device.
///
/// It belongs to the daemon and not to a connection: what one frontend wrote, the next one reads.
#[derive(Debug)]
pub struct RamDisk {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicU64,
}

impl RamDisk {
    pub(super) fn new(bytes: Vec<u8>) -> RamDisk {
        RamDisk {
            bytes: Mutex::new(bytes),
            flushes: AtomicU64::new(0),
        }
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.bytes().len() as u64
    }

    /// How many flush requests the device has carried out since the start.
    pub fn flush_count(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Copies the disk's bytes from `offset` on into `buffer`.
    ///
    /// # Errors
    /// [`MockError`] where the range is not wholly on the disk; nothing is copied then.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut bytes = self.bytes();
        let range = range_of(&mut bytes, offset, buffer.len(), "read the mock's disk")?;
        buffer.copy_from_slice(range);
        Ok(())
    }

    /// Copies `data` to the disk at `offset`.
    ///
    /// # Errors
    /// [`MockError`] where the range is not wholly on the disk; nothing is copied then.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut bytes = self.bytes();
        let range = range_of(&mut bytes, offset, data.len(), "write the mock's disk")?;
        range.copy_from_slice(data);
        Ok(())
    }

    pub(super) fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        lock(&self.bytes)
    }

    pub(super) fn count_flush(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }
}

fn range_of<'a>(
    bytes: &'a mut [u8],
    offset: u64,
    length: usize,
    doing: &'static str,
) -> Result<&'a mut [u8]> {
    let size = bytes.len();
    usize::try_from(offset)
        .ok()
        .and_then(|start| bytes.get_mut(start..start.checked_add(length)?))
        .ok_or_else(|| {
            let reason = format!("{length} bytes at offset {offset} are past its {size} bytes");
            MockError::new(doing, ErrorKind::InvalidInput, reason)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn a_range_beyond_the_end_is_refused_and_changes_nothing() {
        let disk = RamDisk::new(vec![7; 1024]);
        disk.write(1020, &[1, 2, 3, 4]).unwrap();
        for (offset, length) in [(1021, 4), (1024, 1), (u64::MAX, 2), (0, 1025)] {
            let error = disk.write(offset, &vec![9; length]).unwrap_err();
            let reason = error.source().unwrap().to_string();
            assert!(reason.contains("1024 bytes"), "{reason}");
            assert!(disk.read(offset, &mut vec![0; length]).is_err());
        }
        let mut end = [0; 5];
        disk.read(1019, &mut end).unwrap();
        assert_eq!(end, [7, 1, 2, 3, 4]);
    }
}
