//! Sharing guest RAM with one vhost-user daemon: its memory table is kept equal to ours.
//!
//! A [`VhostUserShare`] knows what the daemon has acknowledged, and sends only the difference.
//! Limits are checked before a byte is sent. After a refusal the share stays usable if the daemon
//! survives it and is known to hold what it held. Any other failure on the wire breaks the share:
//! what the daemon holds is no longer known, so it needs a new connection.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

use crate::listener::WaitFor;
use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::range::GuestRange;
use crate::vhost_user::table::{MemoryTable, SlotLimit, TableError, TableView};
use crate::vhost_user::wire::{DaemonSocket, Wire, check_connected};

mod error;
mod listener;
mod log;
mod log_exchange;
mod logging;
mod postcopy;
mod stage;
mod stopped;
mod update;

use error::Result;
pub use error::ShareError;
use logging::Logging;
use stage::{Stage, UPDATE};
pub use stopped::{FormerDaemon, StoppedLog};
pub(in crate::vhost_user) use update::{Pending, after};

/// How long a daemon may take for a change, unless set otherwise: mapping a region takes it
/// microseconds, but it may be busy with I/O.
const DEADLINE: Duration = Duration::from_secs(10);

/// The most regions in SET_MEM_TABLE (vhost-user specification, "Memory regions description").
const MAX_TABLE_REGIONS: u64 = 8;

/// One daemon's memory table, kept equal to a [`MemoryTable`], on the socket of a frontend that
/// the VMM has.
///
/// The VMM negotiates features with the daemon and passes the acknowledged protocol features in.
/// With CONFIGURE_MEM_SLOTS regions are added and removed one by one (ADD_MEM_REG, REM_MEM_REG),
/// up to the daemon's GET_MAX_MEM_SLOTS; without it the whole table is sent (SET_MEM_TABLE), at
/// most 8 regions. Every change is acknowledged by the daemon before
/// [`update_table`](Self::update_table) returns: by REPLY_ACK where it was negotiated, otherwise
/// by a question that follows it. Several messages are under way at the same time.
///
/// A change has one [deadline](Self::with_deadline) for all of its messages. No thread is started,
/// and no lock of the frontend is taken. In return nobody else may use the connection meanwhile:
/// no request of the frontend, or of a clone of it, may be under way during a call of the share,
/// or of the address space that it is a listener of. An answer to somebody else's request breaks
/// the share, and says so.
///
/// The connection is the VMM's: a share that [broke](Self::broken) lets go of it, says nothing
/// more, and does not end it. Most daemons serve one frontend at a time, so drop that before a new
/// one is made. One that is not broken has to let go of it first: [`close`](Self::close).
///
/// ```
/// use guest_memory_shm::{GuestMemoryShm, VhostUserShare};
/// use vhost::VhostBackend;
/// use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Features};
/// # use guest_memory_shm::mock::MockDaemon;
/// # use vm_memory::GuestAddress;
/// # let daemon = MockDaemon::builder().start_unnamed()?;
/// # let stream = daemon.connect()?;
/// # let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let mut frontend = Frontend::from_stream(stream, 1);
/// frontend.set_owner()?;
/// // What the guest's driver knows of them; 26 is VHOST_F_LOG_ALL, for when there is a log.
/// frontend.set_features(frontend.get_features()? & !(1 << 26))?;
/// let features = frontend.get_protocol_features()?
///     & (Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK);
/// frontend.set_protocol_features(features)?;
///
/// let mut share = VhostUserShare::new(&frontend, features)?;
/// share.update_table(&memory.memory_table())?;
/// # assert_eq!(daemon.table().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct VhostUserShare {
    wire: Wire,
    limit: Duration,
    mem_slots: bool,
    reply_ack: bool,
    log_shmfd: bool,
    /// The daemon's answer to GET_MAX_MEM_SLOTS, once it was asked.
    slots: Option<u64>,
    view: TableView,
    /// What the daemon has acknowledged.
    held: MemoryTable,
    /// Told of bases. The lock is never contended: it keeps the share `Sync`.
    base_handler: Option<Mutex<BaseHandler>>,
    /// Postcopy listens: the daemon answers with its bases.
    listens: bool,
    /// Present while the daemon is to log what it writes.
    logging: Option<Logging>,
    broken: Option<Arc<ShareError>>,
}

type BaseHandler = Box<dyn FnMut(GuestRange, u64) + Send>;

impl VhostUserShare {
    /// A share with a daemon that is connected and holds no region yet. On vhost's `Frontend`:
    /// `VhostUserShare::new(&frontend, features)`, and the VMM keeps the frontend.
    ///
    /// `features` are the protocol features that were acknowledged (SET_PROTOCOL_FEATURES).
    ///
    /// # Errors
    ///
    /// [`ShareError::Socket`] if no descriptor is left for a copy of the frontend's;
    /// [`ShareError::UnfitSocket`] for what is no Unix stream socket, or was never connected.
    pub fn new(socket: impl DaemonSocket, features: Features) -> Result<Self> {
        let mut share = Self::on(Wire::new(taken(socket)?));
        share.begin_with(features);
        Ok(share)
    }

    /// A share that has no connection yet: it is broken, until it is
    /// [given one](Self::reconnect).
    pub(in crate::vhost_user) fn away() -> Self {
        let reason = "there is no connection yet".to_owned();
        Self {
            broken: Some(Arc::new(ShareError::GivenUp { reason })),
            ..Self::on(Wire::closed())
        }
    }

    fn on(wire: Wire) -> Self {
        Self {
            wire,
            limit: DEADLINE,
            mem_slots: false,
            reply_ack: false,
            log_shmfd: false,
            slots: None,
            view: TableView::default(),
            held: MemoryTable::default(),
            base_handler: None,
            listens: false,
            logging: None,
            broken: None,
        }
    }

    /// Sets how long the daemon may take for a change, all of its messages together; 10 seconds
    /// unless set. Without any time every update fails.
    ///
    /// For each whole GiB that it is newly told of it has 5 seconds more: a daemon may lock what
    /// it maps (mlockall(2)), which allocates and clears all of it. In a change of an address
    /// space the time counts from the beginning of the change, for all daemons; one whose turn
    /// comes when others have used it up has a tenth of it.
    #[must_use]
    pub fn with_deadline(mut self, limit: Duration) -> Self {
        self.set_deadline(limit);
        self
    }

    /// Sets it from now on, as [`with_deadline`](Self::with_deadline).
    pub fn set_deadline(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Sets what the daemon gets to see of a memory, for [`update_memory`](Self::update_memory)
    /// and [`check_memory`](Self::check_memory); everything by host addresses unless set.
    #[must_use]
    pub fn with_view(mut self, view: TableView) -> Self {
        self.view = view;
        self
    }

    /// What the daemon gets to see of a memory.
    pub fn view(&self) -> &TableView {
        &self.view
    }

    /// Takes a new connection to the daemon, which holds no region yet: a socket on which these
    /// protocol features were acknowledged. The next [`update_table`](Self::update_table) sends
    /// the whole table.
    ///
    /// Most daemons serve one frontend at a time: the old connection must have ended before they
    /// answer on the new one, so drop its frontend first.
    ///
    /// # Errors
    ///
    /// [`ShareError::Socket`], [`ShareError::UnfitSocket`]: the share is what it was.
    pub fn reconnect(&mut self, socket: impl DaemonSocket, features: Features) -> Result<()> {
        self.wire = Wire::new(taken(socket)?);
        self.begin_with(features);
        Ok(())
    }

    /// What was agreed on this connection since it was taken.
    pub(in crate::vhost_user) fn set_protocol_features(&mut self, features: Features) {
        self.mem_slots = features.contains(Features::CONFIGURE_MEM_SLOTS);
        self.reply_ack = features.contains(Features::REPLY_ACK);
        self.log_shmfd = features.contains(Features::LOG_SHMFD);
    }

    fn begin_with(&mut self, features: Features) {
        self.set_protocol_features(features);
        self.slots = None;
        self.held = MemoryTable::default();
        self.listens = false;
        if let Some(logging) = &mut self.logging {
            // Unless it was broken off.
            logging.end("another connection took its place");
        }
        self.broken = None;
    }

    /// Whether the daemon could take `table`, as far as limits say; nothing is changed.
    ///
    /// The daemon is asked for its number of memory slots (GET_MAX_MEM_SLOTS) unless it was
    /// before. [`update_table`](Self::update_table) checks the same.
    ///
    /// # Errors
    ///
    /// [`ShareError::Table`]: [`TableError::Range`] for a region that is not whole pages;
    /// [`TableError::TooManyRegions`]; [`TableError::Empty`] for an empty table that only
    /// SET_MEM_TABLE could carry. [`ShareError::LogNotShared`]; [`ShareError::Broken`]; and
    /// [`ShareError::Daemon`] if the question fails, after which the share is broken.
    pub fn check_table(&mut self, table: &MemoryTable) -> Result<()> {
        self.check_now(table)?;
        if self.mem_slots && *table != self.held {
            self.max_slots()?;
        }
        self.check_limit(table)
    }

    /// What can be checked without a question.
    fn check_now(&self, table: &MemoryTable) -> Result<()> {
        self.check_not_broken()?;
        self.check_log()?;
        if *table == self.held {
            return Ok(());
        }
        Ok(table.check_pages()?)
    }

    /// The number of regions. What the daemon holds it can hold.
    fn check_limit(&self, table: &MemoryTable) -> Result<()> {
        if *table == self.held {
            return Ok(());
        }
        let (limit, slots) = match self.mem_slots {
            // Removals come first, so there are never more regions than in one of the two tables.
            true => (self.slots.unwrap_or(u64::MAX), SlotLimit::Daemon),
            false => (MAX_TABLE_REGIONS, SlotLimit::Message),
        };
        match table.regions().len() {
            0 if !self.mem_slots => Err(TableError::Empty.into()),
            regions if regions as u64 > limit => {
                Err(ShareError::Table(TableError::TooManyRegions {
                    regions,
                    limit,
                    slots,
                }))
            }
            _ => Ok(()),
        }
    }

    /// Makes the daemon's table equal to `table`, by telling it the difference: everything on a
    /// new connection, nothing if it is equal already.
    ///
    /// # Errors
    ///
    /// [`ShareError::Table`], as for [`check_table`](Self::check_table): nothing was sent, the
    /// share is usable as before. So it is after [`ShareError::LogNotShared`], if the daemon is to
    /// log ([`start_log`](Self::start_log)) and a reconnection left LOG_SHMFD out, and after
    /// [`ShareError::Log`], if its log has no memfd.
    ///
    /// [`ShareError::Daemon`] with
    /// [`DaemonFailure::Refused`](crate::DaemonFailure::Refused): the daemon answered that it does
    /// not take a change. If that was a single region and the daemon still answers after it, the
    /// share stays usable: [`table`](Self::table) is what was acknowledged, changes that followed
    /// the refused one included, and the next update continues from there. Otherwise it is broken:
    /// most daemons hang up when they refuse, and some have let go of the old table when they
    /// refuse a whole one. [`broken`](Self::broken) tells the two apart.
    ///
    /// [`ShareError::Daemon`] with any other failure: the share is broken, and every later update
    /// is [`ShareError::Broken`] until [`reconnect`](Self::reconnect). A daemon that acknowledges
    /// a change and hangs up right after it, as libvhost-user does to refuse one, counts as hung
    /// up; among several changes the error may then name the change after the refused one.
    pub fn update_table(&mut self, table: &MemoryTable) -> Result<()> {
        self.check_table(table)?;
        if self.held == *table && !self.log_is_due() {
            return Ok(());
        }
        self.run(UPDATE, table.clone())
    }

    /// [`check_table`](Self::check_table), of what the daemon gets to see of `memory`.
    ///
    /// # Errors
    ///
    /// Those of [`check_table`](Self::check_table), and
    /// [`TableError::OpaqueConstant`] if the [view](Self::with_view) does not fit the memory.
    pub fn check_memory<B: Bitmap>(&mut self, memory: &GuestMemoryShm<B>) -> Result<()> {
        let table = memory.memory_table_as(&self.view)?;
        self.check_table(&table)
    }

    /// [`update_table`](Self::update_table), to what the daemon gets to see of `memory`. A change
    /// outside of its [view](Self::with_view) sends no message.
    ///
    /// # Errors
    ///
    /// Those of [`update_table`](Self::update_table), and [`TableError::OpaqueConstant`] if the
    /// view does not fit the memory: nothing was sent.
    pub fn update_memory<B: Bitmap>(&mut self, memory: &GuestMemoryShm<B>) -> Result<()> {
        let table = memory.memory_table_as(&self.view)?;
        self.update_table(&table)
    }

    /// What the daemon has acknowledged. After a failure this may be part of a change. What a
    /// daemon does about the change at which it failed is known only if it refused, and the share
    /// is not [`broken`](Self::broken): nothing. Of a broken share an
    /// [`AddressSpace`](crate::AddressSpace) has it forgotten.
    pub fn table(&self) -> &MemoryTable {
        &self.held
    }

    /// Why the share is broken, if it is.
    pub fn broken(&self) -> Option<&ShareError> {
        self.broken.as_deref()
    }

    /// Whether the daemon holds what it is to see of this memory, and its log is there for it.
    pub(in crate::vhost_user) fn holds<B: Bitmap>(
        &self,
        memory: &GuestMemoryShm<B>,
    ) -> Result<bool> {
        Ok(self.held == memory.memory_table_as(&self.view)? && !self.log_is_due())
    }

    /// Whether nothing can be said to the daemon, as far as that can be seen without a word.
    pub(in crate::vhost_user) fn is_gone(&self) -> bool {
        self.broken.is_some() || self.wire.is_useless()
    }

    /// The connection.
    pub(in crate::vhost_user) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.wire.socket()
    }

    /// What something that is under way waits for.
    pub(in crate::vhost_user) fn waits_for(&self, pending: &Pending) -> WaitFor<'_> {
        self.wire.waits_for(pending.deadline())
    }

    /// How many regions the daemon takes, if it was asked yet.
    pub fn max_regions(&self) -> Option<u64> {
        self.slots
    }

    /// Lets go of the connection, and breaks the share: for a daemon that serves one frontend at a
    /// time, before a new connection is made while it is still there. The connection ends once the
    /// VMM's frontend is dropped, too.
    pub fn close(&mut self) {
        self.give_up("this end let go of the connection".to_owned());
    }

    pub(in crate::vhost_user) fn check_not_broken(&self) -> Result<()> {
        match &self.broken {
            Some(reason) => Err(ShareError::Broken {
                reason: Arc::clone(reason),
            }),
            None => Ok(()),
        }
    }

    fn max_slots(&mut self) -> Result<u64> {
        if self.slots.is_none() {
            self.run(&[Stage::Slots], self.held.clone())?;
        }
        // The stage has it, or is an error.
        Ok(self.slots.unwrap_or_default())
    }

    /// Nothing more is said to a daemon in an unknown state.
    fn break_off(&mut self, reason: ShareError) {
        let text = reason.to_string();
        if let Some(logging) = &mut self.logging {
            logging.end(&text);
            // The socket is the VMM's, who does not expect them.
            self.wire.pass_credentials(false);
        }
        self.broken = Some(Arc::new(reason));
        self.wire.close();
        logs::warn!("share broken: {text}");
    }
}

fn taken(socket: impl DaemonSocket) -> Result<OwnedFd> {
    let socket = socket.into_socket();
    let socket = socket.map_err(|source| ShareError::Socket { source })?;
    match check_connected(socket.as_fd()) {
        Ok(()) => Ok(socket),
        Err(errno) => Err(ShareError::UnfitSocket {
            source: errno.into(),
        }),
    }
}

impl fmt::Debug for VhostUserShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserShare")
            .field("regions", &self.held.regions().len())
            .field("slots", &self.slots)
            .field("is_logging", &self.logging.is_some())
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
