//! Listeners by name, and how they are.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::listener::ListenerError;

/// Names a listener of type `L` that is attached to an [`AddressSpace`](crate::AddressSpace). No
/// other listener of this process ever has the same, while names may be given twice.
pub struct ListenerId<L> {
    pub(super) id: u64,
    listener: PhantomData<fn() -> L>,
}

/// A listener of an [`AddressSpace`](crate::AddressSpace), and whether it holds what it should.
///
/// One that does not is *stale*. It is told everything at the next change, or by
/// [`AddressSpace::refresh`](crate::AddressSpace::refresh).
#[derive(Clone, Debug)]
pub struct ListenerStatus {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) required: bool,
    pub(super) stale: Option<Stale>,
}

/// Why a listener is stale.
#[derive(Clone, Debug)]
pub(super) struct Stale {
    pub(super) error: ListenerError,
    /// It failed when a change was undone.
    pub(super) undoing: bool,
}

impl ListenerStatus {
    /// Whether it is this listener.
    pub fn is<L>(&self, id: &ListenerId<L>) -> bool {
        self.id == id.id
    }

    /// The name that it was attached by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether no change happens while it is away:
    /// [`AddressSpace::attach_required`](crate::AddressSpace::attach_required).
    pub fn is_required(&self) -> bool {
        self.required
    }

    /// Why it does not hold the present memory, if so.
    ///
    /// That is known from the last time that it was told something: a daemon that died since is
    /// noticed at the next change.
    pub fn stale(&self) -> Option<&ListenerError> {
        self.stale.as_ref().map(|stale| &stale.error)
    }
}

impl fmt::Display for ListenerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.stale {
            None => write!(f, "{:?} is up to date", self.name),
            Some(stale) => write!(f, "{:?} is stale ({stale})", self.name),
        }
    }
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.undoing {
            f.write_str("it could not be put back: ")?;
        }
        f.write_str(self.error.reason())
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
