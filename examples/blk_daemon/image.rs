//! The file that the disk is stored in.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use vm_memory::GuestMemory;

use crate::buffers::Buffers;
use crate::failure::{Failure, OrFail, Result};

/// Bytes in a sector.
pub(crate) const SECTOR: u64 = 512;

/// A sector of zeroes, of which the tail of the disk is a part.
const NO_DATA: [u8; 512] = [0; 512];

/// Bytes that are written at once where a file system cannot zero a range by itself.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// A disk image, open and locked. Its length never changes.
pub(crate) struct Image {
    file: Flock<File>,
    len: u64,
    block_size: u32,
    read_only: bool,
    name: String,
}

impl Image {
    /// Opens the image at `path`; read-only where that is wanted, or where it may not be written.
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<Self> {
        let doing = || format!("cannot serve {}", path.display());
        let refuse = |reason: &str| Err(Failure::new(format!("{}: {reason}", doing())));
        // Opening a FIFO would wait for its other end.
        let kind = fs::metadata(path).or_fail(doing)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return refuse("it is no regular file and no block device");
        }
        let opened = OpenOptions::new().read(true).write(!read_only).open(path);
        let (mut file, read_only) = match opened {
            Err(error) if !read_only && may_not_write(&error) => {
                log::warn!("{}: {error}: read-only, then", path.display());
                (File::open(path).or_fail(doing)?, true)
            }
            opened => (opened.or_fail(doing)?, read_only),
        };
        let len = file.seek(SeekFrom::End(0)).or_fail(doing)?;
        if len == 0 {
            let path = path.display();
            return refuse(&format!(
                "it is empty: give it a size, for example truncate -s 1G {path}"
            ));
        }
        let block_size = file.metadata().or_fail(doing)?.blksize();
        let how = match read_only {
            true => FlockArg::LockSharedNonblock,
            false => FlockArg::LockExclusiveNonblock,
        };
        let file = match Flock::lock(file, how) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => {
                return refuse(
                    "another process has it locked, perhaps a blk_daemon: end it first, or give \
                     both --read-only",
                );
            }
            Err((_, error)) => return Err(error).or_fail(|| format!("{}, lock it", doing())),
        };
        let name = path.file_name().unwrap_or_default();
        Ok(Self {
            file,
            len,
            block_size: u32::try_from(block_size).unwrap_or(0),
            read_only,
            name: name.to_string_lossy().into_owned(),
        })
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Sectors of the disk; the last may be partial in the file.
    pub(crate) fn sectors(&self) -> u64 {
        self.len.div_ceil(SECTOR)
    }

    /// Bytes that the file system handles at once, as far as it says.
    pub(crate) fn block_size(&self) -> u32 {
        self.block_size
    }

    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// The name of the file, by which a guest may know its disks apart.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

fn may_not_write(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
    )
}

/// The image as one queue uses it: with a position of its own.
///
/// vm-memory reads and writes at the position of a file, and a position is shared by all who share
/// the open file. A queue's thread that has opened it for itself needs no lock.
pub(crate) struct Lane {
    image: Arc<Image>,
    file: File,
}

impl Lane {
    pub(crate) fn new(image: &Arc<Image>) -> io::Result<Self> {
        // The same file whatever its name stands for now, see proc_pid_fd(5).
        let path = format!("/proc/self/fd/{}", image.file.as_raw_fd());
        let file = OpenOptions::new()
            .read(true)
            .write(!image.read_only)
            .open(path)?;
        Ok(Self {
            image: Arc::clone(image),
            file,
        })
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    /// The offset of `sector`, if the disk has `len` bytes there.
    pub(crate) fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(len)?;
        let whole = len.is_multiple_of(SECTOR) && end.div_ceil(SECTOR) <= self.image.sectors();
        whole.then_some(start)
    }

    /// Fills `buffers` with what is at `offset`, and with zeroes beyond the end of the file.
    pub(crate) fn read(
        &mut self,
        offset: u64,
        mut buffers: Buffers,
        memory: &impl GuestMemory,
    ) -> io::Result<()> {
        let data = buffers.take_front(self.in_file(offset));
        self.file.seek(SeekFrom::Start(offset))?;
        data.fill_from(memory, &self.file)?;
        buffers.write(memory, beyond(&NO_DATA, &buffers)?)
    }

    /// Writes `buffers` at `offset`. Nothing is written if there is anything but zeroes for what
    /// lies beyond the end of the file.
    pub(crate) fn write(
        &mut self,
        offset: u64,
        mut buffers: Buffers,
        memory: &impl GuestMemory,
    ) -> io::Result<()> {
        let data = buffers.take_front(self.in_file(offset));
        let mut tail = NO_DATA;
        let len = beyond(&tail, &buffers)?.len();
        buffers.read(memory, &mut tail[..len])?;
        if tail.iter().any(|byte| *byte != 0) {
            return Err(io::Error::other(
                "there would be data beyond the end of the image, which is no multiple of 512 \
                 bytes",
            ));
        }
        self.file.seek(SeekFrom::Start(offset))?;
        data.drain_to(memory, &self.file)
    }

    /// Has what was written reach the medium.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a range back, where the file system can; it reads as zeroes then.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)? {
            true => Ok(()),
            // The guest only said that it needs the data no more.
            false => {
                log::debug!("the image's file system has no holes: nothing is discarded");
                Ok(())
            }
        }
    }

    /// Makes a range read as zeroes; its space is given back only with `unmap`.
    pub(crate) fn zero(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
        if unmap && self.allocate(hole, offset, len)? {
            return Ok(());
        }
        if self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)? {
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(offset))?;
        let mut left = len.min(self.in_file(offset));
        while left > 0 {
            let part = left.min(ZEROES.len() as u64);
            let part = usize::try_from(part).unwrap_or(ZEROES.len());
            io::Write::write_all(&mut self.file, &ZEROES[..part])?;
            left -= part as u64;
        }
        Ok(())
    }

    /// fallocate(2) within the file; `false` where its file system cannot do that.
    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        let len = len.min(self.in_file(offset));
        if len == 0 {
            return Ok(true);
        }
        let signed = |number: u64| i64::try_from(number).map_err(io::Error::other);
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, mode, signed(offset)?, signed(len)?) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// How many bytes the file has from `offset` on.
    fn in_file(&self, offset: u64) -> u64 {
        self.image.len.saturating_sub(offset)
    }
}

/// As much of `sector` as `buffers`, which lie beyond the end of the file, are long.
fn beyond<'a>(sector: &'a [u8], buffers: &Buffers) -> io::Result<&'a [u8]> {
    let len = usize::try_from(buffers.len()).ok();
    let part = len.and_then(|len| sector.get(..len));
    part.ok_or_else(|| io::Error::from(ErrorKind::InvalidInput))
}
