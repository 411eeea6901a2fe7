//! The end of a file's use as RAM: what is undone, and what is freed.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::host::calls::retried;
use crate::logs;

/// What becomes of a file when its last user in this process lets go of it.
pub(super) struct FileEnd {
    file: Arc<File>,
    pub(super) undo: Undo,
    kept: AtomicBool,
    /// What is freed then, in bytes of the file.
    pub(super) discard: Option<Range<u64>>,
}

/// What is undone if building the RAM fails.
pub(super) enum Undo {
    Nothing,
    /// The file was created at this path.
    Remove(PathBuf),
    /// The file was empty.
    Empty,
}

impl FileEnd {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self {
            file,
            undo: Undo::Nothing,
            kept: AtomicBool::new(false),
            discard: None,
        }
    }

    /// The RAM is there: nothing is undone any more.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }
}

impl Drop for FileEnd {
    fn drop(&mut self) {
        let answer = if *self.kept.get_mut() {
            let discard = self.discard.take();
            discard.map_or(Ok(()), |range| punch(&self.file, range))
        } else {
            match &self.undo {
                Undo::Nothing => Ok(()),
                Undo::Remove(path) => remove(&self.file, path),
                Undo::Empty => self.file.set_len(0),
            }
        };
        if let Err(error) = answer {
            let doing = match (&self.undo, *self.kept.get_mut()) {
                (_, true) => "discard the contents of a file".to_owned(),
                (Undo::Remove(path), false) => format!("remove {} again", path.display()),
                (_, false) => "make a file empty again".to_owned(),
            };
            logs::error!("cannot {doing}: {error}");
        }
    }
}

/// Removes a name, if it still is that of the file.
fn remove(file: &File, path: &Path) -> io::Result<()> {
    let (ours, theirs) = (file.metadata()?, fs::symlink_metadata(path)?);
    if (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Frees a part of a file, whose length stays (fallocate(2)).
pub(super) fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let too_far = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let start = i64::try_from(range.start).map_err(too_far)?;
    let len = i64::try_from(range.end - range.start).map_err(too_far)?;
    // A signal may interrupt it; what is freed by then stays free.
    Ok(retried(|| fallocate(file, flags, start, len))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_of_the_very_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let end = |undo: Undo| {
            let mut end = FileEnd::new(Arc::new(File::create(&path).unwrap()));
            end.undo = undo;
            end
        };
        drop(end(Undo::Remove(path.clone())));
        assert!(!path.exists());
        // Another process put another file there meanwhile.
        let ours = end(Undo::Remove(path.clone()));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "theirs").unwrap();
        drop(ours);
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        fs::remove_file(&path).unwrap();
        // What is kept stays.
        let kept = end(Undo::Remove(path.clone()));
        kept.keep();
        drop(kept);
        assert!(path.exists());
    }
}
