//! The listeners of an address space: who they are, what they hold, and how all are told.

use std::any::Any;

use vm_memory::bitmap::Bitmap;

use super::listener::{ListenerError, MemoryListener};
use super::workers::{Answer, Call, Listener, Workers};
use crate::error::{AddressSpaceError, Occasion, StaleListener};
use crate::layout::GuestRange;
use crate::logs;
use crate::memory::GuestMemoryShm;

/// Whether a change may happen while a listener is away.
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
            waits: listener.waits(),
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

    pub(super) fn become_stale(&mut self, reason: String) {
        logs::warn!("listener {:?} is stale: {reason}", self.name);
        self.stale = Some(reason);
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
    /// `told` becomes the groups that were told, and may hold any part of it.
    pub(super) fn tell(
        &mut self,
        places: &[usize],
        memory: &GuestMemoryShm<B>,
        told: &mut Vec<Vec<usize>>,
    ) -> Result<(), Objection> {
        for group in self.groups(places) {
            let answers = self.tell_group(&group, memory);
            told.push(group.clone());
            let mut objection = Ok(());
            for (at, answer) in group.into_iter().zip(answers) {
                let attached = &mut self.all[at];
                match answer {
                    Ok(()) => attached.stale = None,
                    Err(error) => {
                        let other = attached.tolerate(error);
                        // The first one stands for the others.
                        if let (Err(_), Err(other)) = (&objection, &other) {
                            logs::warn!("{:?}, too: {}", other.listener, other.error.reason());
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
                    Err(error) => {
                        let reason = format!("it could not be put back: {}", error.reason());
                        attached.become_stale(reason);
                    }
                }
            }
        }
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

impl<B: 'static> Attached<B> {
    /// Whether the change may go on without this listener, which is stale then.
    fn tolerate(&mut self, error: ListenerError) -> Result<(), Objection> {
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
        self,
        occasion: Occasion,
        region: Option<GuestRange>,
        stale: Vec<StaleListener>,
    ) -> AddressSpaceError {
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
