//! A session as a listener.

use std::time::Instant;

use vm_memory::bitmap::Bitmap;

use super::VhostUserSession;
use super::error::SessionError;
use crate::listener::{Exchange, ListenerError, MemoryListener};
use crate::memory::GuestMemoryShm;

/// A daemon, as [`VhostUserShare`](crate::VhostUserShare) is one, with its rings: memory that a
/// running ring lies in cannot be taken away.
impl<B: Bitmap + Send + Sync + 'static> MemoryListener<B> for VhostUserSession {
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.check_rings(memory).map_err(ListenerError::refused)?;
        MemoryListener::check(&mut self.share, memory)
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        MemoryListener::update(&mut self.share, memory)?;
        if self.replay {
            self.start_again(memory)
                .map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    fn begin_update<'a>(
        &'a mut self,
        memory: &GuestMemoryShm<B>,
        begun: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        // After a reconnection its rings follow the memory: in its turn.
        match self.replay {
            true => None,
            false => self.share.begin_update(memory, begun),
        }
    }
}

impl VhostUserSession {
    /// Says no more to a daemon that does not take what it has to.
    pub(crate) fn give_up(&mut self, reason: &str) {
        self.share.give_up(reason.to_owned());
    }

    fn failed(&mut self, error: SessionError) -> ListenerError {
        match self.share.broken() {
            Some(_) => ListenerError::away(error),
            None => ListenerError::refused(error),
        }
    }
}
