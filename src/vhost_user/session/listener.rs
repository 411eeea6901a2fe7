//! A session as a listener.

use std::time::Instant;

use vm_memory::bitmap::Bitmap;

use super::VhostUserSession;
use super::error::SessionError;
use crate::listener::{Exchange, ListenerError, MemoryListener, drive};
use crate::memory::GuestMemoryShm;

/// A daemon, as [`VhostUserShare`](crate::VhostUserShare) is one, with its rings: memory that a
/// running ring lies in cannot be taken away, not while the daemon is gone either.
///
/// After [`reconnect`](VhostUserSession::reconnect) an update connects, and tells the daemon all
/// that it was told before. While it is [connected to in
/// steps](crate::AddressSpace::reconnect_in_steps), it is away.
impl<B: Bitmap + Send + Sync + 'static> MemoryListener<B> for VhostUserSession {
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.check_rings(memory).map_err(ListenerError::refused)?;
        match &self.restart {
            Some(restart) if restart.in_steps => {
                Err(ListenerError::away(SessionError::Reconnecting))
            }
            Some(_) => Ok(()),
            None => MemoryListener::check(&mut self.share, memory),
        }
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let exchange = self.begin_update(memory, Instant::now());
        drive(exchange.into_iter().collect())
            .pop()
            .unwrap_or(Ok(()))
    }

    fn begin_update<'a>(
        &'a mut self,
        memory: &GuestMemoryShm<B>,
        begun: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        match self.restart {
            Some(_) => {
                let told = |_: &mut Self, ended: Result<(), SessionError>| ended.map_err(away);
                Some(Box::new(self.restarting(Some(memory.clone()), begun, told)))
            }
            None => self.share.begin_update(memory, begun),
        }
    }
}

impl VhostUserSession {
    /// Says no more to a daemon that does not take what it has to.
    pub(crate) fn give_up(&mut self, reason: &str) {
        self.restart = None;
        self.channel = None;
        self.share.give_up(reason.to_owned());
    }
}

/// A daemon that does not take what it has to, with the region at which it failed: nothing more is
/// said to it.
pub(crate) fn away(error: SessionError) -> ListenerError {
    let range = match &error {
        SessionError::Share(error) => error.range(),
        _ => None,
    };
    let away = ListenerError::away(error);
    match range {
        Some(range) => away.at(range),
        None => away,
    }
}
