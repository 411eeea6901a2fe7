//! Opening a file by its path, or making one that has a name or none (open(2)).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::error::Result;
use super::place::{check_no_link, open_error};
use crate::options::Access;

/// Only this user reads guest RAM. Daemons are sent a descriptor, they need no name.
const MODE: u32 = 0o600;

/// How often the path may come to name something else while it is opened, and how many names are
/// tried for a file that ends up without one.
const TRIES: usize = 128;

/// What was made by opening.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Created {
    Nothing,
    Named,
    Nameless,
}

/// Opens the file at a path, creates it, or makes a nameless one if the path is a directory.
pub(super) fn open_or_create(path: &Path, access: Access) -> Result<(File, Created)> {
    let writable = access == Access::ReadWrite;
    let mut options = OpenOptions::new();
    // A FIFO that appears there meanwhile cannot make us wait, nor a terminal become ours.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    options
        .read(true)
        .write(writable)
        .mode(MODE)
        .custom_flags(flags.bits());
    let mut last = None;
    for _ in 0..TRIES {
        let error = match options.create_new(false).open(path) {
            Ok(file) => return Ok((file, Created::Nothing)),
            Err(error) => error,
        };
        let answer = match error.kind() {
            ErrorKind::NotFound if writable => {
                let answer = options.create_new(true).open(path);
                answer.map(|file| (file, Created::Named))
            }
            ErrorKind::IsADirectory if writable => {
                nameless(path).map(|file| (file, Created::Nameless))
            }
            _ => Err(error),
        };
        match answer {
            Ok(opened) => return Ok(opened),
            // Another process was faster: the file is there, unless it is a link to nothing.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                check_no_link(path)?;
                last = Some(error);
            }
            Err(error) => return Err(open_error(path, error)),
        }
    }
    let last = last.unwrap_or_else(|| ErrorKind::AlreadyExists.into());
    Err(open_error(path, last))
}

/// A file without a name on the file system of a directory.
fn nameless(dir: &Path) -> io::Result<File> {
    // O_EXCL: no process can give it a name later.
    let flags = OFlag::O_TMPFILE | OFlag::O_EXCL;
    let answer = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(MODE)
        .custom_flags(flags.bits())
        .open(dir);
    match answer {
        Err(error)
            if matches!(
                error.raw_os_error().map(Errno::from_raw),
                Some(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL)
            ) =>
        {
            unlinked(dir)
        }
        answer => answer,
    }
}

/// A file that had a name in a directory for one system call, where there are no nameless ones.
fn unlinked(dir: &Path) -> io::Result<File> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(MODE);
    for _ in 0..TRIES {
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".gms-{}-{count}", std::process::id()));
        match options.open(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Ok(file) => return fs::remove_file(&path).map(|()| file),
            answer => return answer,
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn where_there_are_no_nameless_files_one_loses_its_name_at_once() {
        let dir = tempfile::tempdir().unwrap();
        for make in [nameless, unlinked] {
            let file = make(dir.path()).unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!((metadata.nlink(), metadata.len()), (0, 0));
            assert_eq!(metadata.permissions().mode() & 0o777, MODE);
            assert_eq!(metadata.dev(), fs::metadata(dir.path()).unwrap().dev());
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
        let missing = unlinked(&dir.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_file_that_appeared_meanwhile_is_opened_and_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let (_file, created) = open_or_create(&path, Access::ReadWrite).unwrap();
        assert!(created == Created::Named);
        let (_file, created) = open_or_create(&path, Access::ReadWrite).unwrap();
        assert!(created == Created::Nothing);
        let (_file, created) = open_or_create(dir.path(), Access::ReadWrite).unwrap();
        assert!(created == Created::Nameless);
    }
}
