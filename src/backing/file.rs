//! Files as RAM, named or nameless, as QEMU's `memory-backend-file` has them.
//!
//! A file that has contents keeps its length; one that is empty, or does not exist yet, is made as
//! long as the RAM needs, and is put back if nothing comes of it. Everything that can be known is
//! checked before anything is opened, and once more on the open file.

use std::fs::{self, File, FileType, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use nix::sys::statvfs::statvfs;

use super::capacity::{self, Capacity};
use super::error::{BackingError, Result};
use super::file_end::{FileEnd, Undo, punch};
use super::file_error::FileError;
use super::file_open::{Created, open_or_create};
use super::file_system::FileSystem;
use super::{BLOCK, BackingKind, Seals, check_file_size_limit, seals};
use crate::host::memory::Kind;
use crate::options::{Access, DiscardData, NodeSet, RamOptions};
use crate::range::RangePart;
use crate::shortage::Shortage;

/// A file that is long enough to be mapped, and what becomes of it.
pub(super) struct Opened {
    pub(super) file: Arc<File>,
    pub(super) metadata: Metadata,
    pub(super) kind: BackingKind,
    pub(super) page_size: u64,
    pub(super) seals: Seals,
    pub(super) end: FileEnd,
}

/// The size in bytes of the pages that a file at this path has, or would have.
pub(super) fn page_size(path: &Path) -> Result<u64> {
    Ok(Place::look(path)?.file_system.page_size())
}

/// Everything about RAM of `size` bytes in a file that can be checked without opening it, but the
/// pool of huge pages, and that `size` is whole pages.
pub(super) fn check(options: &RamOptions, path: &Path, size: u64) -> Result<()> {
    let place = Place::look(path)?;
    place.check(options, path, size)?;
    if place.is_new() {
        // An existing file is not made longer, so that the limit does not concern it.
        check_file_size_limit(options.offset() + size)?;
    }
    check_capacity(&place, options, path, size)
}

/// Refuses RAM that the file system can never hold, or, if it is to be populated, cannot hold now:
/// touching it would be SIGBUS.
fn check_capacity(place: &Place, options: &RamOptions, path: &Path, size: u64) -> Result<()> {
    let missing = size.saturating_sub(place.allocated);
    if options.is_unreserved() || missing == 0 {
        return Ok(());
    }
    let stat = statvfs(place.there(path)).ok();
    match stat.as_ref().and_then(Capacity::new) {
        Some(capacity)
            if size > capacity.total || !capacity::lazily(options) && missing > capacity.free =>
        {
            Err(capacity.shortage(missing, Some(path.to_owned())).into())
        }
        // Nothing is known of a file system that does not answer.
        _ => Ok(()),
    }
}

/// How many huge pages a file of `size` bytes takes from its pool, at most.
///
/// None if it has contents: it may have its pages already, or their promise by another mapping,
/// and only mapping it tells how many are missing.
pub(super) fn huge_pages(path: &Path, size: u64) -> Result<u64> {
    let place = Place::look(path)?;
    match place.file_system {
        FileSystem::Hugetlbfs { page_size } if place.is_new() => Ok(size / page_size),
        _ => Ok(0),
    }
}

/// What the pages of a file at this path are made of: nothing that the kernel could not drop, if
/// it is on a disk.
pub(super) fn memory_kind(path: &Path) -> Option<Kind> {
    match Place::look(path).ok()?.file_system {
        FileSystem::Tmpfs => Some(Kind::Base(NodeSet::new())),
        FileSystem::Hugetlbfs { page_size } => Some(Kind::Huge {
            page_size,
            reserving: true,
        }),
        FileSystem::Other { .. } => None,
    }
}

/// Opens or creates the file at a path, long enough for RAM of `size` bytes.
pub(super) fn open(options: &RamOptions, path: &Path, size: u64) -> Result<Opened> {
    let (file, created) = open_or_create(path, options.access())?;
    let file = Arc::new(file);
    // From here on a failure undoes what was done.
    let mut end = FileEnd::new(file.clone());
    if created == Created::Named {
        end.undo = Undo::Remove(path.to_owned());
    }
    let inspect = |source| FileError::Inspect {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(inspect)?;
    let start = options.offset();

    let file_system = FileSystem::of(&file).map_err(inspect)?;
    let place = Place::of(&metadata, file_system, path)?;
    place.check(options, path, size)?;
    let seals = seals::read(&file).map_err(inspect)?;
    let writable = options.access() == Access::ReadWrite;
    if writable && seals.intersects(Seals::WRITE | Seals::FUTURE_WRITE) {
        let path = path.to_owned();
        return Err(FileError::WriteSealed { path, seals }.into());
    }
    if metadata.len() == 0 {
        if created == Created::Nothing {
            end.undo = Undo::Empty;
        }
        file.set_len(start + size)
            .map_err(|source| FileError::Resize {
                path: path.to_owned(),
                len: start + size,
                source,
            })?;
    }
    let metadata = file.metadata().map_err(inspect)?;
    check_len(metadata.len(), start, size, path)?;
    if options.discard_data() == DiscardData::OnDrop {
        let behind = metadata.len().next_multiple_of(place.page_size());
        // Behind its end there is nothing to lose.
        let answer = punch(&file, behind..behind + place.page_size());
        answer.map_err(|source| FileError::NoDiscard {
            path: path.to_owned(),
            source,
        })?;
        end.discard = Some(start..start + size);
    }
    Ok(Opened {
        page_size: place.page_size(),
        kind: match file_system {
            FileSystem::Tmpfs => BackingKind::ShmFile,
            FileSystem::Hugetlbfs { .. } => BackingKind::HugetlbFile,
            FileSystem::Other { .. } => BackingKind::File,
        },
        file,
        metadata,
        seals,
        end,
    })
}

/// What is at a path.
struct Place {
    /// A file, a directory, or nothing.
    found: Option<FileType>,
    file_system: FileSystem,
    /// The length of the file in bytes.
    len: u64,
    /// In bytes.
    allocated: u64,
}

impl Place {
    /// Looks without opening: that may have effects, or wait, where it is a device or a FIFO.
    fn look(path: &Path) -> Result<Self> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                check_no_link(path)?;
                let file_system = FileSystem::at(parent(path));
                return Ok(Self {
                    found: None,
                    file_system: file_system.map_err(|source| open_error(path, source))?,
                    len: 0,
                    allocated: 0,
                });
            }
            Err(source) => return Err(open_error(path, source)),
        };
        let file_system = FileSystem::at(path).map_err(|source| open_error(path, source))?;
        Self::of(&metadata, file_system, path)
    }

    fn of(metadata: &Metadata, file_system: FileSystem, path: &Path) -> Result<Self> {
        let found = metadata.file_type();
        if !found.is_file() && !found.is_dir() {
            let path = path.to_owned();
            return Err(FileError::NotAFile { path, found }.into());
        }
        Ok(Self {
            found: Some(found),
            file_system,
            len: if found.is_file() { metadata.len() } else { 0 },
            allocated: metadata.blocks() * BLOCK,
        })
    }

    fn page_size(&self) -> u64 {
        self.file_system.page_size()
    }

    /// Whether the file is to be made as long as the RAM needs.
    fn is_new(&self) -> bool {
        self.len == 0
    }

    /// What exists of the path.
    fn there<'a>(&self, path: &'a Path) -> &'a Path {
        match self.found {
            None => parent(path),
            Some(_) => path,
        }
    }

    /// Checks the numbers, and that there is something for a ROM.
    fn check(&self, options: &RamOptions, path: &Path, size: u64) -> Result<()> {
        let (offset, page_size) = (options.offset(), self.page_size());
        let path_buf = || path.to_owned();
        RangePart::Offset.check_aligned(offset, page_size)?;
        RangePart::Size.check_aligned(size, page_size)?;
        match options.align() {
            // As in QEMU, 0 is no wish.
            None | Some(0) => {}
            Some(align) if align.is_power_of_two() && align.is_multiple_of(page_size) => {}
            Some(align) => {
                return Err(FileError::Align {
                    path: path_buf(),
                    align,
                    page_size,
                }
                .into());
            }
        }
        match self.found {
            Some(found) if found.is_file() && self.len > 0 => {
                check_len(self.len, offset, size, path)
            }
            found if options.access() == Access::ReadOnly => Err(FileError::NothingToRead {
                path: path_buf(),
                found,
            }
            .into()),
            _ => Ok(()),
        }
    }
}

fn check_len(len: u64, offset: u64, size: u64, path: &Path) -> Result<()> {
    if offset.checked_add(size).is_some_and(|end| end <= len) {
        return Ok(());
    }
    Err(FileError::TooShort {
        path: path.to_owned(),
        len,
        offset,
        size,
    }
    .into())
}

/// A link to nothing cannot be created exclusively, and following it is not for us to decide.
pub(super) fn check_no_link(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => Err(FileError::DanglingLink {
            path: path.to_owned(),
        }
        .into()),
        _ => Ok(()),
    }
}

/// The directory that a path is in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

pub(super) fn open_error(path: &Path, source: io::Error) -> BackingError {
    match Shortage::of_descriptors(&source) {
        Some(shortage) => shortage.into(),
        None => FileError::Open {
            path: path.to_owned(),
            source,
        }
        .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_without_a_directory_is_in_the_current_one() {
        for (path, dir) in [("ram", "."), ("", "."), ("a/ram", "a"), ("/ram", "/")] {
            assert_eq!(parent(Path::new(path)), Path::new(dir));
        }
    }
}
