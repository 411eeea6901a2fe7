//! What building has to say: options that have no effect here, and limits that are near.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::logs;
use crate::options::NumaPolicy;
use crate::shortage::{ResourceLimit, Shortage};
use crate::units::HumanSize;

/// What building found out about RAM that the one who asked for it should know.
///
/// Nothing in it is an error: the RAM is there. `Display` prints a line for each note.
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, Merge, Note, RamOptions};
/// use vm_memory::GuestAddress;
///
/// let (memory, report) = GuestMemoryShm::<()>::builder()
///     .add_ram(RamOptions::new().with_merge(Merge::On), [(GuestAddress(0), 1 << 20)])
///     .build_with_report()?;
/// assert!(matches!(report.lines()[0].note(), Note::Merge));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct BuildReport {
    lines: Vec<ReportLine>,
}

/// A note, and the backing that it is about.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct ReportLine {
    backing: String,
    note: Note,
}

/// Something about RAM that is not as its options may let expect.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Note {
    /// `merge=on`: the kernel merges private pages only (KSM).
    Merge,
    /// `reserve=on`: only huge pages of a pool are reserved when they are mapped.
    Reserve,
    /// Transparent huge pages were asked for, and will not come.
    NotHuge(NotHuge),
    /// A NUMA policy where there is nothing to choose.
    OneNode {
        /// The policy.
        policy: NumaPolicy,
    },
    /// `hugetlbsize` without `hugetlb=on`.
    HugetlbSize {
        /// The size in bytes.
        size: u64,
    },
    /// `x-use-canonical-path-for-ramblock-id`: there are no RAM block ids here.
    CanonicalPath,
    /// The kernel does not take advice about the mapping.
    Advice {
        /// What it does not do.
        meaning: &'static str,
        /// Its answer.
        source: Arc<io::Error>,
    },
    /// A limit is too small for all of the RAM: one day it may not be had.
    Shortage(Shortage),
}

/// Why RAM is not mapped by transparent huge pages.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotHuge {
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` forbids it.
    Switch {
        /// What it is set to.
        value: String,
    },
    /// The tmpfs is mounted without the option `huge=`, or with one that forbids it.
    MountOption {
        /// Where it is mounted.
        mount: String,
        /// The option, `never` if there is none.
        value: String,
    },
    /// The kernel has no transparent huge pages.
    Kernel,
    /// They are switched off for this process (`PR_SET_THP_DISABLE`, prctl(2)).
    Process,
    /// The RAM is smaller than a huge page.
    Size {
        /// The size of the RAM in bytes.
        size: u64,
        /// The size of a huge page in bytes.
        huge: u64,
    },
    /// The host address and the offset are not congruent modulo the size of a huge page, or the
    /// RAM has parts at its ends that are not whole huge pages.
    Alignment {
        /// The offset in the backing, in bytes.
        offset: u64,
        /// The size of the RAM in bytes.
        size: u64,
        /// The size of a huge page in bytes.
        huge: u64,
    },
    /// Files on this file system have no transparent huge pages.
    FileSystem,
}

impl BuildReport {
    /// The notes, in the order of the backings; none if everything is as asked for.
    pub fn lines(&self) -> &[ReportLine] {
        &self.lines
    }

    /// Whether everything is as asked for.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Adds notes about a backing.
    pub(crate) fn add(&mut self, backing: &str, notes: impl IntoIterator<Item = Note>) {
        self.lines.extend(notes.into_iter().map(|note| ReportLine {
            backing: backing.to_owned(),
            note,
        }));
    }
}

/// Logs notes as warnings; whoever finds them does.
pub(crate) fn log_notes(backing: &str, notes: &[Note]) {
    for note in notes {
        logs::warn!("{backing}: {note}");
    }
}

impl ReportLine {
    /// The name of the backing, or its kind if it has none.
    pub fn backing(&self) -> &str {
        &self.backing
    }

    /// What is to be known about it.
    pub fn note(&self) -> &Note {
        &self.note
    }
}

impl Note {
    /// The property of QEMU's `-object` that has no effect, if the note is about one.
    pub fn property(&self) -> Option<&'static str> {
        match self {
            Self::Merge => Some("merge"),
            Self::Reserve => Some("reserve"),
            Self::NotHuge(_) => Some("thp"),
            Self::OneNode { .. } => Some("policy"),
            Self::HugetlbSize { .. } => Some("hugetlbsize"),
            Self::CanonicalPath => Some("x-use-canonical-path-for-ramblock-id"),
            Self::Advice { .. } | Self::Shortage(_) => None,
        }
    }
}

impl fmt::Display for BuildReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, line) in self.lines.iter().enumerate() {
            let end = if at == 0 { "" } else { "\n" };
            write!(f, "{end}{line}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ReportLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.backing, self.note)
    }
}

#[cfg(feature = "serde")]
crate::units::serialized_as_text!(Note);

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Merge => f.write_str(
                "merge=on has no effect: the kernel merges private pages only, never shared ones",
            ),
            Self::Reserve => f.write_str(
                "reserve=on reserves nothing here: only huge pages of a pool are reserved; populate \
                 the RAM to be sure of it",
            ),
            Self::NotHuge(why @ NotHuge::Alignment { .. }) => {
                write!(f, "not all of it can be transparent huge pages: {why}")
            }
            Self::NotHuge(why) => write!(f, "transparent huge pages will not come: {why}"),
            Self::OneNode { policy } => write!(
                f,
                "policy={} with host-nodes={} has no effect: this machine has one node",
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
            Self::Advice { meaning, source } => {
                write!(f, "the kernel does not {meaning}: {source}")
            }
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

impl fmt::Display for NotHuge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Switch { value } => write!(
                f,
                "/sys/kernel/mm/transparent_hugepage/shmem_enabled is {value}, set it to advise"
            ),
            Self::MountOption { mount, value } => write!(
                f,
                "{mount} is mounted with huge={value}, remount it with huge=advise"
            ),
            Self::Kernel => f.write_str("this kernel has none"),
            Self::Process => {
                f.write_str("they are switched off for this process (PR_SET_THP_DISABLE)")
            }
            Self::Size { size, huge } => write!(
                f,
                "{} of RAM are less than a huge page of {}",
                HumanSize(*size),
                HumanSize(*huge)
            ),
            Self::Alignment { offset, size, huge } => write!(
                f,
                "{} at offset {offset:#x} begin or end inside a huge page of {}",
                HumanSize(*size),
                HumanSize(*huge)
            ),
            Self::FileSystem => f.write_str("files on this file system have none"),
        }
    }
}
