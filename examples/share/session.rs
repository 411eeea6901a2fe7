//! A connected daemon: negotiation, its memory table, the virtqueue, hotplug.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use guest_memory_shm::mock::BlkDevice;
use guest_memory_shm::{ShareReport, TimeLimit, VhostUserShare};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};

use crate::disk::Disk;
use crate::failure::{Failure, OrFail, Result};
use crate::ram::Ram;

/// The one queue that is used.
const QUEUE: usize = 0;

/// A daemon that holds the guest's RAM, and the guest's disk through it.
pub(crate) struct Session {
    pub(crate) ram: Ram,
    pub(crate) disk: Disk,
    pub(crate) device: BlkDevice,
    pub(crate) capacity: u64,
    share: VhostUserShare<Frontend>,
    /// For all requests beside those of `share`.
    limit: TimeLimit,
}

impl Session {
    /// Connects to the daemon at `path`, negotiates, shares `ram` with it and starts the queue.
    pub(crate) fn start(path: &Path, ram: Ram, limit: Duration) -> Result<Self> {
        let stream = connect(path, limit)?;
        let doing = || format!("cannot use the daemon at {}", path.display());
        let peer = stream.try_clone().or_fail(doing)?;
        let mut frontend = Frontend::from_stream(stream, 1);

        // A daemon that is busy with another front-end accepts us later, if ever.
        let mut time = TimeLimit::new(&frontend, limit);
        let wanted = Features::CONFIG | Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS;
        let device = time
            .run(|| BlkDevice::negotiate(&mut frontend, wanted))
            .or_fail(doing)?
            .or_fail(doing)?;
        let capacity = device.capacity().ok_or_else(|| {
            let problem = "it does not tell the size of its disk (protocol feature CONFIG)";
            Failure::new(format!("{}: {problem}", doing()))
        })?;

        // The table comes before the queue: the rings must be in it.
        let mut share =
            VhostUserShare::new(frontend, device.protocol_features()).with_time_limit(limit);
        let report = share.update(&ram.table()).or_fail(doing)?;
        log::info!("the daemon took {} regions", report.added());

        let disk = Disk::new(&ram, peer, device.max_segments(), limit)?;
        let table = share.table().clone();
        time.run(|| {
            device.start_queue(share.sink_mut(), QUEUE, disk.driver(), |addr| {
                table.user_addr(addr)
            })
        })
        .or_fail(doing)?
        .or_fail(doing)?;
        Ok(Self {
            ram,
            disk,
            device,
            capacity,
            share,
            limit: time,
        })
    }

    /// Adds the region to the running guest: first the daemon learns of it, then the guest may put
    /// buffers there.
    pub(crate) fn plug(&mut self) -> Result<ShareReport> {
        let doing = || "cannot hot-add RAM";
        let larger = self.ram.plugged().or_fail(doing)?;
        let report = self.share.update(&larger.memory_table()).or_fail(doing)?;
        self.ram.publish(larger)?;
        Ok(report)
    }

    /// Takes it away again: first from the guest, which has no buffers there any more, then from
    /// the daemon.
    pub(crate) fn unplug(&mut self) -> Result<ShareReport> {
        let doing = || "cannot remove the hot-added RAM";
        let smaller = self.ram.unplugged().or_fail(doing)?;
        self.ram.publish(smaller)?;
        self.share.update(&self.ram.table()).or_fail(doing)
    }

    /// How many regions the daemon has acknowledged.
    pub(crate) fn regions(&self) -> usize {
        self.share.table().regions().len()
    }

    /// How many regions the daemon takes, if it takes them one by one.
    pub(crate) fn slots(&self) -> Option<u64> {
        self.share.max_regions()
    }

    /// Stops the queue and hangs up.
    pub(crate) fn end(mut self) -> Result<()> {
        let doing = || "cannot stop the queue";
        let (device, share) = (&self.device, &mut self.share);
        self.limit
            .run(|| device.stop_queue(share.sink_mut(), QUEUE))
            .or_fail(doing)?
            .or_fail(doing)?;
        Ok(())
    }
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
