//! A thread that does I/O with one daemon, in all RAM that the guest may use, until it is told to
//! end.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use guest_memory_shm::GuestRange;
use vm_memory::GuestAddress;

use crate::daemon::{Pattern, check_equal};
use crate::failure::{Failure, OrFail, Result};
use crate::ram::MAX_DAEMONS;
use crate::session::Session;

/// Bytes of a request.
const BLOCK: u32 = 32 << 10;
/// Where the first buffer lies in a region: after the rings, in the lowest one.
const BUFFERS: u64 = 1 << 20;

// Every worker has two buffers in each region.
const _: () = assert!(BUFFERS + 2 * MAX_DAEMONS as u64 * BLOCK as u64 <= crate::ram::PLUG_SIZE);

/// What the guest does with its RAM, as far as the VMM has to know: the regions that it may put
/// buffers in, and how much went through each.
#[derive(Default)]
pub(crate) struct Guest {
    state: Mutex<State>,
    ended: AtomicBool,
    /// Signalled when a region was used, and when a worker failed.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    regions: Vec<Arc<Usable>>,
    failed: Option<Failure>,
}

/// A region with room for buffers. It changes under the lock of the guest's state only.
pub(crate) struct Usable {
    range: GuestRange,
    /// How many workers have buffers in it now.
    users: AtomicUsize,
    /// By worker, in bytes.
    carried: [AtomicU64; MAX_DAEMONS],
}

impl Usable {
    pub(crate) fn range(&self) -> GuestRange {
        self.range
    }

    pub(crate) fn carried(&self) -> u64 {
        self.carried.iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }

    fn buffer(&self, worker: usize, nth: u64) -> GuestAddress {
        let place = 2 * worker as u64 + nth;
        GuestAddress(self.range.start_addr().0 + BUFFERS + place * u64::from(BLOCK))
    }
}

impl Guest {
    /// Lets the guest put buffers in a region.
    pub(crate) fn give(&self, range: GuestRange) -> Arc<Usable> {
        let region = Arc::new(Usable {
            range,
            users: AtomicUsize::new(0),
            carried: Default::default(),
        });
        self.lock().regions.push(region.clone());
        region
    }

    /// Has the guest give a region back: when this returns it has no buffers there any more.
    pub(crate) fn take(&self, region: &Arc<Usable>) {
        let mut state = self.lock();
        state.regions.retain(|other| !Arc::ptr_eq(other, region));
        let used = |_: &mut State| region.users.load(Ordering::Relaxed) > 0;
        let unused = self.changed.wait_while(state, used);
        drop(unused.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until each of so many workers has used the region.
    pub(crate) fn wait_used(
        &self,
        region: &Usable,
        workers: usize,
        limit: Duration,
    ) -> Result<()> {
        let unused = |state: &mut State| {
            let used = |n: &AtomicU64| n.load(Ordering::Relaxed) > 0;
            state.failed.is_none() && !region.carried[..workers].iter().all(used)
        };
        let waited = self.changed.wait_timeout_while(self.lock(), limit, unused);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        match state.failed.take() {
            Some(failure) => Err(failure),
            None if waited.timed_out() => Err(Failure::new(format!(
                "no I/O went through {} within {limit:?}",
                region.range
            ))),
            None => Ok(()),
        }
    }

    /// Two regions, not always different, which the guest uses from now on.
    fn begin(&self, round: u64) -> [Arc<Usable>; 2] {
        let state = self.lock();
        let count = state.regions.len() as u64;
        // The newest takes part every other time.
        let one = match round % 2 {
            0 => count - 1,
            _ => round / 2 % count,
        };
        [one, (round / 3) % count].map(|at| {
            let region = &state.regions[usize::try_from(at).unwrap_or(0)];
            region.users.fetch_add(1, Ordering::Relaxed);
            region.clone()
        })
    }

    /// Ends what [`begin`](Self::begin) began.
    fn end(&self, worker: usize, regions: &[Arc<Usable>], done: Result<()>) {
        let mut state = self.lock();
        for region in regions {
            region.users.fetch_sub(1, Ordering::Relaxed);
            if done.is_ok() {
                region.carried[worker].fetch_add(u64::from(BLOCK), Ordering::Relaxed);
            }
        }
        if let Err(failure) = done {
            state.failed.get_or_insert(failure);
            self.ended.store(true, Ordering::Relaxed);
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread with a session of its own, ended when it is dropped.
pub(crate) struct Worker {
    guest: Arc<Guest>,
    thread: Option<JoinHandle<Session>>,
}

impl Worker {
    /// Does I/O as the `nth` worker: writes and reads back, or, on a disk that is not ours,
    /// reads twice through different regions.
    pub(crate) fn start(
        nth: usize,
        session: Session,
        ours: bool,
        guest: &Arc<Guest>,
    ) -> Result<Self> {
        let mut work = Work {
            nth,
            session,
            ours,
            guest: guest.clone(),
            round: 0,
        };
        let thread = thread::Builder::new()
            .name(format!("io-{nth}"))
            .spawn(move || {
                while !work.guest.ended.load(Ordering::Relaxed) {
                    let regions = work.guest.begin(work.round);
                    let done = work.round(&regions);
                    work.guest.end(work.nth, &regions, done);
                    work.round += 1;
                }
                work.session
            });
        Ok(Self {
            guest: guest.clone(),
            thread: Some(thread.or_fail(|| "cannot start a thread for I/O")?),
        })
    }

    /// Ends all workers of this guest, and gives back what this one worked with.
    pub(crate) fn end(mut self) -> Result<Session> {
        self.guest.ended.store(true, Ordering::Relaxed);
        let session = self.thread.take().and_then(|thread| thread.join().ok());
        if let Some(failure) = self.guest.lock().failed.take() {
            return Err(failure);
        }
        session.ok_or_else(|| Failure::new("a thread for I/O panicked"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.guest.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The one that asks for the result reports why it failed.
            let _ = thread.join();
        }
    }
}

struct Work {
    nth: usize,
    session: Session,
    /// Whether the disk may be written.
    ours: bool,
    guest: Arc<Guest>,
    round: u64,
}

impl Work {
    /// One block through the two regions.
    fn round(&mut self, [one, other]: &[Arc<Usable>; 2]) -> Result<()> {
        let round = self.round;
        let (first, second) = (one.buffer(self.nth, 0), other.buffer(self.nth, 1));

        let blocks = self.session.capacity / u64::from(BLOCK);
        let offset = round.wrapping_mul(0x9e37_79b9) % blocks.max(1) * u64::from(BLOCK);
        let mut expected = vec![0; BLOCK as usize];
        if self.ours {
            // What was there differs, because the round does.
            Pattern::Guest.fill(round * u64::from(BLOCK), &mut expected);
            self.write(first, &expected)?;
            self.session.disk.write_at(offset, (first, BLOCK))?;
        } else {
            self.write(first, &expected)?;
            self.session.disk.read_at(offset, (first, BLOCK))?;
            self.read(first, &mut expected)?;
        }
        let mut found: Vec<u8> = expected.iter().map(|byte| !byte).collect();
        self.write(second, &found)?;
        self.session.disk.read_at(offset, (second, BLOCK))?;
        self.read(second, &mut found)?;
        check_equal(
            offset,
            &found,
            &expected,
            "what the guest read from the disk",
        )?;
        Ok(())
    }

    fn write(&self, at: GuestAddress, bytes: &[u8]) -> Result<()> {
        let written = self.session.ram.memory().write_slice(bytes, at);
        written.or_fail(|| "the guest cannot write its RAM")
    }

    fn read(&self, at: GuestAddress, bytes: &mut [u8]) -> Result<()> {
        let read = self.session.ram.memory().read_slice(bytes, at);
        read.or_fail(|| "the guest cannot read its RAM")
    }
}
