//! Pieces of work that threads take from queues.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::host::NodeSet;

/// Pieces of work in the order in which they are taken.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    /// Where threads should run while they work on it; none: anywhere.
    pub(crate) nodes: NodeSet,
    pieces: Vec<T>,
    next: AtomicUsize,
}

impl<T> Queue<T> {
    pub(crate) fn new(nodes: NodeSet, pieces: Vec<T>) -> Self {
        Self {
            nodes,
            pieces,
            next: AtomicUsize::new(0),
        }
    }

    /// The next piece, which is the caller's from then on.
    pub(crate) fn take(&self) -> Option<&T> {
        self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

impl<T: Clone> Queue<T> {
    /// A queue of what was taken from this one.
    pub(crate) fn taken(&self) -> Self {
        let taken = self.next.load(Ordering::Relaxed).min(self.pieces.len());
        Self::new(self.nodes, self.pieces[..taken].to_vec())
    }
}
