//! Why a daemon does not hold the memory that it should.
//!
//! A failure keeps one form on its way: what the connection says ([`DaemonFailure`]) becomes a
//! [`ShareError::Daemon`] with the request that it is about, and that is what the caller gets,
//! what the share keeps as the reason why it is broken, and what an address space's error has as
//! its cause.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use crate::range::GuestRange;
use crate::region::MemoryError;
use crate::vhost_user::table::TableError;
use crate::vhost_user::wire::{DaemonFailure, DaemonRequest};

/// What a share's calls return.
pub(super) type Result<T, E = ShareError> = std::result::Result<T, E>;

/// Why a daemon does not hold the memory that it should, or does not log what it writes.
///
/// [`VhostUserShare::broken`](crate::VhostUserShare::broken) tells whether the share is still
/// usable.
#[non_exhaustive]
#[derive(Debug)]
pub enum ShareError {
    /// The memory has no table, or none that the daemon can be sent. Nothing was sent.
    Table(TableError),

    /// The daemon failed at a request.
    #[non_exhaustive]
    Daemon {
        /// What it was told.
        request: DaemonRequest,
        /// What it did.
        failure: DaemonFailure,
    },

    /// The daemon had hung up before it was told anything; the share is broken.
    Gone,

    /// The daemon cannot be sent a dirty log, because LOG_SHMFD was not negotiated.
    LogNotShared,

    /// There is no memfd for the daemon's dirty log. The daemon was not told of it.
    Log(Box<MemoryError>),

    /// No descriptor is left for a copy of the frontend's socket.
    #[non_exhaustive]
    Socket {
        /// Why there is none.
        source: io::Error,
    },

    /// What was given is no connection to a daemon: not a Unix stream socket, or never connected.
    #[non_exhaustive]
    UnfitSocket {
        /// What the kernel says of it: ENOTSOCK of a file or a pipe, EOPNOTSUPP of a stream that
        /// is not connected, or listens, EINVAL of datagrams; another of other sockets.
        source: io::Error,
    },

    /// This end says no more on the connection, after a panic of what the share calls, or because
    /// an address space could not bring the daemon up to date. Never returned as such, but the
    /// reason of [`Broken`](Self::Broken).
    #[non_exhaustive]
    GivenUp {
        /// What had happened.
        reason: String,
    },

    /// The share was used after it broke.
    #[non_exhaustive]
    Broken {
        /// Why it broke.
        reason: Arc<Self>,
    },
}

impl ShareError {
    /// What the daemon did, if that is the error.
    pub fn failure(&self) -> Option<&DaemonFailure> {
        match self {
            Self::Daemon { failure, .. } => Some(failure),
            _ => None,
        }
    }

    /// The region that it is about, if it is about one.
    pub(crate) fn range(&self) -> Option<GuestRange> {
        match self {
            Self::Daemon {
                request: DaemonRequest::AddRegion(range) | DaemonRequest::RemoveRegion(range),
                ..
            } => Some(*range),
            Self::Table(
                TableError::NoHostAddress { range } | TableError::OpaqueConstant { range, .. },
            ) => Some(*range),
            _ => None,
        }
    }
}

impl fmt::Display for ShareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(error) => error.fmt(f),
            Self::Daemon { request, failure } => failure.explain(*request, f),
            Self::Gone => {
                f.write_str("the daemon hung up some time ago: restart it or reconnect to it")
            }
            Self::LogNotShared => f.write_str(
                "the daemon cannot log what it writes in memory that is shared with us: negotiate \
                 LOG_SHMFD with it, or stop the log (VhostUserShare::stop_log)",
            ),
            Self::Log(error) => error.fmt(f),
            Self::Socket { .. } => f.write_str(
                "the frontend's socket cannot be had a second time: raise RLIMIT_NOFILE \
                 (ulimit -n)",
            ),
            Self::UnfitSocket { source } => write!(
                f,
                "a share needs a connected Unix stream socket, and was given {}",
                match source.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::ENOTSOCK) => "no socket",
                    Some(Errno::EOPNOTSUPP) => "one that is not connected, or that listens",
                    Some(Errno::EINVAL) => "one of datagrams",
                    _ => "another kind of socket",
                }
            ),
            Self::GivenUp { reason } => f.write_str(reason),
            Self::Broken { reason } => {
                write!(
                    f,
                    "the share with this daemon is broken, reconnect first: {reason}"
                )
            }
        }
    }
}

impl Error for ShareError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Daemon {
                failure:
                    DaemonFailure::Refused(cause)
                    | DaemonFailure::HungUp(cause)
                    | DaemonFailure::Protocol(cause),
                ..
            } => Some(&**cause),
            Self::Log(error) => error.source(),
            Self::Socket { source } | Self::UnfitSocket { source } => Some(source),
            // What is displayed of the reason does not name its cause.
            Self::Broken { reason } => reason.source(),
            _ => None,
        }
    }
}

impl From<MemoryError> for ShareError {
    fn from(error: MemoryError) -> Self {
        Self::Log(Box::new(error))
    }
}

impl From<TableError> for ShareError {
    fn from(error: TableError) -> Self {
        Self::Table(error)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn texts_say_what_became_of_which_request_and_the_way_out() {
        let range = GuestRange::new(GuestAddress(1 << 32), 1 << 30).unwrap();
        let cases = [
            (
                DaemonRequest::SetTable(2),
                DaemonFailure::refused("1"),
                "the daemon refused to take a memory table of 2 regions: it may be out of memory, \
                 address space or memory slots, or its policy (seals) forbids it: look at its log",
            ),
            (
                DaemonRequest::AddRegion(range),
                DaemonFailure::Silent(Duration::from_secs(5)),
                "the daemon did not answer within 5s when told to add the region \
                 0x100000000..=0x13fffffff (1 GiB): its connection is given up, restart the \
                 daemon or allow more with VhostUserShare::with_deadline",
            ),
            (
                DaemonRequest::RemoveRegion(range),
                DaemonFailure::hung_up("end of file"),
                "the daemon hung up when told to remove the region 0x100000000..=0x13fffffff \
                 (1 GiB): it died, or that is how it refuses; restart it or reconnect to it",
            ),
        ];
        for (request, failure, text) in cases {
            let error = ShareError::Daemon { request, failure };
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn the_connections_own_error_is_the_cause() {
        let failure = DaemonFailure::hung_up(io::Error::from_raw_os_error(104));
        let request = DaemonRequest::GetMaxSlots;
        let first = ShareError::Daemon { request, failure };
        let cause = |error: &ShareError| {
            let cause = error.source()?.downcast_ref::<io::Error>();
            cause.and_then(io::Error::raw_os_error)
        };
        assert_eq!(cause(&first), Some(104));
        let reason = Arc::new(first);
        let later = ShareError::Broken { reason };
        assert_eq!(cause(&later), Some(104));
        let text = later.to_string();
        let reason =
            "the share with this daemon is broken, reconnect first: the daemon hung up when";
        assert!(text.starts_with(reason), "{text}");
        assert!(size_of::<ShareError>() <= 56, "{}", size_of::<ShareError>());
    }
}
