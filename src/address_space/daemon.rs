//! A vhost-user daemon as a listener, which comes and goes.

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

#[cfg(doc)]
use super::error::AddressSpaceError;
use super::error::Result;
use super::space::AddressSpace;
use super::status::ListenerId;
use crate::error::{Error, MemTableChange};
use crate::listener::{ListenerError, MemoryListener};
use crate::memory::GuestMemoryShm;
use crate::range::GuestRange;
use crate::vhost_user::share::{MemTableSink, VhostUserShare};

/// A daemon, which is away once its share is broken, until it is
/// [connected to anew](AddressSpace::reconnect).
///
/// It refuses what it answers with a refusal, what exceeds a limit, and what it hangs up at: that
/// is how libvhost-user refuses, and daemons without REPLY_ACK; if it died at that very moment,
/// the change is undone for nothing, and the next attempt finds it away. A daemon that has hung up
/// before, or is silent, is away.
impl<F, B> MemoryListener<B> for VhostUserShare<F>
where
    F: MemTableSink + Send + 'static,
    B: Bitmap + Send + Sync + 'static,
{
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.check_there()
            .and_then(|()| self.check_memory(memory))
            .map_err(|error| self.failed(error))
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.update_memory(memory)
            .map(|report| self.keep_bases(report))
            // Whoever attaches or connects waits for the daemon here; later no question is left
            // for `check`, which asks one daemon after the other.
            .and_then(|()| self.learn_limits())
            .map_err(|error| self.failed(error))
    }

    /// A daemon is another process; the kernel answers at once.
    fn waits(&self) -> bool {
        self.may_wait()
    }
}

impl<F: MemTableSink> VhostUserShare<F> {
    fn failed(&mut self, error: Error) -> ListenerError {
        let range = region_of(&error);
        // The answer counts, also of a daemon that hangs up then, as most do: or a change that one
        // refuses would happen without it.
        let refuses = match &error {
            Error::DaemonRefused { .. } => true,
            // A mere question is nothing to refuse.
            Error::DaemonHungUp { change, .. } => *change != MemTableChange::QuerySlots,
            _ => false,
        };
        let broken = self.broken().is_some();
        if broken {
            // RAM that is unplugged while the daemon is away must not be kept for it.
            self.forget_table();
        }
        let failed = match broken && !refuses {
            true => ListenerError::away(error),
            false => ListenerError::refused(error),
        };
        match range {
            Some(range) => failed.at(range),
            None => failed,
        }
    }
}

/// The region at which a daemon failed.
fn region_of(error: &Error) -> Option<GuestRange> {
    match error {
        Error::DaemonRefused { change, .. }
        | Error::DaemonHungUp { change, .. }
        | Error::DaemonSilent { change, .. }
        | Error::DaemonProtocol { change, .. }
        | Error::NoPostcopy { change } => match change {
            MemTableChange::Add(range) | MemTableChange::Remove(range) => Some(*range),
            _ => None,
        },
        Error::NoHostAddress { range } | Error::OpaqueConstant { range, .. } => Some(*range),
        _ => None,
    }
}

impl<B: Bitmap + Send + Sync + 'static> AddressSpace<B> {
    /// Goes on with a new connection to a daemon, and tells it the present memory; gives back the
    /// old connection.
    ///
    /// That is the memory only. What else the daemon knew, the front-end tells it again: before
    /// this the virtio features (with `VHOST_F_LOG_ALL` not before the log was sent, that is after
    /// it), after it the rings, and that they are enabled.
    ///
    /// `features` are the protocol features that were acknowledged on the new connection, and the
    /// daemon's limits are asked for anew: it may be another program by now. The daemon gets the
    /// memory as on the first day, one region after the other where it takes them so, so that it
    /// does not matter how far the memory has grown. Where it maps the regions while postcopy
    /// listens, the [handler](VhostUserShare::with_base_handler) is told, and it is kept for
    /// [`VhostUserShare::take_bases`].
    ///
    /// Most daemons serve one front-end at a time: the old connection must have ended before they
    /// answer on the new one. That of a daemon that is away has.
    ///
    /// # Errors
    ///
    /// Those of [`refresh`](Self::refresh); the new connection is closed then, and so is the old
    /// one: the daemon is away, as before. With [`AddressSpaceError::NoSuchListener`] and
    /// [`AddressSpaceError::Reentrant`] only the new one is closed, and the daemon is what it was.
    pub fn reconnect<F: MemTableSink + Send + 'static>(
        &self,
        id: &ListenerId<VhostUserShare<F>>,
        sink: F,
        features: Features,
    ) -> Result<F> {
        self.refresh_after(
            id,
            |share| share.reconnect(sink, features),
            |share, error| share.give_up(error.reason().to_owned()),
        )
    }
}
