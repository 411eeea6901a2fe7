//! The two copies: the disk to a file, and a file to the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use guest_memory_shm::GuestMemoryShm;
use indicatif::ProgressBar;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::linkat;
use tempfile::TempPath;
use vm_memory::Bytes;

use crate::daemon::LocalDaemon;
use crate::disk::{Buffer, SECTOR, total};
use crate::ending::{self, Undo};
use crate::facts::size;
use crate::failure::{Failure, OrFail, Result};
use crate::session::Session;

/// A file that takes the disk's contents. It has no name until it is complete: however this
/// process ends, half a copy is never left.
pub(crate) struct Output {
    file: File,
    path: PathBuf,
    /// The name that it has where the file system has no files without one.
    partial: Option<(TempPath, Undo)>,
}

impl Output {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let doing = || format!("cannot write {}", path.display());
        let refuse = |reason: &str| Err(Failure::new(format!("{}: {reason}", doing())));
        // The rename at the end would put a plain file in the place of whatever is there.
        if let Ok(metadata) = fs::metadata(path)
            && !metadata.is_file()
        {
            return refuse("it exists and is no regular file, give another name");
        }
        if path.file_name().is_none() || path.parent().is_none() {
            return refuse("it has no file name");
        }
        let unnamed = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(MODE)
            .custom_flags(OFlag::O_TMPFILE.bits())
            .open(directory_of(path));
        let (file, partial) = match unnamed {
            // To give it a name, its entry in procfs is needed.
            Ok(file) if in_procfs(&file).exists() => (file, None),
            Err(error) if !may_be_missing(&error) => return Err(error).or_fail(doing),
            _ => {
                let _whole = ending::whole();
                let named = builder(path).tempfile_in(directory_of(path));
                let (file, name) = named.or_fail(doing)?.into_parts();
                let left = name.to_path_buf();
                let undo = ending::undo(move || drop(fs::remove_file(&left)));
                (file, Some((name, undo)))
            }
        };
        let path = path.to_owned();
        Ok(Self {
            file,
            path,
            partial,
        })
    }

    /// Copies the whole disk to the file.
    pub(crate) fn fill(&mut self, session: &mut Session, bar: &ProgressBar) -> Result<u64> {
        let len = session.capacity;
        let path = self.path.display();
        if let Ok((limit, _)) = getrlimit(Resource::RLIMIT_FSIZE)
            && len > limit
        {
            // The kernel would end this process with SIGXFSZ.
            return Err(Failure::new(format!(
                "cannot write {path}: a file of {} exceeds RLIMIT_FSIZE, which is {}: raise it \
                 (ulimit -f)",
                size(len),
                size(limit)
            )));
        }
        let file = &mut self.file;
        let Session { disk, ram, .. } = session;
        disk.read(ram, len, bar, |memory, offset, buffers| {
            for (addr, length) in buffers {
                memory
                    .write_all_volatile_to(*addr, file, *length as usize)
                    .or_fail(|| format!("cannot write {path} at byte {offset}"))?;
            }
            Ok(())
        })?;
        Ok(len)
    }

    /// Has the file written back, and gives it its name, which is returned.
    pub(crate) fn complete(self) -> Result<PathBuf> {
        let doing = || format!("cannot complete {}", self.path.display());
        self.file.sync_all().or_fail(doing)?;
        let _whole = ending::whole();
        let named = match self.partial {
            Some((name, _undo)) => name.persist(&self.path).map_err(|refused| refused.error),
            None => give_name(&self.file, &self.path),
        };
        named.or_fail(doing)?;
        Ok(self.path)
    }
}

/// As File::create would: the umask takes its share.
const MODE: u32 = 0o666;

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

/// Makes names beside `path` that tell what they are.
fn builder(path: &Path) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(path.file_name().unwrap_or_default());
    builder.suffix(".partial");
    builder.permissions(fs::Permissions::from_mode(MODE));
    builder
}

/// Whether O_TMPFILE failed because there is no such thing: on this file system, or at all.
fn may_be_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL)
    )
}

fn in_procfs(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Gives a file without a name the name `path`, also where another has it (see open(2),
/// O_TMPFILE).
fn give_name(file: &File, path: &Path) -> io::Result<()> {
    let link = |name: &Path| {
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        linkat(AT_FDCWD, &in_procfs(file), AT_FDCWD, name, flags).map_err(io::Error::from)
    };
    match link(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            // A link replaces nothing, a rename does.
            let beside = builder(path).make_in(directory_of(path), link)?;
            let renamed = beside.into_temp_path().persist(path);
            renamed.map_err(|refused| refused.error)
        }
        linked => linked,
    }
}

/// A file that is to be copied to the disk.
pub(crate) struct Input {
    file: File,
    path: PathBuf,
    len: u64,
}

impl Input {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let doing = || format!("cannot read {}", path.display());
        // Opening a FIFO would wait for its writer.
        let kind = fs::metadata(path).or_fail(doing)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let problem = "it is no regular file and no block device";
            return Err(Failure::new(format!("{}: {problem}", doing())));
        }
        let mut file = File::open(path).or_fail(doing)?;
        let len = file.seek(SeekFrom::End(0)).or_fail(doing)?;
        file.rewind().or_fail(doing)?;
        if !len.is_multiple_of(SECTOR) {
            let padded = len.next_multiple_of(SECTOR);
            let path = path.display();
            return Err(Failure::new(format!(
                "cannot write {path} to a disk: it has {len} bytes, which are no whole sectors of \
                 {SECTOR}: pad it, for example with truncate -s {padded} {path}"
            )));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            len,
        })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Copies the file to the start of the disk.
    pub(crate) fn drain(&mut self, session: &mut Session, bar: &ProgressBar) -> Result<u64> {
        let (len, path) = (self.len, self.path.display());
        if len > session.capacity {
            return Err(Failure::new(format!(
                "{path} has {} and the disk only {}: nothing was written, enlarge the disk first \
                 or give a smaller file",
                size(len),
                size(session.capacity)
            )));
        }
        let file = &mut self.file;
        let Session { disk, ram, .. } = session;
        disk.write(ram, len, bar, |memory, offset, buffers| {
            fill(memory, file, buffers).or_fail(|| format!("cannot read {path} at byte {offset}"))
        })?;
        Ok(len)
    }

    /// Compares the daemon's disk with the file, without a virtqueue.
    pub(crate) fn check(&mut self, daemon: &LocalDaemon) -> Result<()> {
        let doing = || format!("cannot read {} once more", self.path.display());
        self.file.rewind().or_fail(doing)?;
        let mut expected = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < self.len {
            let left = usize::try_from(self.len - offset).unwrap_or(usize::MAX);
            let part = left.min(expected.len());
            self.file.read_exact(&mut expected[..part]).or_fail(doing)?;
            daemon.check_disk(offset, &expected[..part])?;
            offset += part as u64;
        }
        Ok(())
    }
}

/// Reads from `file` into guest RAM until `buffers` are full.
fn fill(
    memory: &GuestMemoryShm,
    file: &mut File,
    buffers: &[Buffer],
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    for (addr, length) in buffers {
        let (mut addr, mut left) = (*addr, *length as usize);
        while left > 0 {
            match memory.read_volatile_from(addr, file, left)? {
                0 => return Err("it became shorter meanwhile".into()),
                count => {
                    addr.0 += count as u64;
                    left -= count;
                }
            }
        }
    }
    log::trace!("{} from the file", size(total(buffers)));
    Ok(())
}
