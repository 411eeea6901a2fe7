//! Who must know the guest's memory, and how they are told.

use std::any::Any;
use std::fmt;

use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};
use crate::range::GuestRange;

/// How many causes of causes are told.
const MOST_CAUSES: usize = 32;

/// What a listener's cause is kept as.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Somebody who must know the guest's memory at all times: a vhost-user daemon, the hypervisor, a
/// user of VFIO, the author's own.
///
/// A listener is told what the memory *is*, not what happens to it, and finds the difference to
/// what it holds itself. So there is one call for all occasions: to attach it, to plug and unplug,
/// to undo that, and to bring it up to date after it was away. [`PerRegion`](super::PerRegion)
/// makes a listener of two functions that add and remove one region.
///
/// A listener that panics refuses, with the panic's message as its cause, and is told to undo what
/// it did. So does one whose error panics when it is displayed; what panics when it is dropped is
/// left at that.
///
/// Calls come from one thread at a time, but not always from the same one. The methods of the
/// [`AddressSpace`](super::AddressSpace) that makes them cannot be used meanwhile, but for
/// [`memory`](super::AddressSpace::memory) and [`atomic`](super::AddressSpace::atomic): a change
/// would wait for itself, and is
/// [`AddressSpaceError::Reentrant`](crate::AddressSpaceError::Reentrant) instead. That is found
/// out on the thread that makes the call. A listener that has *another* thread change the address
/// space and waits for it, waits indefinitely. A listener may change another address space; two whose
/// listeners change each other, from two threads at once, wait for each other: always take them in
/// the same order.
///
/// ```
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, ListenerError, MemoryListener};
/// use vm_memory::{GuestAddress, GuestMemoryBackend};
///
/// /// A device that takes no address behind its 32nd bit.
/// struct Dma32;
///
/// #[derive(Debug, thiserror::Error)]
/// #[error("RAM ends at {:#x}, a device reaches 4 GiB", .0.0)]
/// struct OutOfReach(GuestAddress);
///
/// impl MemoryListener for Dma32 {
///     fn check(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
///         match memory.last_addr() {
///             end if end.0 >> 32 != 0 => Err(ListenerError::refused(OutOfReach(end))),
///             _ => Ok(()),
///         }
///     }
///     fn update(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
///         Ok(())
///     }
/// }
///
/// let space = AddressSpace::new(GuestMemoryShm::<()>::new());
/// assert!(space.attach("old nic", Dma32).is_ok());
/// ```
pub trait MemoryListener<B = ()>: Any + Send {
    /// Whether it could hold this memory: limits, slots. All listeners are asked before the first
    /// is told anything.
    ///
    /// What it holds must not change.
    ///
    /// # Errors
    ///
    /// Why it could not.
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError>;

    /// Makes what it holds equal to `memory`, whatever it held.
    ///
    /// One that is away fails with that again and again, until it is back.
    ///
    /// When this returns it must not use a region that is not in `memory` any more: nothing keeps
    /// such a region mapped but handles of it. The listener keeps handles of the regions that it
    /// holds (or the descriptors) as long as it uses them.
    ///
    /// # Errors
    ///
    /// Why it could not. It may hold a part of the change then: it is told to undo that by another
    /// call, with the memory that was before.
    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError>;

    /// Whether to tell it is to wait for somebody else, such as another process.
    ///
    /// Asked once, when it is attached. Neighbours in the order of attachment that wait are told
    /// side by side, so that a slow one costs its own time and not the sum.
    fn waits(&self) -> bool {
        false
    }
}

/// Why a listener did not take a memory.
///
/// There are two kinds, with different consequences. One that *refuses* answers no to this memory:
/// the change is undone for all. One that is *away* (it died, hung up, fell silent) holds nothing
/// that matters any more: whether the change goes on without it, is up to its
/// [`Attendance`](super::Attendance).
#[derive(Debug)]
pub struct ListenerError {
    away: bool,
    range: Option<GuestRange>,
    cause: Kept,
}

/// A cause, which is code of others: it may panic when it is displayed or dropped.
struct Kept(Option<Cause>);

impl ListenerError {
    /// It does not take the memory.
    pub fn refused(cause: impl Into<Cause>) -> Self {
        Self {
            away: false,
            range: None,
            cause: Kept(Some(cause.into())),
        }
    }

    /// It is gone, or what it holds is not known any more.
    pub fn away(cause: impl Into<Cause>) -> Self {
        Self {
            away: true,
            ..Self::refused(cause)
        }
    }

    /// Names the region at which it failed.
    #[must_use]
    pub fn at(mut self, range: GuestRange) -> Self {
        self.range = Some(range);
        self
    }

    /// Whether it is away, rather than refusing.
    pub fn is_away(&self) -> bool {
        self.away
    }

    /// The region at which it failed, if it was one.
    pub fn range(&self) -> Option<GuestRange> {
        self.range
    }

    /// The cause and the causes of it, in one line. If they panic, that is the cause from now on.
    pub(super) fn reason(&mut self) -> String {
        let text = || {
            let mut texts = Vec::new();
            let mut cause = std::error::Error::source(self);
            // One that names itself as its cause has no end.
            while let Some(error) = cause
                && texts.len() < MOST_CAUSES
            {
                texts.push(error.to_string());
                cause = error.source();
            }
            texts.join(": ")
        };
        caught(text).unwrap_or_else(|panic| {
            let text = format!("its error panicked when it was displayed: {panic}");
            self.cause = Kept(Some(text.clone().into()));
            text
        })
    }

    /// Why.
    pub fn into_cause(mut self) -> Box<dyn std::error::Error + Send + Sync> {
        let Some(cause) = self.cause.0.take() else {
            unreachable!("only this takes it, and takes the rest, too");
        };
        cause
    }
}

impl fmt::Display for ListenerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.away { "away" } else { "refused" })
    }
}

impl std::error::Error for ListenerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let cause = self.cause.0.as_deref()?;
        Some(cause)
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(cause) => cause.fmt(f),
            None => f.write_str("None"),
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        discard(self.0.take());
    }
}
