//! How a session goes through the steps of a [`Restart`].

use std::time::Instant;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

use super::VhostUserSession;
use super::agree::{ask_offer, ask_protocol};
use super::channel::Channel;
use super::error::{Result, SessionError};
use super::restart::{Restart, Step};
use crate::listener::{Exchange, ListenerError, WaitFor};
use crate::memory::GuestMemoryShm;
use crate::vhost_user::share::after;
use crate::vhost_user::wire::{Answer, DaemonRequest, Message, number};

impl VhostUserSession {
    /// Connects to a daemon that is gone, agrees, and tells it all that it was told before,
    /// `memory` included; does what can be done of that without waiting, and gives whether all is
    /// done. If not, it is to be called again when what it [waits for](Self::waits_for) is there.
    /// For a session that is a listener, it is [`AddressSpace::reconnect_in_steps`].
    ///
    /// The first call begins; a daemon that is there is told `memory` only. As long as nobody
    /// listens it is tried again, each time after twice the time, at most a second, and without a
    /// deadline. From the connection on it is that of [`SessionOptions`](crate::SessionOptions).
    ///
    /// [`AddressSpace::reconnect_in_steps`]: crate::AddressSpace::reconnect_in_steps
    ///
    /// # Errors
    ///
    /// Those of [`reconnect`](Self::reconnect) and [`update_memory`](Self::update_memory). The
    /// next call begins anew; on the connection that there is if the daemon was told all else.
    pub fn reconnect_in_steps<B: Bitmap>(&mut self, memory: &GuestMemoryShm<B>) -> Result<bool> {
        self.check_rings(memory)?;
        let is_begun = self
            .restart
            .as_ref()
            .is_some_and(|restart| restart.in_steps);
        if !is_begun {
            match self.restart {
                Some(_) => {}
                None if self.share.is_gone() => self.reconnect()?,
                None if self.share.holds(memory)? => return Ok(true),
                None => self.restart = Some(Restart::of_memory()),
            }
            self.restart = self.restart.take().map(Restart::in_steps);
        }
        match self.go_on(Some(memory), Instant::now()) {
            Some(ended) => ended.map(|()| true),
            None => Ok(false),
        }
    }

    /// What [`reconnect_in_steps`](Self::reconnect_in_steps) waits for: a moment, and the
    /// connection, once there is one. That is the same until all is done.
    pub fn waits_for(&self) -> WaitFor<'_> {
        let Some(restart) = &self.restart else {
            return WaitFor::moment(Instant::now());
        };
        match (&restart.under_way, restart.steps.front()) {
            (Some((_, pending)), _) => self.share.waits_for(pending),
            (None, Some(Step::Connect(attempts))) => WaitFor::moment(attempts.next()),
            (None, _) => WaitFor::moment(Instant::now()),
        }
    }

    /// All that a new connection needs, as an exchange; the time counts from `begun`. `told` gets
    /// the result.
    pub(super) fn restarting<B, F>(
        &mut self,
        memory: Option<GuestMemoryShm<B>>,
        begun: Instant,
        told: F,
    ) -> Restarting<'_, B, F> {
        if let Some(restart) = &mut self.restart {
            restart.begun = begun;
            // Steps have no deadline to connect.
            restart.in_steps = false;
        }
        Restarting {
            session: self,
            memory,
            told,
        }
    }

    /// Does what can be done at once; gives the result once there is one.
    fn go_on<B: Bitmap>(
        &mut self,
        memory: Option<&GuestMemoryShm<B>>,
        now: Instant,
    ) -> Option<Result<()>> {
        // Without it nothing is to be said.
        let Some(mut restart) = self.restart.take() else {
            return Some(Ok(()));
        };
        match self.advance(&mut restart, memory, now) {
            Ok(true) => Some(Ok(())),
            Ok(false) => {
                self.restart = Some(restart);
                None
            }
            Err(error) => {
                // One that serves its rings goes on with that, whatever memory it cannot take.
                if !restart.is_told || self.share.broken().is_some() {
                    self.give_up(&error.to_string());
                }
                Some(Err(error))
            }
        }
    }

    /// Whether all is done.
    fn advance<B: Bitmap>(
        &mut self,
        restart: &mut Restart,
        memory: Option<&GuestMemoryShm<B>>,
        now: Instant,
    ) -> Result<bool> {
        loop {
            if let Some((step, pending)) = restart.under_way.take() {
                let mut update = self.share.resume(pending);
                let Some(ended) = update.advance(now) else {
                    restart.under_way = Some((step, update.pause()));
                    return Ok(false);
                };
                let answers = update.take_answers();
                drop(update);
                ended?;
                self.leave(&step, &answers)?;
                restart.is_told |= matches!(step, Step::Rings);
            }
            let Some(step) = restart.steps.pop_front() else {
                match memory {
                    // It changed while the daemon was told the one before.
                    Some(memory) if !self.share.holds(memory)? => {
                        restart.steps.push_back(Step::Memory);
                        continue;
                    }
                    _ => return Ok(true),
                }
            };
            if !self.enter(step, restart, memory, now)? {
                return Ok(false);
            }
        }
    }

    /// Begins a step. Whether it is under way: otherwise it is to be tried again.
    fn enter<B: Bitmap>(
        &mut self,
        step: Step,
        restart: &mut Restart,
        memory: Option<&GuestMemoryShm<B>>,
        now: Instant,
    ) -> Result<bool> {
        let asks = match &step {
            Step::Offer => ask_offer(),
            Step::Protocol => ask_protocol(),
            Step::Agree => {
                let channel = self.options.channel && self.has(Features::BACKEND_REQ);
                let theirs = match channel {
                    true => {
                        self.channels += 1;
                        let (ours, theirs) = Channel::new(self.agreed.protocol, self.channels)?;
                        self.channel = Some(ours);
                        Some(theirs)
                    }
                    false => None,
                };
                self.agreed.messages(theirs)
            }
            Step::Rings => {
                // The memory has had its own time.
                restart.begun = now;
                self.replay(memory)?
            }
            Step::Memory => {
                if let Some(memory) = memory {
                    let update = self.share.begin_memory(memory, now);
                    restart.under_way = Some((step, update.pause()));
                }
                return Ok(true);
            }
            Step::Connect(_) | Step::Begin(_) => return self.connect_again(step, restart, now),
        };
        let limit = self.options.deadline;
        let update = self.share.begin_asking(asks, restart.begun, limit);
        restart.under_way = Some((step, update.pause()));
        Ok(true)
    }

    fn connect_again(&mut self, step: Step, restart: &mut Restart, now: Instant) -> Result<bool> {
        match step {
            Step::Connect(mut attempts) => {
                let path = self.path.as_deref().ok_or(SessionError::NoPath)?;
                let until = after(restart.begun, self.options.deadline);
                let until = (!restart.in_steps).then_some(until);
                let Some(socket) = attempts.advance(path, now, until) else {
                    restart.steps.push_front(Step::Connect(attempts));
                    return Ok(false);
                };
                restart.steps.push_front(Step::Begin(socket?));
            }
            Step::Begin(socket) => {
                if restart.in_steps {
                    restart.begun = now;
                }
                self.share.reconnect(socket, Features::empty())?;
            }
            _ => {}
        }
        Ok(true)
    }

    /// Takes the answers of a step.
    fn leave(&mut self, step: &Step, answers: &[Answer]) -> Result<()> {
        let first = answers.first().map_or(0, |answer| number(&answer.body));
        let last = answers.last().map_or(0, |answer| number(&answer.body));
        match step {
            Step::Offer => self.agreed.take_offer(first)?,
            Step::Protocol => {
                self.agreed.protocol = Features::from_bits_truncate(first) & self.options.protocol;
            }
            Step::Agree => {
                let counted = if self.agreed.counts_rings() { last } else { 1 };
                let set = self.options.rings.map(u64::from);
                self.agreed.settle(set.unwrap_or(counted));
                self.share.set_protocol_features(self.agreed.protocol);
            }
            Step::Rings => self.wake_rings()?,
            Step::Connect(_) | Step::Begin(_) | Step::Memory => {}
        }
        Ok(())
    }

    /// What the daemon is told after the memory: that it is to log, the in-flight buffer, rings.
    fn replay<B: Bitmap>(&mut self, memory: Option<&GuestMemoryShm<B>>) -> Result<Vec<Message>> {
        let mut all = Vec::new();
        if self.share.is_logging() {
            self.check_logs()?;
            all.push(self.log_features());
        }
        all.extend(self.ring_messages(memory)?);
        let status = self.status_message();
        // The guest has to set it anew where it has to reset the device.
        all.extend(status.filter(|_| !self.needs_reset));
        all.push(Message::barrier(DaemonRequest::Negotiate));
        Ok(all)
    }
}

/// What a new connection needs, under way.
pub(super) struct Restarting<'a, B, F> {
    session: &'a mut VhostUserSession,
    memory: Option<GuestMemoryShm<B>>,
    told: F,
}

impl<B: Bitmap, F> Exchange for Restarting<'_, B, F>
where
    F: FnMut(&mut VhostUserSession, Result<()>) -> Result<(), ListenerError>,
{
    fn advance(&mut self, now: Instant) -> Option<Result<(), ListenerError>> {
        let ended = self.session.go_on(self.memory.as_ref(), now)?;
        Some((self.told)(self.session, ended))
    }

    fn waits_for(&self) -> WaitFor<'_> {
        self.session.waits_for()
    }
}
