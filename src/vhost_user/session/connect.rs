//! To reach a daemon that may not listen yet, without waiting.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::error::SessionError;

/// How long to wait before a daemon that does not listen is tried again, at first.
const FIRST: Duration = Duration::from_millis(10);
/// And at last: each time it is twice as long.
const LAST: Duration = Duration::from_secs(1);

/// Attempts to connect.
#[derive(Debug)]
pub(super) struct Attempts {
    next: Instant,
    pause: Duration,
}

impl Attempts {
    pub(super) fn new() -> Self {
        Self {
            next: Instant::now(),
            pause: FIRST,
        }
    }

    /// The moment of the next one.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Makes one, if it is time, and again right after `until`, which is the last one.
    pub(super) fn advance(
        &mut self,
        path: &Path,
        now: Instant,
        until: Option<Instant>,
    ) -> Option<Result<OwnedFd, SessionError>> {
        if now < self.next {
            return None;
        }
        match open(path) {
            Ok(socket) => Some(Ok(socket)),
            Err(errno) if !can_pass(errno) || until.is_some_and(|until| now >= until) => {
                Some(Err(SessionError::Connect {
                    path: path.to_owned(),
                    source: errno.into(),
                }))
            }
            Err(_) => {
                self.next = now + self.pause;
                self.next = until.map_or(self.next, |until| self.next.min(until));
                self.pause = LAST.min(self.pause * 2);
                None
            }
        }
    }
}

/// Whether somebody may listen there soon: there is no such socket, nobody behind it, or no room
/// for one more.
fn can_pass(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOENT | Errno::ECONNREFUSED | Errno::EAGAIN | Errno::EINTR
    )
}

/// Without waiting: connect(2) waits as long as nobody accepts, once enough others wait.
fn open(path: &Path) -> Result<OwnedFd, Errno> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}
