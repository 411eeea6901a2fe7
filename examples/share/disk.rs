//! The guest's view of the disk: requests in flight, each with several buffers in guest RAM.

use std::collections::VecDeque;
use std::fmt;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use guest_memory_shm::mock::{BlkDriver, BlkError, RequestId};
use guest_memory_shm::{GuestMemoryShm, PublishedMemory};
use indicatif::ProgressBar;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::facts::size;
use crate::failure::{Failure, OrFail, Result};
use crate::ram::{BUFFER, QUEUE_SIZE, Ram, buffers};

pub(crate) const SECTOR: u64 = 512;

/// How many buffers a request has where the daemon allows it: in different regions.
const BUFFERS_PER_REQUEST: usize = 2;

/// A part of guest RAM that holds a part of the disk.
pub(crate) type Buffer = (GuestAddress, u32);

type Driver = BlkDriver<PublishedMemory>;

/// The disk, through a virtqueue in guest RAM.
pub(crate) struct Disk {
    driver: Driver,
    /// Says that the daemon completed requests, or that it is gone.
    events: Epoll,
    /// Keeps the descriptor open that `events` watches.
    _peer: OwnedFd,
    limit: Duration,
    buffers_per_request: usize,
    transfers: usize,
    /// Bytes that passed through the hot-added region.
    carried: u64,
}

/// A request on its way, and the part of the disk that it is about.
struct Pending {
    request: RequestId,
    offset: u64,
    buffers: Vec<Buffer>,
}

impl Disk {
    /// A driver in `ram`, with its virtqueue at `rings`. `peer` is the connection to the daemon.
    pub(crate) fn new(
        ram: &Ram,
        rings: GuestAddress,
        peer: OwnedFd,
        max_segments: Option<u32>,
        limit: Duration,
    ) -> Result<Self> {
        let doing = || "cannot set up the virtqueue in guest RAM";
        // It waits for nothing by itself: `wait` below does, for the daemon's end as well.
        let driver = BlkDriver::new(ram.published(), rings, QUEUE_SIZE)
            .or_fail(doing)?
            .with_deadline(Duration::ZERO);
        let events = Epoll::new().or_fail(doing)?;
        for (fd, event) in [
            (driver.call().as_raw_fd(), EventSet::IN),
            // The end of the connection is reported without being asked for.
            (peer.as_raw_fd(), EventSet::empty()),
        ] {
            let event = EpollEvent::new(event, 0);
            events
                .ctl(ControlOperation::Add, fd, event)
                .or_fail(doing)?;
        }
        let allowed = max_segments.and_then(|segments| usize::try_from(segments).ok());
        Ok(Self {
            driver,
            events,
            _peer: peer,
            limit,
            buffers_per_request: allowed
                .unwrap_or(BUFFERS_PER_REQUEST)
                .clamp(1, BUFFERS_PER_REQUEST),
            transfers: 0,
            carried: 0,
        })
    }

    pub(crate) fn driver(&self) -> &Driver {
        &self.driver
    }

    /// How many bytes passed through the region that was hot-added.
    pub(crate) fn carried(&self) -> u64 {
        self.carried
    }

    /// Reads `len` bytes from the start of the disk. `take` gets each part in the disk's order, as
    /// the buffers that hold it.
    pub(crate) fn read(
        &mut self,
        ram: &Ram,
        len: u64,
        bar: &ProgressBar,
        take: impl FnMut(&GuestMemoryShm, u64, &[Buffer]) -> Result<()>,
    ) -> Result<()> {
        self.transfer(Direction::Read, ram, len, bar, |_, _, _| Ok(()), take)
    }

    /// Writes `len` bytes to the start of the disk, and flushes. `give` fills the buffers for each
    /// part, in the disk's order.
    pub(crate) fn write(
        &mut self,
        ram: &Ram,
        len: u64,
        bar: &ProgressBar,
        give: impl FnMut(&GuestMemoryShm, u64, &[Buffer]) -> Result<()>,
    ) -> Result<()> {
        self.transfer(Direction::Write, ram, len, bar, give, |_, _, _| Ok(()))?;
        let flush = self.driver.submit_flush();
        let request = flush.or_fail(|| "cannot flush the disk")?;
        self.wait(request, || "cannot flush the disk".to_owned())
    }

    /// Whether the daemon answers a read into `buffer`, wherever that is, with an error.
    pub(crate) fn refuses_to_read_into(&mut self, buffer: GuestAddress) -> Result<bool> {
        let doing = || {
            format!(
                "cannot read the first sector into guest address {:#x}",
                buffer.0
            )
        };
        let request = self.driver.submit_read(0, &[(buffer, 512)]);
        match self.outcome(request.or_fail(doing)?, doing)? {
            Ok(()) => Ok(false),
            Err(BlkError::Status { .. }) => Ok(true),
            Err(error) => Err(error).or_fail(doing),
        }
    }

    /// Reads a part of the disk into a buffer.
    pub(crate) fn read_at(&mut self, offset: u64, buffer: Buffer) -> Result<()> {
        let doing = || format!("cannot read the disk at byte {offset}");
        let request = self.driver.submit_read(offset / SECTOR, &[buffer]);
        self.wait(request.or_fail(doing)?, doing)
    }

    /// Writes a buffer to a part of the disk.
    pub(crate) fn write_at(&mut self, offset: u64, buffer: Buffer) -> Result<()> {
        let doing = || format!("cannot write the disk at byte {offset}");
        let request = self.driver.submit_write(offset / SECTOR, &[buffer]);
        self.wait(request.or_fail(doing)?, doing)
    }

    /// Keeps requests in flight on all buffers until `len` bytes have passed.
    fn transfer(
        &mut self,
        direction: Direction,
        ram: &Ram,
        len: u64,
        bar: &ProgressBar,
        mut before: impl FnMut(&GuestMemoryShm, u64, &[Buffer]) -> Result<()>,
        mut after: impl FnMut(&GuestMemoryShm, u64, &[Buffer]) -> Result<()>,
    ) -> Result<()> {
        let memory = ram.memory();
        // It lies above all other regions.
        let plug = ram.plug().range().start_addr();
        let sets = self.buffer_sets(&memory);
        let mut next_set = sets.iter().cycle();
        let mut pending: VecDeque<Pending> = VecDeque::with_capacity(sets.len());
        let mut offset = 0;
        loop {
            // The oldest request has the buffers that come next.
            if (pending.len() == sets.len() || offset == len)
                && let Some(oldest) = pending.pop_front()
            {
                let failed = || format!("cannot {direction} the disk at byte {}", oldest.offset);
                self.wait(oldest.request, failed)?;
                after(&memory, oldest.offset, &oldest.buffers)?;
                bar.inc(total(&oldest.buffers));
                let plugged = oldest.buffers.iter().filter(|(addr, _)| *addr >= plug);
                self.carried += plugged.map(|(_, length)| u64::from(*length)).sum::<u64>();
                log::trace!("{direction} {} of {}", size(oldest.offset), size(len));
            } else if offset < len
                && let Some(set) = next_set.next()
            {
                let buffers = cut(set, len - offset);
                before(&memory, offset, &buffers)?;
                let submitted = match direction {
                    Direction::Read => self.driver.submit_read(offset / SECTOR, &buffers),
                    Direction::Write => self.driver.submit_write(offset / SECTOR, &buffers),
                };
                let request = submitted
                    .or_fail(|| format!("cannot {direction} the disk at byte {offset}"))?;
                let bytes = total(&buffers);
                pending.push_back(Pending {
                    request,
                    offset,
                    buffers,
                });
                offset += bytes;
            } else {
                return Ok(());
            }
        }
    }

    /// The buffers of each request. A transfer begins with others than the one before it.
    fn buffer_sets(&mut self, memory: &GuestMemoryShm) -> Vec<Vec<GuestAddress>> {
        let buffers = buffers(memory);
        let sets = buffers.chunks_exact(self.buffers_per_request);
        let mut sets: Vec<_> = sets.map(<[_]>::to_vec).collect();
        let count = sets.len();
        sets.rotate_left(self.transfers % count.max(1));
        self.transfers += 1;
        sets
    }

    /// Waits until the daemon has completed `request` well.
    fn wait(&mut self, request: RequestId, doing: impl Fn() -> String) -> Result<()> {
        self.outcome(request, &doing)?.or_fail(doing)
    }

    /// Waits until the daemon has completed `request`, until it hangs up, or until the deadline.
    /// The inner result is that of the request.
    fn outcome(
        &mut self,
        request: RequestId,
        doing: impl Fn() -> String,
    ) -> Result<std::result::Result<(), BlkError>> {
        let deadline = Instant::now().checked_add(self.limit);
        loop {
            match self.driver.wait(request) {
                Ok(()) => return Ok(Ok(())),
                Err(BlkError::TimedOut { in_flight, .. }) => {
                    let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Err(Failure::new(format!(
                            "{}: the daemon did not answer within {:?}, with {in_flight} requests \
                             in flight; restart it, or allow more with --deadline",
                            doing(),
                            self.limit
                        )));
                    }
                    if self.wait_for_event(left).or_fail(&doing)? {
                        return Err(Failure::new(format!(
                            "{}: the daemon hung up with {in_flight} requests in flight; it died \
                             or was ended, start it again",
                            doing()
                        )));
                    }
                }
                Err(error) => return Ok(Err(error)),
            }
        }
    }

    /// Waits until requests may have been completed, and tells whether the daemon is gone.
    fn wait_for_event(&self, left: Option<Duration>) -> std::io::Result<bool> {
        // Whole milliseconds, rounded up: a wait of 0 would spin.
        let millis = left.map(|left| left.as_micros().div_ceil(1000));
        let timeout = millis.map_or(-1, |millis| i32::try_from(millis).unwrap_or(i32::MAX));
        let mut events = [EpollEvent::default(); 2];
        let count = match self.events.wait(timeout, &mut events) {
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            count => count?,
        };
        // Taken back before the used ring is looked at: a later completion signals again.
        match self.driver.call().read() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        let mut events = events[..count].iter();
        Ok(events.any(|event| event.event_set().contains(EventSet::HANG_UP)))
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// As much of `set` as `bytes` need.
fn cut(set: &[GuestAddress], bytes: u64) -> Vec<Buffer> {
    let mut left = bytes;
    let mut buffers = Vec::with_capacity(set.len());
    for addr in set {
        let length = u32::try_from(left).unwrap_or(BUFFER).min(BUFFER);
        if length > 0 {
            buffers.push((*addr, length));
        }
        left -= u64::from(length);
    }
    buffers
}

/// The bytes in `buffers`.
pub(crate) fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|(_, length)| u64::from(*length)).sum()
}
