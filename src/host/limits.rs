//! How many descriptors this process, and all of the system, may have.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

/// Whether an answer is that no descriptor is left, of the process's or of the system's.
pub(crate) fn is_no_descriptor(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

/// How many descriptors this process may have.
pub(crate) fn descriptors() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}

/// How many descriptors this process may still open, and its limit, or `None` if nobody tells.
///
/// Other threads open and close some at any time: it is a fair warning, no promise.
pub(crate) fn descriptors_left() -> Option<(u64, u64)> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let mut taken = 0_u64;
    for entry in fs::read_dir("/proc/self/fd").ok()? {
        let number = entry.ok()?.file_name().to_str()?.parse::<u64>().ok()?;
        // The limit is one on the number of a new descriptor: inherited ones may lie beyond it.
        taken += u64::from(number < limit);
    }
    // The directory that is read here is among them, and is closed by now.
    Some((limit.saturating_sub(taken.saturating_sub(1)), limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_left() {
        let (left, limit) = descriptors_left().unwrap();
        assert!(left > 0 && left < limit);
    }
}
