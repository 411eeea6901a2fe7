//! The log of what the front-end asked for.

use std::fmt;

use vhost::vhost_user::message::FrontendReq;
use vm_memory::GuestAddress;

use super::wire::Message;

/// Bytes of one region in a message body: four `u64`.
const REGION_SIZE: usize = 32;

/// One region as a front-end described it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedRegion {
    /// Where the region starts in guest memory.
    pub guest_addr: GuestAddress,
    /// Its length in bytes.
    pub size: u64,
    /// Where the front-end says it has mapped it; ring addresses refer to this.
    pub user_addr: u64,
    /// Where it starts in the file, in bytes.
    pub mmap_offset: u64,
}

/// One request of the front-end, as it arrived.
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
    SetMemTable(Vec<LoggedRegion>),
    /// GET_MAX_MEM_SLOTS.
    GetMaxMemSlots,
    /// ADD_MEM_REG.
    AddMemRegion(LoggedRegion),
    /// REM_MEM_REG.
    RemoveMemRegion(LoggedRegion),
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
                let count = message.u32_at(0)? as usize;
                // The count is the peer's word: the body's length bounds it.
                if count > message.body.len() / REGION_SIZE {
                    return None;
                }
                let regions = (0..count).map(|index| region_at(message, 8 + index * REGION_SIZE));
                LoggedRequest::SetMemTable(regions.collect::<Option<_>>()?)
            }
            FrontendReq::GET_MAX_MEM_SLOTS => LoggedRequest::GetMaxMemSlots,
            FrontendReq::ADD_MEM_REG => LoggedRequest::AddMemRegion(region_at(message, 8)?),
            FrontendReq::REM_MEM_REG => LoggedRequest::RemoveMemRegion(region_at(message, 8)?),
            FrontendReq::SET_LOG_BASE => LoggedRequest::SetLogBase {
                size: message.u64_at(0)?,
                mmap_offset: message.u64_at(8)?,
            },
            _ => return None,
        })
    }
}

impl LoggedRegion {
    /// Where it ends in its file.
    pub(super) fn end(&self) -> Option<u64> {
        self.mmap_offset.checked_add(self.size)
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
                regions.iter().try_for_each(|region| write!(f, " {region}"))
            }
            LoggedRequest::GetMaxMemSlots => f.write_str("GET_MAX_MEM_SLOTS"),
            LoggedRequest::AddMemRegion(region) => write!(f, "ADD_MEM_REG {region}"),
            LoggedRequest::RemoveMemRegion(region) => write!(f, "REM_MEM_REG {region}"),
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

impl fmt::Display for LoggedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x}+{:#x} (user {:#x}, offset {:#x})",
            self.guest_addr.0, self.size, self.user_addr, self.mmap_offset
        )
    }
}

fn region_at(message: &Message, offset: usize) -> Option<LoggedRegion> {
    Some(LoggedRegion {
        guest_addr: GuestAddress(message.u64_at(offset)?),
        size: message.u64_at(offset + 8)?,
        user_addr: message.u64_at(offset + 16)?,
        mmap_offset: message.u64_at(offset + 24)?,
    })
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
