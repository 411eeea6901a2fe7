//! Files as RAM, named or nameless, as QEMU's `memory-backend-file` has them.
//!
//! A file that has contents keeps its length; one that is empty, or does not exist yet, is made as
//! long as the RAM needs, and is put back if building fails. Everything that can be known is
//! checked before anything is opened, and once more on the open file.

use std::path::Path;
use std::sync::Arc;

use super::capacity::check_file_size;
use super::error::Result;
use super::file_end::{FileEnd, Undo, punch};
use super::file_error::FileError;
use super::file_open::{Created, open_or_create};
use super::made::Made;
use super::place::{Place, check_len, open_error};
use super::seals::{self, Seals};
use crate::host::file_system::FileSystem;
use crate::options::{Access, DiscardData, RamOptions};

/// Opens or creates the file at a path, long enough for RAM of `size` bytes.
pub(super) fn open(options: &RamOptions, path: &Path, size: u64) -> Result<Made> {
    let (file, created) = open_or_create(path, options.access())?;
    let file = Arc::new(file);
    // From here on a failure undoes what was done.
    let mut end = FileEnd::new(file.clone());
    if created == Created::Named {
        end.undo = Undo::Remove(path.to_owned());
    }
    let failed = |source| open_error(path, source);
    let metadata = file.metadata().map_err(failed)?;
    let place = Place::of(path, &metadata, FileSystem::of(&file).map_err(failed)?)?;
    place.check(options, size)?;
    let seals = seals::read(&file).map_err(failed)?;
    let writable = options.access() == Access::ReadWrite;
    if writable && seals.intersects(Seals::WRITE | Seals::FUTURE_WRITE) {
        let path = path.to_owned();
        return Err(FileError::WriteSealed { path, seals }.into());
    }
    let start = options.offset();
    if place.is_new() {
        if created == Created::Nothing {
            end.undo = Undo::Empty;
        }
        let len = start + size;
        // What was looked at before may have been another file, which was long enough.
        check_file_size(len)?;
        file.set_len(len).map_err(|source| FileError::Resize {
            path: path.to_owned(),
            len,
            source,
        })?;
    }
    let metadata = file.metadata().map_err(failed)?;
    check_len(path, metadata.len(), start, size)?;
    if options.discard_data() == DiscardData::OnDrop {
        let after = metadata.len().next_multiple_of(place.page_size());
        // Past its end there is nothing to lose.
        let answer = punch(&file, after..after + place.page_size());
        answer.map_err(|source| FileError::NoDiscard {
            path: path.to_owned(),
            source,
        })?;
        end.discard = Some(start..start + size);
    }
    Ok(Made {
        kind: place.kind(),
        page_size: place.page_size(),
        file,
        metadata,
        seals,
        end: Some(end),
    })
}
