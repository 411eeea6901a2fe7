//! An object that was made or opened to be RAM.

use std::fs::{File, Metadata};
use std::sync::Arc;

use super::error::{BackingError, Result};
use super::file_end::FileEnd;
use super::kind::BackingKind;
use super::seals::{self, Seals};

/// An object that has the length that the RAM needs, and what it turned out to be.
pub(super) struct Made {
    pub(super) file: Arc<File>,
    pub(super) metadata: Metadata,
    pub(super) kind: BackingKind,
    pub(super) page_size: u64,
    pub(super) seals: Seals,
    /// Of a file that was opened by its path.
    pub(super) end: Option<FileEnd>,
}

impl Made {
    /// An object without a name.
    pub(super) fn nameless(file: File, kind: BackingKind, page_size: u64) -> Result<Self> {
        Ok(Self {
            metadata: file.metadata().map_err(BackingError::inspect)?,
            seals: seals::read(&file).map_err(BackingError::inspect)?,
            file: Arc::new(file),
            kind,
            page_size,
            end: None,
        })
    }
}
