//! All that is agreed with one daemon, across reconnections: features, memory, rings, log.
//!
//! What a new connection needs is a list of steps ([`restart`]) that do not wait: to connect, to
//! agree, the memory, then all that ran. They are the same for a session that connects, one that
//! reconnects in one call, and one that does in the event loop of its VMM.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

use crate::listener::drive;
use crate::memory::GuestMemoryShm;
use crate::range::GuestRange;
use crate::vhost_user::share::{ShareError, VhostUserShare};
use crate::vhost_user::table::MemoryTable;
use crate::vhost_user::wire::{Answer, DaemonRequest, Message, Reply};

mod agree;
mod channel;
mod connect;
mod error;
mod go_on;
mod inflight;
mod listener;
mod log;
mod message;
mod options;
mod receive;
mod requests;
mod restart;
mod ring;
mod rings;

use agree::Agreed;
use channel::Channel;
use error::Result;
pub use error::SessionError;
use inflight::InflightBuffer;
pub(crate) use listener::away;
pub use message::SessionMessage;
pub use options::SessionOptions;
use restart::Restart;
pub use ring::SessionRing;

/// A session with one daemon: all that was agreed with it, and all that it was told, across
/// reconnections.
///
/// It connects, agrees on what the caller's driver knows, keeps the daemon's memory equal to an
/// address space (it is a [`MemoryListener`](crate::MemoryListener)), starts and stops rings,
/// keeps a dirty log. No call waits without a deadline, and no thread is started.
/// `examples/session.rs` is a whole program.
///
/// ```
/// use guest_memory_shm::{
///     AddressSpace, GuestMemoryShm, SessionOptions, SessionRing, VhostUserSession,
/// };
/// use vm_memory::GuestAddress;
/// use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
/// # use guest_memory_shm::mock::MockDaemon;
/// # let directory = std::env::temp_dir().join(format!("session-{}", std::process::id()));
/// # std::fs::create_dir(&directory)?;
/// # let path = directory.join("blk.sock");
/// # let daemon = MockDaemon::builder().start(&path)?;
///
/// let boot = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let space = AddressSpace::new(boot);
///
/// const FLUSH: u64 = 1 << 9; // what the guest's driver knows
/// let session = VhostUserSession::connect(path, SessionOptions::new(FLUSH))?;
/// # std::fs::remove_dir_all(directory)?;
/// let disk = space.attach("disk0", session)?;
///
/// // When the driver has set its queue up:
/// let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
/// let [descriptors, available, used] = [0x1000, 0x2000, 0x3000].map(GuestAddress);
/// let ring = SessionRing::new(256, [descriptors, available, used], &kick, &call)?;
/// space.with_listener(&disk, |session| session.start_ring(0, ring))??;
/// # assert_eq!(daemon.table().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # A daemon that died
///
/// Its [socket](Self::socket) is readable then, and the session, as a listener, is away. It is
/// connected to anew by one call, [`AddressSpace::reconnect_session`], or step by step,
/// [`AddressSpace::reconnect_in_steps`], and is told all that it was told before: features, the
/// present memory, its log, its rings. What becomes of the requests that it had taken:
///
/// - A daemon with in-flight buffers (protocol feature INFLIGHT_SHMFD) notes them in memory that
///   outlives it, and the next one completes them: each is completed to the guest once.
/// - For a device that completes requests in the order in which they were made available, the
///   caller says so ([`SessionOptions::with_device_in_order`]): it goes on at the used index.
/// - Otherwise the device [needs a reset](Self::needs_reset).
///
/// [`AddressSpace::reconnect_session`]: crate::AddressSpace::reconnect_session
/// [`AddressSpace::reconnect_in_steps`]: crate::AddressSpace::reconnect_in_steps
pub struct VhostUserSession {
    share: VhostUserShare,
    options: SessionOptions,
    path: Option<PathBuf>,
    agreed: Agreed,
    /// Those that run, or are to.
    rings: BTreeMap<u32, SessionRing>,
    /// Where the daemon notes the requests that it has taken, until the guest resets the device.
    inflight: Option<InflightBuffer>,
    channel: Option<Channel>,
    /// How many there were.
    channels: u64,
    /// What was last set, by SET_STATUS.
    status: Option<u8>,
    /// Present while the daemon has not been told all that it was told before.
    restart: Option<Restart>,
    needs_reset: bool,
}

impl VhostUserSession {
    /// Connects to the daemon that listens at this path, waits for it if it does not listen yet,
    /// and agrees with it.
    ///
    /// # Errors
    ///
    /// [`SessionError::Connect`]: nobody listened until the deadline. [`SessionError::Features`];
    /// [`SessionError::NotOffered`] if it lacks `VHOST_USER_F_PROTOCOL_FEATURES`;
    /// [`SessionError::Share`] if it failed on the way.
    pub fn connect(path: impl Into<PathBuf>, options: SessionOptions) -> Result<Self> {
        Self::begun(Restart::connecting(), Some(path.into()), options)
    }

    /// Agrees with a daemon that is connected already.
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Self::connect).
    pub fn on_socket(socket: UnixStream, options: SessionOptions) -> Result<Self> {
        Self::begun(Restart::on(socket.into()), None, options)
    }

    fn begun(restart: Restart, path: Option<PathBuf>, options: SessionOptions) -> Result<Self> {
        let share = VhostUserShare::away()
            .with_deadline(options.deadline)
            .with_view(options.view.clone());
        let mut session = Self {
            share,
            agreed: Agreed::new(&options),
            options,
            path,
            rings: BTreeMap::new(),
            inflight: None,
            channel: None,
            channels: 0,
            status: None,
            restart: Some(restart.until_agreed()),
            needs_reset: false,
        };
        session.run::<()>(None)?;
        Ok(session)
    }

    /// Does all that a new connection needs, and waits for it.
    fn run<B: Bitmap>(&mut self, memory: Option<&GuestMemoryShm<B>>) -> Result<()> {
        let mut result = None;
        let told = |_: &mut Self, ended| {
            result = Some(ended);
            Ok(())
        };
        let exchange = self.restarting(memory.cloned(), Instant::now(), told);
        drive(vec![Box::new(exchange)]);
        // Without one it panicked, in code of others, which breaks the share.
        result.unwrap_or_else(|| Ok(self.share.check_not_broken()?))
    }

    /// Has what the daemon answers to tables while postcopy listens told to `handler`:
    /// [`VhostUserShare::with_base_handler`].
    #[must_use]
    pub fn with_base_handler(
        mut self,
        handler: impl FnMut(GuestRange, u64) + Send + 'static,
    ) -> Self {
        self.share = self.share.with_base_handler(handler);
        self
    }

    /// Says whether postcopy listens: [`VhostUserShare::set_postcopy`].
    pub fn set_postcopy(&mut self, listens: bool) {
        self.share.set_postcopy(listens);
    }

    /// The virtio features that were acknowledged, without those of vhost-user itself.
    pub fn features(&self) -> u64 {
        self.agreed.driver_features()
    }

    /// The protocol features that were acknowledged.
    pub fn protocol_features(&self) -> Features {
        self.agreed.protocol
    }

    /// How many rings the daemon has: as [set](SessionOptions::with_rings), otherwise what
    /// GET_QUEUE_NUM says, 1 if it has no such message; at most 256, as messages name no more.
    pub fn rings(&self) -> u64 {
        self.agreed.rings
    }

    /// What the daemon holds of the memory.
    pub fn table(&self) -> &MemoryTable {
        self.share.table()
    }

    /// How many regions the daemon takes, if it was asked yet:
    /// [`VhostUserShare::max_regions`].
    pub fn max_regions(&self) -> Option<u64> {
        self.share.max_regions()
    }

    /// The connection, to be polled: while nothing is asked, it is readable when the daemon has
    /// hung up, or said what nothing asked for, after which it has to be reconnected, too. It is
    /// another one after a reconnection; `None` while there is none.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.share.socket()
    }

    /// Why no more is said to the daemon, if so: it needs to be [reconnected](Self::reconnect).
    pub fn broken(&self) -> Option<&ShareError> {
        self.share.broken()
    }

    /// Whether the guest has to reset the device: the daemon was restarted while rings ran, and it
    /// is not known which requests it had completed (["A daemon that died"](Self)). Rings are not
    /// started again then; [`forget_rings`](Self::forget_rings) after the reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset
    }

    /// Makes the daemon's memory equal to `memory`, for a session that is no listener; on a new
    /// connection, tells it all else, too.
    ///
    /// # Errors
    ///
    /// [`SessionError::RingNotShared`] for a memory without what a running ring lies in, and
    /// [`SessionError::Reconnecting`] between [steps](Self::reconnect_in_steps): nothing was sent.
    /// Those of [`VhostUserShare::update_memory`]; after [`reconnect`](Self::reconnect)
    /// those of [`connect`](Self::connect) and [`start_ring`](Self::start_ring).
    pub fn update_memory<B: Bitmap>(&mut self, memory: &GuestMemoryShm<B>) -> Result<()> {
        self.check_rings(memory)?;
        match &self.restart {
            // Nothing would end the wait for a daemon.
            Some(restart) if restart.in_steps => Err(SessionError::Reconnecting),
            Some(_) => self.run(Some(memory)),
            None => Ok(self.share.update_memory(memory)?),
        }
    }

    /// Has the next update connect to the daemon anew, at the path of [`connect`](Self::connect),
    /// agree on what was agreed before, and tell it all that it was told: features, memory, log,
    /// in-flight buffers, rings. The old connection ends at once.
    ///
    /// The next update is [`update_memory`](Self::update_memory), or one of an address space that
    /// the session is a listener of: its
    /// [`reconnect_session`](crate::AddressSpace::reconnect_session) does both. It may take the
    /// [deadline](SessionOptions::with_deadline) three times: to connect and agree, for the
    /// memory, and for all that follows it.
    ///
    /// # Errors
    ///
    /// [`SessionError::NoPath`].
    pub fn reconnect(&mut self) -> Result<()> {
        if self.path.is_none() {
            return Err(SessionError::NoPath);
        }
        // Most daemons serve one connection at a time.
        self.share.close();
        self.channel = None;
        self.restart = Some(Restart::connecting());
        Ok(())
    }

    /// Has the next update go on on a new connection: [`reconnect`](Self::reconnect).
    pub fn reconnect_on(&mut self, socket: UnixStream) {
        self.share.close();
        self.channel = None;
        self.restart = Some(Restart::on(socket.into()));
    }

    /// Sends these, and a question after them.
    fn tell(&mut self, mut messages: Vec<Message>, about: DaemonRequest) -> Result<()> {
        messages.push(Message::barrier(about));
        self.ask(messages, self.options.deadline)?;
        Ok(())
    }

    fn ask(&mut self, messages: Vec<Message>, limit: Duration) -> Result<Vec<Answer>> {
        self.check_there()?;
        Ok(self.share.ask(messages, Instant::now(), limit)?)
    }

    /// Refuses what is not for a daemon that knows nothing yet.
    fn check_there(&self) -> Result<()> {
        match self.restart {
            Some(_) => Err(SessionError::Reconnecting),
            None => Ok(()),
        }
    }

    /// Whether this protocol feature was agreed on.
    fn has(&self, feature: Features) -> bool {
        self.agreed.protocol.contains(feature)
    }

    /// Refuses what needs a protocol feature that was not agreed on.
    fn check_feature(&self, feature: Features, what: &'static str) -> Result<()> {
        match self.has(feature) {
            true => Ok(()),
            false => Err(SessionError::NotOffered { what }),
        }
    }

    /// How a message is answered that has no answer of its own.
    fn reply(&self) -> Reply {
        self.agreed.reply()
    }
}

impl fmt::Debug for VhostUserSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserSession")
            .field("path", &self.path)
            .field("agreed", &self.agreed)
            .field("rings", &self.rings.keys())
            .field("share", &self.share)
            .finish_non_exhaustive()
    }
}
