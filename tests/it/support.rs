//! What several tests need: peers that may be missing, and a look at this process.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The path of a program that a test needs, or `None` after printing why the test is skipped.
///
/// With `REQUIRE_PEERS` set, as in CI, a missing program is a failure.
pub fn peer(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file());
    if found.is_none() {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Prints why a test is skipped; fails where everything is required.
pub fn skip(reason: &str) {
    assert!(
        std::env::var_os("REQUIRE_PEERS").is_none(),
        "REQUIRE_PEERS is set, but {reason}"
    );
    eprintln!("skipped: {reason}");
}

/// Held by tests that change or count something that belongs to the whole machine or the whole
/// process: huge pages, descriptors, mappings.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed while it held it has been reported already.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
