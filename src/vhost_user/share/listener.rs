//! A daemon as a listener, which comes and goes.

use vm_memory::bitmap::Bitmap;

use super::VhostUserShare;
use super::connection::DaemonConnection;
use super::deadline::CallDeadline;
use super::error::{DaemonFailure, DaemonRequest, Result, ShareError};
use crate::listener::{ListenerError, MemoryListener};
use crate::memory::GuestMemoryShm;
use crate::vhost_user::table::MemoryTable;

/// A daemon, which is away once its share is broken, until it is
/// [connected to anew](crate::AddressSpace::reconnect).
///
/// It refuses what it answers with a refusal, what exceeds a limit, and what it hangs up at: that
/// is how libvhost-user refuses, and daemons without REPLY_ACK; if it died at that very moment,
/// the change is undone for nothing, and the next attempt finds it away. A daemon that has hung up
/// before, or is silent, is away.
impl<F, B> MemoryListener<B> for VhostUserShare<F>
where
    F: DaemonConnection + Send + 'static,
    B: Bitmap + Send + Sync + 'static,
{
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.check_there()
            .and_then(|()| self.check_memory(memory))
            .map_err(|error| self.failed(error))
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.update_memory(memory)
            // Attaching or connecting waits for the daemon here; later no question is left
            // for `check`, which asks one daemon after the other.
            .and_then(|_| {
                if self.mem_slots {
                    self.max_slots().map(drop)
                } else {
                    Ok(())
                }
            })
            .map_err(|error| self.failed(error))
    }

    /// A daemon is another process, of which a call may wait; the kernel answers at once.
    fn waits(&self) -> bool {
        self.deadline.is_some()
    }
}

impl<F: DaemonConnection> VhostUserShare<F> {
    /// Breaks the share if the daemon has hung up since it was last told something, and says so.
    fn check_there(&mut self) -> Result<()> {
        let is_gone = self.deadline.as_mut().is_some_and(CallDeadline::is_gone);
        if self.broken.is_none() && is_gone {
            self.break_off(ShareError::Gone);
            return Err(ShareError::Gone);
        }
        self.check_not_broken()
    }

    /// Lets go of what the daemon had acknowledged before the share broke.
    fn forget_table(&mut self) {
        self.held = MemoryTable::default();
    }

    /// Closes the connection to a daemon that does not take what it has to.
    pub(crate) fn give_up(&mut self, reason: String) {
        self.forget_table();
        if self.broken.is_none() {
            self.break_off(ShareError::GivenUp { reason });
        }
    }

    fn failed(&mut self, error: ShareError) -> ListenerError {
        let range = error.range();
        // The answer counts, also of a daemon that hangs up then, as most do: or a change that one
        // refuses would happen without it.
        let refuses = match &error {
            ShareError::Daemon { request, failure } => match failure {
                DaemonFailure::Refused(_) => true,
                // A mere question is nothing to refuse.
                DaemonFailure::HungUp(_) => *request != DaemonRequest::GetMaxSlots,
                _ => false,
            },
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
