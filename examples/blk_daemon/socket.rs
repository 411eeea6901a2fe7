//! The socket that frontends connect to.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, OrFail, Result};

/// A listening socket with a name.
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the name: another daemon may have replaced it meanwhile.
    identity: (u64, u64),
}

impl Socket {
    /// Listens at `path`, and replaces what a daemon that died left there.
    pub(crate) fn bind(path: &Path) -> Result<Self> {
        let doing = || format!("cannot listen on {}", path.display());
        let refuse = |reason: &str| Err(Failure::new(format!("{}: {reason}", doing())));
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return refuse("it exists and is no socket, give another name");
            }
            Ok(_) => match UnixStream::connect(path) {
                Ok(_) => return refuse("another process listens there, give another name"),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).or_fail(doing)?;
                }
                Err(error) => return Err(error).or_fail(doing),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).or_fail(doing),
        }
        let listener = UnixListener::bind(path).or_fail(doing)?;
        let metadata = fs::symlink_metadata(path).or_fail(doing)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Takes the name away, if it is ours still.
    pub(crate) fn remove(&self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}
