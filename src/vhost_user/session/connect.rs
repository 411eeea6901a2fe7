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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const NOWHERE: &str = "/nonexistent/blk.sock";

    #[test]
    fn each_pause_is_twice_the_last_one_until_it_is_a_second() {
        let mut attempts = Attempts::new();
        let mut now = attempts.next();
        let mut pauses = Vec::new();
        for _ in 0..10 {
            assert!(attempts.advance(Path::new(NOWHERE), now, None).is_none());
            pauses.push((attempts.next() - now).as_millis());
            // Before its time, nothing is tried.
            let early = attempts.next() - Duration::from_nanos(1);
            let next = attempts.next();
            assert!(attempts.advance(Path::new(NOWHERE), early, None).is_none());
            assert_eq!(attempts.next(), next);
            now = next;
        }
        let expected = [10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000];
        assert_eq!(pauses, expected);
    }

    #[test]
    fn the_last_attempt_is_at_the_deadline_and_says_why_it_failed() {
        let mut attempts = Attempts::new();
        let begun = attempts.next();
        let until = begun + Duration::from_millis(25);
        let mut at = Vec::new();
        let error = loop {
            let now = attempts.next();
            at.push((now - begun).as_millis());
            if let Some(last) = attempts.advance(Path::new(NOWHERE), now, Some(until)) {
                break last.unwrap_err();
            }
        };
        assert_eq!(at, [0, 10, 25]);
        let SessionError::Connect { path, source } = error else {
            panic!("{error}");
        };
        assert_eq!(path, Path::new(NOWHERE));
        assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
    }

    #[test]
    fn one_that_listens_is_connected_to_also_at_the_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blk.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut attempts = Attempts::new();
        let now = attempts.next();
        let socket = attempts.advance(&path, now, Some(now)).unwrap();
        socket.unwrap();
        listener.accept().unwrap();
    }
}
