//! A new connection to a daemon that is a listener.

use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

use super::error::{AddressSpaceError, Result};
use super::space::AddressSpace;
use super::status::ListenerId;
use crate::listener::{ListenerError, WaitFor};
use crate::panics::caught;
use crate::vhost_user::session::{VhostUserSession, away};
use crate::vhost_user::share::VhostUserShare;
use crate::vhost_user::wire::DaemonSocket;

/// When to look again whether a change has ended.
const CHANGE: Duration = Duration::from_millis(10);

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// Goes on with a new connection to a daemon, and tells it the present memory.
    ///
    /// It is told the memory only. The VMM tells it the rest again: before this call the virtio
    /// features (but `VHOST_F_LOG_ALL` after it, as the log comes with the memory), after it the
    /// rings, and that they are enabled.
    ///
    /// `features` are the protocol features that were acknowledged on the new connection, and the
    /// daemon's limits are asked for anew: it may be another program by now. The daemon gets the
    /// memory as at first, one region after the other where it takes them so: it does not matter
    /// how far the memory has grown. Where it maps the regions while postcopy listens, the
    /// [handler](VhostUserShare::with_base_handler) is told.
    ///
    /// Most daemons serve one frontend at a time: the old connection must have ended before they
    /// answer on the new one. So drop its frontend first: of a daemon that is away nobody else has
    /// it.
    ///
    /// # Errors
    ///
    /// Those of [`refresh`](Self::refresh): the daemon is away, as before. With
    /// [`AddressSpaceError::NoSuchListener`] and [`AddressSpaceError::Reentrant`] the daemon is
    /// what it was.
    pub fn reconnect(
        &self,
        id: &ListenerId<VhostUserShare>,
        socket: impl DaemonSocket,
        features: Features,
    ) -> Result<()> {
        self.refresh_after(
            id,
            |share| {
                share
                    .reconnect(socket, features)
                    .map_err(ListenerError::away)
            },
            |share, error| share.give_up(error.reason().to_owned()),
        )
    }

    /// Connects to the daemon of a session anew ([`VhostUserSession::reconnect`]), and tells it
    /// all that it was told before: features, the present memory, its log, the rings that ran.
    ///
    /// # Errors
    ///
    /// Those of [`refresh`](Self::refresh): the daemon is away, as before.
    pub fn reconnect_session(&self, id: &ListenerId<VhostUserSession>) -> Result<()> {
        self.refresh_after(
            id,
            |session| session.reconnect().map_err(ListenerError::away),
            |session, error| session.give_up(error.reason()),
        )
    }

    /// Connects to the daemon of a session that is gone anew, as
    /// [`reconnect_session`](Self::reconnect_session), step by step in the VMM's event loop: does
    /// what can be done at once. `None`: the daemon is there, and was told all. Otherwise `wait`
    /// is told what to wait for, a moment or the daemon's connection, and what it makes of that is
    /// given; call this again then. A call before that, or for a daemon that is there, does no
    /// harm. Nothing waits here, neither for the daemon nor for a change that another thread
    /// makes.
    ///
    /// The VMM's other threads can change the memory meanwhile: the daemon is away until all is
    /// done, and has the present memory then.
    /// [`VhostUserSession::reconnect_in_steps`] says how long it is tried; a VMM that knows better
    /// when the daemon listens calls [`VhostUserSession::reconnect`] then, and goes on here.
    ///
    /// ```
    /// use std::os::fd::{AsRawFd, BorrowedFd};
    /// use std::time::{Duration, Instant};
    ///
    /// use guest_memory_shm::{AddressSpace, AddressSpaceError, ListenerId, VhostUserSession};
    /// use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    ///
    /// /// Called when the disk's connection is readable, and when it is time.
    /// fn go_on(
    ///     space: &AddressSpace,
    ///     disk: &ListenerId<VhostUserSession>,
    ///     events: &Epoll,
    ///     timer: &mut Option<Instant>,
    /// ) -> Result<(), AddressSpaceError> {
    ///     let watch = |fd: BorrowedFd<'_>| {
    ///         let event = EpollEvent::new(EventSet::IN, 1);
    ///         // It may be watched already.
    ///         let _ = events.ctl(ControlOperation::Add, fd.as_raw_fd(), event);
    ///     };
    ///     let waits = space.reconnect_in_steps(disk, |wait| {
    ///         wait.fd().map(watch);
    ///         wait.until()
    ///     });
    ///     *timer = waits.unwrap_or_else(|error| {
    ///         eprintln!("the disk is away: {error}");
    ///         Some(Instant::now() + Duration::from_secs(1))
    ///     });
    ///     if timer.is_none() {
    ///         space.with_listener(disk, |session| session.socket().map(watch))?; // it is back
    ///     }
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`AddressSpaceError::Refresh`]: the daemon died again, was silent, refused something, or is
    /// not what it was. It is away, and the next call begins anew.
    /// [`AddressSpaceError::NoSuchListener`] and [`AddressSpaceError::Reentrant`].
    pub fn reconnect_in_steps<T>(
        &self,
        id: &ListenerId<VhostUserSession>,
        wait: impl FnOnce(WaitFor<'_>) -> T,
    ) -> Result<Option<T>> {
        let Some(mut listeners) = self.try_lock()? else {
            return Ok(Some(wait(WaitFor::moment(Instant::now() + CHANGE))));
        };
        let memory = self.publisher.current();
        let at = listeners.place_of(id)?;
        let attached = &mut listeners.all[at];
        let session: Option<&mut VhostUserSession> = attached.downcast();
        let session = session.ok_or(AddressSpaceError::NoSuchListener)?;
        let done = caught(|| session.reconnect_in_steps(&memory));
        let error = match done {
            Ok(Ok(false)) => return Ok(Some(wait(session.waits_for()))),
            Ok(Ok(true)) => {
                attached.status.stale = None;
                return Ok(None);
            }
            Ok(Err(error)) => away(error),
            Err(panic) => {
                session.give_up(&panic);
                ListenerError::panicked(&panic)
            }
        };
        Err(attached.fail(error))
    }
}
