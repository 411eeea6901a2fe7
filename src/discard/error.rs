//! Why memory could not be given back.

use std::io;

use vm_memory::GuestAddress;

use crate::backing::BackingKind;
use crate::range::{GuestRange, InvalidRange};
use crate::units::HumanSize;

/// Why memory could not be given back. Unless the variant says otherwise, nothing was.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// What was to be discarded is no range.
    #[error(transparent)]
    Range(#[from] InvalidRange),

    /// A part of the range is no RAM.
    #[error(
        "cannot discard {range}: there is no RAM at guest address {:#x}, discard what is before \
         and after the gap apart",
        .first.0
    )]
    #[non_exhaustive]
    NotRam {
        /// The range that was to be discarded.
        range: GuestRange,
        /// The first address in it that is no RAM.
        first: GuestAddress,
    },

    /// Discards are forbidden, because devices have pages of the RAM pinned.
    #[error(
        "cannot discard {range}: discards are inhibited by {by} (DiscardInhibitor), whose devices \
         have the pages pinned; try again when they have let go"
    )]
    #[non_exhaustive]
    Inhibited {
        /// The range that was to be discarded.
        range: GuestRange,
        /// How many inhibitors there are.
        by: usize,
    },

    /// Pages in the range are locked into memory, and the kernel does not take those away.
    #[error(
        "cannot discard {range}: pages of it are locked (mlock or mlockall), which the kernel \
         does not give back: munlock them first"
    )]
    #[non_exhaustive]
    Locked {
        /// The part that has locked pages.
        range: GuestRange,
    },

    /// The mapping cannot be written.
    #[error("cannot discard {range}: it is mapped for reading only, and a discard writes zeroes")]
    #[non_exhaustive]
    ReadOnly {
        /// The part that is read-only.
        range: GuestRange,
    },

    /// The file system that backs the RAM cannot make holes in files.
    #[error(
        "cannot discard {range}: the file system of its {kind} cannot punch holes into files, use \
         a memfd, or a file on a tmpfs, ext4, xfs or btrfs"
    )]
    #[non_exhaustive]
    NoHoles {
        /// The part that the file backs.
        range: GuestRange,
        /// What its backing is.
        kind: BackingKind,
    },

    /// The kernel does not tell whether pages may be given back, or were.
    #[error(
        "cannot discard {range}: the kernel does not say which of its pages it gives back, {} \
         were given back before",
        HumanSize(*.freed)
    )]
    #[non_exhaustive]
    CannotLook {
        /// The range that was to be discarded, or the part of it that was looked at.
        range: GuestRange,
        /// How much was given back before, in bytes.
        freed: u64,
        /// The system's answer.
        source: io::Error,
    },

    /// The kernel gave a part of the range back, and then no more.
    #[error(
        "cannot discard {range}: madvise(MADV_REMOVE) failed, {} of it were given back before",
        HumanSize(*.freed)
    )]
    #[non_exhaustive]
    Failed {
        /// The range that was to be discarded.
        range: GuestRange,
        /// How much was given back before it failed, in bytes.
        freed: u64,
        /// The system's answer.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_the_range_the_limit_and_the_way_out() {
        let range = GuestRange::new(GuestAddress(0x1000), 0x2000).unwrap();
        let cases = [
            (
                DiscardError::NotRam {
                    range,
                    first: GuestAddress(0x2000),
                },
                "there is no RAM at guest address 0x2000, discard what is before and after the \
                 gap apart",
            ),
            (
                DiscardError::Inhibited { range, by: 2 },
                "discards are inhibited by 2 (DiscardInhibitor), whose devices have the pages \
                 pinned; try again when they have let go",
            ),
            (
                DiscardError::Locked { range },
                "pages of it are locked (mlock or mlockall), which the kernel does not give back: \
                 munlock them first",
            ),
            (
                DiscardError::ReadOnly { range },
                "it is mapped for reading only, and a discard writes zeroes",
            ),
            (
                DiscardError::NoHoles {
                    range,
                    kind: BackingKind::AdoptedFile,
                },
                "the file system of its adopted file cannot punch holes into files, use a memfd, \
                 or a file on a tmpfs, ext4, xfs or btrfs",
            ),
            (
                DiscardError::Failed {
                    range,
                    freed: 4096,
                    source: io::Error::from_raw_os_error(12),
                },
                "madvise(MADV_REMOVE) failed, 4 KiB of it were given back before",
            ),
        ];
        for (error, text) in cases {
            let text = format!("cannot discard 0x1000..=0x2fff (8 KiB): {text}");
            assert_eq!(error.to_string(), text);
        }
    }
}
