//! A connected daemon: negotiation, its memory table, the virtqueue, hotplug.

use std::fmt;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use guest_memory_shm::mock::BlkDevice;
use guest_memory_shm::{ListenerId, VhostUserShare};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};

use crate::daemon::LocalDaemon;
use crate::disk::Disk;
use crate::failure::{Failure, OrFail, Result};
use crate::ram::{Ram, rings};

/// The one queue that is used.
const QUEUE: usize = 0;

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
    pub(crate) device: BlkDevice,
    pub(crate) capacity: u64,
    share: ListenerId<VhostUserShare>,
    /// For all requests beside those of `share`.
    frontend: Frontend,
    /// What `frontend` speaks through.
    socket: UnixStream,
    limit: Duration,
}

impl Session {
    /// Connects to the `nth` daemon, negotiates, shares `ram` with it and starts the queue.
    pub(crate) fn start(
        nth: usize,
        endpoint: &Endpoint,
        ram: Arc<Ram>,
        limit: Duration,
    ) -> Result<Self> {
        let stream = match endpoint {
            Endpoint::Socket(path) => connect(path, limit)?,
            Endpoint::Local(daemon) => daemon.connect()?,
        };
        let doing = || format!("cannot use the daemon {endpoint}");
        let peer = stream.try_clone().or_fail(doing)?;
        let socket = stream.try_clone().or_fail(doing)?;
        let mut frontend = Frontend::from_stream(stream, 1);

        // A daemon that is busy with another frontend accepts us later, if ever.
        let wanted = Features::CONFIG | Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS;
        let device = within(limit, &socket, || {
            BlkDevice::negotiate(&mut frontend, wanted)
        })
        .or_fail(doing)?
        .or_fail(doing)?;
        let capacity = device.capacity().ok_or_else(|| {
            let problem = "it does not tell the size of its disk (protocol feature CONFIG)";
            Failure::new(format!("{}: {problem}", doing()))
        })?;

        // The table comes before the queue: the rings must be in it. From here on the daemon is
        // told of each change of the RAM, or there is none.
        let share = VhostUserShare::new(&frontend, device.protocol_features()).or_fail(doing)?;
        let share = ram
            .space()
            .attach_required(format!("daemon {}", nth + 1), share.with_deadline(limit))
            .or_fail(doing)?;

        let disk = Disk::new(&ram, rings(nth), peer, device.max_segments(), limit)?;
        let table = ram
            .space()
            .with_listener(&share, |share| share.table().clone())
            .or_fail(doing)?;
        let translate = |addr| table.user_addr(addr);
        within(limit, &socket, || {
            device.start_queue(&mut frontend, QUEUE, disk.driver(), translate)
        })
        .or_fail(doing)?
        .or_fail(doing)?;
        Ok(Self {
            ram,
            disk,
            device,
            capacity,
            share,
            frontend,
            socket,
            limit,
        })
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
        self.ask(|share| share.table().regions().len())
    }

    /// How many regions the daemon takes, if it takes them one by one.
    pub(crate) fn slots(&self) -> Result<Option<u64>> {
        self.ask(|share| share.max_regions())
    }

    fn ask<T>(&self, question: impl FnOnce(&mut VhostUserShare) -> T) -> Result<T> {
        let answer = self.ram.space().with_listener(&self.share, question);
        answer.or_fail(|| "cannot ask what the daemon holds")
    }

    /// Stops the queue and hangs up.
    pub(crate) fn end(mut self) -> Result<()> {
        let doing = || "cannot stop the queue";
        drop(self.ram.space().detach(self.share).or_fail(doing)?);
        within(self.limit, &self.socket, || {
            self.device.stop_queue(&mut self.frontend, QUEUE)
        })
        .or_fail(doing)?
        .or_fail(doing)?;
        Ok(())
    }
}

/// Makes requests on the frontend whose connection `socket` is, which wait for their answers:
/// hangs up after `limit`.
fn within<T>(limit: Duration, socket: &UnixStream, requests: impl FnOnce() -> T) -> Result<T> {
    let (done, over) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let late = over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            // It may have ended by itself.
            let _ = late.then(|| socket.shutdown(Shutdown::Both));
            late
        });
        let answered = requests();
        drop(done);
        match watch.join() {
            Ok(false) => Ok(answered),
            _ => Err(Failure::new(format!(
                "the daemon did not answer within {limit:?}: restart it, or allow more with \
                 --deadline"
            ))),
        }
    })
}

/// connect(2) waits where too many others wait already: that is given up after `limit`.
fn connect(path: &Path, limit: Duration) -> Result<UnixStream> {
    let doing = || {
        format!(
            "cannot connect to {}, where a vhost-user-blk daemon must be listening",
            path.display()
        )
    };
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    thread::Builder::new()
        .name("connect".into())
        .spawn(move || sender.send(UnixStream::connect(path)))
        .or_fail(doing)?;
    receiver
        .recv_timeout(limit)
        .or_fail(|| format!("{}, within {limit:?}", doing()))?
        .or_fail(doing)
}
