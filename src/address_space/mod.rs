//! Guest memory that changes while the guest runs, and everybody who must know of it.
//!
//! An [`AddressSpace`] publishes memories to the threads that read and write them, and tells
//! listeners (daemons, the hypervisor) of each change: all of them, or none.

use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use crate::error::{AddressSpaceError, AttachError, Occasion, Result, StaleListener};
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::region::GuestRegionShm;

mod attached;
#[cfg(feature = "vhost-user")]
mod daemon;
mod listener;
mod per_region;
mod transaction;
mod workers;

pub use attached::Attendance;
use attached::{Attached, Listeners, Objection};
pub use listener::{ListenerError, MemoryListener};
pub use per_region::{PerRegion, RegionListener};
pub use transaction::{ChangeReport, Transaction};
use workers::Call;

/// The guest's memory, published to its readers, and the listeners who must know it.
///
/// A change (plug, unplug, several of them in a [transaction](Self::transaction)) goes like this:
///
/// 1. Every listener is asked whether it can hold the new memory.
/// 2. Regions that go are taken from the readers: a memory without them is published.
/// 3. The listeners are told, in the order in which they were attached; neighbours that
///    [wait](MemoryListener::waits) for another process are told side by side.
/// 4. The new memory is published.
///
/// If anybody refuses, those already told are put back, in reverse, and the old memory stays (or
/// is published again). The error names the listener, the region and the cause. A listener that
/// cannot even be put back is [stale](Self::listeners), with its reason, until it is brought up to
/// date ([`refresh`](Self::refresh), or any later change) or [detached](Self::detach).
///
/// Readers, such as the threads of virtqueues, take [`memory`](Self::memory) and hold it for a
/// batch: they never wait for a change, and never see memory that a listener was not told of (but
/// for listeners that are stale). A region that was removed stays mapped until the last of them
/// lets go.
///
/// ```
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions, VhostUserShare};
/// # use guest_memory_shm::mock::{BlkDevice, MockDaemon};
/// # use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
/// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
///
/// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(boot);
/// # let daemon = MockDaemon::builder().start_unnamed()?;
/// # let mut frontend = Frontend::from_stream(daemon.connect()?, 1);
/// # let features = BlkDevice::negotiate(&mut frontend, Features::all())?.protocol_features();
/// let disk = space.attach("disk0", VhostUserShare::new(frontend, features))?;
///
/// // A device's thread.
/// let memory = space.memory();
/// memory.memory().write_obj(7u64, GuestAddress(0x1000))?;
///
/// // Hotplug, and unplug.
/// let region = GuestRegionShm::new(GuestAddress(4 << 30), 1 << 20, &RamOptions::new())?;
/// space.insert(region)?;
/// memory.memory().write_obj(7u64, GuestAddress(4 << 30))?;
/// # assert_eq!(daemon.table().len(), 2);
/// space.remove(GuestAddress(4 << 30), 1 << 20)?;
/// # assert_eq!(daemon.table().len(), 1);
///
/// let share = space.detach(disk)?;
/// # drop(share);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct AddressSpace<B: Bitmap + Send + Sync + 'static = ()> {
    memory: GuestMemoryAtomic<GuestMemoryShm<B>>,
    /// Held during a change: there is one at a time.
    listeners: Mutex<Listeners<B>>,
}

/// Names a listener of type `L` that is attached to an [`AddressSpace`]. No other listener of this
/// process ever has the same, while names may be given twice.
pub struct ListenerId<L> {
    id: u64,
    listener: PhantomData<fn() -> L>,
}

/// A listener of an [`AddressSpace`], and how it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerStatus {
    id: u64,
    name: String,
    attendance: Attendance,
    stale: Option<String>,
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

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// An address space with this memory, and without listeners.
    pub fn new(memory: GuestMemoryShm<B>) -> Self {
        Self {
            memory: GuestMemoryAtomic::new(memory),
            listeners: Mutex::new(Listeners::new()),
        }
    }

    /// The memory, as it is published: for devices and the threads of virtqueues.
    ///
    /// A clone of it costs one reference count; taking the memory out of it
    /// (`GuestAddressSpace::memory`) gives the present one, which stays as it is while it is held.
    /// Only the address space may publish: `GuestMemoryAtomic::lock` is not for its users.
    pub fn memory(&self) -> GuestMemoryAtomic<GuestMemoryShm<B>> {
        self.memory.clone()
    }

    /// Plugs a region: every listener is told of it, and then readers see it.
    ///
    /// # Errors
    ///
    /// [`Error::Overlap`](crate::Error::Overlap) if a region is there already, and those of
    /// [`Transaction::commit`]: the memory and the listeners are what they were.
    pub fn insert(&self, region: impl Into<Arc<GuestRegionShm<B>>>) -> Result<ChangeReport<B>> {
        self.transaction().insert(region).commit()
    }

    /// Unplugs the region of `size` bytes at `start`: readers see it no more, and then every
    /// listener is told. It is unmapped when the last user lets go of it.
    ///
    /// The guest must have given it back before.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRegion`](crate::Error::NoSuchRegion) if no region starts there, or it has
    /// another size, and those of [`Transaction::commit`]: the region is there again, for readers
    /// and listeners.
    pub fn remove(&self, start: GuestAddress, size: u64) -> Result<ChangeReport<B>> {
        self.transaction().remove(start, size).commit()
    }

    /// Begins several changes that happen together or not at all.
    pub fn transaction(&self) -> Transaction<'_, B> {
        Transaction::new(self)
    }

    /// Attaches a listener, behind the others, and tells it the present memory; it
    /// [may lag](Attendance::MayLag). `name` is for errors and logs.
    ///
    /// The hypervisor comes first and daemons after it, so that each learns of memory before those
    /// who make use of it.
    ///
    /// # Errors
    ///
    /// Those of [`attach_as`](Self::attach_as).
    pub fn attach<L: MemoryListener<B>>(
        &self,
        name: impl Into<String>,
        listener: L,
    ) -> Result<ListenerId<L>, AttachError<L>> {
        self.attach_as(name, Attendance::default(), listener)
    }

    /// Attaches a listener, as [`attach`](Self::attach), and says whether changes may happen while
    /// it is away.
    ///
    /// # Errors
    ///
    /// [`AttachError`] gives the listener back. The reason is [`AddressSpaceError::Refused`] or
    /// [`AddressSpaceError::Away`]; what it was told was taken back, or it is called stale.
    pub fn attach_as<L: MemoryListener<B>>(
        &self,
        name: impl Into<String>,
        attendance: Attendance,
        listener: L,
    ) -> Result<ListenerId<L>, AttachError<L>> {
        let mut listeners = self.lock();
        let memory = self.current();
        let id = ListenerId::new();
        let mut attached = Attached::new(id.id, name.into(), attendance, listener);
        match attached.bring_up(&memory) {
            Ok(()) => {
                logs::debug!("listener {:?} attached", attached.name);
                listeners.all.push(attached);
                Ok(id)
            }
            Err((objection, told)) => {
                let stale = told.then(|| attached.take_back()).flatten();
                let stale = stale.into_iter().collect();
                let error = objection.into_error(Occasion::Attach, None, stale);
                let Some(listener) = attached.into_listener() else {
                    unreachable!("{} was put in", type_name::<L>());
                };
                Err(AttachError {
                    error: Box::new(error.into()),
                    listener,
                })
            }
        }
    }

    /// Gives a listener back. It is not told: what it holds, it goes on holding.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::NoSuchListener`].
    pub fn detach<L: MemoryListener<B>>(&self, id: ListenerId<L>) -> Result<L> {
        let mut listeners = self.lock();
        let at = listeners.place_of(&id)?;
        let attached = listeners.all.remove(at);
        logs::debug!("listener {:?} detached", attached.name);
        Ok(attached
            .into_listener()
            .ok_or(AddressSpaceError::NoSuchListener)?)
    }

    /// Uses a listener, for what it can do otherwise. No change happens meanwhile: changes wait, so
    /// that what may wait itself, such as a request to a daemon, needs a
    #[cfg_attr(feature = "vhost-user", doc = "[time limit](crate::TimeLimit),")]
    #[cfg_attr(not(feature = "vhost-user"), doc = "time limit,")]
    /// and `work` must not call this address space, which would wait for itself.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::NoSuchListener`]: nothing was done.
    pub fn with_listener<L: MemoryListener<B>, T>(
        &self,
        id: &ListenerId<L>,
        work: impl FnOnce(&mut L) -> T,
    ) -> Result<T> {
        let mut listeners = self.lock();
        let at = listeners.place_of(id)?;
        let listener = listeners.all[at].downcast();
        Ok(work(listener.ok_or(AddressSpaceError::NoSuchListener)?))
    }

    /// Brings a listener up to date: tells it the present memory, whatever it holds. Does nothing
    /// to one that holds it already.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::Refused`] and [`AddressSpaceError::Away`]: it is stale, with this
    /// reason. [`AddressSpaceError::NoSuchListener`].
    pub fn refresh<L: MemoryListener<B>>(&self, id: &ListenerId<L>) -> Result<()> {
        self.refresh_after(id, |_| (), |_, _| ())
    }

    /// Changes a listener and brings it up to date, without another change in between. Tells it
    /// the reason if that fails.
    fn refresh_after<L: MemoryListener<B>, T>(
        &self,
        id: &ListenerId<L>,
        work: impl FnOnce(&mut L) -> T,
        failed: impl FnOnce(&mut L, String),
    ) -> Result<T> {
        let mut listeners = self.lock();
        let memory = self.current();
        let at = listeners.place_of(id)?;
        let attached = &mut listeners.all[at];
        let listener = attached.downcast();
        let done = work(listener.ok_or(AddressSpaceError::NoSuchListener)?);
        match attached.bring_up(&memory) {
            Ok(()) => attached.stale = None,
            Err((objection, _)) => {
                let reason = objection.error.reason();
                attached.become_stale(reason.clone());
                if let Some(listener) = attached.downcast() {
                    failed(listener, reason.clone());
                }
                let stale = vec![StaleListener {
                    id: id.id,
                    name: attached.name.clone(),
                    reason,
                }];
                return Err(objection.into_error(Occasion::Refresh, None, stale).into());
            }
        }
        Ok(done)
    }

    /// The listeners, in the order of their attachment. Waits while a change is under way.
    pub fn listeners(&self) -> Vec<ListenerStatus> {
        let status = |attached: &Attached<B>| ListenerStatus {
            id: attached.id,
            name: attached.name.clone(),
            attendance: attached.attendance,
            stale: attached.stale.clone(),
        };
        self.lock().all.iter().map(status).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Listeners<B>> {
        // Panics of listeners are caught, and those of `with_listener` leave the list whole.
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> GuestMemoryShm<B> {
        GuestMemoryShm::clone(&self.memory.memory())
    }

    fn publish(&self, memory: &GuestMemoryShm<B>) {
        let exclusive = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        exclusive.replace(memory.clone());
    }
}

impl<B: Bitmap + Send + Sync + 'static> Listeners<B> {
    fn place_of<L>(&self, id: &ListenerId<L>) -> Result<usize, AddressSpaceError> {
        let place = self.all.iter().position(|attached| attached.id == id.id);
        place.ok_or(AddressSpaceError::NoSuchListener)
    }
}

impl<B: Bitmap + Send + Sync + 'static> Attached<B> {
    /// Asks it, and tells it. Says at a failure whether it was told.
    fn bring_up(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), (Objection, bool)> {
        for (call, told) in [(Call::Check, false), (Call::Update, true)] {
            let answer = self.call(call, memory);
            answer.map_err(|error| (self.object(error), told))?;
        }
        Ok(())
    }

    /// Makes it hold nothing again; tells why that failed.
    fn take_back(&mut self) -> Option<StaleListener> {
        let error = self.call(Call::Update, &GuestMemoryShm::new()).err()?;
        Some(StaleListener {
            id: self.id,
            name: self.name.clone(),
            reason: error.reason(),
        })
    }
}

impl<L> ListenerId<L> {
    /// One of its own, for all address spaces.
    fn new() -> Self {
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

impl<B: Bitmap + Send + Sync + 'static> fmt::Debug for AddressSpace<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("memory", &self.current())
            .field("listeners", &self.listeners())
            .finish()
    }
}

#[cfg(test)]
mod tests;
