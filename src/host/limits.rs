//! How many descriptors this process, and all of the system, may have.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};

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
