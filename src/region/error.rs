//! Why a region or a ROM cannot be made, and why regions do not make a memory.

use std::io;

use vm_memory::GuestAddress;

use crate::backing::BackingError;
use crate::mapping::MapError;
use crate::populate::PopulateError;
use crate::range::{GuestRange, InvalidRange};
use crate::shortage::Shortage;
use crate::units::HumanSize;

pub(crate) type Result<T, E = MemoryError> = std::result::Result<T, E>;

/// Why a region or a ROM cannot be made or read, or regions do not make a memory.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A range is not what it should be: empty, too large, not whole pages, or taken.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// The backing could not be created, or does not have that part.
    #[error(transparent)]
    Backing(BackingError),

    /// The backing could not be mapped.
    #[error(transparent)]
    Map(MapError),

    /// The RAM could not be populated.
    #[error(transparent)]
    Populate(#[from] PopulateError),

    /// Guest memory without any range was asked for.
    #[error("no range of guest RAM was given: give at least one")]
    NoRanges,

    /// Ranges or regions are not sorted by address, which vm-memory's constructors demand.
    #[error(
        "the guest range {second} was given after {first}: sort them by address, or use \
         GuestMemoryShm::builder, which takes any order"
    )]
    #[non_exhaustive]
    Unsorted {
        /// The range that was given first.
        first: GuestRange,
        /// The range after it, at a lower address.
        second: GuestRange,
    },

    /// No region has exactly this address and size.
    #[error(
        "no region of {} starts at guest address {:#x}, where {}",
        HumanSize(*.size), .start.0, found_instead(*.found)
    )]
    #[non_exhaustive]
    NoSuchRegion {
        /// The address that was looked for.
        start: GuestAddress,
        /// The size that was looked for, in bytes.
        size: u64,
        /// The size of the region that starts there, if one does.
        found: Option<u64>,
    },

    /// A file that is open for reading only was to be guest RAM.
    #[error(
        "a file that is opened for reading only (readonly=on) cannot be RAM, which guests and \
         daemons write: map it with GuestRom, or open it for writing"
    )]
    ReadOnlyRam,

    /// A ROM was to be made of something other than a file opened for reading only.
    #[error(
        "a ROM is made of a file that is opened for reading only: use BackingSource::File and \
         Access::ReadOnly (mem-path=..., readonly=on, rom=on)"
    )]
    WritableRom,

    /// More was to be read of a ROM than it has.
    #[error(
        "{len} bytes at offset {offset:#x} are not all in the ROM of {}: read less",
        HumanSize(*.size)
    )]
    #[non_exhaustive]
    OutsideRom {
        /// Where in the ROM reading was to start, in bytes.
        offset: u64,
        /// How much was to be read, in bytes.
        len: u64,
        /// The size of the ROM in bytes.
        size: u64,
    },

    /// A ROM could not be read.
    #[error("cannot read {len} bytes at offset {offset:#x} of the ROM")]
    #[non_exhaustive]
    ReadRom {
        /// Where in the ROM reading was to start, in bytes.
        offset: u64,
        /// How much was to be read, in bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },

    /// A second view of the RAM, as vm-memory's own type, could not be made.
    #[error("cannot map {range} once more as vm-memory's GuestMemoryMmap")]
    #[non_exhaustive]
    Remap {
        /// The range of the region, or of all of them.
        range: GuestRange,
        /// vm-memory's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl MemoryError {
    /// What is short, if that is the reason.
    pub fn shortage(&self) -> Option<&Shortage> {
        match self {
            Self::Backing(BackingError::Shortage(shortage))
            | Self::Populate(
                PopulateError::Shortage { shortage, .. } | PopulateError::CannotLook { shortage },
            ) => Some(shortage),
            _ => None,
        }
    }
}

impl From<BackingError> for MemoryError {
    fn from(error: BackingError) -> Self {
        match error {
            BackingError::Range(error) => error.into(),
            error => Self::Backing(error),
        }
    }
}

impl From<MapError> for MemoryError {
    fn from(error: MapError) -> Self {
        match error {
            MapError::Backing(error) => error.into(),
            error => Self::Map(error),
        }
    }
}

fn found_instead(found: Option<u64>) -> String {
    match found {
        Some(size) => format!("one of {} does", HumanSize(size)),
        None => "none does".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rom_that_cannot_be_read_says_what_of_it_and_why() {
        let error = MemoryError::ReadRom {
            offset: 16,
            len: 4,
            source: io::Error::from_raw_os_error(5),
        };
        assert_eq!(
            error.to_string(),
            "cannot read 4 bytes at offset 0x10 of the ROM"
        );
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        assert!(cause.is_some_and(|cause| cause.contains("os error 5")));
    }
}
