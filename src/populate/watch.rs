//! Looking again, before each piece of work, whether there is memory for it.
//!
//! Others take memory, too, while RAM is populated: other threads of this process that populate,
//! for this job or for another, about which all is known, and other processes, about which only
//! what they have taken so far is. So at most a quarter of what is left is worked on at once.
//! Where that is less than a chunk, chunks are done in smaller pieces: up to three others that do
//! the same, in the same group, are no danger, and as the rest shrinks, so does what is taken
//! between two looks.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::host::memory::{Bound, Demand, MemoryLimits, Pages, Short};
use crate::pool::Stop;

/// At most this part of what is left is worked on at once.
const AT_ONCE: u64 = 4;

/// Lets work begin for which there is memory.
pub(super) struct Watch {
    look: Box<Look>,
    under_way: Arc<UnderWay>,
}

/// What is being worked on, and may or may not be there by now.
#[derive(Default)]
struct UnderWay {
    demand: Mutex<Demand>,
    /// Some of it is done.
    done: Condvar,
}

impl UnderWay {
    /// That of all jobs of this process.
    fn of_this_process() -> Arc<Self> {
        static KNOWN: Mutex<Option<(u32, Arc<UnderWay>)>> = Mutex::new(None);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = std::process::id();
        match &*known {
            Some((of, under_way)) if *of == pid => under_way.clone(),
            // What is under way in the parent of a child of fork(2) is never done here.
            _ => known.insert((pid, Arc::default())).1.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Demand> {
        self.demand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the limits leave that are about something in the demand, exactly if it is less than so
/// many bytes.
type Look = dyn Fn(&Demand, u64) -> Vec<Bound> + Send + Sync;

/// A piece of work that has begun; when it is dropped, its pages are there, or will not come.
pub(super) struct Pass<'a> {
    watch: &'a Watch,
    pages: Pages,
    bytes: u64,
    /// How much may be done, in bytes.
    pub(super) len: u64,
}

/// What is to be begun.
pub(super) struct Wish {
    pub(super) pages: Pages,
    /// In bytes.
    pub(super) len: u64,
    /// The least that is worth a call, in bytes.
    pub(super) grain: u64,
}

impl Watch {
    /// A watch that looks at all limits of this process, and minds its other jobs.
    ///
    /// # Errors
    ///
    /// No descriptor is left to look with.
    pub(super) fn of_this_process() -> io::Result<Self> {
        let limits = MemoryLimits::of_this_process()?;
        let look = move |demand: &Demand, enough| limits.bounds(demand, enough);
        Ok(Self::among(UnderWay::of_this_process(), look))
    }

    /// A watch that finds no limits.
    pub(super) fn of_nothing() -> Self {
        Self::among(Arc::default(), |_, _| Vec::new())
    }

    /// What each limit leaves that is about something in the demand.
    pub(super) fn bounds(&self, demand: &Demand) -> Vec<Bound> {
        (self.look)(demand, 0)
    }

    fn among(
        under_way: Arc<UnderWay>,
        look: impl Fn(&Demand, u64) -> Vec<Bound> + Send + Sync + 'static,
    ) -> Self {
        Self {
            look: Box::new(look),
            under_way,
        }
    }

    /// Waits until all of a wish, or its beginning, may be begun; none if the work is to stop.
    ///
    /// `missing` says how much of so many bytes at its beginning is not there yet. That takes a
    /// while, and is only asked if there might be too little for all of it.
    ///
    /// # Errors
    ///
    /// What is short of the least piece, when nothing else is under way there that might turn out
    /// to need less than was thought.
    pub(super) fn begin(
        &self,
        wish: &Wish,
        stop: &Stop,
        missing: impl Fn(u64) -> u64,
    ) -> Result<Option<Pass<'_>>, Short> {
        let mut under_way = self.under_way.lock();
        while !stop.is_set() {
            let all = under_way.total().saturating_add(wish.len);
            // Limits on what others work on, and this does not, are none of its business.
            let wished = Demand::of(wish.pages, wish.len);
            let bounds = (self.look)(&wished, all.saturating_mul(2 * AT_ONCE));
            let pass = |under_way: &mut Demand, len: u64, bytes: u64| {
                under_way.add(wish.pages, bytes);
                Some(Pass {
                    watch: self,
                    pages: wish.pages,
                    bytes,
                    len,
                })
            };
            let least = wish.len.min(wish.grain);
            let quota_of = |bound: &Bound| {
                let quota = (bound.left / AT_ONCE).saturating_sub(under_way.on(bound));
                quota - quota % wish.grain
            };
            let quota = bounds.iter().map(quota_of).min().unwrap_or(u64::MAX);
            if quota >= least {
                let len = wish.len.min(quota);
                return Ok(pass(&mut under_way, len, len));
            }
            let mut tight = bounds.iter().filter(|bound| quota_of(bound) < least);
            if tight.all(|bound| under_way.on(bound) == 0) {
                // Alone the last pages are taken, too, those that are there already for nothing.
                let bytes = missing(least);
                let needed = Demand::of(wish.pages, bytes);
                return match needed.shortage(&bounds) {
                    None => Ok(pass(&mut under_way, least, bytes)),
                    Some(shortage) => Err(shortage),
                };
            }
            let woken = self.under_way.done.wait(under_way);
            under_way = woken.unwrap_or_else(PoisonError::into_inner);
        }
        Ok(None)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let under_way = &self.watch.under_way;
        under_way.lock().take(self.pages, self.bytes);
        under_way.done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::host::NodeSet;

    const MIB: u64 = 1 << 20;
    const PAGES: Pages = Pages::Base(NodeSet::new());

    /// A machine of which so much is left, and a watch that looks at it.
    fn machine(left: u64) -> (Arc<AtomicU64>, Watch) {
        let left = Arc::new(AtomicU64::new(left));
        let watch = on_machine(&left, Arc::default());
        (left, watch)
    }

    fn on_machine(left: &Arc<AtomicU64>, under_way: Arc<UnderWay>) -> Watch {
        let seen = left.clone();
        Watch::among(under_way, move |demand, _| {
            assert!(!demand.is_empty());
            vec![Bound::of_machine(seen.load(Ordering::Relaxed))]
        })
    }

    fn wish(len: u64) -> Wish {
        Wish {
            pages: PAGES,
            len,
            grain: 2 * MIB,
        }
    }

    fn begin(watch: &Watch, len: u64) -> Result<Pass<'_>, Short> {
        let pass = watch.begin(&wish(len), &Stop::default(), |len| len)?;
        Ok(pass.expect("it is not stopped"))
    }

    #[test]
    fn at_most_a_quarter_of_the_rest_is_worked_on_at_once() {
        let (left, watch) = machine(1000 * MIB);
        let one = begin(&watch, 16 * MIB).unwrap();
        assert_eq!(one.len, 16 * MIB);
        // Others took nearly all.
        left.store(100 * MIB, Ordering::Relaxed);
        let two = begin(&watch, 16 * MIB).unwrap();
        assert_eq!(two.len, 8 * MIB, "25 MiB less 16, in whole pieces");
        drop((one, two));
        left.store(40 * MIB, Ordering::Relaxed);
        assert_eq!(begin(&watch, 16 * MIB).unwrap().len, 10 * MIB);
        left.store(5 * MIB, Ordering::Relaxed);
        assert_eq!(begin(&watch, 16 * MIB).unwrap().len, 2 * MIB);
        assert_eq!(begin(&watch, MIB).unwrap().len, MIB);
    }

    #[test]
    fn when_others_take_the_rest_it_is_an_error_that_names_need_and_rest() {
        let (left, watch) = machine(100 * MIB);
        drop(begin(&watch, 16 * MIB).unwrap());
        left.store(2 * MIB, Ordering::Relaxed);
        let short = begin(&watch, 16 * MIB).err().unwrap();
        assert_eq!(short.left, 2 * MIB);
        assert_eq!(short.needed, PAGES.charged(2 * MIB));
        // It is not the end of everything: nothing is under way that was not begun.
        left.store(100 * MIB, Ordering::Relaxed);
        assert_eq!(begin(&watch, 16 * MIB).unwrap().len, 16 * MIB);
    }

    #[test]
    fn pages_that_are_there_need_nothing() {
        let (_, watch) = machine(0);
        let stop = Stop::default();
        let pass = watch.begin(&wish(16 * MIB), &stop, |_| 0).unwrap();
        assert_eq!(pass.unwrap().len, 2 * MIB);
        assert!(watch.begin(&wish(16 * MIB), &stop, |_| 4096).is_err());
    }

    #[test]
    fn work_that_has_too_little_waits_for_the_others_and_sees_what_they_left() {
        let (left, watch) = machine(3 * MIB);
        let first = begin(&watch, 16 * MIB).unwrap();
        assert_eq!(first.len, 2 * MIB);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| begin(&watch, 16 * MIB).map(|pass| pass.len));
            // Only now there is something for it, whether it waits by now or not.
            left.store(6 * MIB, Ordering::Relaxed);
            drop(first);
            assert_eq!(second.join().unwrap(), Ok(2 * MIB));
        });
        let third = begin(&watch, 16 * MIB).unwrap();
        std::thread::scope(|scope| {
            let fourth = scope.spawn(|| begin(&watch, 16 * MIB).map(|pass| pass.len));
            left.store(MIB, Ordering::Relaxed);
            drop(third);
            assert!(fourth.join().unwrap().is_err());
        });
    }

    #[test]
    fn work_that_waits_hears_that_it_is_to_stop() {
        let (_, watch) = machine(3 * MIB);
        let stop = Stop::default();
        let pass = begin(&watch, 16 * MIB).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| watch.begin(&wish(16 * MIB), &stop, |len| len));
            stop.set();
            drop(pass);
            assert!(waiting.join().unwrap().unwrap().is_none());
        });
    }

    #[test]
    fn jobs_of_one_process_mind_each_other() {
        let left = Arc::new(AtomicU64::new(100 * MIB));
        let under_way = Arc::default();
        let job = || on_machine(&left, Arc::clone(&under_way));
        let (one, two, three) = (job(), job(), job());
        let first = begin(&one, 16 * MIB).unwrap();
        assert_eq!(
            (first.len, begin(&two, 16 * MIB).unwrap().len),
            (16 * MIB, 8 * MIB)
        );
        let second = begin(&two, 16 * MIB).unwrap();
        std::thread::scope(|scope| {
            // Nothing is left for the third until both have done their part.
            let third = scope.spawn(|| begin(&three, 16 * MIB).map(|pass| pass.len));
            left.store(4 * MIB, Ordering::Relaxed);
            drop(first);
            assert!(!third.is_finished());
            drop(second);
            assert_eq!(third.join().unwrap(), Ok(2 * MIB));
        });
    }

    #[test]
    fn work_under_other_limits_is_not_waited_for() {
        let left = Arc::new(AtomicU64::new(0));
        let under_way = Arc::default();
        let short = on_machine(&left, Arc::clone(&under_way));
        let other = Watch::among(under_way, |_, _| Vec::new());
        let huge = Wish {
            pages: Pages::Huge {
                page_size: 2 * MIB,
                reserving: false,
            },
            ..wish(16 * MIB)
        };
        let pass = other.begin(&huge, &Stop::default(), |len| len).unwrap();
        assert!(begin(&short, 16 * MIB).is_err());
        drop(pass);
    }

    #[test]
    fn without_limits_all_is_begun_at_once() {
        let watch = Watch::of_nothing();
        assert_eq!(begin(&watch, 1 << 50).unwrap().len, 1 << 50);
    }
}
