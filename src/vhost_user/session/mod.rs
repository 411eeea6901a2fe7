//! All that is agreed with one daemon, across reconnections: features, memory, rings, log.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::bitmap::Bitmap;

use crate::logs;
use crate::memory::GuestMemoryShm;
use crate::range::GuestRange;
use crate::vhost_user::share::{ShareError, StoppedLog, VhostUserShare};
use crate::vhost_user::table::MemoryTable;
use crate::vhost_user::wire::{Answer, DaemonRequest, Message, NUMBER, Reply, number, numbers};

mod error;
mod listener;
mod options;
mod rings;

use error::Result;
pub use error::SessionError;
pub use options::SessionOptions;
pub use rings::SessionRing;

/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Those that no driver decides about.
const OWN_BITS: u64 = LOG_ALL | PROTOCOL_FEATURES;

/// The protocol features that a session knows how to use.
const KNOWN: Features = Features::MQ
    .union(Features::REPLY_ACK)
    .union(Features::CONFIGURE_MEM_SLOTS)
    .union(Features::LOG_SHMFD)
    .union(Features::CONFIG);

/// How long to wait before a daemon that does not listen yet is tried again.
const RETRY: Duration = Duration::from_millis(10);
/// The longest configuration space (vhost-user specification, "Virtio device config space").
const MAX_CONFIG: usize = 256;

/// A session with one daemon: all that was agreed with it, and all that it was told, across
/// reconnections.
///
/// It connects, agrees on what the caller's driver knows, keeps the daemon's memory equal to an
/// address space (it is a [`MemoryListener`](crate::MemoryListener)), starts and stops rings,
/// keeps a dirty log. No call waits without a deadline, and no thread is started.
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
pub struct VhostUserSession {
    share: VhostUserShare,
    options: SessionOptions,
    path: Option<PathBuf>,
    agreed: Agreed,
    rings: BTreeMap<u32, SessionRing>,
    /// The daemon has yet to be told of the rings, and to log.
    replay: bool,
    needs_reset: bool,
}

/// What both sides know.
#[derive(Clone, Copy, Debug)]
struct Agreed {
    features: u64,
    protocol: Features,
    rings: u64,
    /// The daemon offers `VHOST_F_LOG_ALL`.
    logs: bool,
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
        let (path, begun) = (path.into(), Instant::now());
        let socket = open(&path, begun, options.deadline)?;
        let mut session = Self::agreed(socket, options, begun)?;
        session.path = Some(path);
        Ok(session)
    }

    /// Agrees with a daemon that is connected already.
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Self::connect).
    pub fn on_socket(socket: UnixStream, options: SessionOptions) -> Result<Self> {
        Self::agreed(socket.into(), options, Instant::now())
    }

    fn agreed(socket: OwnedFd, options: SessionOptions, begun: Instant) -> Result<Self> {
        let view = options.view.clone();
        let mut share = VhostUserShare::new(socket, Features::empty())?
            .with_deadline(options.deadline)
            .with_view(view);
        let (wanted, required) = (options.features, options.required);
        let agreed = agree(&mut share, &options, begun, wanted, required)?;
        Ok(Self {
            share,
            options,
            path: None,
            agreed,
            rings: BTreeMap::new(),
            replay: false,
            needs_reset: false,
        })
    }

    /// The virtio features that were acknowledged, without those of vhost-user itself.
    pub fn features(&self) -> u64 {
        self.agreed.features & !OWN_BITS
    }

    /// The protocol features that were acknowledged.
    pub fn protocol_features(&self) -> Features {
        self.agreed.protocol
    }

    /// How many rings the daemon has: what GET_QUEUE_NUM says, 1 if it has no such message.
    pub fn rings(&self) -> u64 {
        self.agreed.rings
    }

    /// What the daemon holds of the memory.
    pub fn table(&self) -> &MemoryTable {
        self.share.table()
    }

    /// Why no more is said to the daemon, if so: it needs to be [reconnected](Self::reconnect).
    pub fn broken(&self) -> Option<&ShareError> {
        self.share.broken()
    }

    /// Whether the guest has to reset the device: the daemon was restarted while rings ran, and it
    /// is not known which requests it had completed
    /// ([`SessionOptions::with_device_in_order`]). Rings are not started again then;
    /// [`forget_rings`](Self::forget_rings) after the reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset
    }

    /// Makes the daemon's memory equal to `memory`, for a session that is no listener; rings that
    /// ran before a reconnection are started.
    ///
    /// # Errors
    ///
    /// Those of [`VhostUserShare::update_memory`], and of [`start_ring`](Self::start_ring).
    pub fn update_memory<B: Bitmap>(&mut self, memory: &GuestMemoryShm<B>) -> Result<()> {
        self.check_rings(memory)?;
        self.share.update_memory(memory)?;
        match self.replay {
            true => self.start_again(memory),
            false => Ok(()),
        }
    }

    /// Reads `len` bytes of the device's configuration space.
    ///
    /// # Errors
    ///
    /// [`SessionError::NotOffered`] without the protocol feature CONFIG, or where the daemon has
    /// no such part; [`SessionError::Share`].
    pub fn config(&mut self, offset: u32, len: usize) -> Result<Vec<u8>> {
        let message = self.config_message(FrontendReq::GET_CONFIG, offset, &vec![0; len])?;
        let answers = self.ask(vec![message], self.options.deadline)?;
        let body = answers.into_iter().next().map(|answer| answer.body);
        let bytes = body.as_deref().and_then(|body| body.get(12..));
        bytes.map(<[u8]>::to_vec).ok_or(SessionError::NotOffered {
            what: "this part of its configuration",
        })
    }

    /// Writes to the device's configuration space.
    ///
    /// # Errors
    ///
    /// Those of [`config`](Self::config).
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        let mut message = self.config_message(FrontendReq::SET_CONFIG, offset, bytes)?;
        message = message.with_reply(self.reply());
        self.tell(vec![message], DaemonRequest::Config)
    }

    fn config_message(&self, code: FrontendReq, offset: u32, bytes: &[u8]) -> Result<Message> {
        let what = match self.agreed.protocol.contains(Features::CONFIG) {
            true if (1..=MAX_CONFIG).contains(&bytes.len()) => {
                let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                let mut body = [offset, size, 0].map(u32::to_ne_bytes).concat();
                body.extend(bytes);
                return Ok(Message::new(DaemonRequest::Config, code, body, Reply::Like));
            }
            true => "configuration of such a length (1 to 256 bytes)",
            false => "CONFIG",
        };
        Err(SessionError::NotOffered { what })
    }

    /// Starts a ring, and wakes the daemon once it knows all of it.
    ///
    /// # Errors
    ///
    /// [`SessionError::RingState`], [`SessionError::NoSuchRing`], [`SessionError::RingSize`],
    /// [`SessionError::RingNotShared`]: nothing was sent. [`SessionError::Share`]; the ring does
    /// not run then.
    pub fn start_ring(&mut self, index: u32, ring: SessionRing) -> Result<()> {
        if self.rings.contains_key(&index) {
            return Err(SessionError::RingState { index, runs: true });
        }
        let rings = self.agreed.rings;
        if u64::from(index) >= rings {
            return Err(SessionError::NoSuchRing { index, rings });
        }
        ring.check_size()?;
        self.send_ring(index, &ring)?;
        self.rings.insert(index, ring);
        Ok(())
    }

    /// Stops a ring: the daemon has completed what it had begun, and uses neither the ring nor the
    /// buffers of its requests any more. Gives the index at which it would go on.
    ///
    /// # Errors
    ///
    /// [`SessionError::RingState`]; [`SessionError::Share`], also if it takes longer than the
    /// [deadline](SessionOptions::with_drain_deadline).
    pub fn stop_ring(&mut self, index: u32) -> Result<u16> {
        if !self.rings.contains_key(&index) {
            return Err(SessionError::RingState { index, runs: false });
        }
        let ask = vec![SessionRing::stop_message(index)];
        let answers = self.ask(ask, self.options.drain_deadline)?;
        self.rings.remove(&index);
        // Two numbers of 4 bytes: the ring, and an index that has 2 bytes.
        let body = answers
            .first()
            .and_then(|answer| answer.body.get(4..)?.first_chunk());
        let base = body.map_or(0, |base| u32::from_ne_bytes(*base));
        Ok(u16::try_from(base & 0xffff).unwrap_or_default())
    }

    /// Forgets all rings, without a word to the daemon: the guest has reset the device, or there
    /// is no daemon.
    pub fn forget_rings(&mut self) {
        self.rings.clear();
        self.needs_reset = false;
        self.replay = false;
    }

    /// Has the daemon log what it writes from now on, in memory and used rings, across changes of
    /// the memory and reconnections: [`VhostUserShare::start_log`], and the features and rings.
    ///
    /// # Errors
    ///
    /// [`SessionError::NotOffered`] without `VHOST_F_LOG_ALL`; [`SessionError::Share`], as for
    /// [`VhostUserShare::start_log`].
    pub fn start_log(&mut self) -> Result<()> {
        self.check_logs()?;
        self.share.start_log()?;
        let told = self
            .tell_features()
            .and_then(|()| self.tell_ring_addresses());
        if told.is_err() {
            // What was noted until now is of no use to one who thinks that it is not logged.
            drop(self.share.stop_log());
        }
        told
    }

    /// Takes what the daemon wrote since the last time: [`VhostUserShare::drain_dirty`].
    pub fn drain_dirty(&mut self) -> Vec<GuestRange> {
        self.share.drain_dirty()
    }

    /// Ends logging: [`VhostUserShare::stop_log`]. A daemon that cannot be told of it may go on
    /// logging, where nobody reads it.
    pub fn stop_log(&mut self) -> StoppedLog {
        if self.share.is_logging() && self.share.broken().is_none() {
            let features = self.agreed.features & !LOG_ALL;
            if let Err(error) = self.set_features(features) {
                logs::warn!("the daemon may go on logging: {error}");
            }
        }
        self.share.stop_log()
    }

    /// Connects to the daemon anew, at the path of [`connect`](Self::connect), and agrees on what
    /// was agreed before. It is told the memory, its log and its rings at the next update: as a
    /// listener, use [`AddressSpace::reconnect_session`](crate::AddressSpace::reconnect_session).
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Self::connect), [`SessionError::NoPath`].
    pub fn reconnect(&mut self) -> Result<()> {
        let path = self.path.clone().ok_or(SessionError::NoPath)?;
        // Most daemons serve one connection at a time.
        self.share.close();
        let begun = Instant::now();
        let socket = open(&path, begun, self.options.deadline)?;
        self.go_on(socket, begun)
    }

    /// Goes on on a new connection: [`reconnect`](Self::reconnect).
    ///
    /// # Errors
    ///
    /// Those of [`reconnect`](Self::reconnect).
    pub fn reconnect_on(&mut self, socket: UnixStream) -> Result<()> {
        self.go_on(socket.into(), Instant::now())
    }

    fn go_on(&mut self, socket: OwnedFd, begun: Instant) -> Result<()> {
        self.share.reconnect(socket, Features::empty())?;
        // No more and no less than before: the guest's driver has agreed to that.
        let before = self.features();
        match agree(&mut self.share, &self.options, begun, before, before) {
            Ok(agreed) => {
                self.agreed = agreed;
                self.replay = !self.rings.is_empty() || self.share.is_logging();
                Ok(())
            }
            Err(error) => {
                self.share.give_up(error.to_string());
                Err(error)
            }
        }
    }

    /// Starts what ran before the connection was lost. Where that fails, it is tried again.
    fn start_again<B: Bitmap>(&mut self, memory: &GuestMemoryShm<B>) -> Result<()> {
        if self.share.is_logging() {
            self.check_logs()?;
            self.tell_features()?;
        }
        if !self.options.in_order {
            self.needs_reset = !self.rings.is_empty();
        } else {
            for (index, ring) in &mut self.rings {
                ring.base = ring.used_index(*index, memory)?;
            }
            // Taken out for that, and put back whatever comes of it.
            let rings = std::mem::take(&mut self.rings);
            let mut rings_sent = rings.iter();
            let sent = rings_sent.try_for_each(|(index, ring)| self.send_ring(*index, ring));
            self.rings = rings;
            sent?;
        }
        self.replay = false;
        Ok(())
    }

    fn send_ring(&mut self, index: u32, ring: &SessionRing) -> Result<()> {
        let logs = self.share.is_logging();
        let messages = ring.start_messages(index, self.share.table(), logs, self.reply())?;
        self.ask(messages, self.options.deadline)?;
        ring.wake(index)
    }

    fn ask(&mut self, messages: Vec<Message>, limit: Duration) -> Result<Vec<Answer>> {
        Ok(self.share.ask(messages, Instant::now(), limit)?)
    }

    /// Whether the daemon can be told to log.
    fn check_logs(&self) -> Result<()> {
        let what = "VHOST_F_LOG_ALL";
        match self.agreed.logs {
            true => Ok(()),
            false => Err(SessionError::NotOffered { what }),
        }
    }

    /// Refuses a memory without what running rings lie in.
    fn check_rings<B: Bitmap>(&self, memory: &GuestMemoryShm<B>) -> Result<()> {
        if self.rings.is_empty() || self.needs_reset {
            return Ok(());
        }
        let next = memory.memory_table_as(&self.options.view);
        let next = next.map_err(ShareError::from)?;
        for (index, ring) in &self.rings {
            let places = ring.places(*index, &next)?;
            let before = ring.places(*index, self.share.table());
            // Replaced by another region, too, it is taken away.
            if before.is_ok_and(|before| before != places) {
                let [(part, addr, len), ..] = ring.parts();
                return Err(SessionError::RingNotShared {
                    index: *index,
                    part,
                    addr,
                    len,
                });
            }
        }
        Ok(())
    }

    fn tell_features(&mut self) -> Result<()> {
        let log = if self.share.is_logging() { LOG_ALL } else { 0 };
        self.set_features(self.agreed.features & !LOG_ALL | log)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let message = set_features(features, self.reply());
        self.tell(vec![message], DaemonRequest::Negotiate)?;
        self.agreed.features = features;
        Ok(())
    }

    /// Says where the rings are once more, and whether they are logged.
    fn tell_ring_addresses(&mut self) -> Result<()> {
        let (table, logs) = (self.share.table(), self.share.is_logging());
        let mut all = Vec::new();
        for (index, ring) in &self.rings {
            let messages = ring.start_messages(*index, table, logs, self.reply())?;
            all.extend(messages.into_iter().filter(Message::is_ring_address));
        }
        self.tell(all, DaemonRequest::Negotiate)
    }

    /// Sends these, and a question after them.
    fn tell(&mut self, mut messages: Vec<Message>, about: DaemonRequest) -> Result<()> {
        messages.push(Message::barrier(about));
        self.ask(messages, self.options.deadline)?;
        Ok(())
    }

    fn reply(&self) -> Reply {
        match self.agreed.protocol.contains(Features::REPLY_ACK) {
            true => Reply::Ack,
            false => Reply::None,
        }
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

fn set_features(features: u64, reply: Reply) -> Message {
    let about = DaemonRequest::Negotiate;
    Message::new(about, FrontendReq::SET_FEATURES, numbers([features]), reply)
}

/// Agrees with a daemon that was told nothing yet, on what it offers of `wanted`.
fn agree(
    share: &mut VhostUserShare,
    options: &SessionOptions,
    begun: Instant,
    wanted: u64,
    required: u64,
) -> Result<Agreed> {
    let about = DaemonRequest::Negotiate;
    let message = |code, body, reply| Message::new(about, code, body, reply);
    let ask = |share: &mut VhostUserShare, all| -> Result<Vec<u64>> {
        let answers = share.ask(all, begun, options.deadline)?;
        Ok(answers.iter().map(|answer| number(&answer.body)).collect())
    };
    let owner = message(FrontendReq::SET_OWNER, Vec::new(), Reply::None);
    let offered = ask(share, vec![owner, Message::barrier(about)])?;
    let offered = offered.first().copied().unwrap_or_default();
    let missing = required & !offered;
    if missing != 0 {
        return Err(SessionError::Features { missing, offered });
    }
    if offered & PROTOCOL_FEATURES == 0 {
        let what = "VHOST_USER_F_PROTOCOL_FEATURES";
        return Err(SessionError::NotOffered { what });
    }
    let question = message(FrontendReq::GET_PROTOCOL_FEATURES, Vec::new(), NUMBER);
    let protocol = ask(share, vec![question])?;
    let protocol = protocol.first().copied().unwrap_or_default();
    let protocol = Features::from_bits_truncate(protocol) & options.protocol;
    let features = offered & wanted | PROTOCOL_FEATURES;
    let reply = match protocol.contains(Features::REPLY_ACK) {
        true => Reply::Ack,
        false => Reply::None,
    };
    let bits = numbers([protocol.bits()]);
    let mut all = vec![
        // Not acknowledged: it decides whether others are.
        message(FrontendReq::SET_PROTOCOL_FEATURES, bits, Reply::None),
        set_features(features, reply),
    ];
    all.push(match protocol.contains(Features::MQ) {
        true => message(FrontendReq::GET_QUEUE_NUM, Vec::new(), NUMBER),
        false => Message::barrier(about),
    });
    let answers = ask(share, all)?;
    let rings = match protocol.contains(Features::MQ) {
        true => answers.last().copied().unwrap_or(1),
        false => 1,
    };
    share.set_protocol_features(protocol);
    Ok(Agreed {
        features,
        protocol,
        rings,
        logs: offered & LOG_ALL != 0,
    })
}

/// Connects, and waits until somebody listens, and has room for one more.
fn open(path: &Path, begun: Instant, limit: Duration) -> Result<OwnedFd> {
    let failed = |errno: Errno| SessionError::Connect {
        path: path.to_owned(),
        source: errno.into(),
    };
    let address = UnixAddr::new(path).map_err(failed)?;
    // Without waiting: connect(2) waits as long as nobody accepts, once enough others wait.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => return Ok(socket),
            Err(errno) if begun.elapsed() >= limit => return Err(failed(errno)),
            Err(_) => sleep(RETRY),
        }
    }
}
