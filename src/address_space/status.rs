//! Listeners by name, and how they are.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use super::attached::{Attached, Attendance};
use crate::error::StaleListener;

/// Names a listener of type `L` that is attached to an [`AddressSpace`](super::AddressSpace). No
/// other listener of this process ever has the same, while names may be given twice.
pub struct ListenerId<L> {
    pub(super) id: u64,
    listener: PhantomData<fn() -> L>,
}

/// A listener of an [`AddressSpace`](super::AddressSpace), and how it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerStatus {
    id: u64,
    name: String,
    attendance: Attendance,
    stale: Option<String>,
}

impl ListenerStatus {
    pub(super) fn of<B>(attached: &Attached<B>) -> Self {
        Self {
            id: attached.id,
            name: attached.name.clone(),
            attendance: attached.attendance,
            stale: attached.stale.clone(),
        }
    }

    /// Whether it is this listener.
    pub fn is<L>(&self, id: &ListenerId<L>) -> bool {
        self.id == id.id
    }

    /// The name that it was attached by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether changes may happen while it is away.
    pub fn attendance(&self) -> Attendance {
        self.attendance
    }

    /// Why it does not hold the present memory, if so.
    ///
    /// That is known from the last time that it was told something: a daemon that died since is
    /// noticed at the next change.
    pub fn stale(&self) -> Option<&str> {
        self.stale.as_deref()
    }
}

impl<L> ListenerId<L> {
    /// One of its own, for all address spaces.
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            listener: PhantomData,
        }
    }
}

impl StaleListener {
    /// Whether it is this listener.
    pub fn is<L>(&self, id: &ListenerId<L>) -> bool {
        self.id == id.id
    }
}

impl<L> Clone for ListenerId<L> {
    /// Another name of the same listener: void, too, once that is detached.
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

impl<L> PartialEq for ListenerId<L> {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl<L> Eq for ListenerId<L> {}

impl<L> fmt::Debug for ListenerId<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ListenerId({})", self.id)
    }
}
