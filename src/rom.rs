//! ROMs: files that the guest reads and does not write, placed at a guest address.

use std::fmt;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

#[cfg(doc)]
use crate::backing::{BackingError, FileError};
use crate::backing::{Resolved, ShmBacking};
#[cfg(feature = "kvm")]
use crate::mapping::HostAddr;
use crate::mapping::Mapping;
use crate::options::{Access, BackingSource, RamOptions};
use crate::range::{GuestRange, InvalidRange};
use crate::region::{MemoryError, Result};

/// A file mapped for reading only (`PROT_READ`, `MAP_SHARED`), for firmware and the like: QEMU's
/// `memory-backend-file` with `readonly=on,rom=on`.
///
/// It is no region of a [`GuestMemoryShm`](crate::GuestMemoryShm), because what accesses a memory
/// may write: the VMM's devices would die of SIGSEGV, and daemons could not map the descriptor.
/// A hypervisor maps it as a read-only memory slot, for example KVM's with `KVM_MEM_READONLY`.
///
/// The file stays what it is: what another process writes to it is seen by the guest, and when one
/// truncates it, the guest's next access is SIGBUS in the VMM. Like a region it lies between two
/// guard pages.
///
/// ```
/// use guest_memory_shm::{Access, BackingSource, GuestRom, RamOptions};
/// use vm_memory::GuestAddress;
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("firmware");
/// std::fs::write(&path, vec![0xea; 64 << 10])?;
/// let options = RamOptions::new()
///     .with_backing(BackingSource::File(path))
///     .with_access(Access::ReadOnly);
/// let rom = GuestRom::new((GuestAddress(0xf_0000), 64 << 10), &options)?;
///
/// let mut reset_vector = [0];
/// rom.read(0xfff0, &mut reset_vector)?;
/// assert_eq!(reset_vector, [0xea]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GuestRom {
    range: GuestRange,
    /// Before the backing: it is unmapped first.
    mapping: Mapping,
    backing: ShmBacking,
}

impl GuestRom {
    /// A ROM in this range, in a file that exists.
    ///
    /// The size is a multiple of the page size, and the file has at least
    /// [`RamOptions::offset`] + `size` bytes.
    ///
    /// # Errors
    ///
    /// [`MemoryError::WritableRom`] unless the options are those of a [`BackingSource::File`] with
    /// [`Access::ReadOnly`]; [`FileError::NothingToRead`] and [`FileError::TooShort`] for a file
    /// without the contents; [`MemoryError::Range`] for a bad place; those of
    /// [`ShmBacking::create`]; and [`MemoryError::Map`]. Nothing is left behind, and no file is
    /// created.
    pub fn new(
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
        options: &RamOptions,
    ) -> Result<Self> {
        let is_file = matches!(options.backing(), BackingSource::File(_));
        if !is_file || options.access() != Access::ReadOnly {
            return Err(MemoryError::WritableRom);
        }
        let range = GuestRange::at(range)?;
        let resolved = Resolved::new(options)?;
        range.check_aligned(resolved.page_size())?;
        let backing = resolved.with_len(range.size())?.create_alone()?;
        let mapping = Mapping::new(&backing, backing.start(), range.size())?;
        Ok(Self {
            range,
            mapping,
            backing,
        })
    }

    /// The guest addresses of the ROM.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// The file, open for reading only.
    pub fn backing(&self) -> &ShmBacking {
        &self.backing
    }

    /// Where the ROM starts in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.backing.start()
    }

    /// The host address of the first byte, for a read-only memory slot of a hypervisor.
    ///
    /// It is valid as long as the ROM lives. Other processes may write the file: no reference to
    /// it may be made, and it is read by volatile operations. A write there is SIGSEGV.
    pub fn as_ptr(&self) -> *const u8 {
        self.mapping.host_addr().as_ptr()
    }

    /// As [`as_ptr`](Self::as_ptr).
    #[cfg(feature = "kvm")]
    pub(crate) fn host_addr(&self) -> HostAddr {
        self.mapping.host_addr()
    }

    /// Reads what is `offset` bytes into the ROM, by pread(2): no truncation is SIGBUS here.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutsideRom`] if it is shorter than that;
    /// [`BackingError::Truncated`] if the file has become shorter;
    /// [`MemoryError::ReadRom`] if reading fails.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (len, size) = (buf.len() as u64, self.range.size());
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(MemoryError::OutsideRom { offset, len, size });
        }
        let at = self.offset() + offset;
        let answer = self.backing.file().read_exact_at(buf, at);
        answer.or_else(|source| {
            if source.kind() == ErrorKind::UnexpectedEof {
                self.backing.check_not_truncated()?;
            }
            Err(MemoryError::ReadRom {
                offset,
                len,
                source,
            })
        })
    }
}

impl fmt::Debug for GuestRom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRom")
            .field("range", &format_args!("{}", self.range))
            .field("mapping", &self.mapping)
            .field("backing", &self.backing)
            .finish()
    }
}
