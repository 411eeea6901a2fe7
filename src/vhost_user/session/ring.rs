//! Virtqueues of a daemon: their place, their descriptors, and the messages that start them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::FrontendReq;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::error::{Result, SessionError};
use crate::memory::GuestMemoryShm;
use crate::vhost_user::table::{MemoryTable, TableRegion};
use crate::vhost_user::wire::{DaemonRequest, Descriptor, Message, Reply, copy_of, numbers};

/// `VHOST_VRING_F_LOG`.
const LOG_FLAG: u32 = 1;

/// A virtqueue that is to be started: [`VhostUserSession::start_ring`](crate::VhostUserSession).
///
/// ```
/// use guest_memory_shm::SessionRing;
/// use vm_memory::GuestAddress;
/// use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
///
/// let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
/// let [descriptors, available, used] = [0x1000, 0x2000, 0x3000].map(GuestAddress);
/// let ring = SessionRing::new(256, [descriptors, available, used], &kick, &call)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct SessionRing {
    pub(super) size: u16,
    pub(super) descriptors: GuestAddress,
    pub(super) available: GuestAddress,
    pub(super) used: GuestAddress,
    pub(super) base: u16,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    error: Option<Arc<OwnedFd>>,
    /// The regions that its parts lie in, since it was started.
    homes: Vec<TableRegion>,
}

impl SessionRing {
    /// A split ring of `size` descriptors, whose descriptor table, available ring and used ring
    /// are at these guest addresses, as the guest's driver has set them. By `kick` the guest wakes
    /// the daemon, and by `call` the daemon the guest: copies of them are kept. Both are to be
    /// non-blocking (`EFD_NONBLOCK`), or a daemon could fill one while it is written.
    ///
    /// # Errors
    ///
    /// No descriptor is left for a copy.
    pub fn new(
        size: u16,
        [descriptors, available, used]: [GuestAddress; 3],
        kick: &EventFd,
        call: &EventFd,
    ) -> io::Result<Self> {
        Ok(Self {
            size,
            descriptors,
            available,
            used,
            base: 0,
            kick: Arc::new(copy_of(kick)?),
            call: Arc::new(copy_of(call)?),
            error: None,
            homes: Vec::new(),
        })
    }

    /// Sets the index of the available ring at which the daemon begins: what
    /// [`stop_ring`](crate::VhostUserSession::stop_ring) gave; 0 unless set.
    #[must_use]
    pub fn with_base(mut self, base: u16) -> Self {
        self.base = base;
        self
    }

    /// Sets an eventfd by which the daemon tells of an error of the ring.
    ///
    /// # Errors
    ///
    /// No descriptor is left for a copy.
    pub fn with_error(mut self, error: &EventFd) -> io::Result<Self> {
        self.error = Some(Arc::new(copy_of(error)?));
        Ok(self)
    }

    /// The parts: name, address, size in bytes (virtio 1.3, "Split Virtqueues").
    pub(super) fn parts(&self) -> [(&'static str, GuestAddress, u64); 3] {
        let size = u64::from(self.size);
        [
            ("descriptor table", self.descriptors, 16 * size),
            ("available ring", self.available, 6 + 2 * size),
            ("used ring", self.used, 6 + 8 * size),
        ]
    }

    /// The user addresses of the parts, by this table.
    pub(super) fn places(&self, index: u32, table: &MemoryTable) -> Result<[u64; 3]> {
        let mut places = [0; 3];
        for (place, (part, addr, len)) in places.iter_mut().zip(self.parts()) {
            *place = table.ring(addr, len).ok_or(SessionError::RingNotShared {
                index,
                part,
                addr,
                len,
            })?;
        }
        Ok(places)
    }

    pub(super) fn check_size(&self, limit: u16) -> Result<()> {
        let size = self.size;
        match size.is_power_of_two() && (2..=limit).contains(&size) {
            true => Ok(()),
            false => Err(SessionError::RingSize { size, limit }),
        }
    }

    /// Notes the regions of this table that it lies in: it keeps them from being taken away.
    pub(super) fn settle(&mut self, table: &MemoryTable) {
        let parts = self.parts();
        let homes = parts.iter().filter_map(|(_, addr, _)| table.holder(*addr));
        self.homes = homes.cloned().collect();
    }

    /// The regions that it lies in, once it was started.
    pub(super) fn homes(&self) -> &[TableRegion] {
        &self.homes
    }

    /// Where it is, and whether the daemon is to log what it writes there.
    pub(super) fn addresses(
        &self,
        index: u32,
        table: &MemoryTable,
        logs: bool,
        reply: Reply,
    ) -> Result<Message> {
        let [descriptors, available, used] = self.places(index, table)?;
        let flags = if logs { LOG_FLAG } else { 0 };
        let mut body = [index, flags].map(u32::to_ne_bytes).concat();
        body.extend(numbers([descriptors, used, available, self.used.0]));
        let about = DaemonRequest::StartRing(index);
        Ok(Message::new(
            about,
            FrontendReq::SET_VRING_ADDR,
            body,
            reply,
        ))
    }

    /// What starts it: the daemon must have handled all of it before it is kicked, so a question
    /// is to follow.
    pub(super) fn start_messages(
        &self,
        index: u32,
        table: &MemoryTable,
        logs: bool,
        reply: Reply,
    ) -> Result<Vec<Message>> {
        let about = DaemonRequest::StartRing(index);
        let message = |code, body| Message::new(about, code, body, reply);
        let state = |number: u32| [index, number].map(u32::to_ne_bytes).concat();
        let file = |code, fd: &Arc<OwnedFd>| {
            let fd: Descriptor = Arc::<OwnedFd>::clone(fd);
            message(code, numbers([u64::from(index)])).with_fds([fd])
        };
        let mut all = vec![
            message(FrontendReq::SET_VRING_NUM, state(self.size.into())),
            message(FrontendReq::SET_VRING_BASE, state(self.base.into())),
            self.addresses(index, table, logs, reply)?,
            file(FrontendReq::SET_VRING_CALL, &self.call),
        ];
        all.extend(
            self.error
                .as_ref()
                .map(|fd| file(FrontendReq::SET_VRING_ERR, fd)),
        );
        all.push(file(FrontendReq::SET_VRING_KICK, &self.kick));
        all.push(message(FrontendReq::SET_VRING_ENABLE, state(1)));
        Ok(all)
    }

    /// The index of the used ring: what is before it was completed, and all else is carried out.
    pub(super) fn used_index<B: Bitmap>(
        &self,
        index: u32,
        memory: &GuestMemoryShm<B>,
    ) -> Result<u16> {
        let (part, addr, len) = ("used ring", self.used, 4);
        let used = addr
            .checked_add(2)
            .and_then(|at| memory.read_obj::<u16>(at).ok());
        used.map(u16::from_le).ok_or(SessionError::RingNotShared {
            index,
            part,
            addr,
            len,
        })
    }

    /// Wakes the daemon: requests that an earlier one left undone are carried out. The guest is
    /// woken, too, for what that one had completed without saying so.
    pub(super) fn wake(&self, index: u32) -> Result<()> {
        for fd in [&self.kick, &self.call] {
            // A counter that is full wakes as well. The daemon can fill it, and the write would
            // wait where the VMM has made it a blocking one.
            let mut room = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut room, PollTimeout::ZERO) == Ok(0) {
                continue;
            }
            let written = nix::unistd::write(fd.as_fd(), &1_u64.to_ne_bytes());
            if let Err(errno) = written
                && errno != nix::errno::Errno::EAGAIN
            {
                let source = io::Error::from(errno);
                return Err(SessionError::RingDescriptor { index, source });
            }
        }
        Ok(())
    }

    /// What stops it; the answer is the index at which it would go on.
    pub(super) fn stop_message(index: u32) -> Message {
        let body = [index, 0].map(u32::to_ne_bytes).concat();
        let about = DaemonRequest::StopRing(index);
        Message::new(about, FrontendReq::GET_VRING_BASE, body, Reply::Body(&[8]))
    }
}
