//! Which file systems are mounted where, with which options (`mountinfo`, proc(5)).

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Major and minor number of its device, the `st_dev` of its files.
    pub(crate) dev: (u64, u64),
    /// Which directory of it is mounted.
    pub(crate) root: PathBuf,
    /// Where.
    pub(crate) point: PathBuf,
    pub(crate) fs_type: String,
    /// Options of the file system, as `size=64k`.
    pub(crate) options: Vec<String>,
}

impl Mount {
    /// The mount of the file system with this `st_dev`, if this process sees one.
    pub(crate) fn of_device(dev: u64) -> Option<Self> {
        let dev = (major(dev), minor(dev));
        all().into_iter().find(|mount| mount.dev == dev)
    }

    /// The value of an option of the file system, as `advise` of `huge=advise`.
    pub(crate) fn option(&self, name: &str) -> Option<&str> {
        self.options
            .iter()
            .find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    }

    /// Whether the file system has an option without a value.
    pub(crate) fn has_option(&self, name: &str) -> bool {
        self.options.iter().any(|option| option == name)
    }

    fn parse(line: &str) -> Option<Self> {
        // Optional fields of any number stand before the dash.
        let (of_mount, of_fs) = line.split_once(" - ")?;
        let mut words = of_mount.split(' ').skip(2);
        let (major, minor) = words.next()?.split_once(':')?;
        let (root, point) = (words.next()?, words.next()?);
        let mut words = of_fs.split(' ');
        let fs_type = words.next()?;
        let options = words.nth(1).unwrap_or_default();
        Some(Self {
            dev: (major.parse().ok()?, minor.parse().ok()?),
            root: unescape(root),
            point: unescape(point),
            fs_type: fs_type.to_owned(),
            options: options.split(',').map(str::to_owned).collect(),
        })
    }
}

/// All mounts that this thread sees (it may have a mount namespace of its own); none where procfs
/// is not mounted.
pub(crate) fn all() -> Vec<Mount> {
    parse(&fs::read_to_string(MOUNTINFO).unwrap_or_default())
}

/// Where the kernel lists them.
pub(super) const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// Those of a list.
pub(super) fn parse(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(Mount::parse).collect()
}

/// The kernel writes blanks and backslashes of paths in octal, as `\040`.
fn unescape(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut path = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) if code.is_ascii() => {
                path.push(char::from(code));
                path.push_str(&part[3..]);
            }
            _ => {
                path.push('\\');
                path.push_str(part);
            }
        }
    }
    Path::new(&path).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line =
            "30 25 0:27 / /dev/a\\040b rw,relatime shared:3 - tmpfs tmpfs rw,size=64k,huge=advise";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.dev, (0, 27));
        assert_eq!(mount.point, Path::new("/dev/a b"));
        assert_eq!(mount.option("huge"), Some("advise"));
        assert_eq!(mount.option("hug"), None);
        assert!(mount.has_option("rw"));
        assert_eq!(Mount::parse("nonsense"), None);
    }

    #[test]
    fn procfs_is_found_where_it_is_mounted() {
        let proc = all().into_iter().find(|mount| mount.fs_type == "proc");
        assert_eq!(proc.unwrap().point, Path::new("/proc"));
    }
}
