//! A thread for each queue that is used.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Device, Vring};
use crate::image::Lane;

/// What events are about.
const WAKE: u64 = 0;
const KICK: u64 = 1;

/// A queue of the device, and its thread, which ends on drop.
pub(crate) struct QueueThread {
    vring: Vring,
    events: Arc<Epoll>,
    /// Has the thread look at the queue, and at whether the connection is over.
    wake: Arc<EventFd>,
    /// What the thread waits for to be kicked by.
    watched: Option<RawFd>,
    device: Arc<Device>,
    thread: Option<JoinHandle<()>>,
}

impl QueueThread {
    pub(crate) fn start(device: &Arc<Device>, vring: Vring, lane: Lane) -> io::Result<Self> {
        let events = Arc::new(Epoll::new()?);
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let event = EpollEvent::new(EventSet::IN, WAKE);
        events.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        let mut work = Work {
            vring: vring.clone(),
            events: Arc::clone(&events),
            wake: Arc::clone(&wake),
            device: Arc::clone(device),
            lane,
        };
        let thread = thread::Builder::new().name("queue".into());
        let thread = thread.spawn(move || {
            while let Err(error) = work.serve() {
                log::warn!("a queue: {error}");
            }
        })?;
        Ok(Self {
            vring,
            events,
            wake,
            watched: None,
            device: Arc::clone(device),
            thread: Some(thread),
        })
    }

    /// Waits for kicks if the queue runs, and for none if it does not. To be called after each
    /// change of that.
    pub(crate) fn follow_state(&mut self) -> io::Result<()> {
        let kick = {
            let vring = self.vring.get_ref();
            let runs = vring.is_enabled() && vring.get_queue().ready();
            let kick = vring.get_kick().as_ref().filter(|_| runs);
            kick.map(AsRawFd::as_raw_fd)
        };
        if kick != self.watched {
            self.ignore_kicks();
        }
        if let Some(kick) = kick
            && self.watched.is_none()
        {
            let event = EpollEvent::new(EventSet::IN, KICK);
            self.events.ctl(ControlOperation::Add, kick, event)?;
            self.watched = Some(kick);
            // There may be requests already, left by a daemon before this one.
            self.wake.write(1)?;
        }
        Ok(())
    }

    /// Waits for no kick. To be called before the descriptor is closed: the frontend has the
    /// eventfd, too, so closing alone would not end the wait for it.
    pub(crate) fn ignore_kicks(&mut self) {
        if let Some(kick) = self.watched.take()
            && let Err(error) =
                self.events
                    .ctl(ControlOperation::Delete, kick, EpollEvent::default())
        {
            log::warn!("cannot stop waiting for kicks: {error}");
        }
    }
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        self.device.end();
        if let Err(error) = self.wake.write(1) {
            log::error!("cannot end the thread of a queue: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a queue panicked");
        }
    }
}

/// What the thread works with.
struct Work {
    vring: Vring,
    events: Arc<Epoll>,
    wake: Arc<EventFd>,
    device: Arc<Device>,
    lane: Lane,
}

impl Work {
    /// Serves the queue until the connection is over.
    fn serve(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 2];
        while !self.device.is_over() {
            let count = match self.events.wait(-1, &mut events) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                count => count?,
            };
            for event in &events[..count] {
                if event.data() == KICK {
                    self.vring.read_kick()?;
                } else if let Err(error) = self.wake.read()
                    && error.kind() != ErrorKind::WouldBlock
                {
                    return Err(error);
                }
            }
            self.device.serve_queue(&self.vring, &mut self.lane);
        }
        Ok(())
    }
}
