//! Which address spaces this thread makes a change of, so that a call that would wait for itself
//! is an error.
//!
//! A listener may be called by a worker instead of the thread that makes the change: that is busy
//! with the same address spaces meanwhile. Several, where a listener of one changes another.

use std::cell::RefCell;

thread_local! {
    static SPACES: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// As long as it lives, its thread is busy with some address spaces.
pub(super) struct Busy(Vec<u64>);

impl Busy {
    /// Makes this thread busy with an address space; `None` if it is already.
    pub(super) fn with(space: u64) -> Option<Self> {
        match Self::spaces().contains(&space) {
            true => None,
            false => Some(Self::on_behalf(vec![space])),
        }
    }

    /// Makes this thread busy with what another one is busy with.
    pub(super) fn on_behalf(spaces: Vec<u64>) -> Self {
        // At the very end of a thread the list is gone: then nothing is found out any more.
        let _ = SPACES.try_with(|all| all.borrow_mut().extend(&spaces));
        Self(spaces)
    }

    /// All that this thread is busy with.
    pub(super) fn spaces() -> Vec<u64> {
        SPACES
            .try_with(|all| all.borrow().clone())
            .unwrap_or_default()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = SPACES.try_with(|all| {
            let mut all = all.borrow_mut();
            for space in &self.0 {
                if let Some(at) = all.iter().rposition(|other| other == space) {
                    all.remove(at);
                }
            }
        });
    }
}
