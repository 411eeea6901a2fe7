//! Files of the kernel that are read again and again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::descriptors::is_none_left;

/// A file of procfs, sysfs or a control group that stays open once it was read: to read it again
/// takes no descriptor, which may have become short, and less than a microsecond for most.
#[derive(Debug, Default)]
pub(super) struct Kept {
    path: PathBuf,
    file: OnceLock<Option<File>>,
}

impl Kept {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: OnceLock::new(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens it; fails only where no descriptor is left. A file that is not there, or must not be
    /// read, says nothing.
    pub(super) fn open(&self) -> io::Result<()> {
        if self.file.get().is_some() {
            return Ok(());
        }
        let file = match File::open(&self.path) {
            Err(error) if is_none_left(&error) => return Err(error),
            answer => answer.ok(),
        };
        // Another thread may have been first.
        let _ = self.file.set(file);
        Ok(())
    }

    /// What it says now, if anything.
    pub(super) fn read(&self) -> Option<String> {
        self.open().ok()?;
        let file = self.file.get()?.as_ref()?;
        let mut text = Vec::new();
        let mut part = [0; 4096];
        loop {
            match file.read_at(&mut part, text.len() as u64) {
                Ok(0) => return String::from_utf8(text).ok(),
                Ok(len) => text.extend_from_slice(&part[..len]),
                // A group that is gone, for example.
                Err(_) => return None,
            }
        }
    }

    /// The number that it says now, if it is one: the kernel gives such a file at once.
    pub(super) fn number(&self) -> Option<u64> {
        self.open().ok()?;
        let mut text = [0; 64];
        let len = self.file.get()?.as_ref()?.read_at(&mut text, 0).ok()?;
        std::str::from_utf8(&text[..len]).ok()?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_again_is_what_is_there_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("number");
        std::fs::write(&path, "12\n").unwrap();
        let kept = Kept::new(path.clone());
        assert_eq!(kept.number(), Some(12));
        let long = format!("{}7\n", " ".repeat(5000));
        std::fs::write(&path, &long).unwrap();
        assert_eq!(kept.read(), Some(long));
        std::fs::write(&path, "max\n").unwrap();
        assert_eq!(
            (kept.number(), kept.read()),
            (None, Some("max\n".to_owned()))
        );
        assert_eq!(Kept::new(dir.path().join("none")).read(), None);
    }
}
