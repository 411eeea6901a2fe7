//! The log of what the frontend asked for.

use std::fmt;

use super::wire::Message;
use crate::vhost_user::receive::ReceivedRegion;
use vhost::vhost_user::message::FrontendReq;

/// One request of the frontend, as it arrived.
///
/// Requests that matter for guest memory are taken apart; the others keep their number. A message
/// that is too short for its request is logged as [`LoggedRequest::Other`]. `Display` gives one
/// line with the protocol's name of the request.
///
/// ```
/// use guest_memory_shm::mock::LoggedRequest;
///
/// assert_eq!(LoggedRequest::GetFeatures.to_string(), "GET_FEATURES");
/// assert_eq!(LoggedRequest::Other(8).to_string(), "SET_VRING_NUM");
/// assert_eq!(LoggedRequest::Other(99).to_string(), "request 99");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LoggedRequest {
    /// GET_FEATURES.
    GetFeatures,
    /// SET_FEATURES with the acknowledged virtio features.
    SetFeatures(u64),
    /// SET_OWNER, the first request of a session.
    SetOwner,
    /// GET_PROTOCOL_FEATURES.
    GetProtocolFeatures,
    /// SET_PROTOCOL_FEATURES with the acknowledged bits.
    SetProtocolFeatures(u64),
    /// SET_MEM_TABLE with the whole table, in the order of the message.
    SetMemTable(Vec<ReceivedRegion>),
    /// GET_MAX_MEM_SLOTS.
    GetMaxMemSlots,
    /// ADD_MEM_REG.
    AddMemRegion(ReceivedRegion),
    /// REM_MEM_REG.
    RemoveMemRegion(ReceivedRegion),
    /// SET_LOG_BASE with a shared log.
    SetLogBase {
        /// Bytes of the log.
        size: u64,
        /// Where it starts in its file.
        mmap_offset: u64,
    },
    /// Any other request, by its number.
    Other(u32),
}

impl LoggedRequest {
    pub(super) fn of(message: &Message) -> LoggedRequest {
        Self::decode(message).unwrap_or(LoggedRequest::Other(message.request))
    }

    fn decode(message: &Message) -> Option<LoggedRequest> {
        Some(match message.code()? {
            FrontendReq::GET_FEATURES => LoggedRequest::GetFeatures,
            FrontendReq::SET_FEATURES => LoggedRequest::SetFeatures(message.u64_at(0)?),
            FrontendReq::SET_OWNER => LoggedRequest::SetOwner,
            FrontendReq::GET_PROTOCOL_FEATURES => LoggedRequest::GetProtocolFeatures,
            FrontendReq::SET_PROTOCOL_FEATURES => {
                LoggedRequest::SetProtocolFeatures(message.u64_at(0)?)
            }
            FrontendReq::SET_MEM_TABLE => {
                LoggedRequest::SetMemTable(ReceivedRegion::decode_table(&message.body).ok()?)
            }
            FrontendReq::GET_MAX_MEM_SLOTS => LoggedRequest::GetMaxMemSlots,
            FrontendReq::ADD_MEM_REG => LoggedRequest::AddMemRegion(region_in(message)?),
            FrontendReq::REM_MEM_REG => LoggedRequest::RemoveMemRegion(region_in(message)?),
            FrontendReq::SET_LOG_BASE => LoggedRequest::SetLogBase {
                size: message.u64_at(0)?,
                mmap_offset: message.u64_at(8)?,
            },
            _ => return None,
        })
    }
}

impl fmt::Display for LoggedRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoggedRequest::GetFeatures => f.write_str("GET_FEATURES"),
            LoggedRequest::SetFeatures(bits) => write!(f, "SET_FEATURES {bits:#x}"),
            LoggedRequest::SetOwner => f.write_str("SET_OWNER"),
            LoggedRequest::GetProtocolFeatures => f.write_str("GET_PROTOCOL_FEATURES"),
            LoggedRequest::SetProtocolFeatures(bits) => {
                write!(f, "SET_PROTOCOL_FEATURES {bits:#x}")
            }
            LoggedRequest::SetMemTable(regions) => {
                f.write_str("SET_MEM_TABLE")?;
                let mut regions = regions.iter().map(Shown);
                regions.try_for_each(|region| write!(f, " {region}"))
            }
            LoggedRequest::GetMaxMemSlots => f.write_str("GET_MAX_MEM_SLOTS"),
            LoggedRequest::AddMemRegion(region) => write!(f, "ADD_MEM_REG {}", Shown(region)),
            LoggedRequest::RemoveMemRegion(region) => write!(f, "REM_MEM_REG {}", Shown(region)),
            LoggedRequest::SetLogBase { size, mmap_offset } => {
                write!(f, "SET_LOG_BASE {size:#x} bytes at offset {mmap_offset:#x}")
            }
            LoggedRequest::Other(code) => match FrontendReq::try_from(*code) {
                Ok(name) => write!(f, "{name:?}"),
                Err(_) => write!(f, "request {code}"),
            },
        }
    }
}

/// A region in one line.
struct Shown<'a>(&'a ReceivedRegion);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ReceivedRegion {
            guest_addr,
            size,
            user_addr,
            mmap_offset,
        } = self.0;
        let start = guest_addr.0;
        write!(
            f,
            "{start:#x}+{size:#x} (user {user_addr:#x}, offset {mmap_offset:#x})"
        )
    }
}

fn region_in(message: &Message) -> Option<ReceivedRegion> {
    ReceivedRegion::decode(&message.body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: FrontendReq, fields: &[u64]) -> Message {
        Message {
            body: fields.iter().flat_map(|f| f.to_ne_bytes()).collect(),
            ..Message::bare(request)
        }
    }

    #[test]
    fn a_region_is_named_with_all_its_fields() {
        let add = message(
            FrontendReq::ADD_MEM_REG,
            &[0, 0x1000, 0x2000, 0x7000, 0x3000],
        );
        assert_eq!(
            LoggedRequest::of(&add).to_string(),
            "ADD_MEM_REG 0x1000+0x2000 (user 0x7000, offset 0x3000)"
        );
    }

    #[test]
    fn a_cut_off_or_lying_message_keeps_only_its_number() {
        for short in [
            message(FrontendReq::ADD_MEM_REG, &[0, 1, 2, 3]),
            message(FrontendReq::SET_MEM_TABLE, &[2, 1, 2, 3, 4]),
            message(FrontendReq::SET_MEM_TABLE, &[0xffff_ffff]),
            message(FrontendReq::SET_FEATURES, &[]),
        ] {
            assert_eq!(
                LoggedRequest::of(&short),
                LoggedRequest::Other(short.request)
            );
        }
    }
}
