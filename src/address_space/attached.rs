//! The listeners of an address space: what is known of them, and how all are told.

use std::any::Any;
use std::time::Instant;

use vm_memory::bitmap::Bitmap;

use super::status::{ListenerStatus, Stale};
use crate::listener::{ListenerError, MemoryListener, drive};
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::panics::{caught, discard};
use crate::range::GuestRange;

type Listener<B> = Box<dyn MemoryListener<B>>;
type Answer = Result<(), ListenerError>;

/// A listener and what is known of it.
pub(super) struct Attached<B: 'static> {
    pub(super) status: ListenerStatus,
    listener: Listener<B>,
}

/// All listeners, in the order of attachment.
pub(super) struct Listeners<B: 'static> {
    pub(super) all: Vec<Attached<B>>,
}

/// A listener that stopped a change.
pub(super) struct Objection {
    pub(super) listener: String,
    pub(super) error: ListenerError,
}

/// When a change was begun, less the time that is not of listeners with exchanges.
struct Stopwatch {
    begun: Instant,
}

impl Stopwatch {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
        }
    }

    /// What has been done since then does not count.
    fn leave_out(&mut self, since: Instant) {
        self.begun += since.elapsed();
    }
}

/// Makes a call of a listener. One that panics refuses.
fn answered(call: impl FnOnce() -> Answer) -> Answer {
    caught(call).unwrap_or_else(|panic| Err(ListenerError::panicked(&panic)))
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
            listener: Box::new(listener),
        }
    }

    /// The listener as what it was attached as.
    pub(super) fn downcast<L: 'static>(&mut self) -> Option<&mut L> {
        let any: &mut dyn Any = self.listener.as_mut();
        any.downcast_mut()
    }

    /// The listener as what it was attached as; a wrong type drops it.
    pub(super) fn into_listener<L: 'static>(self) -> Option<L> {
        let any: Box<dyn Any> = self.listener;
        any.downcast().ok().map(|listener| *listener)
    }

    /// Asks whether it can hold this memory.
    pub(super) fn check(&mut self, memory: &GuestMemoryShm<B>) -> Answer {
        answered(|| self.listener.check(memory))
    }

    /// Tells it this memory, alone, and waits for the end of that.
    pub(super) fn update(&mut self, memory: &GuestMemoryShm<B>) -> Answer {
        answered(|| {
            if let Some(exchange) = self.listener.begin_update(memory, Instant::now()) {
                return drive(vec![exchange]).pop().unwrap_or(Ok(()));
            }
            self.listener.update(memory)
        })
    }

    /// Tells it this memory, after it was asked for an exchange and has none.
    fn update_at_once(&mut self, memory: &GuestMemoryShm<B>) -> Answer {
        answered(|| self.listener.update(memory))
    }

    pub(super) fn become_stale(&mut self, error: ListenerError, undoing: bool) {
        let stale = self.status.stale.insert(Stale { error, undoing });
        logs::warn!("listener {:?} is stale: {stale}", self.status.name);
    }
}

impl<B: Bitmap + Send + Sync + 'static> Listeners<B> {
    pub(super) fn new() -> Self {
        Self { all: Vec::new() }
    }

    /// Asks all listeners whether they can hold this memory; gives the places of those that can.
    /// One that is away and not required becomes stale.
    pub(super) fn ask(&mut self, memory: &GuestMemoryShm<B>) -> Result<Vec<usize>, Objection> {
        let mut present = Vec::new();
        for (at, attached) in self.all.iter_mut().enumerate() {
            match attached.check(memory) {
                Ok(()) => present.push(at),
                Err(error) => attached.tolerate(error)?,
            }
        }
        Ok(present)
    }

    /// Tells those at `places` this memory, in order of attachment; neighbours that have exchanges
    /// are told side by side. After an objection no further one is told.
    ///
    /// Each is in `told` before it is told: then a panic leaves it there, to be undone. It may
    /// hold any part of the memory.
    pub(super) fn tell(
        &mut self,
        places: &[usize],
        memory: &GuestMemoryShm<B>,
        told: &mut Vec<usize>,
    ) -> Result<(), Objection> {
        self.tell_each(places, memory, told, |attached, answer| match answer {
            Ok(()) => {
                attached.status.stale = None;
                Ok(())
            }
            Err(error) => attached.tolerate(error),
        })
    }

    /// Puts all that were told back to what was before, in reverse. One that fails becomes stale.
    pub(super) fn undo(&mut self, mut told: Vec<usize>, before: &GuestMemoryShm<B>) {
        told.reverse();
        let put_back = |attached: &mut Attached<B>, answer: Answer| {
            match answer {
                Ok(()) => attached.status.stale = None,
                // One that is away already stays so, for the first reason.
                Err(_) if attached.status.stale.is_some() => {}
                Err(error) => attached.become_stale(error, true),
            }
            Ok(())
        };
        // None of them stops it.
        let _: Result<(), Objection> = self.tell_each(&told, before, &mut Vec::new(), put_back);
    }

    /// Tells those at `places` this memory, in this order, and notes what each answers; as long as
    /// that is no objection.
    fn tell_each(
        &mut self,
        places: &[usize],
        memory: &GuestMemoryShm<B>,
        told: &mut Vec<usize>,
        mut note: impl FnMut(&mut Attached<B>, Answer) -> Result<(), Objection>,
    ) -> Result<(), Objection> {
        let mut watch = Stopwatch::new();
        let mut places = places.iter();
        while !places.as_slice().is_empty() {
            let (answers, alone) = self.tell_side_by_side(&mut places, memory, &mut watch, told);
            let mut objection = Ok(());
            for (at, answer) in answers {
                let other = note(&mut self.all[at], answer);
                // The first one stands for the others.
                if let (Err(_), Err(other)) = (&objection, &other) {
                    logs::warn!("{:?}, too: {}", other.listener, other.error.reason());
                }
                objection = objection.and(other);
            }
            objection?;
            if let Some(at) = alone {
                told.push(at);
                let (attached, before) = (&mut self.all[at], Instant::now());
                let answer = attached.update_at_once(memory);
                watch.leave_out(before);
                note(attached, answer)?;
            }
        }
        Ok(())
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

    /// Tells the first of `places` and those after it side by side, as long as they have
    /// exchanges. Gives their answers, and the first one that has none: that is not told yet.
    /// Their places are taken off `places`.
    fn tell_side_by_side(
        &mut self,
        places: &mut std::slice::Iter<'_, usize>,
        memory: &GuestMemoryShm<B>,
        watch: &mut Stopwatch,
        told: &mut Vec<usize>,
    ) -> (Vec<(usize, Answer)>, Option<usize>) {
        let all = self.all.iter_mut();
        let mut listeners: Vec<_> = all.map(|one| Some(&mut one.listener)).collect();
        let (mut begun, mut exchanges) = (Vec::new(), Vec::new());
        let (mut panicked, mut alone) = (None, None);
        for &at in places {
            // Each place is named once.
            let Some(listener) = listeners[at].take() else {
                continue;
            };
            let before = Instant::now();
            told.push(at);
            match caught(|| listener.begin_update(memory, watch.begun)) {
                Ok(Some(exchange)) => {
                    begun.push(at);
                    exchanges.push(exchange);
                    continue;
                }
                Ok(None) => {
                    watch.leave_out(before);
                    told.pop();
                    alone = Some(at);
                }
                Err(panic) => panicked = Some((at, Err(ListenerError::panicked(&panic)))),
            }
            break;
        }
        let answers = begun.into_iter().zip(drive(exchanges));
        (answers.chain(panicked).collect(), alone)
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
