//! Listeners come and go, are used, and brought up to date.

use std::any::type_name;

use vm_memory::bitmap::Bitmap;

use super::AddressSpace;
use super::attached::{Attached, Attendance, Listeners, Objection};
use super::status::{ListenerId, ListenerStatus};
use super::workers::{Call, panicked};
use crate::error::{AddressSpaceError, AttachError, Occasion, Result, StaleListener};
use crate::listener::MemoryListener;
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// Attaches a listener, after the others, and tells it the present memory; it
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
    /// [`AddressSpaceError::Away`]; what it was told was taken back, or it is called stale. Or it
    /// is [`AddressSpaceError::Reentrant`], and it was told nothing.
    pub fn attach_as<L: MemoryListener<B>>(
        &self,
        name: impl Into<String>,
        attendance: Attendance,
        listener: L,
    ) -> Result<ListenerId<L>, AttachError<L>> {
        let name = name.into();
        let mut listeners = match self.lock() {
            Ok(listeners) => listeners,
            Err(error) => {
                let error = Box::new(error.into());
                return Err(AttachError { error, listener });
            }
        };
        let memory = self.publisher.current();
        let id = ListenerId::new();
        let mut attached = Attached::new(id.id, name, attendance, listener);
        let asked = attached.ask_waits();
        let asked = asked.map_err(|error| (attached.object(error), false));
        match asked.and_then(|()| attached.bring_up(&memory)) {
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
    /// [`AddressSpaceError::NoSuchListener`]. [`AddressSpaceError::Reentrant`]: it is attached as
    /// before, and a clone of `id` still names it.
    pub fn detach<L: MemoryListener<B>>(&self, id: ListenerId<L>) -> Result<L> {
        let mut listeners = self.lock()?;
        let at = listeners.place_of(&id)?;
        let attached = listeners.all.remove(at);
        logs::debug!("listener {:?} detached", attached.name);
        Ok(attached
            .into_listener()
            .ok_or(AddressSpaceError::NoSuchListener)?)
    }

    /// Runs a closure on a listener, for what it can do otherwise. No change happens meanwhile:
    /// changes wait, so that what may wait itself, such as a request to a daemon, needs a
    #[cfg_attr(feature = "vhost-user", doc = "[time limit](crate::CallDeadline).")]
    #[cfg_attr(not(feature = "vhost-user"), doc = "time limit.")]
    /// What `work` calls of this address space is [`AddressSpaceError::Reentrant`], but for
    /// [`memory`](Self::memory) and [`atomic`](Self::atomic).
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
        Ok(work(listener.ok_or(AddressSpaceError::NoSuchListener)?))
    }

    /// Brings a listener up to date: tells it the present memory, whatever it holds. Does nothing
    /// to one that holds it already.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::Refused`] and [`AddressSpaceError::Away`]: it is stale, with this
    /// reason. [`AddressSpaceError::NoSuchListener`] and [`AddressSpaceError::Reentrant`].
    pub fn refresh<L: MemoryListener<B>>(&self, id: &ListenerId<L>) -> Result<()> {
        self.refresh_after(id, |_| (), |_, _| ())
    }

    /// Changes a listener and brings it up to date, without another change in between. Tells it
    /// the reason if that fails; to panic is to fail, for `work` as for the listener.
    pub(super) fn refresh_after<L: MemoryListener<B>, T>(
        &self,
        id: &ListenerId<L>,
        work: impl FnOnce(&mut L) -> T,
        failed: impl FnOnce(&mut L, String),
    ) -> Result<T> {
        let mut listeners = self.lock()?;
        let memory = self.publisher.current();
        let at = listeners.place_of(id)?;
        let attached = &mut listeners.all[at];
        let listener = attached.downcast();
        let listener = listener.ok_or(AddressSpaceError::NoSuchListener)?;
        let done = caught(|| work(listener));
        let brought_up = match &done {
            Ok(_) => attached
                .bring_up(&memory)
                .map_err(|(objection, _)| objection),
            Err(panic) => Err(attached.object(panicked(panic))),
        };
        let mut objection = match (brought_up, done) {
            (Ok(()), Ok(done)) => {
                attached.stale = None;
                return Ok(done);
            }
            (Err(objection), done) => {
                discard(done);
                objection
            }
            (Ok(()), Err(_)) => unreachable!("it is not brought up after a panic"),
        };
        let reason = objection.error.reason();
        attached.become_stale(reason.clone());
        if let Some(listener) = attached.downcast() {
            // It has failed already.
            let _ = caught(|| failed(listener, reason.clone()));
        }
        let stale = vec![StaleListener {
            id: id.id,
            name: attached.name.clone(),
            reason,
        }];
        Err(objection.into_error(Occasion::Refresh, None, stale).into())
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
        let mut error = self.call(Call::Update, &GuestMemoryShm::new()).err()?;
        Some(StaleListener {
            id: self.id,
            name: self.name.clone(),
            reason: error.reason(),
        })
    }
}
