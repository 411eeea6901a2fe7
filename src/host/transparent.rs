//! Transparent huge pages of shared memory: what allows and what forbids them
//! (Documentation/admin-guide/mm/transhuge.rst).

use std::fmt;
use std::fs;
use std::io;
use std::sync::OnceLock;

use super::descriptors::is_none_left;
use super::fields::field;
use super::mounts::Mount;
use crate::units::HumanSize;

const SWITCHES: &str = "/sys/kernel/mm/transparent_hugepage";

/// The size of a transparent huge page in bytes, or `None` if the kernel has none.
///
/// It is the same until the machine is restarted, and is read once. Who builds RAM asks for it, so
/// that a thread that may open no files can discard.
pub(crate) fn page_size() -> Option<u64> {
    static SIZE: OnceLock<Option<u64>> = OnceLock::new();
    if let Some(known) = SIZE.get() {
        return *known;
    }
    let text = match fs::read_to_string(format!("{SWITCHES}/hpage_pmd_size")) {
        // Next time there may be one.
        Err(error) if is_none_left(&error) => return None,
        text => text.ok(),
    };
    let size = text.and_then(|text| text.trim().parse().ok());
    *SIZE.get_or_init(|| size)
}

/// Why RAM is not mapped by transparent huge pages, which were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ThpObstacle {
    /// The kernel has none.
    Kernel,
    /// They are switched off for this process (`PR_SET_THP_DISABLE`, prctl(2)).
    Process,
    /// The kernel refuses the advice (`MADV_HUGEPAGE`, madvise(2)).
    #[non_exhaustive]
    Refused {
        /// Its answer.
        errno: i32,
    },
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` forbids them.
    #[non_exhaustive]
    Switch {
        /// What it is set to.
        value: String,
    },
    /// The tmpfs is mounted without the option `huge=`, or with one that forbids them.
    #[non_exhaustive]
    MountOption {
        /// Where it is mounted.
        mount: String,
        /// The option, `never` if there is none.
        value: String,
    },
    /// Files on this file system have none.
    FileSystem,
    /// The RAM is smaller than a huge page.
    #[non_exhaustive]
    Size {
        /// The size of the RAM in bytes.
        size: u64,
        /// The size of a huge page in bytes.
        huge: u64,
    },
    /// The RAM has parts at its ends that are not whole huge pages; the others may be huge.
    #[non_exhaustive]
    Alignment {
        /// The offset in the backing, in bytes.
        offset: u64,
        /// The size of the RAM in bytes.
        size: u64,
        /// The size of a huge page in bytes.
        huge: u64,
    },
}

impl fmt::Display for ThpObstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("this kernel has none"),
            Self::Process => {
                f.write_str("they are switched off for this process (PR_SET_THP_DISABLE)")
            }
            Self::Refused { errno } => write!(
                f,
                "the kernel refuses the advice: {}",
                io::Error::from_raw_os_error(*errno)
            ),
            Self::Switch { value } => write!(
                f,
                "/sys/kernel/mm/transparent_hugepage/shmem_enabled is {value}, set it to advise"
            ),
            Self::MountOption { mount, value } => write!(
                f,
                "{mount} is mounted with huge={value}, remount it with huge=advise"
            ),
            Self::FileSystem => f.write_str("files on this file system have none"),
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
        }
    }
}

/// What forbids huge pages of files on the tmpfs with this `st_dev`, even if they are asked for
/// (`MADV_HUGEPAGE`).
pub(crate) fn forbidden_on_tmpfs(dev: u64) -> Option<ThpObstacle> {
    let Some(switch) = read("shmem_enabled") else {
        return Some(ThpObstacle::Kernel);
    };
    let mount = Mount::of_device(dev);
    forbidden(
        &chosen(&switch),
        mount.as_ref(),
        process_may_not(&fs::read_to_string("/proc/self/status").unwrap_or_default()),
    )
}

/// The switch is for the kernel's own mount, on which memfds are, except for its values that
/// overrule all mounts; other mounts have an option.
fn forbidden(switch: &str, mount: Option<&Mount>, process_may_not: bool) -> Option<ThpObstacle> {
    if process_may_not {
        return Some(ThpObstacle::Process);
    }
    let by_switch = || ThpObstacle::Switch {
        value: switch.to_owned(),
    };
    match (switch, mount) {
        ("force", _) => None,
        ("deny", _) => Some(by_switch()),
        ("never", None) => Some(by_switch()),
        (_, None) => None,
        (_, Some(mount)) => match mount.option("huge").unwrap_or("never") {
            value @ "never" => Some(ThpObstacle::MountOption {
                mount: mount.point.display().to_string(),
                value: value.to_owned(),
            }),
            _ => None,
        },
    }
}

/// Whether they are switched off for this process (`PR_SET_THP_DISABLE`).
fn process_may_not(status: &str) -> bool {
    field(status, "THP_enabled") == Some("0")
}

/// The value in brackets of a switch that lists all it could be.
fn chosen(switch: &str) -> String {
    let inner = switch.split_once('[').and_then(|(_, rest)| {
        let (value, _) = rest.split_once(']')?;
        Some(value)
    });
    inner.unwrap_or(switch).to_owned()
}

fn read(name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("{SWITCHES}/{name}")).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_mount_is_ruled_by_its_option_and_the_kernels_own_by_the_switch() {
        let mount = |options: &str| Mount {
            dev: (0, 27),
            root: PathBuf::from("/"),
            point: PathBuf::from("/dev/shm"),
            fs_type: "tmpfs".to_owned(),
            options: options.split(',').map(str::to_owned).collect(),
        };
        let switch = |value: &str| {
            Some(ThpObstacle::Switch {
                value: value.to_owned(),
            })
        };
        let option = Some(ThpObstacle::MountOption {
            mount: "/dev/shm".to_owned(),
            value: "never".to_owned(),
        });
        for (value, own, plain, advise) in [
            ("always", None, option.clone(), None),
            ("within_size", None, option.clone(), None),
            ("advise", None, option.clone(), None),
            ("never", switch("never"), option.clone(), None),
            ("deny", switch("deny"), switch("deny"), switch("deny")),
            ("force", None, None, None),
        ] {
            assert_eq!(forbidden(value, None, false), own, "{value}");
            assert_eq!(
                forbidden(value, Some(&mount("rw")), false),
                plain,
                "{value}"
            );
            let allowed = mount("rw,huge=advise");
            assert_eq!(forbidden(value, Some(&allowed), false), advise, "{value}");
            let process = forbidden(value, Some(&allowed), true);
            assert_eq!(process, Some(ThpObstacle::Process), "{value}");
        }
    }

    #[test]
    fn switches_and_status_are_read() {
        assert_eq!(chosen("always within_size [advise] never"), "advise");
        assert!(process_may_not("Name:\tx\nTHP_enabled:\t0\n"));
        assert!(!process_may_not("THP_enabled:\t1\n"));
        assert!(!process_may_not("Name:\tx\n"));
    }
}
