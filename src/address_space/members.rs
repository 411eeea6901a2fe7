//! Listeners come and go, are used, and brought up to date.

use std::any::type_name;

use vm_memory::bitmap::Bitmap;

use super::attached::{Attached, Listeners};
use super::error::{AddressSpaceError, AttachError, Result};
use super::space::AddressSpace;
use super::status::{ListenerId, ListenerStatus};
use crate::listener::{ListenerError, MemoryListener};
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::panics::caught;

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// Attaches a listener, after the others, and tells it the present memory. `name` is for
    /// errors and logs.
    ///
    /// Changes may happen while it is away. A daemon that died, or does not answer in time, costs
    /// the change its deadline, and then the change *succeeds without it*: the daemon knows
    /// nothing of the new memory, and a guest that gives it a buffer there sees its device fail.
    /// So look at [`ChangeReport::stale`](crate::ChangeReport::stale) before the guest is told of
    /// the memory, or [require](Self::attach_required) the daemon.
    ///
    /// A listener that *refuses* stops a change in either case. A daemon that hangs up when it is
    /// told of the change has refused; one that had hung up before, or stays silent, is away.
    ///
    /// Attach the hypervisor first and daemons after it: each learns of memory before those that
    /// make use of it.
    ///
    /// ```
    /// use guest_memory_shm::{
    ///     AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions, SessionOptions,
    ///     VhostUserSession,
    /// };
    /// # use guest_memory_shm::mock::{Fault, MockDaemon};
    /// # use std::time::Duration;
    /// use vm_memory::GuestAddress;
    ///
    /// # let daemon = MockDaemon::builder().start_unnamed()?;
    /// # let (socket, options) = (daemon.connect()?, SessionOptions::new(0));
    /// # let options = options.with_deadline(Duration::from_millis(200));
    /// let session = VhostUserSession::on_socket(socket, options.clone())?;
    /// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// let space = AddressSpace::new(boot);
    /// let disk = space.attach("disk0", session)?;
    ///
    /// # daemon.inject(1, Fault::NeverAnswer);
    /// // The daemon falls silent: RAM is plugged without it.
    /// let region = GuestRegionShm::new((GuestAddress(4 << 30), 1 << 20), &RamOptions::new())?;
    /// let report = space.insert(region)?;
    /// for listener in report.stale() {
    ///     eprintln!("connect it anew: {listener}");
    /// }
    /// assert!(report.stale()[0].is(&disk));
    ///
    /// # drop(space.detach(disk)?);
    /// # daemon.wait_disconnected(Duration::from_secs(10))?;
    /// # let session = VhostUserSession::on_socket(daemon.connect()?, options)?;
    /// // One that has to be there: RAM is not plugged, and the error says why.
    /// space.attach_required("disk0", session)?;
    /// # daemon.inject(1, Fault::NeverAnswer);
    /// let region = GuestRegionShm::new((GuestAddress(8 << 30), 1 << 20), &RamOptions::new())?;
    /// assert!(space.insert(region).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AttachError`] gives the listener back. The reason is [`AddressSpaceError::Attach`]; what
    /// it was told was taken back, unless the error says otherwise. Or it is
    /// [`AddressSpaceError::Reentrant`], and it was told nothing.
    pub fn attach<L: MemoryListener<B>>(
        &self,
        name: impl Into<String>,
        listener: L,
    ) -> Result<ListenerId<L>, AttachError<L>> {
        self.attach_as(name.into(), false, listener)
    }

    /// Attaches a listener, as [`attach`](Self::attach), without which no change happens: while it
    /// is away, changes are undone.
    ///
    /// # Errors
    ///
    /// Those of [`attach`](Self::attach).
    pub fn attach_required<L: MemoryListener<B>>(
        &self,
        name: impl Into<String>,
        listener: L,
    ) -> Result<ListenerId<L>, AttachError<L>> {
        self.attach_as(name.into(), true, listener)
    }

    fn attach_as<L: MemoryListener<B>>(
        &self,
        name: String,
        required: bool,
        listener: L,
    ) -> Result<ListenerId<L>, AttachError<L>> {
        let mut listeners = match self.lock() {
            Ok(listeners) => listeners,
            Err(error) => return Err(AttachError { error, listener }),
        };
        let memory = self.publisher.current();
        let id = ListenerId::new();
        let mut attached = Attached::new(id.id, name, required, listener);
        match attached.bring_up(&memory) {
            Ok(()) => {
                logs::debug!("listener {:?} attached", attached.status.name);
                listeners.all.push(attached);
                Ok(id)
            }
            Err((error, told)) => {
                let take_back = || attached.update(&GuestMemoryShm::new()).err();
                let error = AddressSpaceError::Attach {
                    stale: told.then(take_back).flatten(),
                    listener: attached.status.name.clone(),
                    error,
                };
                let Some(listener) = attached.into_listener() else {
                    unreachable!("{} was put in", type_name::<L>());
                };
                Err(AttachError { error, listener })
            }
        }
    }

    /// Gives a listener back. It is not told, and keeps what it holds.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::NoSuchListener`]. [`AddressSpaceError::Reentrant`]: it is attached as
    /// before, and a clone of `id` still names it.
    pub fn detach<L: MemoryListener<B>>(&self, id: ListenerId<L>) -> Result<L> {
        let mut listeners = self.lock()?;
        let at = listeners.place_of(&id)?;
        let attached = listeners.all.remove(at);
        logs::debug!("listener {:?} detached", attached.status.name);
        let listener = attached.into_listener();
        listener.ok_or(AddressSpaceError::NoSuchListener)
    }

    /// Runs a closure on a listener. No change happens meanwhile, as changes wait: so what may
    /// wait itself, such as a request to a daemon, needs a
    /// deadline.
    /// Calls of this address space from `work` are [`AddressSpaceError::Reentrant`], except
    /// [`published`](Self::published) and [`atomic`](Self::atomic).
    ///
    /// If `work` panics, so does this call. The listener is as `work` left it then, and is told
    /// the memory at the next change, or by [`refresh`](Self::refresh).
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::NoSuchListener`] and [`AddressSpaceError::Reentrant`]: nothing was
    /// done.
    pub fn with_listener<L: MemoryListener<B>, T>(
        &self,
        id: &ListenerId<L>,
        work: impl FnOnce(&mut L) -> T,
    ) -> Result<T> {
        let mut listeners = self.lock()?;
        let at = listeners.place_of(id)?;
        let listener = listeners.all[at].downcast();
        listener.map(work).ok_or(AddressSpaceError::NoSuchListener)
    }

    /// Brings a listener up to date: tells it the present memory, whatever it holds. Does nothing
    /// to one that holds it already.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::Refresh`]: it is stale, with this reason.
    /// [`AddressSpaceError::NoSuchListener`] and [`AddressSpaceError::Reentrant`].
    pub fn refresh<L: MemoryListener<B>>(&self, id: &ListenerId<L>) -> Result<()> {
        self.refresh_after(id, |_| Ok(()), |_, _| ())
    }

    /// Changes a listener and brings it up to date, without another change in between. Tells it
    /// the reason if that fails; a panic is a failure, of `work` as of the listener.
    pub(super) fn refresh_after<L: MemoryListener<B>>(
        &self,
        id: &ListenerId<L>,
        work: impl FnOnce(&mut L) -> Result<(), ListenerError>,
        failed: impl FnOnce(&mut L, &ListenerError),
    ) -> Result<()> {
        let mut listeners = self.lock()?;
        let memory = self.publisher.current();
        let at = listeners.place_of(id)?;
        let attached = &mut listeners.all[at];
        let listener = attached.downcast();
        let listener = listener.ok_or(AddressSpaceError::NoSuchListener)?;
        let done = caught(|| work(listener));
        let done = done.unwrap_or_else(|panic| Err(ListenerError::panicked(&panic)));
        let told = done.and_then(|()| attached.bring_up(&memory).map_err(|(error, _)| error));
        let Err(error) = told else {
            attached.status.stale = None;
            return Ok(());
        };
        if let Some(listener) = attached.downcast() {
            // It has failed already.
            let _ = caught(|| failed(listener, &error));
        }
        Err(attached.fail(error))
    }

    /// The listeners, in the order of their attachment. Waits while a change is under way.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::Reentrant`].
    pub fn listeners(&self) -> Result<Vec<ListenerStatus>> {
        Ok(self.lock()?.status())
    }
}

impl<B: Bitmap + Send + Sync + 'static> Listeners<B> {
    pub(super) fn place_of<L>(&self, id: &ListenerId<L>) -> Result<usize> {
        let place = self
            .all
            .iter()
            .position(|attached| attached.status.id == id.id);
        place.ok_or(AddressSpaceError::NoSuchListener)
    }
}

impl<B: Bitmap + Send + Sync + 'static> Attached<B> {
    /// It could not be brought up to date.
    pub(super) fn fail(&mut self, error: ListenerError) -> AddressSpaceError {
        self.become_stale(error.clone(), false);
        AddressSpaceError::Refresh {
            listener: self.status.name.clone(),
            error,
        }
    }

    /// Asks it, and tells it. A failure says whether it was told.
    fn bring_up(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), (ListenerError, bool)> {
        self.check(memory).map_err(|error| (error, false))?;
        self.update(memory).map_err(|error| (error, true))
    }
}
