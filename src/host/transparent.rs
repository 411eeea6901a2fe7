//! Transparent huge pages of shared memory: what allows and what forbids them
//! (Documentation/admin-guide/mm/transhuge.rst).

use std::fs;

use super::fields::field;
use super::mounts::Mount;

const SWITCHES: &str = "/sys/kernel/mm/transparent_hugepage";

/// The size of a transparent huge page in bytes, or `None` if the kernel has none.
pub(crate) fn page_size() -> Option<u64> {
    read("hpage_pmd_size")?.parse().ok()
}

/// What forbids transparent huge pages of shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Forbidden {
    /// The kernel has none.
    Kernel,
    /// `PR_SET_THP_DISABLE` of prctl(2).
    Process,
    /// `shmem_enabled`, which has this value.
    Switch { value: String },
    /// The option `huge=` of what is mounted there.
    MountOption { mount: String, value: String },
}

/// What forbids huge pages of files on the tmpfs with this `st_dev`, even if they are asked for
/// (`MADV_HUGEPAGE`).
pub(crate) fn forbidden_on_tmpfs(dev: u64) -> Option<Forbidden> {
    let Some(switch) = read("shmem_enabled") else {
        return Some(Forbidden::Kernel);
    };
    let mount = Mount::of_device(dev);
    forbidden(
        &chosen(&switch),
        mount.as_ref(),
        process_may_not(&fs::read_to_string("/proc/self/status").unwrap_or_default()),
    )
}

/// The switch is for the kernel's own mount, on which memfds are, but for its values that overrule
/// everybody; other mounts have an option.
fn forbidden(switch: &str, mount: Option<&Mount>, process_may_not: bool) -> Option<Forbidden> {
    if process_may_not {
        return Some(Forbidden::Process);
    }
    let by_switch = || Forbidden::Switch {
        value: switch.to_owned(),
    };
    match (switch, mount) {
        ("force", _) => None,
        ("deny", _) => Some(by_switch()),
        ("never", None) => Some(by_switch()),
        (_, None) => None,
        (_, Some(mount)) => match mount.option("huge").unwrap_or("never") {
            value @ "never" => Some(Forbidden::MountOption {
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
            Some(Forbidden::Switch {
                value: value.to_owned(),
            })
        };
        let option = Some(Forbidden::MountOption {
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
            assert_eq!(process, Some(Forbidden::Process), "{value}");
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
