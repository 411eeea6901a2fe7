//! QEMU's types of memory backend, and which properties each has.

use crate::options::BackingSource;
use crate::options::error::{OptionsError, Result};

/// A type of memory backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::options) enum BackendType {
    Memfd,
    Shm,
    File,
}

/// Those of every type, and this crate's own `populate`, `on-shortage` and `thp` at the end.
macro_rules! properties {
    ($($own:literal),*) => {
        &[
            "id", "size", "share", "reserve", "prealloc", "prealloc-threads", "prealloc-context",
            "host-nodes", "policy", "merge", "dump", "x-use-canonical-path-for-ramblock-id",
            $($own,)*
            "populate", "on-shortage", "thp",
        ]
    };
}

impl BackendType {
    const ALL: [Self; 3] = [Self::Memfd, Self::Shm, Self::File];

    /// The type with this name, if RAM of it can be shared.
    pub(super) fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|known| known.name() == name);
        found.ok_or_else(|| OptionsError::UnknownType { found: name.into() })
    }

    pub(in crate::options) fn of(backing: &BackingSource) -> Self {
        match backing {
            BackingSource::Memfd => Self::Memfd,
            BackingSource::PosixShm => Self::Shm,
            BackingSource::File(_) => Self::File,
        }
    }

    /// Its name in QEMU.
    pub(in crate::options) fn name(self) -> &'static str {
        match self {
            Self::Memfd => "memory-backend-memfd",
            Self::Shm => "memory-backend-shm",
            Self::File => "memory-backend-file",
        }
    }

    /// Its properties.
    pub(super) fn properties(self) -> &'static [&'static str] {
        match self {
            Self::Memfd => properties!("hugetlb", "hugetlbsize", "seal"),
            Self::Shm => properties!(),
            Self::File => properties!(
                "mem-path",
                "align",
                "offset",
                "discard-data",
                "readonly",
                "rom",
                "pmem"
            ),
        }
    }
}
