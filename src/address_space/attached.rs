//! The listeners of an address space: what is known of them, and how all are told.

use std::any::Any;

use vm_memory::bitmap::Bitmap;

use super::status::{ListenerStatus, Stale};
use super::workers::{Answer, Call, Listener, Workers, panicked};
use crate::listener::{ListenerError, MemoryListener};
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};
use crate::range::GuestRange;

/// A listener and what is known of it.
pub(super) struct Attached<B: 'static> {
    pub(super) status: ListenerStatus,
    /// Whether telling it means waiting for another process.
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
        required: bool,
        listener: impl MemoryListener<B>,
    ) -> Self {
        Self {
            status: ListenerStatus {
                id,
                name,
                required,
                stale: None,
            },
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

    /// Asks whether telling it means waiting, before it is told anything.
    pub(super) fn ask_waits(&mut self) -> Answer {
        let listener = self.listener();
        self.waits = caught(|| listener.waits()).map_err(|panic| panicked(&panic))?;
        Ok(())
    }

    pub(super) fn become_stale(&mut self, error: ListenerError, undoing: bool) {
        let stale = self.status.stale.insert(Stale { error, undoing });
        logs::warn!("listener {:?} is stale: {stale}", self.status.name);
    }
}

impl<B: Bitmap + Send + Sync + 'static> Listeners<B> {
    pub(super) fn new() -> Self {
        Self {
            all: Vec::new(),
            workers: Workers::new(),
        }
    }

    /// Asks all listeners whether they can hold this memory; gives the places of those that can.
    /// One that is away and not required becomes stale.
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
    /// side by side. After an objection no further one is told.
    ///
    /// A group is in `told` before it is told: then a panic leaves it there, to be undone. Each
    /// listener of the groups in it may hold any part of the memory.
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
                    Ok(()) => attached.status.stale = None,
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

    /// Puts all that were told back to what was before, in reverse. One that fails becomes stale.
    pub(super) fn undo(&mut self, told: Vec<Vec<usize>>, before: &GuestMemoryShm<B>) {
        for group in told.into_iter().rev() {
            let answers = self.tell_group(&group, before);
            for (at, answer) in group.into_iter().zip(answers) {
                let attached = &mut self.all[at];
                match answer {
                    Ok(()) => attached.status.stale = None,
                    // One that is away already stays so, for the first reason.
                    Err(_) if attached.status.stale.is_some() => {}
                    Err(error) => attached.become_stale(error, true),
                }
            }
        }
    }

    /// How all of them are.
    pub(super) fn status(&self) -> Vec<ListenerStatus> {
        let all = self.all.iter();
        all.map(|attached| attached.status.clone()).collect()
    }

    /// Those that do not hold what they should.
    pub(super) fn stale(&self) -> Vec<ListenerStatus> {
        let all = self.all.iter().map(|attached| &attached.status);
        let stale = all.filter(|status| status.stale.is_some());
        stale.cloned().collect()
    }

    /// The places in order, neighbours that wait together.
    fn groups(&self, places: &[usize]) -> Vec<Vec<usize>> {
        let waits = |at: &usize| self.all[*at].waits;
        let groups = places.chunk_by(|one, next| waits(one) && waits(next));
        groups.map(<[usize]>::to_vec).collect()
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
    fn tolerate(&mut self, error: ListenerError) -> Result<(), Objection> {
        if !error.is_away() {
            return Err(self.object(error));
        }
        // The first reason is why; the later ones only follow from it.
        if self.status.stale.is_none() {
            self.become_stale(error.clone(), false);
        }
        match self.status.required {
            false => Ok(()),
            true => Err(self.object(error)),
        }
    }

    fn object(&self, error: ListenerError) -> Objection {
        Objection {
            listener: self.status.name.clone(),
            error,
        }
    }
}

impl Objection {
    /// Against a change of `subject`, for a listener that did not say where it failed.
    pub(super) fn about(mut self, subject: Option<GuestRange>) -> Self {
        if let (None, Some(subject)) = (self.error.range(), subject) {
            self.error = self.error.at(subject);
        }
        self
    }
}
