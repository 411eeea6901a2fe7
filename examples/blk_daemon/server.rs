//! One front-end after the other, until a signal ends the daemon.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{Shutdown, shutdown};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::device::Device;
use crate::failure::{OrFail, Result};
use crate::image::Image;

/// Blocks the signals that end the daemon, to be waited for, and the one by which the kernel would
/// end it where a write exceeds the limit on file sizes: that is an I/O error of the guest's.
pub(crate) fn block_signals() -> Result<SigSet> {
    let doing = || "cannot block signals";
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGINT);
    ending.add(Signal::SIGTERM);
    ending.thread_block().or_fail(doing)?;
    let mut limit = SigSet::empty();
    limit.add(Signal::SIGXFSZ);
    limit.thread_block().or_fail(doing)?;
    Ok(ending)
}

/// Starts the thread that waits for `signals` and ends the daemon. The second signal does what
/// signals do by default: it kills a daemon that is stuck.
pub(crate) fn end_by(signals: SigSet, ending: Arc<Ending>) -> Result<()> {
    let wait = move || {
        match signals.wait() {
            Ok(signal) => log::info!("ended by {signal}"),
            Err(error) => log::error!("cannot wait for signals: {error}"),
        }
        ending.begin();
        if let Err(error) = signals.thread_unblock() {
            log::error!("cannot unblock signals: {error}");
        }
        loop {
            thread::park();
        }
    };
    let thread = thread::Builder::new().name("signals".into());
    thread
        .spawn(wait)
        .map(drop)
        .or_fail(|| "cannot start a thread")
}

/// What a signal has to interrupt: the wait for a front-end, or the connection.
pub(crate) struct Ending {
    listener: OwnedFd,
    state: Mutex<EndingState>,
}

#[derive(Default)]
struct EndingState {
    begun: bool,
    connection: Option<ShutdownHandle>,
}

impl Ending {
    pub(crate) fn new(listener: &UnixListener) -> Result<Self> {
        let listener = listener.try_clone();
        Ok(Self {
            listener: listener.or_fail(|| "cannot listen")?.into(),
            state: Mutex::default(),
        })
    }

    /// Makes the wait for a front-end fail, and the connection end.
    fn begin(&self) {
        let mut state = self.lock();
        state.begun = true;
        if let Some(connection) = &state.connection {
            connection.shutdown();
        }
        if let Err(error) = shutdown(self.listener.as_raw_fd(), Shutdown::Both) {
            log::error!("cannot stop listening: {error}");
        }
    }

    fn has_begun(&self) -> bool {
        self.lock().begun
    }

    /// Names the connection that is served, if any; an end that has begun ends it at once.
    fn set_connection(&self, connection: Option<ShutdownHandle>) {
        let mut state = self.lock();
        if state.begun
            && let Some(connection) = &connection
        {
            connection.shutdown();
        }
        state.connection = connection;
    }

    fn lock(&self) -> MutexGuard<'_, EndingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves one front-end after the other until `ending` begins.
pub(crate) fn serve(
    listener: &UnixListener,
    image: &Arc<Image>,
    queues: u16,
    ending: &Ending,
) -> Result<()> {
    let doing = || "cannot serve";
    let mut listener = Listener::from(listener.try_clone().or_fail(doing)?);
    while !ending.has_begun() {
        let mut connection = Connection::new(image, queues)?;
        match connection.daemon.start(&mut listener) {
            Ok(()) => {}
            Err(_) if ending.has_begun() => break,
            Err(error) => return Err(error.to_string()).or_fail(|| "cannot accept a front-end"),
        }
        log::info!("a front-end is here");
        ending.set_connection(connection.daemon.shutdown_handle());
        let ended = connection.daemon.wait();
        ending.set_connection(None);
        match ended {
            Ok(())
            | Err(DaemonError::HandleRequest(
                ProtocolError::Disconnected | ProtocolError::PartialMessage,
            )) => log::info!("the front-end has gone"),
            Err(error) => log::warn!("the front-end was given up: {error}"),
        }
    }
    Ok(())
}

/// All that belongs to one front-end; its threads end on drop.
struct Connection {
    daemon: VhostUserDaemon<Arc<Device>>,
    device: Arc<Device>,
    exit: EventFd,
}

impl Connection {
    fn new(image: &Arc<Image>, queues: u16) -> Result<Self> {
        let doing = || "cannot prepare for a front-end";
        let exit = EventFd::new(EFD_CLOEXEC).or_fail(doing)?;
        let device = Arc::new(Device::new(image, queues)?);
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new("front-end".into(), Arc::clone(&device), memory)
            .map_err(|error| error.to_string())
            .or_fail(doing)?;

        // The threads end by an event of ours and not by `exit_event`: vhost-user-backend 0.24
        // never closes the descriptor that it takes there.
        for handler in daemon.get_epoll_handlers() {
            let watched =
                handler.register_listener(exit.as_raw_fd(), EventSet::IN, device.exit_token());
            if watched.is_err() {
                // Dropped, the daemon would wait for ever for threads that nothing can end.
                std::mem::forget(daemon);
                return watched.or_fail(doing).map(|()| unreachable!());
            }
        }
        Ok(Self {
            daemon,
            device,
            exit,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.device.end();
        // Nobody reads it: it wakes every thread.
        if let Err(error) = self.exit.write(1) {
            log::error!("cannot end the threads: {error}");
        }
    }
}
