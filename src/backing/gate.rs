//! The gate that discards of a backing go through, and that users with pinned pages close.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Whether pages of a backing may be discarded now.
///
/// Discards run in parallel with each other; [`close`](Self::close) waits for those that run.
#[derive(Debug, Default)]
pub(crate) struct DiscardGate {
    /// How many hold it closed. The number is always valid, even if the lock is poisoned.
    holders: RwLock<usize>,
}

/// As long as it lives, a discard may run and the gate cannot be closed.
#[derive(Debug)]
pub(crate) struct Passage<'a> {
    _open: RwLockReadGuard<'a, usize>,
}

/// Holds a gate closed until it is dropped.
#[derive(Debug)]
pub(crate) struct Closed {
    gate: Arc<DiscardGate>,
}

impl DiscardGate {
    /// Lets a discard in, or returns how many hold the gate closed.
    ///
    /// A discard that needs several gates enters them in the order of [`place`](Self::place), each
    /// once: a gate that is about to close lets no discard in, so two discards that enter two
    /// gates in opposite order would wait for each other.
    pub(crate) fn enter(&self) -> std::result::Result<Passage<'_>, usize> {
        let holders = self.holders.read().unwrap_or_else(PoisonError::into_inner);
        match *holders {
            0 => Ok(Passage { _open: holders }),
            by => Err(by),
        }
    }

    /// Closes the gate; when this returns, no discard is inside, and none gets in.
    ///
    /// The lock is released at once and the count keeps the gate closed, so the caller never waits
    /// for another gate with this lock held.
    pub(crate) fn close(self: &Arc<Self>) -> Closed {
        self.change(|holders| holders + 1);
        Closed { gate: self.clone() }
    }

    /// The order of gates.
    pub(crate) fn place(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self).addr()
    }

    fn change(&self, change: impl FnOnce(usize) -> usize) {
        let mut holders = self.holders.write().unwrap_or_else(PoisonError::into_inner);
        *holders = change(*holders);
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.gate.change(|holders| holders - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_opens_when_the_last_holder_lets_go() {
        let gate = Arc::new(DiscardGate::default());
        drop(gate.enter().unwrap());
        let (one, other) = (gate.close(), gate.close());
        assert_eq!(gate.enter().err(), Some(2));
        drop(one);
        assert_eq!(gate.enter().err(), Some(1));
        drop(other);
        let together = (gate.enter().unwrap(), gate.enter().unwrap());
        drop(together);
    }
}
