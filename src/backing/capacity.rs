//! What the system can hold, asked before anything is created: file systems, descriptors, lengths.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};

use super::error::Result;
use super::kind::FileIdentity;
use crate::host::descriptors;
use crate::host::file_system::Room;
use crate::range::RangeSet;
use crate::report::BuildNote;
use crate::shortage::{ResourceLimit, Shortage};

/// Where POSIX shared memory objects are.
pub(super) const SHM: &str = "/dev/shm";

/// Refuses `all` if it exceeds the size of the file system of what has a name, and `now`, what is
/// needed at once, if it exceeds what is free.
fn check(room: Room, all: u64, now: u64, name: Name<'_>) -> Result<()> {
    if all > room.total {
        Err(shortage(room, all, name.path()).into())
    } else if now > room.free {
        Err(shortage(room, now, name.path()).into())
    } else {
        Ok(())
    }
}

/// The error that so many bytes are not free, in the file system of what is at a path.
fn shortage(room: Room, needed: u64, path: Option<PathBuf>) -> Shortage {
    let limit = ResourceLimit::FileSystem {
        path,
        size: room.total,
    };
    Shortage::new(needed, room.free, limit)
}

/// What RAM takes from a file system.
#[derive(Debug)]
pub(super) struct Draw<'a> {
    /// The name of the RAM, for errors.
    pub(super) name: Name<'a>,
    /// What the file system has.
    pub(super) room: Room,
    /// The device of the file system.
    pub(super) device: u64,
    /// Which part of which file, unless that is new and nameless: the same part of a file is only
    /// taken once.
    pub(super) part: Option<(Taken<'a>, Range<u64>)>,
    /// In bytes.
    pub(super) all: u64,
    /// What of it is taken before it is in use.
    pub(super) now: u64,
}

/// What is known of the name of a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Name<'a> {
    Path(&'a Path),
    /// The kernel may tell.
    Of(&'a File),
}

impl Name<'_> {
    fn path(self) -> Option<PathBuf> {
        match self {
            Self::Path(path) => Some(path.to_owned()),
            Self::Of(file) => descriptors::name_of(file).map(PathBuf::from),
        }
    }
}

/// A file of which parts are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Taken<'a> {
    /// One that is to be created.
    Path(&'a Path),
    /// One that is there.
    File(FileIdentity),
}

/// Refuses what file systems can never hold, or, of what is to be populated, cannot hold now:
/// touching it would be SIGBUS.
pub(super) fn check_file_systems<'a>(draws: impl Iterator<Item = Draw<'a>>) -> Result<()> {
    let mut sums: BTreeMap<u64, Draw<'a>> = BTreeMap::new();
    let mut parts: BTreeMap<Taken<'a>, RangeSet> = BTreeMap::new();
    for mut draw in draws {
        if let Some((file, part)) = draw.part.take() {
            let taken = parts.entry(file).or_default();
            draw.all = taken
                .gaps(part.clone())
                .map(|new| new.end - new.start)
                .sum();
            draw.now = draw.now.min(draw.all);
            taken.insert(part);
        }
        match sums.entry(draw.device) {
            Entry::Vacant(first) => drop(first.insert(draw)),
            Entry::Occupied(mut sum) => {
                let sum = sum.get_mut();
                sum.all = sum.all.saturating_add(draw.all);
                sum.now = sum.now.saturating_add(draw.now);
            }
        }
    }
    let check = |draw: &Draw<'_>| check(draw.room, draw.all, draw.now, draw.name);
    sums.values().try_for_each(check)
}

/// The note about a file system that is large enough for the RAM, but too full now.
pub(super) fn note(file: &File, size: u64) -> Option<BuildNote> {
    let room = Room::of(file)?;
    (size > room.free).then(|| BuildNote::Shortage(shortage(room, size, None)))
}

/// Refuses more backings than there are descriptors for.
pub(super) fn check_descriptors(needed: u64) -> Result<()> {
    match descriptors::left() {
        Some((left, limit)) if needed > left => {
            let limit = ResourceLimit::Descriptors { limit };
            Err(Shortage::new(needed, left, limit).into())
        }
        _ => Ok(()),
    }
}

/// Refuses what ftruncate(2) would answer with SIGXFSZ, which kills a process that does not handle
/// it.
pub(super) fn check_file_size(len: u64) -> Result<()> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if len > limit => {
            Err(Shortage::new(len, limit, ResourceLimit::FileSize).into())
        }
        // Without an answer the limit is left to the kernel.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::BackingError;

    #[test]
    fn ram_must_fit_at_all_and_populated_ram_now() {
        let room = Room {
            total: 100,
            free: 10,
        };
        for (all, now, fits) in [
            (100, 0, true),
            (101, 0, false),
            (100, 10, true),
            (100, 11, false),
        ] {
            let checked = check(room, all, now, Name::Path(Path::new(SHM)));
            assert_eq!(checked.is_ok(), fits, "{all} {now}");
        }
    }

    #[test]
    fn more_descriptors_than_are_left_are_refused() {
        assert!(check_descriptors(1).is_ok());
        let refused = check_descriptors(u64::MAX);
        let Err(BackingError::Shortage(shortage)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(shortage.needed, u64::MAX);
        assert!(matches!(shortage.limit, ResourceLimit::Descriptors { .. }));
    }
}
