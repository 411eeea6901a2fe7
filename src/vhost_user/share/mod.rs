//! Sharing guest RAM with one vhost-user daemon: its memory table is kept equal to ours.
//!
//! A [`VhostUserShare`] knows what the daemon has acknowledged, and sends only the difference.
//! Limits are checked before a byte is sent. After a refusal the share stays usable if the daemon
//! survives it and is known to hold what it held. Any other failure on the wire breaks the share:
//! what the daemon holds is no longer known, so it needs a new connection.

use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::vhost_user::table::{MemoryTable, SlotLimit, TableError, TableView};

mod bases;
mod connection;
mod deadline;
mod disconnector;
mod error;
mod exchange;
mod kernel;
mod listener;
mod log;
mod log_exchange;
mod logging;
mod postcopy;
mod socket;
mod stopped;
mod wire;

pub use self::log::DaemonLog;
use bases::BaseHandler;
pub use connection::DaemonConnection;
pub use deadline::CallDeadline;
pub use disconnector::Disconnector;
use error::Result;
pub use error::{DaemonFailure, DaemonRequest, ShareError};
pub use kernel::KernelVhost;
use logging::Logging;
pub use stopped::{FormerDaemon, StoppedLog};

/// How long a daemon may take to answer, unless set otherwise: mapping a region takes it
/// microseconds, but it may be busy with I/O.
const DEADLINE: Duration = Duration::from_secs(10);

/// One daemon's memory table, kept equal to a [`MemoryTable`].
///
/// The VMM negotiates features with the daemon and passes the acknowledged protocol features in.
/// With CONFIGURE_MEM_SLOTS regions are added and removed one by one (ADD_MEM_REG, REM_MEM_REG),
/// up to the daemon's GET_MAX_MEM_SLOTS; without it the whole table is sent (SET_MEM_TABLE), at
/// most 8 regions. Every change is acknowledged by the daemon before
/// [`update_table`](Self::update_table) returns: by REPLY_ACK where it was negotiated, otherwise
/// by a round trip. No call waits longer than the [deadline](Self::with_deadline) for an answer; a
/// change of many regions is as many calls.
///
/// ```
/// use std::time::Duration;
///
/// use guest_memory_shm::{GuestMemoryShm, CallDeadline, VhostUserShare};
/// use vhost::VhostBackend;
/// use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Features};
/// # use guest_memory_shm::mock::MockDaemon;
/// # use vm_memory::GuestAddress;
/// # let daemon = MockDaemon::builder().start_unnamed()?;
/// # let stream = daemon.connect()?;
/// # let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let mut frontend = Frontend::from_stream(stream, 1);
/// let mut limit = CallDeadline::new(&frontend, Duration::from_secs(10));
/// let features = limit.run(|| -> vhost::Result<Features> {
///     frontend.set_owner()?;
///     // What the guest's driver knows of them; 26 is VHOST_F_LOG_ALL, for when there is a log.
///     frontend.set_features(frontend.get_features()? & !(1 << 26))?;
///     let features = frontend.get_protocol_features()?
///         & (Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK);
///     frontend.set_protocol_features(features)?;
///     Ok(features)
/// })??;
///
/// let mut share = VhostUserShare::new(frontend, features);
/// share.update_table(&memory.memory_table())?;
/// # assert_eq!(daemon.table().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct VhostUserShare<F> {
    connection: F,
    /// Absent only if no call of the connection ever waits.
    deadline: Option<CallDeadline>,
    limit: Duration,
    mem_slots: bool,
    reply_ack: bool,
    /// The connection has yet to be told that changes are acknowledged.
    acks_due: bool,
    log_shmfd: bool,
    /// The daemon's answer to GET_MAX_MEM_SLOTS, once it was asked.
    slots: Option<u64>,
    view: TableView,
    /// What the daemon has acknowledged.
    held: MemoryTable,
    base_handler: BaseHandler,
    /// Present while the daemon is to log what it writes.
    logging: Option<Logging>,
    broken: Option<Arc<ShareError>>,
}

/// What an update did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShareReport {
    /// The number of regions that the daemon was told to forget.
    pub removed: usize,
    /// The number of regions that the daemon was told of newly.
    pub added: usize,
}

impl<F: DaemonConnection> VhostUserShare<F> {
    /// A share with a daemon that is connected and holds no region yet.
    ///
    /// `features` are the protocol features that were acknowledged (SET_PROTOCOL_FEATURES).
    pub fn new(connection: F, features: Features) -> Self {
        let disconnector = connection.disconnector();
        let mut share = Self {
            connection,
            deadline: None,
            limit: DEADLINE,
            mem_slots: false,
            reply_ack: false,
            acks_due: false,
            log_shmfd: false,
            slots: None,
            view: TableView::default(),
            held: MemoryTable::default(),
            base_handler: BaseHandler::default(),
            logging: None,
            broken: None,
        };
        share.begin(features, disconnector);
        share
    }

    /// Sets how long the daemon may take for each answer; 10 seconds unless set. Without any time
    /// every update fails.
    ///
    /// A call that another thread makes on a clone of the frontend uses up this time while it
    /// waits, because it holds the frontend's lock; when the time is over, the connection is
    /// closed for both.
    #[must_use]
    pub fn with_deadline(mut self, limit: Duration) -> Self {
        self.limit = limit;
        if let Some(watching) = &mut self.deadline {
            watching.set_limit(limit);
        }
        self
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

    /// Takes a new connection to the daemon, which holds no region yet; gives back the old one.
    /// The next [`update_table`](Self::update_table) sends the whole table.
    ///
    /// Most daemons serve one frontend at a time: the old connection must have ended before they
    /// answer on the new one. That of a broken share has.
    pub fn reconnect(&mut self, connection: F, features: Features) -> F {
        // First, and not between: if it panics, the share is what it was.
        let disconnector = connection.disconnector();
        let old = std::mem::replace(&mut self.connection, connection);
        self.begin(features, disconnector);
        old
    }

    fn begin(&mut self, features: Features, disconnector: Option<Disconnector>) {
        self.mem_slots = features.contains(Features::CONFIGURE_MEM_SLOTS);
        self.reply_ack = features.contains(Features::REPLY_ACK);
        self.log_shmfd = features.contains(Features::LOG_SHMFD);
        self.slots = None;
        self.held = MemoryTable::default();
        if let Some(logging) = &mut self.logging {
            // Unless it was broken off.
            logging.end("another connection took its place");
        }
        self.broken = None;
        self.acks_due = self.reply_ack;
        self.deadline = disconnector
            .map(|disconnector| CallDeadline::with_disconnector(disconnector, self.limit));
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
    /// SET_MEM_TABLE could carry; [`TableError::NoHostAddress`] where the table is
    /// for the kernel. [`ShareError::LogNotShared`]; [`ShareError::Broken`]; and what a failed
    /// question leads to: [`ShareError::NoDeadline`], after which the share is usable as before,
    /// and [`ShareError::Daemon`], after which it is broken.
    pub fn check_table(&mut self, table: &MemoryTable) -> Result<()> {
        self.check_not_broken()?;
        self.check_log()?;
        if *table == self.held {
            return Ok(());
        }
        table.check_pages()?;
        self.connection.check_table(table)?;
        let (limit, slots) = match self.mem_slots {
            // Removals come first, so there are never more regions than in one of the two tables.
            true => (self.max_slots()?, SlotLimit::Daemon),
            false => {
                let limit = self.connection.max_table_regions() as u64;
                (limit, SlotLimit::Message)
            }
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
    /// share is usable as before. So it is after [`ShareError::NoDeadline`], if no thread could be
    /// had to watch the time.
    ///
    /// [`ShareError::LogNotShared`] if the daemon is to log ([`start_log`](Self::start_log)) and a
    /// reconnection left LOG_SHMFD out; [`ShareError::Log`] if it has no memfd. Where such an
    /// error, or a refusal of the log, comes after the table, the table is what the daemon holds,
    /// and the next update, to any table, sends the log; until then all of it counts as dirty.
    ///
    /// [`ShareError::Daemon`] with [`DaemonFailure::Refused`]: the daemon answered that it does
    /// not take a change. If that was a single region and the daemon still answers after it, the
    /// share stays usable: [`table`](Self::table) is what was acknowledged until then, and the
    /// next update continues from there. Otherwise it is broken: most daemons hang up when they
    /// refuse, and some have let go of the old table when they refuse a whole one.
    /// [`broken`](Self::broken) tells the two apart.
    ///
    /// [`ShareError::Daemon`] with any other failure: the connection is closed, the share is
    /// broken, and every later update is [`ShareError::Broken`] until
    /// [`reconnect`](Self::reconnect). A daemon that acknowledges a change and hangs up right
    /// after it, as libvhost-user does to refuse one, counts as hung up; among several changes the
    /// error may then name the change after the refused one.
    pub fn update_table(&mut self, table: &MemoryTable) -> Result<ShareReport> {
        self.check_table(table)?;
        if self.held == *table && !self.log_is_due() {
            return Ok(ShareReport::default());
        }
        let change = self.held.change_to(table);
        self.send(table, &change)?;
        let report = ShareReport {
            removed: change.removals.len(),
            added: change.additions.len(),
        };
        logs::debug!(
            "daemon took {} regions less, {} more",
            report.removed,
            report.added
        );
        Ok(report)
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
    pub fn update_memory<B: Bitmap>(&mut self, memory: &GuestMemoryShm<B>) -> Result<ShareReport> {
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

    /// How many regions the daemon takes, if it was asked yet.
    pub fn max_regions(&self) -> Option<u64> {
        self.slots
    }

    /// The connection.
    pub fn connection(&self) -> &F {
        &self.connection
    }

    /// The connection, for other requests (rings, configuration).
    pub fn connection_mut(&mut self) -> &mut F {
        &mut self.connection
    }

    /// Gives the connection back.
    pub fn into_connection(self) -> F {
        self.connection
    }

    fn check_not_broken(&self) -> Result<()> {
        match &self.broken {
            Some(reason) => Err(ShareError::Broken {
                reason: Arc::clone(reason),
            }),
            None => Ok(()),
        }
    }

    fn max_slots(&mut self) -> Result<u64> {
        match self.slots {
            Some(limit) => Ok(limit),
            None => {
                let limit = self.call(DaemonRequest::GetMaxSlots, F::max_mem_slots)?;
                Ok(*self.slots.insert(limit))
            }
        }
    }
}

#[cfg(test)]
mod tests;
