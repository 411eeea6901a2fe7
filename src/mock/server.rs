//! The thread that accepts connections and serves one after the other.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::backend::Backend;
use super::gate;
use super::state::{Link, Listening, Mapped, Shared};
use crate::logs;

/// A listening socket without a file: the kernel chooses a free abstract name.
pub(super) fn listen_unnamed() -> io::Result<UnixListener> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // An address without a name asks for one, see "Autobind feature" in unix(7).
    bind(fd.as_raw_fd(), &UnixAddr::new_unnamed())?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(UnixListener::from(fd))
}

/// A new connection to `listener`.
pub(super) fn connect_to(listener: &UnixListener) -> io::Result<UnixStream> {
    UnixStream::connect_addr(&listener.local_addr()?)
}

/// How long the thread waits where nothing tells it that there are descriptors or memory again.
const SHORTAGE: Duration = Duration::from_millis(20);

/// Serves one connection after the other until the owner stops the daemon, and then shuts
/// `listener` down to wake this thread. Where connections cannot be accepted any more, the
/// listening ends as well: no client shall wait for an answer that never comes.
pub(super) fn run(listener: &UnixListener, mut spare: Spare, shared: &Arc<Shared>) {
    while !shared.state().stopping {
        match spare.accept(listener) {
            Ok(Some(front)) => {
                if let Err(error) = serve(front, shared) {
                    logs::debug!("mock daemon: the connection ended with an error: {error}");
                }
                shared.disconnect();
            }
            Ok(None) => {}
            Err(_) if shared.state().stopping => {}
            Err(error) if is_shortage(&error) => shared.wait_stopping(SHORTAGE),
            Err(error) => {
                logs::error!("mock daemon: stops listening, it cannot accept: {error}");
                shared.state().listener = Listening::Failed(error);
                return;
            }
        }
    }
}

/// A descriptor that is kept for the time when there is no other.
///
/// A connection that cannot be accepted stays in the queue, and its client waits. With the spare
/// one's number it can be accepted, to be hung up on: its client learns that it is not served.
pub(super) struct Spare {
    kept: Option<EventFd>,
    /// A shortage is one line in the log.
    short: bool,
}

impl Spare {
    pub(super) fn new() -> io::Result<Spare> {
        Ok(Spare {
            kept: Some(EventFd::new(EFD_CLOEXEC)?),
            short: false,
        })
    }

    /// The next connection to serve; `None` if there is none after all.
    fn accept(&mut self, listener: &UnixListener) -> io::Result<Option<UnixStream>> {
        match listener.accept() {
            Err(error) if is_shortage(&error) => {
                if !self.short {
                    logs::warn!("mock daemon: hangs up on clients until there is more: {error}");
                }
                self.short = true;
            }
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => return Ok(None),
            accepted => {
                self.short = false;
                return accepted.map(|(front, _)| Some(front));
            }
        }
        // Another thread may be faster and take the number: then this fails, too.
        drop(self.kept.take());
        let accepted = listener.accept();
        // It waits where no client does yet: there may be more by now.
        self.kept = EventFd::new(EFD_CLOEXEC).ok();
        let (front, _) = accepted?;
        if self.kept.is_some() {
            return Ok(Some(front));
        }
        drop(front);
        self.kept = EventFd::new(EFD_CLOEXEC).ok();
        Ok(None)
    }
}

/// Whether accept(2) failed for want of something that may be there again.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
    )
}

/// Serves one frontend with a daemon of its own, from the first request to the hang-up.
fn serve(front: UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    let (daemon, inner) = InnerDaemon::start(shared)?;
    let link = Arc::new(Link { front, inner });
    let result = match shared.connect(&link) {
        true => gate::relay(&link, shared),
        false => Ok(()),
    };
    // The daemon waits for requests: end its connection before waiting for it.
    link.hang_up();
    drop(daemon);
    result
}

/// The daemon at the other end of the gate, and what ends its threads.
struct InnerDaemon {
    daemon: VhostUserDaemon<Arc<Backend>>,
    backend: Arc<Backend>,
    exit: EventFd,
}

impl InnerDaemon {
    /// Starts the daemon with an empty table; the socket is the frontend's side of it.
    fn start(shared: &Arc<Shared>) -> io::Result<(InnerDaemon, UnixStream)> {
        let exit = EventFd::new(EFD_CLOEXEC)?;
        let listener = listen_unnamed()?;
        let inner = connect_to(&listener)?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(Arc::clone(shared), memory.clone()));
        shared.state().memory = Mapped(Some(memory.clone()));
        let daemon = VhostUserDaemon::new("mock-daemon".into(), Arc::clone(&backend), memory)
            .map_err(to_io)?;

        // The worker ends by an event of ours and not by `exit_event`: vhost-user-backend 0.24
        // never closes the descriptor that it takes there, one per connection.
        for handler in daemon.get_epoll_handlers() {
            let watched =
                handler.register_listener(exit.as_raw_fd(), EventSet::IN, backend.exit_token());
            if let Err(error) = watched {
                // Dropped, the daemon would wait indefinitely for a worker that nothing can end.
                std::mem::forget(daemon);
                return Err(error);
            }
        }
        let mut this = InnerDaemon {
            daemon,
            backend,
            exit,
        };
        this.daemon
            .start(&mut Listener::from(listener))
            .map_err(to_io)?;
        Ok((this, inner))
    }
}

impl Drop for InnerDaemon {
    fn drop(&mut self) {
        self.backend.end();
        if let Err(error) = self.exit.write(1) {
            logs::error!("mock daemon: cannot end the worker thread: {error}");
        }
        self.daemon.request_shutdown();
        // A frontend that just hangs up is an error to the crate, and so is a refused change.
        if let Err(error) = self.daemon.wait() {
            logs::debug!("mock daemon: the daemon of the connection ended: {error}");
        }
    }
}

fn to_io(error: vhost_user_backend::Error) -> io::Error {
    // The type has no std::error::Error: its text is all there is.
    io::Error::other(error.to_string())
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{Shutdown, shutdown};

    use super::super::disk::RamDisk;
    use super::super::fault::FaultPlan;
    use super::super::state::Options;
    use super::*;

    #[test]
    fn a_daemon_that_can_never_accept_again_stops_listening_and_says_why() {
        let listener = Arc::new(listen_unnamed().unwrap());
        let options = Options {
            queues: 1,
            max_mem_slots: None,
            reply_ack: true,
            inflight: false,
            backend_channel: false,
        };
        let disk = RamDisk::new(Vec::new());
        let shared = Shared::new(options, disk, FaultPlan::default(), Arc::clone(&listener));
        let shared = Arc::new(shared);
        let address = listener.local_addr().unwrap();
        // As good as any error that does not pass.
        shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
        run(&listener, Spare::new().unwrap(), &shared);
        drop(listener);

        let refused = UnixStream::connect_addr(&address).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let reason = shared.listener().unwrap_err();
        assert_eq!(reason.kind(), ErrorKind::ConnectionRefused);
        assert!(reason.to_string().contains("Invalid argument"), "{reason}");
    }
}
