//! A daemon as a listener, which comes and goes.

use std::time::Instant;

use vm_memory::bitmap::Bitmap;

use super::VhostUserShare;
use super::error::{Result, ShareError};
use super::stage::{Stage, UPDATE};
use super::update::Update;
use crate::listener::{Exchange, ListenerError, MemoryListener, WaitFor, drive};
use crate::memory::GuestMemoryShm;
use crate::vhost_user::table::MemoryTable;
use crate::vhost_user::wire::{DaemonFailure, DaemonRequest};

/// A daemon, which is away once its share is broken, until it is
/// [connected to anew](crate::AddressSpace::reconnect).
///
/// It refuses what it answers with a refusal, what exceeds a limit, and what it hangs up at: that
/// is how libvhost-user refuses, and daemons without REPLY_ACK; if it died at that very moment,
/// the change is undone for nothing, and the next attempt finds it away. A daemon that has hung up
/// before, or is silent, is away.
impl<B: Bitmap + Send + Sync + 'static> MemoryListener<B> for VhostUserShare {
    fn check(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        self.check_there()
            .and_then(|()| self.check_memory(memory))
            .map_err(|error| self.failed(error))
    }

    fn update(&mut self, memory: &GuestMemoryShm<B>) -> Result<(), ListenerError> {
        let exchange = self.tell(memory, Instant::now());
        drive(vec![exchange]).pop().unwrap_or(Ok(()))
    }

    fn begin_update<'a>(
        &'a mut self,
        memory: &GuestMemoryShm<B>,
        begun: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        Some(self.tell(memory, begun))
    }
}

/// An update, as a listener's.
struct Telling<'a>(Update<'a>);

impl Exchange for Telling<'_> {
    fn advance(&mut self, now: Instant) -> Option<Result<(), ListenerError>> {
        let ended = self.0.advance(now)?;
        Some(ended.map_err(|error| self.0.share().failed(error)))
    }

    fn waits_for(&self) -> WaitFor<'_> {
        self.0.waits_for()
    }
}

impl VhostUserShare {
    fn tell<B: Bitmap>(
        &mut self,
        memory: &GuestMemoryShm<B>,
        begun: Instant,
    ) -> Box<dyn Exchange + '_> {
        Box::new(Telling(self.begin_memory(memory, begun)))
    }

    /// Begins to make what the daemon holds equal to `memory`; the time counts from `begun`.
    pub(in crate::vhost_user) fn begin_memory<B: Bitmap>(
        &mut self,
        memory: &GuestMemoryShm<B>,
        begun: Instant,
    ) -> Update<'_> {
        let table = memory.memory_table_as(&self.view).map_err(ShareError::from);
        let checked = table.and_then(|table| self.check_now(&table).map(|()| table));
        let (stages, table) = match checked {
            // Attaching or connecting waits for the number of slots here: later no question is
            // left for `check`, which asks one daemon after the other.
            Ok(table) if self.held == table && !self.log_is_due() => {
                (&[Stage::Slots][..], Ok(table))
            }
            Ok(table) => (UPDATE, Ok(table)),
            Err(error) => (&[][..], Err(error)),
        };
        let (table, refused) = match table {
            Ok(table) => (table, None),
            Err(error) => (MemoryTable::default(), Some(error)),
        };
        let mut update = self.begin(stages, table, begun);
        update.refuse(refused);
        update
    }

    /// Breaks the share if the daemon has hung up since it was last told something, and says so.
    fn check_there(&mut self) -> Result<()> {
        if self.broken.is_none() && self.wire.has_hung_up() {
            self.break_off(ShareError::Gone);
            return Err(ShareError::Gone);
        }
        self.check_not_broken()
    }

    /// Lets go of what the daemon had acknowledged before the share broke.
    fn forget_table(&mut self) {
        self.held = MemoryTable::default();
    }

    /// Says no more to a daemon that does not take what it has to.
    pub(crate) fn give_up(&mut self, reason: String) {
        self.forget_table();
        if self.broken.is_none() {
            self.break_off(ShareError::GivenUp { reason });
        }
    }

    fn failed(&mut self, error: ShareError) -> ListenerError {
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
        match (broken && !refuses, error.range()) {
            (false, _) => error.into(),
            (true, Some(range)) => ListenerError::away(error).at(range),
            (true, None) => ListenerError::away(error),
        }
    }
}

/// A refusal.
impl From<ShareError> for ListenerError {
    fn from(error: ShareError) -> Self {
        match error.range() {
            Some(range) => Self::refused(error).at(range),
            None => Self::refused(error),
        }
    }
}
