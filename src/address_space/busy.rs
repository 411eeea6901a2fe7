//! Which address spaces this thread makes a change of, so that a call that would wait for itself
//! is an error.
//!
//! Several, where a listener of one changes another.

use std::cell::RefCell;

thread_local! {
    static SPACES: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// As long as it lives, its thread is busy with an address space.
pub(super) struct Busy(u64);

impl Busy {
    /// Makes this thread busy with an address space; `None` if it is already.
    pub(super) fn with(space: u64) -> Option<Self> {
        let add = |all: &RefCell<Vec<u64>>| {
            let mut all = all.borrow_mut();
            let is_new = !all.contains(&space);
            if is_new {
                all.push(space);
            }
            is_new
        };
        // At the very end of a thread the list is gone: then nothing is found out any more.
        let is_new = SPACES.try_with(add).unwrap_or(true);
        is_new.then(|| Self(space))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = SPACES.try_with(|all| all.borrow_mut().retain(|other| *other != self.0));
    }
}
