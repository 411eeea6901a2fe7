//! What building reports: options that have no effect here, and limits that are near.

use std::fmt;
use std::io;

use crate::host::transparent::ThpObstacle;
use crate::logs;
use crate::options::NumaPolicy;
use crate::shortage::{ResourceLimit, Shortage};
use crate::units::HumanSize;

/// What building found out about the RAM, apart from errors.
///
/// Nothing in it is an error: the RAM is there. `Display` prints a line for each note.
///
/// ```
/// use guest_memory_shm::{BuildNote, GuestMemoryShm, RamOptions, Reserve};
/// use vm_memory::GuestAddress;
///
/// let (memory, report) = GuestMemoryShm::<()>::builder()
///     .add_ram(RamOptions::new().with_reserve(Reserve::On), [(GuestAddress(0), 1 << 20)])
///     .build_with_report()?;
/// let notes: Vec<_> = report.notes().collect();
/// assert_eq!(notes, [("memfd", &BuildNote::Reserve)]);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct BuildReport {
    lines: Vec<Line>,
}

/// A note, and the backing that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
struct Line {
    backing: String,
    note: BuildNote,
}

/// Something about RAM that its options may not lead one to expect.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BuildNote {
    /// `merge=on`: the kernel merges private pages only (KSM).
    Merge,
    /// `reserve=on`: only huge pages of a pool are reserved when they are mapped.
    Reserve,
    /// Transparent huge pages were asked for, and will not come.
    NotHuge(ThpObstacle),
    /// A NUMA policy where there is nothing to choose.
    #[non_exhaustive]
    OneNode {
        /// The policy.
        policy: NumaPolicy,
    },
    /// A NUMA policy for a file on a disk: the kernel does not ask it for new pages of the file.
    #[non_exhaustive]
    NotPlaced {
        /// The policy.
        policy: NumaPolicy,
    },
    /// `hugetlbsize` without `hugetlb=on`.
    #[non_exhaustive]
    HugetlbSize {
        /// The size in bytes.
        size: u64,
    },
    /// `x-use-canonical-path-for-ramblock-id`: there are no RAM block ids here.
    CanonicalPath,
    /// Core dumps were to leave the RAM out, and the kernel refuses that (`MADV_DONTDUMP`).
    #[non_exhaustive]
    InCoreDumps {
        /// Its answer.
        errno: i32,
    },
    /// A limit is too small for all of the RAM: some of it may not be had one day.
    Shortage(Shortage),
}

impl BuildReport {
    /// The notes, each once, in the order of the backings, with the name of the backing that it
    /// is about, or its kind if it has none. There are none if everything is as asked for.
    pub fn notes(&self) -> impl Iterator<Item = (&str, &BuildNote)> {
        let lines = self.lines.iter();
        lines.map(|line| (line.backing.as_str(), &line.note))
    }

    /// Whether everything is as asked for.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Adds notes about a backing; each once, however many regions say it.
    pub(crate) fn add(&mut self, backing: &str, notes: impl IntoIterator<Item = BuildNote>) {
        for note in notes {
            let backing = backing.to_owned();
            let line = Line { backing, note };
            if !self.lines.contains(&line) {
                self.lines.push(line);
            }
        }
    }
}

/// Logs notes as warnings, where they are found.
pub(crate) fn log_notes(backing: &str, notes: &[BuildNote]) {
    for note in notes {
        logs::warn!("{backing}: {note}");
    }
}

impl BuildNote {
    /// The property of QEMU's `-object` that has no effect, if the note is about one.
    pub fn property(&self) -> Option<&'static str> {
        match self {
            Self::Merge => Some("merge"),
            Self::Reserve => Some("reserve"),
            Self::NotHuge(_) => Some("thp"),
            Self::OneNode { .. } | Self::NotPlaced { .. } => Some("policy"),
            Self::HugetlbSize { .. } => Some("hugetlbsize"),
            Self::CanonicalPath => Some("x-use-canonical-path-for-ramblock-id"),
            Self::InCoreDumps { .. } => Some("dump"),
            Self::Shortage(_) => None,
        }
    }
}

impl fmt::Display for BuildReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (backing, note)) in self.notes().enumerate() {
            let end = if at == 0 { "" } else { "\n" };
            write!(f, "{end}{backing}: {note}")?;
        }
        Ok(())
    }
}

/// Its [property](BuildNote::property), and the text for people.
#[cfg(feature = "serde")]
impl serde::Serialize for BuildNote {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;

        let mut note = serializer.serialize_struct("BuildNote", 2)?;
        note.serialize_field("property", &self.property())?;
        note.serialize_field("text", &self.to_string())?;
        note.end()
    }
}

impl fmt::Display for BuildNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Merge => f.write_str(
                "merge=on has no effect: the kernel merges private pages only, never shared ones",
            ),
            Self::Reserve => f.write_str(
                "reserve=on reserves nothing here: only huge pages of a pool are reserved; \
                 populate the RAM to be sure of it",
            ),
            Self::NotHuge(why @ ThpObstacle::Alignment { .. }) => {
                write!(f, "not all of it can be transparent huge pages: {why}")
            }
            Self::NotHuge(why) => write!(f, "transparent huge pages will not come: {why}"),
            Self::OneNode { policy } => write!(
                f,
                "policy={} with host-nodes={} has no effect: this machine has one node",
                policy.name(),
                policy.nodes()
            ),
            Self::NotPlaced { policy } => write!(
                f,
                "policy={} with host-nodes={} has no effect on new pages of a file on a disk: \
                 they come from where the thread runs that needs them first",
                policy.name(),
                policy.nodes()
            ),
            Self::HugetlbSize { size } => write!(
                f,
                "hugetlbsize={} has no effect without hugetlb=on",
                HumanSize(*size)
            ),
            Self::CanonicalPath => f.write_str(
                "x-use-canonical-path-for-ramblock-id has no effect: there are no RAM block ids",
            ),
            Self::InCoreDumps { errno } => write!(
                f,
                "the kernel does not leave the RAM out of core dumps: {}",
                io::Error::from_raw_os_error(*errno)
            ),
            Self::Shortage(shortage) => match shortage.limit {
                ResourceLimit::FileSystem { .. } => write!(
                    f,
                    "touching all of the RAM would be SIGBUS: {}; populate it to be told in time",
                    shortage.fact()
                ),
                _ => write!(
                    f,
                    "using all of the RAM would end a process or slow it down: {}",
                    shortage.fact()
                ),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_equal_note_is_told_once_for_a_backing() {
        let mut report = BuildReport::default();
        for backing in ["a", "b", "a"] {
            report.add(backing, [BuildNote::Merge, BuildNote::Reserve]);
        }
        report.add("a", [BuildNote::CanonicalPath]);
        let told: Vec<_> = report.notes().map(|(backing, _)| backing).collect();
        assert_eq!(told, ["a", "a", "b", "b", "a"]);
    }
}
