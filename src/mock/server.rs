//! The thread that accepts connections and serves one after the other.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

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
use super::state::{Link, Shared};

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

/// Serves until the owner stops the daemon, who then shuts `listener` down to wake this thread.
pub(super) fn run(listener: &UnixListener, shared: &Arc<Shared>) {
    loop {
        let front = match listener.accept() {
            Ok((front, _)) => front,
            Err(error) => match error.kind() {
                ErrorKind::Interrupted | ErrorKind::ConnectionAborted => continue,
                _ if shared.is_stopping() => return,
                _ => {
                    log::error!("mock daemon: cannot accept connections any more: {error}");
                    return;
                }
            },
        };
        if let Err(error) = serve(front, shared) {
            log::debug!("mock daemon: the connection ended with an error: {error}");
        }
        shared.disconnect();
        if shared.is_stopping() {
            return;
        }
    }
}

/// Serves one front-end with a daemon of its own, from the first request to the hang-up.
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

/// The daemon behind the gate, and what ends its threads.
struct InnerDaemon {
    daemon: VhostUserDaemon<Arc<Backend>>,
    backend: Arc<Backend>,
    exit: EventFd,
}

impl InnerDaemon {
    /// Starts the daemon with an empty table; the socket is the front-end's side of it.
    fn start(shared: &Arc<Shared>) -> io::Result<(InnerDaemon, UnixStream)> {
        let exit = EventFd::new(EFD_CLOEXEC)?;
        let listener = listen_unnamed()?;
        let inner = connect_to(&listener)?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(Arc::clone(shared), memory.clone()));
        shared.set_memory(memory.clone());
        let daemon = VhostUserDaemon::new("mock-daemon".into(), Arc::clone(&backend), memory)
            .map_err(to_io)?;

        // The worker ends by an event of ours and not by `exit_event`: vhost-user-backend 0.24
        // never closes the descriptor that it takes there, one per connection.
        for handler in daemon.get_epoll_handlers() {
            let watched =
                handler.register_listener(exit.as_raw_fd(), EventSet::IN, backend.exit_token());
            if let Err(error) = watched {
                // Dropped, the daemon would wait for ever for a worker that nothing can end.
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
            log::error!("mock daemon: cannot end the worker thread: {error}");
        }
        self.daemon.request_shutdown();
        // A front-end that just hangs up is an error to the crate, and so is a refused change.
        if let Err(error) = self.daemon.wait() {
            log::debug!("mock daemon: the daemon behind the gate ended: {error}");
        }
    }
}

fn to_io(error: vhost_user_backend::Error) -> io::Error {
    // The type has no std::error::Error: its text is all there is.
    io::Error::other(error.to_string())
}
