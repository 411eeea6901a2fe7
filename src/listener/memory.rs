//! What must know the guest's memory, and how it is told.

use std::any::Any;
use std::time::Instant;

use super::error::ListenerError;
use super::exchange::Exchange;
use crate::memory::GuestMemoryShm;

/// A part of the VMM that must know the guest's memory at all times: a vhost-user daemon, the
/// hypervisor, VFIO, or one of your own.
///
/// A listener is told what the memory *is*, not what happens to it, and finds the difference to
/// what it holds itself. So one call serves every purpose: attaching it, plugging and unplugging,
/// undoing that, and bringing it up to date after it was away.
/// [`RegionAdapter`](crate::RegionAdapter) makes a listener out of two functions that add and
/// remove one region.
///
/// A listener that panics refuses, with the panic's message as its cause, and is told to undo what
/// it did. So does one whose error panics when it is displayed. A panic when something of it is
/// dropped is ignored.
///
/// Calls come from one thread at a time, but not always from the same one. The methods of the
/// [`AddressSpace`](crate::AddressSpace) that makes them cannot be used meanwhile, except
/// [`published`](crate::AddressSpace::published) and [`atomic`](crate::AddressSpace::atomic): a
/// change would wait for itself, and is
/// [`AddressSpaceError::Reentrant`](crate::AddressSpaceError::Reentrant) instead. That is detected
/// on the thread that makes the call: a listener that has *another* thread change the address
/// space, and waits for it, waits indefinitely. A listener may change another address space. Two
/// address spaces whose listeners change each other from two threads at once wait for each other:
/// always take them in the same order.
///
/// ```
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, ListenerError, MemoryListener};
/// use vm_memory::{GuestAddress, GuestMemoryBackend};
///
/// /// A device that reaches no address past 4 GiB.
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
    /// One that is away fails with [`ListenerError::away`] each time, until it is back.
    ///
    /// When this returns it must no longer use a region that is not in `memory`: only handles keep
    /// such a region mapped. The listener keeps handles of the regions that it holds (or their
    /// descriptors) as long as it uses them.
    ///
    /// # Errors
    ///
    /// Why it could not. It may hold a part of the change then: another call, with the memory from
    /// before, tells it to undo that.
    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError>;

    /// Begins to make what it holds equal to `memory`, without waiting: for a listener that waits
    /// for another process. `None`, as it is unless implemented: [`update`](Self::update) does it,
    /// which is not called otherwise. It is asked each time that it is to be told something.
    ///
    /// Neighbours in the order of attachment that begin are told side by side, by one thread
    /// ([`Exchange`]). What [`update`](Self::update) promises holds when the exchange has ended.
    /// A deadline of the listener's own counts from `begun`: when the change was begun, less the
    /// time of listeners that have no exchange.
    fn begin_update<'a>(
        &'a mut self,
        _memory: &GuestMemoryShm<B>,
        _begun: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        None
    }
}
