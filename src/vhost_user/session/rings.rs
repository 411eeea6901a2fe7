//! The rings of a session: started, stopped, and started again.

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

use super::VhostUserSession;
use super::error::{Result, SessionError};
use super::inflight::InflightBuffer;
use super::restart::Restart;
use super::ring::SessionRing;
use crate::memory::GuestMemoryShm;
use crate::vhost_user::share::ShareError;
use crate::vhost_user::wire::{DaemonRequest, Message, Reply};

/// The largest ring (virtio 1.3, "Split Virtqueues").
const MAX_SIZE: u16 = 1 << 15;

impl VhostUserSession {
    /// Starts a ring, and wakes the daemon once it knows all of it.
    ///
    /// The first ring of a daemon with in-flight buffers (INFLIGHT_SHMFD) gets it one, for all of
    /// its rings, until [`forget_rings`](Self::forget_rings).
    ///
    /// # Errors
    ///
    /// [`SessionError::RingState`], [`SessionError::NoSuchRing`], [`SessionError::RingSize`],
    /// [`SessionError::RingNotShared`], [`SessionError::NeedsReset`]: nothing was sent.
    /// [`SessionError::Inflight`]; [`SessionError::Share`]; the ring does not run then. A daemon
    /// that failed may have taken requests all the same: where the next one begins,
    /// [`SessionRing::with_base`] says.
    pub fn start_ring(&mut self, index: u32, mut ring: SessionRing) -> Result<()> {
        self.check_there()?;
        self.check_no_reset()?;
        if self.rings.contains_key(&index) {
            return Err(SessionError::RingState { index, runs: true });
        }
        self.check_index(index)?;
        let notes = self.has(Features::INFLIGHT_SHMFD);
        let limit = if notes {
            self.options.max_ring_size
        } else {
            MAX_SIZE
        };
        ring.check_size(limit)?;
        let logs = self.share.is_logging();
        let (table, reply) = (self.share.table(), self.reply());
        let mut messages = ring.start_messages(index, table, logs, reply)?;
        let mut fresh = None;
        if notes && self.rings.is_empty() && self.inflight.is_none() {
            let buffer = self.new_inflight_buffer()?;
            messages.insert(0, buffer.message(reply));
            fresh = Some(buffer);
        }
        let told = self.tell(messages, DaemonRequest::StartRing(index));
        if told.is_err() && self.share.broken().is_none() {
            // It may have taken what came after the message that it refused.
            let stop = vec![SessionRing::stop_message(index)];
            self.ask(stop, self.options.deadline)?;
        }
        told?;
        // One that it refused is not kept.
        self.inflight = fresh.or(self.inflight.take());
        ring.wake(index)?;
        ring.settle(self.share.table());
        self.rings.insert(index, ring);
        Ok(())
    }

    /// Stops a ring: the daemon has completed what it had begun, and uses neither the ring nor the
    /// buffers of its requests any more. Gives the index at which it would go on.
    ///
    /// # Errors
    ///
    /// [`SessionError::RingState`], [`SessionError::NeedsReset`]; [`SessionError::Share`], also if
    /// it takes longer than the [deadline](crate::SessionOptions::with_drain_deadline).
    pub fn stop_ring(&mut self, index: u32) -> Result<u16> {
        self.check_no_reset()?;
        if !self.rings.contains_key(&index) {
            return Err(SessionError::RingState { index, runs: false });
        }
        let ask = vec![SessionRing::stop_message(index)];
        let answers = self.ask(ask, self.options.drain_deadline)?;
        self.rings.remove(&index);
        // Two numbers of 4 bytes: the ring, and an index that has 2 bytes.
        let body = answers
            .first()
            .and_then(|answer| answer.body.get(4..)?.first_chunk());
        let base = body.map_or(0, |base| u32::from_ne_bytes(*base));
        Ok(u16::try_from(base & 0xffff).unwrap_or_default())
    }

    /// Forgets all rings, what is in flight in them, and the [status](Self::set_status), without a
    /// word to the daemon: the guest has reset the device, or there is no daemon. One that is
    /// there is told of a reset by [`reset_device`](Self::reset_device), or by
    /// [stopping](Self::stop_ring) each ring before. One that was told of the rings in
    /// [steps](Self::reconnect_in_steps) that are not all done is hung up on, and the next step
    /// connects anew.
    pub fn forget_rings(&mut self) {
        let was_told = self
            .restart
            .as_ref()
            .is_some_and(Restart::was_told_of_rings);
        if was_told && !self.rings.is_empty() && !self.needs_reset {
            self.give_up("its rings were forgotten before it was told all");
        }
        self.rings.clear();
        self.inflight = None;
        self.status = None;
        self.needs_reset = false;
    }

    /// Refuses what is for rings that run.
    fn check_no_reset(&self) -> Result<()> {
        match self.needs_reset {
            true => Err(SessionError::NeedsReset),
            false => Ok(()),
        }
    }

    fn check_index(&self, index: u32) -> Result<()> {
        // The buffer was made when the daemon had so many.
        let noted = self.inflight.as_ref().map(InflightBuffer::rings);
        let rings = self.agreed.rings.min(noted.unwrap_or(u64::MAX));
        match u64::from(index) < rings {
            true => Ok(()),
            false => Err(SessionError::NoSuchRing { index, rings }),
        }
    }

    /// Refuses a memory without what running rings lie in.
    pub(super) fn check_rings<B: Bitmap>(&self, memory: &GuestMemoryShm<B>) -> Result<()> {
        if self.rings.is_empty() || self.needs_reset {
            return Ok(());
        }
        let next = memory.memory_table_as(&self.options.view);
        let next = next.map_err(ShareError::from)?;
        for (index, ring) in &self.rings {
            ring.places(*index, &next)?;
            // Replaced by another region, too, it is taken away.
            let mut homes = ring.parts().into_iter().zip(ring.homes());
            if let Some(((part, addr, len), _)) = homes.find(|(_, home)| !next.contains(home)) {
                return Err(SessionError::RingNotShared {
                    index: *index,
                    part,
                    addr,
                    len,
                });
            }
        }
        Ok(())
    }

    /// What gives a new connection the in-flight buffer, also for rings to come, and starts the
    /// rings; nothing where it is not known which requests were completed.
    pub(super) fn ring_messages<B: Bitmap>(
        &mut self,
        memory: Option<&GuestMemoryShm<B>>,
    ) -> Result<Vec<Message>> {
        if !self.has(Features::INFLIGHT_SHMFD) {
            // What it says is wrong once this daemon completes requests.
            self.inflight = None;
        }
        let is_known = self.rings.is_empty() || self.inflight.is_some() || self.options.in_order;
        self.needs_reset |= !is_known;
        let mut all = Vec::new();
        let (Some(memory), false) = (memory, self.needs_reset) else {
            return Ok(all);
        };
        // It may be another program by now.
        let mut indices = self.rings.keys();
        indices.try_for_each(|index| self.check_index(*index))?;
        let (table, reply) = (self.share.table(), self.agreed.reply());
        if let Some(buffer) = &self.inflight {
            buffer.check_file()?;
            all.push(buffer.message(reply));
        }
        for (index, ring) in &mut self.rings {
            ring.base = ring.used_index(*index, memory)?;
            all.extend(ring.start_messages(*index, table, self.share.is_logging(), reply)?);
            if reply == Reply::None {
                // No more messages with descriptors than may be under way without an answer.
                all.push(Message::barrier(DaemonRequest::StartRing(*index)));
            }
        }
        Ok(all)
    }

    /// The daemon knows all of the rings.
    pub(super) fn wake_rings(&mut self) -> Result<()> {
        if self.needs_reset {
            return Ok(());
        }
        for (index, ring) in &mut self.rings {
            ring.settle(self.share.table());
            ring.wake(*index)?;
        }
        Ok(())
    }

    /// Has the daemon make an in-flight buffer.
    fn new_inflight_buffer(&mut self) -> Result<InflightBuffer> {
        let rings = u16::try_from(self.agreed.rings).unwrap_or(u16::MAX);
        let size = self.options.max_ring_size;
        let answer = self.answer_to(InflightBuffer::request(rings, size))?;
        InflightBuffer::new(rings, size, answer)
    }
}
