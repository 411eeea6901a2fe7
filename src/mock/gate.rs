//! The relay between the frontend and the daemon, where faults are played.
//!
//! Two threads per connection, one for each direction, read blocking and pass every message on.
//! The daemon at the other end is a correct one: what it must not see is not passed on, what the
//! frontend must not see is held back or rewritten, and the gate answers in the daemon's place. It
//! also does so for in-flight buffers, which vhost-user-backend does not know.
//!
//! A fault needs to know when a change is applied, or that every earlier request has been
//! answered. REPLY_ACK says so only where it was negotiated. The gate asks with a GET_FEATURES of
//! its own instead and keeps the answer to itself: requests are handled in order, so that its
//! answer comes after everything before it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight, VhostUserProtocolFeatures};

use super::backend::MAX_QUEUE_SIZE;
use super::channel::Channel;
use super::fault::{Fault, InflightFault};
use super::inflight::{self, InflightBuffer};
use super::lock::lock;
use super::request::LoggedRequest;
use super::state::{Link, Shared};
use super::wire::{Message, Receiver};
use crate::logs;
use crate::vhost_user::receive::ReceivedRegion;

/// The specification's limit of regions in one SET_MEM_TABLE.
const MAX_TABLE_REGIONS: usize = 8;

/// The values of an acknowledgement.
const DONE: u64 = 0;
const REFUSED: u64 = 1;

/// How much of an answer there is that is cut off: more than the header.
const CUT_OFF: usize = 15;

/// Relays between the two sockets of `link` until either side hangs up or a fault does.
pub(super) fn relay(link: &Arc<Link>, shared: &Arc<Shared>) -> io::Result<()> {
    let barrier = Arc::new(Barrier::default());
    let answers = {
        let (link, shared, barrier) = (Arc::clone(link), Arc::clone(shared), Arc::clone(&barrier));
        thread::Builder::new()
            .name("mock-answers".into())
            .spawn(move || {
                let result = relay_answers(&link, &shared, &barrier);
                barrier.close();
                link.hang_up();
                result
            })?
    };
    let mut gate = Gate {
        link,
        shared,
        barrier: &barrier,
        receiver: Receiver::new(),
        features: VhostUserProtocolFeatures::empty(),
        regions: 0,
        daemon_ended: false,
    };
    let requests = gate.relay_requests();
    if !gate.daemon_ended {
        link.hang_up();
    }
    let answers = answers
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the answering thread panicked")));
    requests.and(answers)
}

/// The direction from the frontend to the daemon.
struct Gate<'a> {
    link: &'a Link,
    shared: &'a Shared,
    barrier: &'a Barrier,
    receiver: Receiver,
    /// The protocol features that were offered and acknowledged.
    features: VhostUserProtocolFeatures,
    /// How many regions the daemon has, once it has handled all that was passed on.
    regions: usize,
    /// It hung up. What it answered before has yet to be passed on, which ends the connection.
    daemon_ended: bool,
}

impl Gate<'_> {
    fn relay_requests(&mut self) -> io::Result<()> {
        while let Some(message) = self.receive()? {
            if self.relay(message)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Passes a request on, or plays a fault; `Break` ends the connection.
    fn relay(&mut self, mut message: Message) -> io::Result<ControlFlow<()>> {
        match message.code() {
            Some(FrontendReq::SET_LOG_BASE) if !has_room(&message) => {
                // What it was told before is answered.
                self.pass_barrier()?;
                return Ok(ControlFlow::Break(()));
            }
            Some(FrontendReq::SET_LOG_BASE) => return self.set_log(message),
            Some(
                FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG,
            ) => return self.change(message),
            Some(FrontendReq::SET_PROTOCOL_FEATURES) => self.note_features(&mut message),
            Some(FrontendReq::GET_INFLIGHT_FD) if self.has_inflight() => {
                return self.make_inflight(&message);
            }
            Some(FrontendReq::SET_INFLIGHT_FD) if self.has_inflight() => {
                return self.take_inflight(message);
            }
            Some(FrontendReq::SET_BACKEND_REQ_FD) => self.note_channel(&message)?,
            Some(asked @ FrontendReq::GET_FEATURES) => self.barrier.expect(asked, Asker::Frontend),
            _ => {}
        }
        self.pass(&message)
    }

    fn pass(&mut self, message: &Message) -> io::Result<ControlFlow<()>> {
        let sent = message.send(&self.link.inner);
        self.daemon_ended = sent.as_ref().is_err_and(is_hang_up);
        match self.daemon_ended {
            true => Ok(ControlFlow::Break(())),
            false => sent.map(ControlFlow::Continue),
        }
    }

    fn receive(&mut self) -> io::Result<Option<Message>> {
        let message = self.receiver.receive(&self.link.front)?;
        if let Some(message) = &message {
            self.shared.log(LoggedRequest::of(message));
        }
        Ok(message)
    }

    /// The daemon must not think that REPLY_ACK is in use where it is not offered.
    fn note_features(&mut self, message: &mut Message) {
        let Some(mut bits) = message.u64_at(0) else {
            return;
        };
        let reply_ack = VhostUserProtocolFeatures::REPLY_ACK.bits();
        if !self.shared.options.reply_ack {
            bits &= !reply_ack;
            message.body = bits.to_ne_bytes().to_vec();
        }
        self.features = VhostUserProtocolFeatures::from_bits_truncate(bits);
    }

    fn answers(&self, message: &Message) -> bool {
        self.features.contains(VhostUserProtocolFeatures::REPLY_ACK) && message.wants_answer()
    }

    fn has_inflight(&self) -> bool {
        let feature = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        self.shared.options.inflight && self.features.contains(feature)
    }

    /// GET_INFLIGHT_FD. The daemon knows nothing of the buffer before it is sent back.
    fn make_inflight(&mut self, message: &Message) -> io::Result<ControlFlow<()>> {
        let fault = self.shared.state().faults.inflight.next();
        let Some(shape) = self.shape_in(message) else {
            return Ok(ControlFlow::Break(()));
        };
        self.pass_barrier()?;
        if fault == Some(InflightFault::Refuse) {
            return Ok(ControlFlow::Break(()));
        }
        let mut answer = Message::answer(message.request, DONE);
        let (body, file) = inflight::create(shape, fault)?;
        (answer.body, answer.fds) = (body, file.into_iter().collect());
        answer.send(&self.link.front)?;
        Ok(ControlFlow::Continue(()))
    }

    /// SET_INFLIGHT_FD: the requests that are taken from now on are noted in this buffer.
    fn take_inflight(&mut self, message: Message) -> io::Result<ControlFlow<()>> {
        let (shape, wants_answer) = (self.shape_in(&message), self.answers(&message));
        let request = message.request;
        let file = <[OwnedFd; 1]>::try_from(message.fds).ok();
        self.pass_barrier()?;
        let buffer = match shape.zip(file) {
            Some((shape, [file])) => InflightBuffer::map(shape, file),
            None => Err(ErrorKind::InvalidInput.into()),
        };
        let is_taken = buffer.is_ok();
        match buffer {
            Ok(buffer) => self.shared.state().inflight = Some(Arc::new(buffer)),
            Err(error) => logs::warn!("mock daemon: refused an in-flight buffer: {error}"),
        }
        if wants_answer {
            let value = if is_taken { DONE } else { REFUSED };
            Message::answer(request, value).send(&self.link.front)?;
        }
        Ok(match is_taken || wants_answer {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        })
    }

    fn shape_in(&self, message: &Message) -> Option<VhostUserInflight> {
        inflight::shape_in(&message.body, self.shared.options.queues, MAX_QUEUE_SIZE)
    }

    /// SET_BACKEND_REQ_FD. The daemon gets it too, and says whether it may be.
    fn note_channel(&self, message: &Message) -> io::Result<()> {
        let feature = VhostUserProtocolFeatures::BACKEND_REQ;
        if self.shared.options.backend_channel
            && self.features.contains(feature)
            && let [socket] = &message.fds[..]
        {
            let channel = Channel::new(socket.try_clone()?)?;
            self.shared.state().channel = Some(Arc::new(channel));
        }
        Ok(())
    }

    /// A change of the table.
    fn change(&mut self, message: Message) -> io::Result<ControlFlow<()>> {
        let wants_answer = self.answers(&message);
        let fault = self.shared.state().faults.table.next();
        let fault = match fault {
            Some(fault) => fault,
            None if !has_room(&message) || self.exceeds_limits(&message) => Fault::Refuse,
            None => {
                self.count(&message);
                return self.pass(&message);
            }
        };
        let refuses_by = wants_answer.then_some(REFUSED);
        self.misbehave(message, fault, wants_answer, refuses_by)
    }

    /// A new dirty log, which is always answered.
    fn set_log(&mut self, message: Message) -> io::Result<ControlFlow<()>> {
        let fault = self.shared.state().faults.log.next();
        match fault {
            Some(fault) => self.misbehave(message, fault, true, None),
            None => {
                self.barrier
                    .expect(FrontendReq::SET_LOG_BASE, Asker::Frontend);
                self.pass(&message)
            }
        }
    }

    /// Plays a fault; a refusal is the answer `refuses_by`, or a hang-up.
    fn misbehave(
        &mut self,
        message: Message,
        fault: Fault,
        wants_answer: bool,
        refuses_by: Option<u64>,
    ) -> io::Result<ControlFlow<()>> {
        let request = message.request;
        logs::debug!(
            "mock daemon: {} meets {fault:?}",
            LoggedRequest::of(&message)
        );

        // From here on the gate may answer: nothing of the daemon's may still be on its way.
        self.pass_barrier()?;
        let answer = |value| match wants_answer {
            true => Message::answer(request, value).send(&self.link.front),
            false => Ok(()),
        };
        if fault.applies() {
            self.count(&message);
            self.apply(message)?;
        }
        let stays = match fault {
            Fault::Refuse => match refuses_by {
                Some(refused) => answer(refused).map(|()| true)?,
                None => false,
            },
            Fault::HangUpBefore | Fault::HangUpAfter => false,
            Fault::AnswerLate(delay) if wait_for_hang_up(self.link, delay)? => false,
            Fault::AnswerLate(_) => answer(DONE).map(|()| true)?,
            Fault::AnswerThenHangUp => answer(DONE).map(|()| false)?,
            Fault::AnswerNonsense => {
                // No request has this number. It is as long as any answer that is waited for.
                let mut nonsense = Message::answer(u32::MAX, u64::MAX);
                nonsense.body.resize(16, 0x5a);
                nonsense.send(&self.link.front).map(|()| true)?
            }
            Fault::AnswerTwice => answer(DONE).and_then(|()| answer(DONE)).map(|()| true)?,
            Fault::AnswerOther => {
                let other = FrontendReq::GET_QUEUE_NUM.into();
                Message::answer(other, 1)
                    .send(&self.link.front)
                    .map(|()| true)?
            }
            Fault::HangUpWithinAnswer => {
                if wants_answer {
                    let done = Message::answer(request, DONE);
                    done.send_part(&self.link.front, CUT_OFF)?;
                }
                false
            }
            Fault::NeverAnswer | Fault::NeverAnswerAfter => {
                while self.receive()?.is_some() {}
                false
            }
        };
        Ok(match stays {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        })
    }

    /// Whether a daemon with this mock's limits would refuse the change. vhost-user-backend itself
    /// takes tables of 32 regions and does not count slots.
    fn exceeds_limits(&self, message: &Message) -> bool {
        match LoggedRequest::of(message) {
            LoggedRequest::SetMemTable(regions) => regions.len() > MAX_TABLE_REGIONS,
            LoggedRequest::AddMemRegion(_) => {
                let limit = self.shared.options.max_mem_slots;
                limit.is_some_and(|limit| self.regions as u64 >= limit)
            }
            _ => false,
        }
    }

    /// Counts the regions that the daemon will have. Earlier changes may still be under way, so it
    /// cannot be asked; and at one that it refuses by itself it hangs up.
    fn count(&mut self, message: &Message) {
        self.regions = match LoggedRequest::of(message) {
            LoggedRequest::SetMemTable(regions) => regions.len(),
            LoggedRequest::AddMemRegion(_) => self.regions + 1,
            LoggedRequest::RemoveMemRegion(_) => self.regions.saturating_sub(1),
            _ => self.regions,
        };
    }

    /// Has the daemon apply the change and returns once it has, without an answer.
    fn apply(&self, message: Message) -> io::Result<()> {
        if message.code() == Some(FrontendReq::SET_LOG_BASE) {
            self.barrier.expect(FrontendReq::SET_LOG_BASE, Asker::Gate);
        }
        message.without_answer().send(&self.link.inner)?;
        self.pass_barrier()
    }

    fn pass_barrier(&self) -> io::Result<()> {
        self.barrier.expect(FrontendReq::GET_FEATURES, Asker::Gate);
        Message::bare(FrontendReq::GET_FEATURES).send(&self.link.inner)?;
        self.barrier.wait()
    }
}

/// The direction from the daemon to the frontend.
fn relay_answers(link: &Link, shared: &Shared, barrier: &Barrier) -> io::Result<()> {
    let mut receiver = Receiver::new();
    while let Some(mut message) = receiver.receive(&link.inner)? {
        let rewritten = match (message.code(), message.u64_at(0)) {
            (Some(asked @ (FrontendReq::GET_FEATURES | FrontendReq::SET_LOG_BASE)), _) => {
                if barrier.arrive(asked) == Some(Asker::Gate) {
                    continue;
                }
                None
            }
            // vhost's backend half adds REPLY_ACK whatever the device says.
            (Some(FrontendReq::GET_PROTOCOL_FEATURES), Some(bits))
                if !shared.options.reply_ack =>
            {
                Some(bits & !VhostUserProtocolFeatures::REPLY_ACK.bits())
            }
            // And it always says 509.
            (Some(FrontendReq::GET_MAX_MEM_SLOTS), _) => shared.options.max_mem_slots,
            _ => None,
        };
        if let Some(value) = rewritten {
            message.body = value.to_ne_bytes().to_vec();
        }
        message.send(&link.front)?;
    }
    Ok(())
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
    )
}

/// Whether the files that came with a message are as long as the message says: to touch what is
/// missing would end this process with SIGBUS. A message that is not whole is the daemon's to
/// refuse.
fn has_room(message: &Message) -> bool {
    let end = |region: &ReceivedRegion| region.mmap_offset.checked_add(region.size);
    let ends: Vec<_> = match LoggedRequest::of(message) {
        LoggedRequest::SetMemTable(regions) => regions.iter().map(end).collect(),
        LoggedRequest::AddMemRegion(region) => vec![end(&region)],
        LoggedRequest::SetLogBase { size, mmap_offset } => vec![mmap_offset.checked_add(size)],
        _ => Vec::new(),
    };
    ends.into_iter().zip(&message.fds).all(|(end, fd)| {
        let len = fstat(fd).map_or(0, |facts| u64::try_from(facts.st_size).unwrap_or(0));
        let fits = end.is_some_and(|end| end <= len);
        if !fits {
            logs::warn!(
                "mock daemon: refused {}: its file has {len} bytes",
                LoggedRequest::of(message)
            );
        }
        fits
    })
}

/// Waits for `delay`, or until the connection ends: then true.
fn wait_for_hang_up(link: &Link, delay: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + delay;
    loop {
        // No event is asked for: a hang-up is reported all the same, data is not.
        let mut fds = [PollFd::new(link.front.as_fd(), PollFlags::empty())];
        let left = deadline.saturating_duration_since(Instant::now());
        // poll counts whole milliseconds: round up, or the last one would be spun away.
        let timeout =
            PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Which end sent a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asker {
    Frontend,
    Gate,
}

/// Tells the gate's own GET_FEATURES and SET_LOG_BASE from the frontend's, and says when the
/// answer to its GET_FEATURES came.
#[derive(Debug, Default)]
struct Barrier {
    state: Mutex<BarrierState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct BarrierState {
    /// The requests under way, oldest first.
    asked: VecDeque<(FrontendReq, Asker)>,
    closed: bool,
}

impl BarrierState {
    fn waits(&self) -> bool {
        let own = (FrontendReq::GET_FEATURES, Asker::Gate);
        self.asked.contains(&own)
    }
}

impl Barrier {
    /// To be called before the request is sent.
    fn expect(&self, request: FrontendReq, asker: Asker) {
        lock(&self.state).asked.push_back((request, asker));
    }

    /// An answer to such a request has come. Says whose it is.
    fn arrive(&self, request: FrontendReq) -> Option<Asker> {
        let asked = &mut lock(&self.state).asked;
        let at = asked.iter().position(|(asked, _)| *asked == request)?;
        let (_, asker) = asked.remove(at)?;
        self.changed.notify_all();
        Some(asker)
    }

    fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    /// Waits for the answer to the gate's own GET_FEATURES.
    fn wait(&self) -> io::Result<()> {
        let state = self
            .changed
            .wait_while(lock(&self.state), |state| !state.closed && state.waits())
            .unwrap_or_else(PoisonError::into_inner);
        match state.waits() {
            true => Err(ErrorKind::BrokenPipe.into()),
            false => Ok(()),
        }
    }
}
