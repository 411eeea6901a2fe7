//! The listeners of an address space: who they are, what they hold, and how all are told.

use std::any::Any;

use vm_memory::bitmap::Bitmap;

use super::status::ListenerStatus;
use super::workers::{Answer, Call, Listener, Workers, panicked};
use crate::error::{AddressSpaceError, Occasion, StaleListener};
use crate::listener::{ListenerError, MemoryListener};
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};
use crate::range::GuestRange;

/// Whether a change may happen while a listener is away.
///
/// By default it may: a daemon that died, or does not answer in time, costs the change its time
/// limit, and then the change *succeeds without it*. It is named in
/// [`ChangeReport::stale`](super::ChangeReport::stale), and knows nothing of the new memory: a
/// guest that gives it a buffer there sees its device fail. So look at the report before the guest
/// is told of the memory, or say that nothing happens without the daemon:
///
/// ```
/// use guest_memory_shm::{
///     AddressSpace, Attendance, GuestMemoryShm, GuestRegionShm, RamOptions, VhostUserShare,
/// };
/// # use guest_memory_shm::mock::{BlkDevice, Fault, MockDaemon};
/// # use std::time::Duration;
/// # use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
/// use vm_memory::GuestAddress;
///
/// # let daemon = MockDaemon::builder().start_unnamed()?;
/// # let connect = || -> Result<_, Box<dyn std::error::Error>> {
/// #     let mut frontend = Frontend::from_stream(daemon.connect()?, 1);
/// #     let features = BlkDevice::negotiate(&mut frontend, Features::all())?.protocol_features();
/// #     Ok(VhostUserShare::new(frontend, features).with_deadline(Duration::from_millis(50)))
/// # };
/// # let share = connect()?;
/// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(boot);
/// let disk = space.attach("disk0", share)?;
///
/// # daemon.inject(Fault::never_answer(1));
/// // The daemon falls silent: RAM is plugged without it.
/// let region = GuestRegionShm::new(GuestAddress(4 << 30), 1 << 20, &RamOptions::new())?;
/// let report = space.insert(region)?;
/// for stale in report.stale() {
///     eprintln!("connect {} anew: {}", stale.name(), stale.reason());
/// }
/// assert!(report.stale()[0].is(&disk));
///
/// # drop(space.detach(disk)?);
/// # daemon.wait_disconnected(Duration::from_secs(10))?;
/// # let share = connect()?;
/// // One that has to be there: RAM is not plugged, and the error says why.
/// space.attach_as("disk0", Attendance::Required, share)?;
/// # daemon.inject(Fault::never_answer(1));
/// let region = GuestRegionShm::new(GuestAddress(8 << 30), 1 << 20, &RamOptions::new())?;
/// assert!(space.insert(region).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Attendance {
    /// It may: the listener becomes stale, and is told everything when it is back. A listener that
    /// *refuses* stops the change all the same; a daemon that hangs up when it is told of the
    /// change has refused, one that had hung up before or stays silent is away.
    #[default]
    MayLag,
    /// It may not: the change is undone.
    Required,
}

/// A listener and what is known of it.
pub(super) struct Attached<B: 'static> {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) attendance: Attendance,
    /// Why it does not hold what it should, if so.
    pub(super) stale: Option<String>,
    /// Whether to tell it is to wait for somebody else.
    waits: bool,
    /// Absent only while it is with a worker.
    listener: Option<Listener<B>>,
}

/// All listeners, in the order of attachment.
pub(super) struct Listeners<B: 'static> {
    pub(super) all: Vec<Attached<B>>,
    workers: Workers<B>,
}

/// A listener that stopped a change.
pub(super) struct Objection {
    pub(super) listener: String,
    pub(super) error: ListenerError,
}

impl<B: 'static> Attached<B> {
    pub(super) fn new(
        id: u64,
        name: String,
        attendance: Attendance,
        listener: impl MemoryListener<B>,
    ) -> Self {
        Self {
            id,
            name,
            attendance,
            stale: None,
            waits: false,
            listener: Some(Box::new(listener)),
        }
    }

    fn listener(&mut self) -> &mut Listener<B> {
        let Some(listener) = &mut self.listener else {
            unreachable!("no change is under way");
        };
        listener
    }

    /// The listener as what it was attached as.
    pub(super) fn downcast<L: 'static>(&mut self) -> Option<&mut L> {
        let any: &mut dyn Any = self.listener().as_mut();
        any.downcast_mut()
    }

    /// The listener as what it was attached as; a wrong type drops it.
    pub(super) fn into_listener<L: 'static>(self) -> Option<L> {
        let any: Box<dyn Any> = self.listener?;
        any.downcast().ok().map(|listener| *listener)
    }

    pub(super) fn call(&mut self, call: Call, memory: &GuestMemoryShm<B>) -> Answer {
        call.make(self.listener(), memory)
    }

    /// Asks whether telling it is to wait, before it is told anything.
    pub(super) fn ask_waits(&mut self) -> Answer {
        let listener = self.listener();
        self.waits = caught(|| listener.waits()).map_err(|panic| panicked(&panic))?;
        Ok(())
    }

    pub(super) fn become_stale(&mut self, reason: String) {
        let reason = self.stale.insert(reason);
        logs::warn!("listener {:?} is stale: {reason}", self.name);
    }
}

impl<B: Bitmap + Send + Sync + 'static> Listeners<B> {
    pub(super) fn new() -> Self {
        Self {
            all: Vec::new(),
            workers: Workers::new(),
        }
    }

    /// Asks everybody who is there whether this memory can be held; gives the places of those who
    /// can. Who is away and may be, becomes stale.
    pub(super) fn ask(&mut self, memory: &GuestMemoryShm<B>) -> Result<Vec<usize>, Objection> {
        let mut present = Vec::new();
        for (at, attached) in self.all.iter_mut().enumerate() {
            match attached.call(Call::Check, memory) {
                Ok(()) => present.push(at),
                Err(error) => attached.tolerate(error)?,
            }
        }
        Ok(present)
    }

    /// Tells those at `places` this memory, in order of attachment; neighbours that wait are told
    /// side by side. At an objection nobody further is told.
    ///
    /// `told` becomes the groups that were told, and may hold any part of it; that of the group
    /// that is just being told is in it.
    pub(super) fn tell(
        &mut self,
        places: &[usize],
        memory: &GuestMemoryShm<B>,
        told: &mut Vec<Vec<usize>>,
    ) -> Result<(), Objection> {
        for group in self.groups(places) {
            told.push(group.clone());
            let answers = self.tell_group(&group, memory);
            let mut objection = Ok(());
            for (at, answer) in group.into_iter().zip(answers) {
                let attached = &mut self.all[at];
                match answer {
                    Ok(()) => attached.stale = None,
                    Err(error) => {
                        let mut other = attached.tolerate(error);
                        // The first one stands for the others.
                        if let (Err(_), Err(other)) = (&objection, &mut other) {
                            let reason = other.error.reason();
                            logs::warn!("{:?}, too: {reason}", other.listener);
                        }
                        objection = objection.and(other);
                    }
                }
            }
            objection?;
        }
        Ok(())
    }

    /// Puts everybody who was told back to what was before, in reverse. Who fails becomes stale.
    pub(super) fn undo(&mut self, told: Vec<Vec<usize>>, before: &GuestMemoryShm<B>) {
        for group in told.into_iter().rev() {
            let answers = self.tell_group(&group, before);
            for (at, answer) in group.into_iter().zip(answers) {
                let attached = &mut self.all[at];
                match answer {
                    Ok(()) => attached.stale = None,
                    // One that is away already stays so, for the first reason.
                    Err(_) if attached.stale.is_some() => {}
                    Err(mut error) => {
                        let reason = format!("it could not be put back: {}", error.reason());
                        attached.become_stale(reason);
                    }
                }
            }
        }
    }

    /// How all of them are.
    pub(super) fn status(&self) -> Vec<ListenerStatus> {
        self.all.iter().map(ListenerStatus::of).collect()
    }

    /// Who does not hold what it should.
    pub(super) fn stale(&self) -> Vec<StaleListener> {
        let stale = |attached: &Attached<B>| {
            Some(StaleListener {
                id: attached.id,
                name: attached.name.clone(),
                reason: attached.stale.clone()?,
            })
        };
        self.all.iter().filter_map(stale).collect()
    }

    /// The places in order, neighbours that wait together.
    fn groups(&self, places: &[usize]) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut waited = false;
        for at in places {
            let waits = self.all[*at].waits;
            match groups.last_mut() {
                Some(group) if waits && waited => group.push(*at),
                _ => groups.push(vec![*at]),
            }
            waited = waits;
        }
        groups
    }

    fn tell_group(&mut self, group: &[usize], memory: &GuestMemoryShm<B>) -> Vec<Answer> {
        if let [only] = group {
            return vec![self.all[*only].call(Call::Update, memory)];
        }
        let taken = group.iter().filter_map(|at| self.all[*at].listener.take());
        let answers = self.workers.update(taken.collect(), memory);
        let put_back = |(at, (listener, answer)): (&usize, (Listener<B>, Answer))| {
            self.all[*at].listener = Some(listener);
            answer
        };
        group.iter().zip(answers).map(put_back).collect()
    }
}

impl<B: 'static> Drop for Listeners<B> {
    /// All of them are let go, whatever one of them does then.
    fn drop(&mut self) {
        self.all.drain(..).for_each(discard);
    }
}

impl<B: 'static> Attached<B> {
    /// Whether the change may go on without this listener, which is stale then.
    fn tolerate(&mut self, mut error: ListenerError) -> Result<(), Objection> {
        if !error.is_away() {
            return Err(self.object(error));
        }
        // The first reason is why; the later ones only follow from it.
        if self.stale.is_none() {
            self.become_stale(error.reason());
        }
        match self.attendance {
            Attendance::MayLag => Ok(()),
            Attendance::Required => Err(self.object(error)),
        }
    }

    pub(super) fn object(&self, error: ListenerError) -> Objection {
        Objection {
            listener: self.name.clone(),
            error,
        }
    }
}

impl Objection {
    /// As an error. `region` is what changed first, for a listener that did not say where it
    /// failed.
    pub(super) fn into_error(
        mut self,
        occasion: Occasion,
        region: Option<GuestRange>,
        stale: Vec<StaleListener>,
    ) -> AddressSpaceError {
        // The caller must be able to display it.
        self.error.reason();
        let listener = self.listener;
        let region = self.error.range().or(region);
        let away = self.error.is_away();
        let cause = self.error.into_cause();
        if away {
            AddressSpaceError::Away {
                listener,
                occasion,
                region,
                stale,
                cause,
            }
        } else {
            AddressSpaceError::Refused {
                listener,
                occasion,
                region,
                stale,
                cause,
            }
        }
    }
}
