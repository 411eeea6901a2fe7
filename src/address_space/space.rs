//! The address space: what it publishes, and how calls wait for each other.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use vm_memory::GuestMemoryAtomic;
use vm_memory::bitmap::Bitmap;

use super::attached::Listeners;
use super::busy::Busy;
use super::error::{AddressSpaceError, Result};
use super::published::{PublishedMemory, Publisher};
use crate::memory::GuestMemoryShm;

/// The guest's memory, published to its readers, and the listeners that must know it.
///
/// A change (plug, unplug, several of them in a [transaction](Self::transaction)) goes like this:
///
/// 1. Every listener is asked whether it can hold the new memory.
/// 2. Regions that go are taken from the readers: a memory without them is published.
/// 3. The listeners are told, in the order in which they were attached; neighbours that
///    [wait](crate::MemoryListener::begin_update) for another process are told side by side.
/// 4. The new memory is published.
///
/// If a listener refuses, those already told are put back, in reverse, and the old memory stays
/// (or is published again). The error names the listener, the region and the cause. A listener
/// that cannot even be put back is [stale](Self::listeners), with its reason, until it is brought
/// up to date ([`refresh`](Self::refresh), or any later change) or [detached](Self::detach).
///
/// All of this holds when a listener panics, or the logger does: a listener that panics has
/// refused.
///
/// A listener that is away, a daemon that died or is silent, does not stop a change unless it is
/// [required](Self::attach_required): look at what each change
/// [reports](crate::ChangeReport::stale).
///
/// A listener, and the closure of [`with_listener`](Self::with_listener), cannot call the address
/// space, except [`published`](Self::published) and [`atomic`](Self::atomic): that is
/// [`AddressSpaceError::Reentrant`]. Calls from other threads wait for the change that is under
/// way.
///
/// Readers, such as the threads of virtqueues, take [`published`](Self::published) and hold it for
/// a batch. They never wait for a change, and never see memory that a listener was not told of,
/// except a stale one. A region that was removed stays mapped until the last of them lets go.
///
/// ```
/// use guest_memory_shm::{
///     AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions, SessionOptions, VhostUserSession,
/// };
/// # use guest_memory_shm::mock::MockDaemon;
/// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
///
/// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(boot);
/// # let daemon = MockDaemon::builder().start_unnamed()?;
/// # let socket = daemon.connect()?;
/// let session = VhostUserSession::on_socket(socket, SessionOptions::new(0))?;
/// let disk = space.attach("disk0", session)?;
///
/// // A device's thread.
/// let memory = space.published();
/// memory.memory().write_obj(7u64, GuestAddress(0x1000))?;
///
/// // Hotplug, and unplug.
/// let region = GuestRegionShm::new((GuestAddress(4 << 30), 1 << 20), &RamOptions::new())?;
/// let report = space.insert(region)?;
/// assert!(report.stale().is_empty(), "every listener was there");
/// memory.memory().write_obj(7u64, GuestAddress(4 << 30))?;
/// # assert_eq!(daemon.table().len(), 2);
/// let report = space.remove((GuestAddress(4 << 30), 1 << 20))?;
/// assert_eq!(report.removed().len(), 1);
/// # assert_eq!(daemon.table().len(), 1);
///
/// let session = space.detach(disk)?;
/// # drop(session);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A whole program with listeners of its own, one of which refuses: `examples/hotplug.rs`.
pub struct AddressSpace<B: Bitmap + Send + Sync + 'static = ()> {
    /// Its own among all of this process.
    id: u64,
    pub(super) publisher: Publisher<B>,
    /// Held during a change: there is one at a time.
    listeners: Mutex<Listeners<B>>,
}

/// What a change has while it is under way: all others wait.
pub(super) struct Exclusive<'a, B: 'static> {
    listeners: MutexGuard<'a, Listeners<B>>,
    _busy: Busy,
}

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// An address space with this memory, and without listeners.
    pub fn new(memory: GuestMemoryShm<B>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            publisher: Publisher::new(memory),
            listeners: Mutex::new(Listeners::new()),
        }
    }

    /// The memory, as it is published: for devices and the threads of virtqueues.
    ///
    /// A clone of it costs one reference count; taking the memory out of it
    /// (`GuestAddressSpace::memory`) gives the present one, which stays as it is while it is held.
    pub fn published(&self) -> PublishedMemory<B> {
        self.publisher.readers()
    }

    /// The published memory as vm-memory's own type, for device code that names
    /// `GuestMemoryAtomic`. All calls give clones of one, which follows each change.
    ///
    /// That type lets its users publish (`lock().replace(..)`), and no listener would be told. It
    /// is for reading only. What other code puts there is seen by the users of this, and not by
    /// those of [`published`](Self::published), until the next change: that fails with
    /// [`AddressSpaceError::MirrorReplaced`] and puts the memory of the address space back, and
    /// later changes work as before. A change waits for the holder of its `lock()`, and one made
    /// *by* its holder waits indefinitely: nothing can detect that.
    ///
    /// ```
    /// use guest_memory_shm::{
    ///     AddressSpace, AddressSpaceError, GuestMemoryShm, GuestRegionShm, RamOptions,
    /// };
    /// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
    ///
    /// /// Another crate's.
    /// struct Device {
    ///     memory: GuestMemoryAtomic<GuestMemoryShm>,
    /// }
    ///
    /// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// let space = AddressSpace::new(boot);
    /// let device = Device { memory: space.atomic() };
    /// let region = GuestRegionShm::new((GuestAddress(4 << 30), 1 << 20), &RamOptions::new())?;
    /// assert!(space.insert(region)?.stale().is_empty());
    /// assert_eq!(device.memory.memory().num_regions(), 2);
    ///
    /// // What it must not do.
    /// device.memory.lock().expect("no thread panicked").replace(GuestMemoryShm::new());
    /// let refused = space.remove((GuestAddress(4 << 30), 1 << 20)).unwrap_err();
    /// assert!(matches!(refused, AddressSpaceError::MirrorReplaced));
    /// assert_eq!(device.memory.memory().num_regions(), 2);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    pub fn atomic(&self) -> GuestMemoryAtomic<GuestMemoryShm<B>> {
        self.publisher.mirror()
    }

    /// Waits for the change that is under way, unless it is one of this thread's.
    pub(super) fn lock(&self) -> Result<Exclusive<'_, B>> {
        let busy = Busy::with(self.id).ok_or(AddressSpaceError::Reentrant)?;
        // Panics of listeners are caught, and those of `with_listener` leave the list whole.
        let listeners = self.listeners.lock();
        Ok(Exclusive {
            listeners: listeners.unwrap_or_else(PoisonError::into_inner),
            _busy: busy,
        })
    }

    /// As [`lock`](Self::lock), but `None` while a change is under way.
    #[cfg(feature = "vhost-user")]
    pub(super) fn try_lock(&self) -> Result<Option<Exclusive<'_, B>>> {
        let busy = Busy::with(self.id).ok_or(AddressSpaceError::Reentrant)?;
        let listeners = match self.listeners.try_lock() {
            Ok(listeners) => listeners,
            Err(TryLockError::Poisoned(listeners)) => listeners.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        Ok(Some(Exclusive {
            listeners,
            _busy: busy,
        }))
    }
}

impl<B: 'static> Deref for Exclusive<'_, B> {
    type Target = Listeners<B>;

    fn deref(&self) -> &Listeners<B> {
        &self.listeners
    }
}

impl<B: 'static> DerefMut for Exclusive<'_, B> {
    fn deref_mut(&mut self) -> &mut Listeners<B> {
        &mut self.listeners
    }
}

impl<B: Bitmap + Send + Sync + 'static> fmt::Debug for AddressSpace<B> {
    /// Never waits: during a change it shows no listeners.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listeners = match self.listeners.try_lock() {
            Ok(listeners) => Some(listeners.status()),
            Err(TryLockError::Poisoned(listeners)) => Some(listeners.into_inner().status()),
            Err(TryLockError::WouldBlock) => None,
        };
        let mut space = f.debug_struct("AddressSpace");
        space.field("memory", &self.publisher.current());
        match listeners {
            Some(listeners) => space.field("listeners", &listeners),
            None => space.field("listeners", &format_args!("(a change is under way)")),
        };
        space.finish()
    }
}
