//! What is at the path of a file that is to be RAM, or will be.

use std::fs::{self, FileType, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::capacity::{Draw, Name, Taken};
use super::error::{BackingError, Result};
use super::file_error::FileError;
use super::kind::{BLOCK, BackingKind, FileIdentity};
use crate::host::file_system::{FileSystem, Room};
use crate::options::{Access, RamOptions};
use crate::range::RangePart;
use crate::shortage::Shortage;

/// What was found at a path, when it was looked at.
#[derive(Debug)]
pub(super) struct Place<'a> {
    pub(super) path: &'a Path,
    /// A file, a directory, or nothing.
    found: Option<FileType>,
    file_system: FileSystem,
    /// The device of the file system.
    device: u64,
    /// Which file it is.
    file: Option<FileIdentity>,
    /// The length of the file in bytes.
    len: u64,
    /// In bytes.
    allocated: u64,
}

impl<'a> Place<'a> {
    /// Looks without opening: that may have effects, or wait, where it is a device or a FIFO.
    pub(super) fn look(path: &'a Path) -> Result<Self> {
        let failed = |source| open_error(path, source);
        match fs::metadata(path) {
            Ok(metadata) => {
                let file_system = FileSystem::at(path).map_err(failed)?;
                Self::of(path, &metadata, file_system)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                check_no_link(path)?;
                let parent = parent(path);
                Ok(Self {
                    path,
                    found: None,
                    file_system: FileSystem::at(parent).map_err(failed)?,
                    device: fs::metadata(parent).map_err(failed)?.dev(),
                    file: None,
                    len: 0,
                    allocated: 0,
                })
            }
            Err(error) => Err(failed(error)),
        }
    }

    pub(super) fn of(
        path: &'a Path,
        metadata: &Metadata,
        file_system: FileSystem,
    ) -> Result<Self> {
        let found = metadata.file_type();
        if !found.is_file() && !found.is_dir() {
            let path = path.to_owned();
            return Err(FileError::NotAFile { path, found }.into());
        }
        Ok(Self {
            path,
            found: Some(found),
            file_system,
            device: metadata.dev(),
            file: found.is_file().then(|| FileIdentity::of(metadata)),
            len: if found.is_file() { metadata.len() } else { 0 },
            allocated: metadata.blocks() * BLOCK,
        })
    }

    pub(super) fn page_size(&self) -> u64 {
        self.file_system.page_size()
    }

    pub(super) fn kind(&self) -> BackingKind {
        match self.file_system {
            FileSystem::Tmpfs => BackingKind::ShmFile,
            FileSystem::Hugetlbfs { .. } => BackingKind::HugetlbFile,
            FileSystem::Other { .. } => BackingKind::File,
        }
    }

    /// Whether the file is to be made as long as the RAM needs.
    pub(super) fn is_new(&self) -> bool {
        self.len == 0
    }

    /// Checks the numbers, and that there is something for a ROM.
    pub(super) fn check(&self, options: &RamOptions, size: u64) -> Result<()> {
        let page_size = self.page_size();
        RangePart::Offset.check_aligned(options.offset(), page_size)?;
        RangePart::Size.check_aligned(size, page_size)?;
        options.check_align(page_size)?;
        if !self.is_new() {
            return check_len(self.path, self.len, options.offset(), size);
        }
        if options.access() == Access::ReadOnly {
            let (path, found) = (self.path.to_owned(), self.found);
            return Err(FileError::NothingToRead { path, found }.into());
        }
        Ok(())
    }

    /// What RAM of these options takes from the file system, unless it has all of it already.
    pub(super) fn draw(&self, options: &RamOptions, size: u64) -> Option<Draw<'a>> {
        let missing = size.saturating_sub(self.allocated);
        if missing == 0 {
            return None;
        }
        let there = match self.found {
            Some(_) => self.path,
            None => parent(self.path),
        };
        let start = options.offset();
        let part = start..start.saturating_add(size);
        Some(Draw {
            name: Name::Path(self.path),
            room: Room::at(there)?,
            device: self.device,
            part: match (self.found, self.file) {
                // A nameless one for each.
                (Some(found), _) if found.is_dir() => None,
                (_, Some(file)) => Some((Taken::File(file), part)),
                (_, None) => Some((Taken::Path(self.path), part)),
            },
            all: size,
            now: if options.is_lazy() { 0 } else { missing },
        })
    }
}

pub(super) fn check_len(path: &Path, len: u64, offset: u64, size: u64) -> Result<()> {
    if offset.checked_add(size).is_some_and(|end| end <= len) {
        return Ok(());
    }
    let path = path.to_owned();
    let error = FileError::TooShort {
        path,
        len,
        offset,
        size,
    };
    Err(error.into())
}

/// Creating exclusively fails on a link to nothing, and following it is the caller's decision.
pub(super) fn check_no_link(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => {
            let path = path.to_owned();
            Err(FileError::DanglingLink { path }.into())
        }
        _ => Ok(()),
    }
}

pub(super) fn open_error(path: &Path, source: io::Error) -> BackingError {
    match Shortage::of_descriptors(&source) {
        Some(shortage) => shortage.into(),
        None => {
            let path = path.to_owned();
            FileError::Open { path, source }.into()
        }
    }
}

/// The directory that a path is in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
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
