//! What ends a connection from another thread than the one that waits on it.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use vhost::vhost_user::Frontend;

use crate::logs;

/// Ends a connection from another thread than the one that waits on it, and looks whether it has
/// ended.
///
/// A [`CallDeadline`](crate::CallDeadline) has one, and so has every connection whose calls may
/// wait ([`DaemonConnection::disconnector`](crate::DaemonConnection::disconnector)). Neither may
/// need a lock that a call holds while it waits.
///
/// ```
/// use std::net::Shutdown;
/// use std::os::unix::net::UnixStream;
///
/// use guest_memory_shm::Disconnector;
///
/// fn of(socket: &UnixStream) -> std::io::Result<Disconnector> {
///     let socket = socket.try_clone()?;
///     Ok(Disconnector::new(move || drop(socket.shutdown(Shutdown::Both))))
/// }
/// ```
pub struct Disconnector {
    learn: Box<dyn FnOnce() -> Line + Send>,
}

/// A connection, past the lock of its user.
pub(super) struct Line {
    end: Box<dyn Fn() + Send>,
    is_gone: Box<dyn Fn() -> bool + Send>,
}

impl Disconnector {
    /// Ends a connection by calling `end`, from any thread. Whether the other side has ended it
    /// cannot be seen.
    pub fn new(end: impl Fn() + Send + 'static) -> Self {
        Self {
            learn: Box::new(|| Line {
                end: Box::new(end),
                is_gone: Box::new(|| false),
            }),
        }
    }

    /// Looks whether the other side has ended the connection by calling `is_gone`, which must not
    /// wait: a daemon that is gone is told apart from one that hangs up when it is told something.
    #[must_use]
    pub fn with_is_gone(self, is_gone: impl Fn() -> bool + Send + 'static) -> Self {
        Self {
            learn: Box::new(|| Line {
                is_gone: Box::new(is_gone),
                ..self.learn()
            }),
        }
    }

    /// Learns what there is to know of the connection. That may wait: a frontend's descriptor is
    /// guarded by its lock, which a call on another clone of it holds while it waits.
    pub(super) fn learn(self) -> Line {
        // A frontend whose lock is poisoned panics in each call: the caller shall see that.
        catch_unwind(AssertUnwindSafe(self.learn)).unwrap_or_else(|_| Line {
            end: Box::new(|| {}),
            is_gone: Box::new(|| false),
        })
    }
}

impl Line {
    pub(super) fn end(&self) {
        (self.end)();
    }

    pub(super) fn is_gone(&self) -> bool {
        (self.is_gone)()
    }
}

/// By shutdown(2) of its socket, which all of its clones share.
impl From<&Frontend> for Disconnector {
    fn from(frontend: &Frontend) -> Self {
        let frontend = frontend.clone();
        Self {
            learn: Box::new(move || {
                let fd = frontend.as_raw_fd();
                // The clone keeps the number from being reused.
                let (keep, keep_too) = (frontend.clone(), frontend);
                Line {
                    end: Box::new(move || {
                        let _ = &keep;
                        if let Err(errno) = shutdown(fd, Shutdown::Both) {
                            logs::debug!("the connection was closed already: {errno}");
                        }
                    }),
                    is_gone: Box::new(move || {
                        let _ = &keep_too;
                        has_hung_up(fd)
                    }),
                }
            }),
        }
    }
}

impl fmt::Debug for Disconnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disconnector").finish_non_exhaustive()
    }
}

/// Whether the other end of the connection is closed. What it said before may still be unread.
fn has_hung_up(socket: RawFd) -> bool {
    // Nothing is received: it is only looked at, and there is no wait.
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let mut byte = [0];
    match recv(socket, &mut byte, flags) {
        Ok(read) => read == 0,
        Err(errno) => errno != Errno::EAGAIN && errno != Errno::EINTR,
    }
}
