//! Updates in steps: what a listener that waits for another process does meanwhile.

use std::os::fd::BorrowedFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::ListenerError;
use crate::panics::{caught, discard};

/// An update under way, of a listener that waits for another process:
/// [`MemoryListener::begin_update`](crate::MemoryListener::begin_update).
///
/// All exchanges of a change are driven by one thread, side by side, in one loop of poll(2): they
/// cost the time of the slowest, not the sum. Dropped before its end, an exchange is given up, and
/// what the listener holds is not known.
///
/// ```
/// use std::io::{Read, Write};
/// use std::os::fd::AsFd;
/// use std::os::unix::net::UnixStream;
/// use std::time::Instant;
///
/// use guest_memory_shm::{
///     AddressSpace, Exchange, GuestMemoryShm, ListenerError, MemoryListener, WaitFor,
/// };
///
/// /// Something at the other end of a socket that answers each update with one byte.
/// struct Peer(UnixStream);
///
/// impl MemoryListener for Peer {
///     fn check(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
///         Ok(())
///     }
///     fn update(&mut self, _memory: &GuestMemoryShm) -> Result<(), ListenerError> {
///         Err(ListenerError::away("it is told in steps"))
///     }
///     fn begin_update<'a>(
///         &'a mut self,
///         _memory: &GuestMemoryShm,
///         begun: Instant,
///     ) -> Option<Box<dyn Exchange + 'a>> {
///         // Here the update is sent, without waiting.
///         let deadline = begun + std::time::Duration::from_secs(10);
///         Some(Box::new(Answer { socket: &self.0, deadline }))
///     }
/// }
///
/// struct Answer<'a> {
///     socket: &'a UnixStream,
///     deadline: Instant,
/// }
///
/// impl Exchange for Answer<'_> {
///     fn advance(&mut self, now: Instant) -> Option<Result<(), ListenerError>> {
///         match self.socket.read(&mut [0]) {
///             Ok(1) => Some(Ok(())),
///             Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
///                 (now >= self.deadline).then(|| Err(ListenerError::away("it is silent")))
///             }
///             _ => Some(Err(ListenerError::away("it hung up"))),
///         }
///     }
///     fn waits_for(&self) -> WaitFor<'_> {
///         WaitFor::moment(self.deadline).or_readable(self.socket.as_fd())
///     }
/// }
///
/// let (ours, mut theirs) = UnixStream::pair()?;
/// ours.set_nonblocking(true)?;
/// theirs.write_all(&[1])?;
/// let space = AddressSpace::new(GuestMemoryShm::<()>::new());
/// space.attach("peer", Peer(ours))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Exchange {
    /// Does all that can be done without waiting; gives the result once there is one. Then it is
    /// not called any more. Called once at the beginning, and whenever what it waits for is there.
    ///
    /// `now` is the present time: past [`WaitFor::until`], it ends, or says another time. One that
    /// goes on naming a moment in the past is called again and again, and one that never ends
    /// holds the change: nothing limits the time of an exchange but itself.
    fn advance(&mut self, now: Instant) -> Option<Result<(), ListenerError>>;

    /// What it waits for. Asked after [`advance`](Self::advance) gave no result, and again
    /// whenever another exchange went on meanwhile.
    fn waits_for(&self) -> WaitFor<'_>;
}

/// What an [`Exchange`] waits for: a moment, or a descriptor, whichever comes first.
#[derive(Clone, Copy, Debug)]
pub struct WaitFor<'a> {
    until: Instant,
    fd: Option<BorrowedFd<'a>>,
    events: PollFlags,
}

impl<'a> WaitFor<'a> {
    /// For this moment.
    pub fn moment(until: Instant) -> Self {
        Self {
            until,
            fd: None,
            events: PollFlags::empty(),
        }
    }

    /// Also for something to read here, or the other end's hanging up.
    #[must_use]
    pub fn or_readable(self, fd: BorrowedFd<'a>) -> Self {
        self.or(fd, PollFlags::POLLIN)
    }

    /// Also for room to write here, or the other end's hanging up. It is one descriptor: the last
    /// that was named.
    #[must_use]
    pub fn or_writable(self, fd: BorrowedFd<'a>) -> Self {
        self.or(fd, PollFlags::POLLOUT)
    }

    fn or(mut self, fd: BorrowedFd<'a>, events: PollFlags) -> Self {
        self.fd = Some(fd);
        self.events |= events;
        self
    }

    /// The moment.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// The descriptor, if it waits for one.
    pub fn fd(&self) -> Option<BorrowedFd<'a>> {
        self.fd
    }

    /// Whether it waits for something to read.
    pub fn is_for_reading(&self) -> bool {
        self.events.contains(PollFlags::POLLIN)
    }

    /// Whether it waits for room to write.
    pub fn is_for_writing(&self) -> bool {
        self.events.contains(PollFlags::POLLOUT)
    }
}

type Answer = Result<(), ListenerError>;

/// An exchange that has not ended, and the place of its answer.
struct UnderWay<'a> {
    place: usize,
    /// Absent once it has ended.
    exchange: Option<Box<dyn Exchange + 'a>>,
    state: State,
}

/// Whether an exchange can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Waits,
    /// It can, as far as is known.
    IsDue,
    /// It cannot: it panicked, with this message, when it was to say what it waits for.
    Panicked(String),
}

/// Drives exchanges to their ends, side by side; gives their results in their order. One that
/// panics refuses.
pub(crate) fn drive(exchanges: Vec<Box<dyn Exchange + '_>>) -> Vec<Answer> {
    let mut answers: Vec<Option<Answer>> = exchanges.iter().map(|_| None).collect();
    let begun = exchanges.into_iter().enumerate();
    let mut under_way: Vec<UnderWay<'_>> = begun
        .map(|(place, exchange)| UnderWay {
            place,
            exchange: Some(exchange),
            state: State::IsDue,
        })
        .collect();
    loop {
        let now = Instant::now();
        for one in &mut under_way {
            answers[one.place] = one.go_on(now);
        }
        under_way.retain(|one| one.exchange.is_some());
        if under_way.is_empty() {
            return answers.into_iter().flatten().collect();
        }
        wait(&mut under_way);
    }
}

impl UnderWay<'_> {
    /// Calls it, if it is due; lets go of it when it has ended.
    fn go_on(&mut self, now: Instant) -> Option<Answer> {
        let exchange = self.exchange.as_mut()?;
        let ended = match &self.state {
            State::Waits => None,
            State::IsDue => caught(|| exchange.advance(now)).unwrap_or_else(panicked),
            State::Panicked(panic) => panicked(panic.clone()),
        };
        if ended.is_some() {
            discard(self.exchange.take());
        }
        ended
    }

    fn waits_for(&self) -> Option<Result<WaitFor<'_>, String>> {
        let exchange = self.exchange.as_ref()?;
        Some(caught(|| exchange.waits_for()))
    }
}

fn panicked(panic: String) -> Option<Answer> {
    Some(Err(ListenerError::panicked(&panic)))
}

/// Waits until one of them can go on, and notes which can.
fn wait(under_way: &mut [UnderWay<'_>]) {
    // None of them has ended.
    let waits: Vec<_> = under_way.iter().filter_map(UnderWay::waits_for).collect();
    let mut fds: Vec<PollFd<'_>> = waits
        .iter()
        .flatten()
        .filter_map(|wait| Some(PollFd::new(wait.fd?, wait.events)))
        .collect();
    let moments = waits.iter().flatten().map(WaitFor::until);
    let left = match moments.min() {
        Some(first) if waits.iter().all(Result::is_ok) => {
            first.saturating_duration_since(Instant::now())
        }
        _ => Duration::ZERO,
    };
    // poll(2) counts milliseconds: rounded up, or the last one would be spun away.
    let millis = left.as_micros().div_ceil(1000);
    let waited = poll(
        &mut fds,
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX),
    );
    if waited.is_err_and(|errno| errno != Errno::EINTR) {
        // The kernel has no room to wait: all are called, until their deadlines.
        sleep(left.min(Duration::from_millis(1)));
    }
    let now = Instant::now();
    let mut polled = fds.iter();
    let mut has_events = |wait: &WaitFor<'_>| match wait.fd {
        Some(_) => polled.next().and_then(PollFd::any).unwrap_or(true),
        None => false,
    };
    let states: Vec<State> = waits
        .iter()
        .map(|wait| match wait {
            Err(panic) => State::Panicked(panic.clone()),
            Ok(wait) if has_events(wait) || waited.is_err() || now >= wait.until => State::IsDue,
            Ok(_) => State::Waits,
        })
        .collect();
    for (one, state) in under_way.iter_mut().zip(states) {
        one.state = state;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::libc;

    use super::*;
    use crate::host::calls::forbidden;

    /// More than anything here takes.
    const LONG: Duration = Duration::from_secs(3600);

    struct Script<'a> {
        advance: Box<dyn FnMut(Instant) -> bool + 'a>,
        waits_for: Box<dyn Fn() -> WaitFor<'a> + 'a>,
    }

    impl Exchange for Script<'_> {
        fn advance(&mut self, now: Instant) -> Option<Answer> {
            (self.advance)(now).then_some(Ok(()))
        }
        fn waits_for(&self) -> WaitFor<'_> {
            (self.waits_for)()
        }
    }

    fn script<'a>(
        advance: impl FnMut(Instant) -> bool + 'a,
        waits_for: impl Fn() -> WaitFor<'a> + 'a,
    ) -> Box<dyn Exchange + 'a> {
        Box::new(Script {
            advance: Box::new(advance),
            waits_for: Box::new(waits_for),
        })
    }

    /// Ends at a moment, and counts its calls.
    fn moment(until: Instant, calls: &Cell<usize>) -> Box<dyn Exchange + '_> {
        let advance = move |now| {
            calls.set(calls.get() + 1);
            now >= until
        };
        script(advance, move || WaitFor::moment(until))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(10)
    }

    #[test]
    fn a_moment_is_slept_towards_and_not_spun() {
        let calls = [const { Cell::new(0) }; 2];
        let (first, second) = (soon(), soon() + Duration::from_millis(10));
        let answers = drive(vec![moment(second, &calls[0]), moment(first, &calls[1])]);
        assert!(answers.iter().all(Result::is_ok));
        assert!(Instant::now() >= second);
        // At the beginning and at the end: one sleeps on when the other has ended.
        assert_eq!(calls.map(Cell::into_inner), [2, 2]);
    }

    #[test]
    fn a_descriptor_is_waited_for_in_the_way_that_is_said() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        while ours.write(&[0; 4096]).is_ok() {}
        let (there, calls) = (ours.try_clone().unwrap(), Cell::new(0));
        // There is room once the other end was read, and that is done at a moment.
        let writes = script(
            |_| {
                calls.set(calls.get() + 1);
                ours.write(&[7]).is_ok()
            },
            || WaitFor::moment(Instant::now() + LONG).or_writable(there.as_fd()),
        );
        let until = soon();
        let reads = script(
            |now| {
                while now >= until && theirs.read(&mut [0; 4096]).is_ok() {}
                now >= until
            },
            || WaitFor::moment(until),
        );
        let answers = drive(vec![writes, reads]);
        assert!(answers.iter().all(Result::is_ok));
        assert_eq!(calls.get(), 2);
    }

    #[test]
    fn who_panics_anywhere_refuses_and_the_others_go_on() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("a bug");
            }
        }
        let (now, calls) = (Instant::now(), Cell::new(0));
        let answers = drive(vec![
            script(|_| panic!("a bug"), || unreachable!("it has ended")),
            script(|_| false, || panic!("a bug")),
            script(
                |then| then > now && panic!("a bug"),
                || WaitFor::moment(soon()),
            ),
            moment(soon(), &calls),
            {
                let bomb = Bomb;
                script(
                    move |_| {
                        let _ = &bomb;
                        true
                    },
                    || unreachable!("it has ended"),
                )
            },
        ]);
        let reasons: Vec<_> = answers.iter().map(|answer| answer.as_ref().err()).collect();
        for refused in &reasons[..3] {
            let refused = refused.unwrap();
            assert_eq!(refused.reason(), "it panicked: a bug");
            assert!(!refused.is_away());
        }
        assert!(reasons[3..].iter().all(Option::is_none));
    }

    #[test]
    fn where_the_kernel_does_not_wait_all_end_all_the_same() {
        const POLLS: &[libc::c_long] = &[
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll,
            libc::SYS_ppoll,
        ];
        for errno in [Errno::EINTR, Errno::ENOMEM, Errno::EINVAL, Errno::EPERM] {
            forbidden(POLLS, errno, || {
                let (ours, mut theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                let (until, calls) = (soon(), Cell::new(0));
                let reads = script(
                    |_| (&ours).read(&mut [0]).is_ok(),
                    || WaitFor::moment(Instant::now() + LONG).or_readable(ours.as_fd()),
                );
                let writes = script(
                    |now| now >= until && theirs.write(&[7]).is_ok(),
                    || WaitFor::moment(until),
                );
                let answers = drive(vec![reads, writes, moment(until, &calls)]);
                assert!(answers.iter().all(Result::is_ok), "{errno}");
                assert!(calls.get() > 1);
            });
        }
    }
}
