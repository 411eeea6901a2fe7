//! A connected daemon: what is agreed with it, its memory, the virtqueue, hotplug.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use guest_memory_shm::{ListenerId, SessionOptions, VhostUserSession};
use vhost::vhost_user::VhostUserProtocolFeatures;

use crate::daemon::LocalDaemon;
use crate::disk::{Disk, SECTOR};
use crate::failure::{Failure, OrFail, Result};
use crate::ram::{Ram, rings};

/// The one queue that is used.
const QUEUE: u32 = 0;

/// `VIRTIO_BLK_F_SEG_MAX`: a request has a largest number of buffers.
const SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_BLK_SIZE`.
const BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`.
const FLUSH: u64 = 1 << 9;
/// What the driver in `disk` knows.
const DRIVER: u64 = SEG_MAX | BLK_SIZE | FLUSH;

/// Where a daemon is.
#[derive(Clone, Copy)]
pub(crate) enum Endpoint<'a> {
    /// In another process, which listens there.
    Socket(&'a Path),
    /// In this process.
    Local(&'a LocalDaemon),
}

impl fmt::Display for Endpoint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "at {}", path.display()),
            Self::Local(_) => f.write_str("in this process"),
        }
    }
}

/// A daemon that holds the guest's RAM, and the guest's disk through it.
pub(crate) struct Session {
    pub(crate) ram: Arc<Ram>,
    pub(crate) disk: Disk,
    pub(crate) capacity: u64,
    daemon: ListenerId<VhostUserSession>,
}

impl Session {
    /// Connects to the `nth` daemon, agrees with it, shares `ram` with it and starts the queue.
    pub(crate) fn start(
        nth: usize,
        endpoint: &Endpoint,
        ram: Arc<Ram>,
        limit: Duration,
    ) -> Result<Self> {
        let doing = || format!("cannot use the daemon {endpoint}");
        let options = SessionOptions::new(DRIVER)
            .with_deadline(limit)
            .with_drain_deadline(limit);
        let connected = match endpoint {
            Endpoint::Socket(path) => VhostUserSession::connect(*path, options),
            Endpoint::Local(daemon) => VhostUserSession::on_socket(daemon.connect()?, options),
        };
        let mut session = connected.or_fail(doing)?;
        let (capacity, max_segments) = configuration(&mut session).or_fail(doing)?;
        let socket = session.socket().map(|socket| socket.try_clone_to_owned());
        let socket = socket
            .ok_or_else(|| Failure::new(doing()))?
            .or_fail(doing)?;
        let disk = Disk::new(&ram, rings(nth), socket, max_segments, limit)?;
        let ring = disk.driver().session_ring().or_fail(doing)?;

        // The memory comes before the queue, which lies in it. From here on the daemon is told of
        // each change of the RAM, or there is none.
        let name = format!("daemon {}", nth + 1);
        let daemon = ram.space().attach_required(name, session).or_fail(doing)?;
        let this = Self {
            ram,
            disk,
            capacity,
            daemon,
        };
        this.with(|session| session.start_ring(QUEUE, ring))?
            .or_fail(doing)?;
        Ok(this)
    }

    /// Adds the region to the running guest: first the daemon learns of it, then the guest may put
    /// buffers there.
    pub(crate) fn plug(&mut self) -> Result<()> {
        let plugged = self.ram.space().insert(self.ram.plug().clone());
        // The daemon may not lag, so there is nothing in the report.
        plugged.map(drop).or_fail(|| "cannot hot-add RAM")
    }

    /// Takes it away again: first from the guest, which has no buffers there any more, then from
    /// the daemon.
    pub(crate) fn unplug(&mut self) -> Result<()> {
        let plug = self.ram.plug().range();
        let removed = self.ram.space().remove(plug);
        removed
            .map(drop)
            .or_fail(|| "cannot remove the hot-added RAM")
    }

    /// How many regions the daemon has acknowledged.
    pub(crate) fn regions(&self) -> Result<usize> {
        self.with(|session| session.table().regions().len())
    }

    /// How many regions the daemon takes, if it takes them one by one.
    pub(crate) fn slots(&self) -> Result<Option<u64>> {
        self.with(|session| session.max_regions())
    }

    /// What was agreed on: virtio features, and those of the protocol.
    pub(crate) fn features(&self) -> Result<(u64, VhostUserProtocolFeatures)> {
        self.with(|session| (session.features(), session.protocol_features()))
    }

    fn with<T>(&self, work: impl FnOnce(&mut VhostUserSession) -> T) -> Result<T> {
        let done = self.ram.space().with_listener(&self.daemon, work);
        done.or_fail(|| "cannot use the session with the daemon")
    }

    /// Stops the queue and hangs up.
    pub(crate) fn end(self) -> Result<()> {
        let doing = || "cannot stop the queue";
        self.with(|session| session.stop_ring(QUEUE))?
            .or_fail(doing)?;
        let detached = self.ram.space().detach(self.daemon);
        detached.map(drop).or_fail(doing)
    }
}

/// What the daemon says of its disk: its size in bytes, and how many buffers a request may have.
fn configuration(
    session: &mut VhostUserSession,
) -> std::result::Result<(u64, Option<u32>), Box<dyn std::error::Error + Send + Sync>> {
    // struct virtio_blk_config: le64 capacity, le32 size_max, le32 seg_max.
    let space = session.config(0, 16)?;
    let (Some(capacity), Some(seg_max)) = (space.first_chunk(), space.last_chunk()) else {
        return Err("it does not tell the size of its disk".into());
    };
    let capacity = u64::from_le_bytes(*capacity).saturating_mul(SECTOR);
    let limited = session.features() & SEG_MAX != 0;
    Ok((capacity, limited.then(|| u32::from_le_bytes(*seg_max))))
}
