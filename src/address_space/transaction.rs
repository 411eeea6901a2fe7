//! Several changes of the guest's memory as one.

use std::sync::Arc;

use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::attached::{Listeners, Objection};
use super::error::{AddressSpaceError, Result};
use super::published::Publisher;
use super::space::AddressSpace;
use super::status::ListenerStatus;
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::range::{GuestRange, InvalidRange};
use crate::region::{GuestRegionShm, MemoryError};

/// Changes of the guest's memory that happen together or not at all:
/// [`AddressSpace::transaction`].
///
/// Removals come before additions, in whatever order they were named: a region can be replaced by
/// another in its place.
///
/// ```
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions};
/// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
///
/// const MIB: u64 = 1 << 20;
/// let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(memory);
///
/// let report = space
///     .transaction()
///     .remove((GuestAddress(0), MIB))
///     .insert(GuestRegionShm::new((GuestAddress(0), 2 * MIB), &RamOptions::new())?)
///     .insert(GuestRegionShm::new((GuestAddress(4 << 30), MIB), &RamOptions::new())?)
///     .commit()?;
/// assert_eq!(report.removed()[0].range().size(), MIB);
/// assert_eq!(space.published().memory().num_regions(), 2);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[must_use = "nothing happens before commit()"]
pub struct Transaction<'a, B: Bitmap + Send + Sync + 'static = ()> {
    space: &'a AddressSpace<B>,
    removals: Vec<Result<GuestRange, InvalidRange>>,
    additions: Vec<Arc<GuestRegionShm<B>>>,
}

/// What a change did, and which listeners were away and do not know of it.
///
/// ```
/// use guest_memory_shm::{AddressSpace, GuestMemoryShm};
/// use vm_memory::GuestAddress;
///
/// let boot = GuestMemoryShm::<()>::from_ranges(&[
///     (GuestAddress(0), 1 << 20),
///     (GuestAddress(4 << 30), 1 << 20),
/// ])?;
/// let space = AddressSpace::new(boot);
/// let report = space.remove((GuestAddress(4 << 30), 1 << 20))?;
/// for stale in report.stale() {
///     eprintln!("connect it anew: {stale}");
/// }
/// assert_eq!(report.removed().len(), 1);
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
///
/// In one line: `?` for the change, and a line of the log for each listener that missed it. Where
/// all of them are attached as [required](AddressSpace::attach_required) none can miss one, and
/// the report can be dropped.
///
/// ```
/// # use guest_memory_shm::{AddressSpace, GuestMemoryShm, GuestRegionShm, RamOptions};
/// # use vm_memory::GuestAddress;
/// # let space = AddressSpace::new(GuestMemoryShm::<()>::new());
/// # let region = GuestRegionShm::new((GuestAddress(0), 1 << 20), &RamOptions::new())?;
/// space.insert(region)?.stale().iter().for_each(|listener| eprintln!("{listener}"));
/// let _ = space.remove((GuestAddress(0), 1 << 20))?; // all are required
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a listener that is away was not told, and the change succeeded without it: look at \
              stale(), or attach it with AddressSpace::attach_required"]
pub struct ChangeReport<B = ()> {
    removed: Vec<Arc<GuestRegionShm<B>>>,
    stale: Vec<ListenerStatus>,
}

impl<B> ChangeReport<B> {
    /// The regions that were removed. Each stays mapped until its last user lets go, and this
    /// report is one.
    pub fn removed(&self) -> &[Arc<GuestRegionShm<B>>] {
        &self.removed
    }

    /// Takes the regions that were removed out.
    pub fn into_removed(self) -> Vec<Arc<GuestRegionShm<B>>> {
        self.removed
    }

    /// The listeners that are away and have not been told, each with the reason: see
    /// [`AddressSpace::attach`].
    pub fn stale(&self) -> &[ListenerStatus] {
        &self.stale
    }
}

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// Plugs a region: every listener is told of it, and then readers see it. A listener that is
    /// away is not told, and the report [names it](ChangeReport::stale): look at that before the
    /// guest is told of the region.
    ///
    /// # Errors
    ///
    /// Those of [`Transaction::commit`]: the memory and the listeners are what they were, and the
    /// region is dropped. To try again, keep a clone of it: that is a handle, nothing is copied.
    pub fn insert(&self, region: impl Into<Arc<GuestRegionShm<B>>>) -> Result<ChangeReport<B>> {
        self.transaction().insert(region).commit()
    }

    /// Unplugs the region that has exactly this range: readers see it no more, and then every
    /// listener is told. It is unmapped when the last user lets go of it.
    ///
    /// The guest must have given it back before. A daemon that the report calls
    /// [stale](ChangeReport::stale) may go on writing to the region until its process ends: do not
    /// reuse its backing before.
    ///
    /// # Errors
    ///
    /// Those of [`Transaction::commit`]: the region is there again, for readers and listeners.
    pub fn remove(
        &self,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
    ) -> Result<ChangeReport<B>> {
        self.transaction().remove(range).commit()
    }

    /// Begins several changes that happen together or not at all.
    pub fn transaction(&self) -> Transaction<'_, B> {
        Transaction {
            space: self,
            removals: Vec::new(),
            additions: Vec::new(),
        }
    }
}

impl<B: Bitmap + Send + Sync + 'static> Transaction<'_, B> {
    /// Plugs a region.
    pub fn insert(mut self, region: impl Into<Arc<GuestRegionShm<B>>>) -> Self {
        self.additions.push(region.into());
        self
    }

    /// Unplugs the region that has exactly this range.
    pub fn remove(mut self, range: impl TryInto<GuestRange, Error: Into<InvalidRange>>) -> Self {
        self.removals.push(GuestRange::at(range));
        self
    }

    /// Makes all the changes, or none.
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::Memory`] if a region is there already, or one to be removed is not.
    /// [`AddressSpaceError::Change`]: all that were told have been put back, except those that the
    /// error calls stale. [`AddressSpaceError::Reentrant`] from inside a listener, and
    /// [`AddressSpaceError::MirrorReplaced`], once, if other code published through
    /// [`AddressSpace::atomic`]: no listener was asked or told.
    pub fn commit(self) -> Result<ChangeReport<B>> {
        let mut listeners = self.space.lock()?;
        let publisher = &self.space.publisher;
        publisher.check_mirror()?;
        let before = publisher.current();
        let steps = Steps::new(&before, self.removals, self.additions)?;
        if steps.is_empty() {
            return Ok(ChangeReport {
                removed: Vec::new(),
                stale: listeners.stale(),
            });
        }
        let change = Change {
            publisher,
            listeners: &mut listeners,
            before: &before,
            told: Vec::new(),
            complete: false,
        };
        change.make(&steps).map_err(|objection| {
            let Objection { listener, error } = objection.about(steps.subject);
            AddressSpaceError::Change {
                listener,
                error,
                stale: listeners.stale(),
            }
        })?;
        logs::debug!("guest memory has {} regions now", steps.after.num_regions());
        Ok(ChangeReport {
            removed: steps.removed,
            stale: listeners.stale(),
        })
    }
}

/// The memories on the way.
///
/// Readers go through the one without the removed regions: they must have lost those before the
/// first listener lets go of them, and must not see those that come before the last listener has
/// them. Where a region is replaced by another in its place, they see neither meanwhile.
struct Steps<B> {
    removed: Vec<Arc<GuestRegionShm<B>>>,
    /// Without the removed regions; absent if there are none.
    without: Option<GuestMemoryShm<B>>,
    after: GuestMemoryShm<B>,
    /// What the change is about: a region that comes, if any does.
    subject: Option<GuestRange>,
}

impl<B> Steps<B> {
    fn new(
        before: &GuestMemoryShm<B>,
        removals: Vec<Result<GuestRange, InvalidRange>>,
        additions: Vec<Arc<GuestRegionShm<B>>>,
    ) -> Result<Self> {
        let removals: Vec<GuestRange> = removals
            .into_iter()
            .collect::<Result<_, _>>()
            .map_err(MemoryError::from)?;
        let (without, removed) = before.remove_regions(&removals)?;
        let without = (!removed.is_empty()).then_some(without);
        let subject = additions.first().or(removed.first());
        let subject = subject.map(|region| region.range());
        let from = without.as_ref().unwrap_or(before);
        let after = match additions.is_empty() {
            true => from.clone(),
            false => from.insert_regions(additions)?,
        };
        Ok(Self {
            removed,
            without,
            after,
            subject,
        })
    }

    fn is_empty(&self) -> bool {
        self.subject.is_none()
    }
}

/// A change under way. Dropped before it is complete, by an objection or a panic, it is undone:
/// all that were told are put back or stale, and readers see the memory from before.
struct Change<'a, B: Bitmap + Send + Sync + 'static> {
    publisher: &'a Publisher<B>,
    listeners: &'a mut Listeners<B>,
    before: &'a GuestMemoryShm<B>,
    /// Those that were told, or are being told, in order.
    told: Vec<usize>,
    complete: bool,
}

impl<B: Bitmap + Send + Sync + 'static> Change<'_, B> {
    /// Asks, tells and publishes, in the order in which no reader ever sees memory that a listener
    /// was not told of.
    fn make(mut self, steps: &Steps<B>) -> Result<(), Objection> {
        let present = self.listeners.ask(&steps.after)?;
        if let Some(without) = &steps.without {
            self.publisher.publish(without);
        }
        self.listeners
            .tell(&present, &steps.after, &mut self.told)?;
        match &steps.without {
            Some(without) if without.is(&steps.after) => {}
            _ => self.publisher.publish(&steps.after),
        }
        self.complete = true;
        Ok(())
    }
}

impl<B: Bitmap + Send + Sync + 'static> Drop for Change<'_, B> {
    fn drop(&mut self) {
        if self.complete {
            return;
        }
        let told = std::mem::take(&mut self.told);
        self.listeners.undo(told, self.before);
        if !self.publisher.current().is(self.before) {
            self.publisher.publish(self.before);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Mutex;

    use vm_memory::{GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::listener::{ListenerError, MemoryListener};

    /// How many regions it was told.
    struct Counts(Arc<Mutex<Vec<usize>>>);

    impl MemoryListener for Counts {
        fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
        fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
            self.0.lock().unwrap().push(memory.num_regions());
            Ok(())
        }
    }

    /// All panics that are foreseen are caught earlier: this is for those that are not.
    #[test]
    fn a_change_that_ends_in_a_panic_is_undone() {
        let before = GuestMemoryShm::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(4 << 20), 1 << 20),
        ])
        .unwrap();
        let space = AddressSpace::new(before.clone());
        let told = Arc::new(Mutex::new(Vec::new()));
        for name in ["a", "b"] {
            space.attach(name, Counts(told.clone())).unwrap();
        }
        told.lock().unwrap().clear();
        let work = || {
            let mut listeners = space.lock().unwrap();
            let (after, _) = before.remove_region(GuestAddress(0), 1 << 20).unwrap();
            let mut change = Change {
                publisher: &space.publisher,
                listeners: &mut listeners,
                before: &before,
                told: Vec::new(),
                complete: false,
            };
            change.publisher.publish(&after);
            let Ok(()) = change.listeners.tell(&[0], &after, &mut change.told) else {
                unreachable!("it takes everything");
            };
            panic!("unforeseen");
        };
        assert!(catch_unwind(AssertUnwindSafe(work)).is_err());
        // Only the one that had been told was put back.
        assert_eq!(*told.lock().unwrap(), [1, 2]);
        assert!(space.published().memory().is(&before));
        assert!(space.atomic().memory().is(&before));
        let report = space.remove((GuestAddress(0), 1 << 20)).unwrap();
        assert_eq!(report.removed().len(), 1);
    }
}
