//! The example `blk_daemon` as a person runs it, with this crate as its frontend.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use daemon::BlkDaemon;

mod arguments;
pub(crate) mod daemon;
mod disk;
mod frontend;
mod life;
mod requests;

const NO_ARGS: &[&str] = &[];

/// A directory for a test, with room for a socket and images.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::with_prefix("gms-blk-").unwrap())
    }

    /// On a tmpfs.
    fn in_shm() -> Self {
        Self(TempDir::with_prefix_in("gms-blk-", "/dev/shm").unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("blk.sock")
    }

    /// An image with a pattern: no two sectors are equal.
    fn image(&self, len: usize) -> PathBuf {
        let path = self.path("disk.img");
        fs::write(&path, pattern(0, len)).unwrap();
        path
    }

    fn daemon(&self, image: &Path) -> BlkDaemon {
        BlkDaemon::start(&self.socket(), image, NO_ARGS)
    }
}

/// What an image begins with.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let words = (1..).map(|word: u64| (word + (seed << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

/// An image without data.
fn sparse(path: &Path, len: u64) {
    File::create(path).unwrap().set_len(len).unwrap();
}
