//! What a daemon was told, and in which way it did not do it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::range::GuestRange;
use crate::units::{Counted, HumanSize};

/// The cause of a failure, as the connection gave it.
type Cause = Arc<dyn Error + Send + Sync>;

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
    /// The messages by which two sides agree on features.
    Negotiate,
    /// GET_CONFIG or SET_CONFIG.
    Config,
    /// The messages that start this ring.
    StartRing(u32),
    /// GET_VRING_BASE of this ring.
    StopRing(u32),
    /// GET_INFLIGHT_FD or SET_INFLIGHT_FD.
    Inflight,
    /// RESET_DEVICE.
    Reset,
    /// SET_STATUS or GET_STATUS.
    Status,
    /// A message of the caller's own, with this number
    /// ([`VhostUserSession::send`](crate::VhostUserSession::send)).
    Own(u32),
    /// Another message.
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
    /// It did not answer in this time.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// It answered something else; the two sides may be out of step.
    #[error("an answer that does not fit the protocol")]
    Protocol(#[source] Cause),
    /// It answered as daemons do while postcopy listens, which the share was not told
    /// ([`VhostUserShare::set_postcopy`](crate::VhostUserShare::set_postcopy)).
    #[error("addresses for postcopy")]
    NoPostcopy,
}

impl DaemonRequest {
    /// What sets how long it may take.
    fn deadline_setter(self) -> &'static str {
        match self {
            Self::StopRing(_) => "with SessionOptions::with_drain_deadline",
            Self::Negotiate
            | Self::Config
            | Self::StartRing(_)
            | Self::Inflight
            | Self::Reset
            | Self::Status => "with SessionOptions::with_deadline",
            _ => "with VhostUserShare::with_deadline",
        }
    }

    /// Why a daemon refuses it, most likely.
    fn likely_refusal(self) -> &'static str {
        match self {
            Self::RemoveRegion(_) => {
                "it may not know the region by this address and size, or remove no regions at all"
            }
            Self::Config | Self::Status | Self::Reset | Self::Own(_) | Self::Other => {
                "it may not know that, or not as it was said"
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
            Self::Negotiate => f.write_str("agree on features"),
            Self::Config => f.write_str("exchange its configuration"),
            Self::StartRing(index) => write!(f, "start ring {index}"),
            Self::StopRing(index) => write!(f, "stop ring {index}"),
            Self::Inflight => f.write_str("share its in-flight buffer"),
            Self::Reset => f.write_str("reset the device"),
            Self::Status => f.write_str("exchange the device status"),
            Self::Own(code) => write!(f, "take message {code}"),
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
    pub(crate) fn explain(
        &self,
        request: DaemonRequest,
        f: &mut fmt::Formatter<'_>,
    ) -> fmt::Result {
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
                        request.deadline_setter(),
                    ),
                };
                write!(
                    f,
                    "the daemon did not answer within {limit:?}{told}: its connection is given \
                     up, restart the daemon or allow more {remedy}"
                )
            }
            Self::Protocol(_) => write!(
                f,
                "the daemon could not be made to {request}: its answer does not fit the protocol, \
                 and its connection is given up; it is faulty, or the share was given protocol \
                 features other than those acknowledged (SET_PROTOCOL_FEATURES)"
            ),
            Self::NoPostcopy => write!(
                f,
                "the daemon could not be made to {request}: it answered with addresses for \
                 postcopy, and its connection is given up; if postcopy listens, say so before \
                 (VhostUserShare::set_postcopy)"
            ),
        }
    }
}
