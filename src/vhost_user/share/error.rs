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
use std::time::Duration;

use crate::range::GuestRange;
use crate::region::MemoryError;
use crate::units::{Counted, HumanSize};
use crate::vhost_user::table::TableError;

/// What a share's calls return.
pub(super) type Result<T, E = ShareError> = std::result::Result<T, E>;

/// The cause of a failure, as the connection gave it.
type Cause = Arc<dyn Error + Send + Sync>;

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

    /// The time that a daemon takes cannot be watched; nothing was sent.
    #[non_exhaustive]
    NoDeadline {
        /// Why there is no thread to watch it.
        source: io::Error,
    },

    /// This end closed the connection, after a panic of what the share calls, or because an
    /// address space could not bring the daemon up to date. Never returned as such, but the reason
    /// of [`Broken`](Self::Broken).
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

/// What a daemon was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DaemonRequest {
    /// GET_MAX_MEM_SLOTS: how many regions it takes.
    GetMaxSlots,
    /// SET_MEM_TABLE with this many regions.
    SetTable(usize),
    /// ADD_MEM_REG of this range.
    AddRegion(GuestRange),
    /// REM_MEM_REG of this range.
    RemoveRegion(GuestRange),
    /// SET_LOG_BASE with a log of this many bytes.
    SetLog(u64),
    /// Another message, by a caller of [`CallDeadline::run`](crate::CallDeadline::run).
    Other,
}

/// In which way a daemon did not do what it was told.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonFailure {
    /// It answered, with a refusal.
    #[error("refused")]
    Refused(#[source] Cause),
    /// It hung up, then or right after it.
    #[error("hung up")]
    HungUp(#[source] Cause),
    /// It did not answer in this time; the connection was closed.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// It answered something else; the two sides may be out of step.
    #[error("an answer that does not fit the protocol")]
    Protocol(#[source] Cause),
    /// It answered as daemons do while postcopy listens, and waits for an acknowledgement that
    /// this connection cannot send.
    #[error("addresses that cannot be acknowledged")]
    NoPostcopy,
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
            Self::NoDeadline { .. } => f.write_str(
                "the daemon's time to answer cannot be limited, and it might never answer: \
                 nothing was sent; raise RLIMIT_NPROC (ulimit -u), or connect anew in this \
                 process",
            ),
            Self::GivenUp { reason } => f.write_str(reason),
            Self::Broken { reason } => {
                write!(
                    f,
                    "the share with this daemon is broken ({reason}): reconnect first"
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
            Self::NoDeadline { source } => Some(source),
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

impl DaemonRequest {
    /// Why a daemon refuses it, most likely.
    fn likely_refusal(self) -> &'static str {
        match self {
            Self::RemoveRegion(_) => {
                "it may not know the region by this address and size, or remove no regions at all"
            }
            _ => {
                "it may be out of memory, address space or memory slots, or its policy (seals) \
                 forbids it"
            }
        }
    }
}

impl fmt::Display for DaemonRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GetMaxSlots => f.write_str("say how many memory slots it has"),
            Self::SetTable(regions) => {
                write!(f, "take a memory table of {}", Counted(regions, "region"))
            }
            Self::AddRegion(range) => write!(f, "add the region {range}"),
            Self::RemoveRegion(range) => write!(f, "remove the region {range}"),
            Self::SetLog(size) => write!(f, "take a dirty log of {}", HumanSize(*size)),
            Self::Other => f.write_str("answer"),
        }
    }
}

impl DaemonFailure {
    /// It refuses, for this cause.
    pub fn refused(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Refused(Arc::from(cause.into()))
    }

    /// It hung up, as this cause shows.
    pub fn hung_up(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::HungUp(Arc::from(cause.into()))
    }

    /// Its answer does not fit the protocol, as this cause shows.
    pub fn protocol(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Protocol(Arc::from(cause.into()))
    }

    /// Says what became of a request, and the way out.
    fn explain(&self, request: DaemonRequest, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(_) => {
                let why = request.likely_refusal();
                write!(f, "the daemon refused to {request}: {why}: look at its log")
            }
            Self::HungUp(_) => write!(
                f,
                "the daemon hung up when told to {request}: it died, or that is how it refuses; \
                 restart it or reconnect to it"
            ),
            Self::Silent(limit) => {
                let (told, remedy) = match request {
                    DaemonRequest::Other => (String::new(), "time"),
                    _ => (
                        format!(" when told to {request}"),
                        "with VhostUserShare::with_deadline",
                    ),
                };
                write!(
                    f,
                    "the daemon did not answer within {limit:?}{told}: the connection was closed, \
                     restart the daemon or allow more {remedy}"
                )
            }
            Self::Protocol(_) => write!(
                f,
                "the daemon could not be made to {request}: its answer does not fit the protocol, \
                 and the connection was closed; it is faulty, or the share was given protocol \
                 features other than those acknowledged (SET_PROTOCOL_FEATURES)"
            ),
            Self::NoPostcopy => write!(
                f,
                "the daemon could not be made to {request}: it answered with addresses for \
                 postcopy, which this connection cannot acknowledge; the connection was closed, \
                 build guest-memory-shm with its feature postcopy, or implement \
                 DaemonConnection::acknowledge_bases"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
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
                 0x100000000..=0x13fffffff (1 GiB): the connection was closed, restart the daemon \
                 or allow more with VhostUserShare::with_deadline",
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
        assert_eq!(cause(&ShareError::Broken { reason }), Some(104));
        assert!(size_of::<ShareError>() <= 56, "{}", size_of::<ShareError>());
    }
}
