//! One frontend after the other, until a signal ends the daemon.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::socket;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::device::Device;
use crate::failure::{OrFail, Result};
use crate::handler::Handler;
use crate::image::Image;
use crate::socket::Socket;

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

/// Starts the thread that waits for `signals` and ends the daemon. The second signal kills a
/// daemon that is stuck, as signals do by default; its socket goes all the same.
pub(crate) fn end_by(signals: SigSet, ending: Arc<Ending>, socket: Arc<Socket>) -> Result<()> {
    let wait = move || {
        match signals.wait() {
            Ok(signal) => log::info!("ended by {signal}"),
            Err(error) => log::error!("cannot wait for signals: {error}"),
        }
        ending.begin();
        if let Ok(signal) = signals.wait() {
            socket.remove();
            // If the process was started with the signal ignored, it does not kill.
            let _ = signals.thread_unblock().and_then(|()| raise(signal));
            process::exit(128 + signal as i32);
        }
    };
    let thread = thread::Builder::new().name("signals".into());
    thread
        .spawn(wait)
        .map(drop)
        .or_fail(|| "cannot start a thread")
}

/// What a signal has to interrupt: the wait for a frontend, or the connection.
pub(crate) struct Ending {
    listener: OwnedFd,
    state: Mutex<EndingState>,
}

#[derive(Default)]
struct EndingState {
    begun: bool,
    connection: Option<UnixStream>,
}

impl Ending {
    pub(crate) fn new(listener: &UnixListener) -> Result<Self> {
        let listener = listener.try_clone();
        Ok(Self {
            listener: listener.or_fail(|| "cannot listen")?.into(),
            state: Mutex::default(),
        })
    }

    /// Makes the wait for a frontend fail, and the connection end.
    fn begin(&self) {
        let mut state = self.lock();
        state.begun = true;
        if let Some(connection) = &state.connection {
            hang_up(connection);
        }
        if let Err(error) = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both) {
            log::error!("cannot stop listening: {error}");
        }
    }

    fn has_begun(&self) -> bool {
        self.lock().begun
    }

    /// Names the connection that is served, if any; an end that has begun ends it at once.
    fn set_connection(&self, connection: Option<UnixStream>) {
        let mut state = self.lock();
        if state.begun
            && let Some(connection) = &connection
        {
            hang_up(connection);
        }
        state.connection = connection;
    }

    fn lock(&self) -> MutexGuard<'_, EndingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hang_up(connection: &UnixStream) {
    // An error says that the frontend was faster.
    let _ = connection.shutdown(Shutdown::Both);
}

/// Serves one frontend after the other until `ending` begins.
pub(crate) fn serve(
    listener: &UnixListener,
    image: &Arc<Image>,
    queues: u16,
    ending: &Ending,
) -> Result<()> {
    while !ending.has_begun() {
        let connection = match listener.accept() {
            Ok((connection, _)) => connection,
            Err(_) if ending.has_begun() => break,
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error).or_fail(|| "cannot accept a frontend"),
        };
        log::info!("a frontend is here");
        let ended = serve_one(connection, image, queues, ending);
        ending.set_connection(None);
        match ended {
            Ok(
                ProtocolError::Disconnected
                | ProtocolError::PartialMessage
                | ProtocolError::SocketBroken(_),
            ) => log::info!("the frontend has gone"),
            _ if ending.has_begun() => log::info!("the frontend was hung up on"),
            Ok(error) => log::warn!("the frontend was given up: {error}"),
            // The next one may find more descriptors or memory.
            Err(error) => log::warn!("cannot serve a frontend, it was hung up on: {error}"),
        }
    }
    Ok(())
}

/// Serves a frontend to its end, which is the result. Nothing is left of it then.
fn serve_one(
    connection: UnixStream,
    image: &Arc<Image>,
    queues: u16,
    ending: &Ending,
) -> io::Result<ProtocolError> {
    let device = Arc::new(Device::new(image, queues));
    let handler = Handler::new(image, device)?;
    ending.set_connection(Some(connection.try_clone()?));
    let handler = Arc::new(Mutex::new(handler));
    let mut requests = BackendReqHandler::from_stream(connection, handler);
    loop {
        if let Err(error) = requests.handle_request() {
            return Ok(error);
        }
    }
}
