//! The in-flight buffer: memory in which a daemon notes the requests that it has taken, and which
//! its successor gets ("Inflight I/O tracking" in the vhost-user specification).
//!
//! It is not mapped here: nobody but daemons reads it.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;

use super::error::{Result, SessionError};
use crate::vhost_user::wire::{Answer, DaemonRequest, Message, Reply, number, numbers};

/// The bytes of a split ring before its descriptors, and of a descriptor.
const HEAD: u64 = 16;
const DESCRIPTOR: u64 = 16;
/// The bytes of a body without the padding at its end, which most send.
const BODY: usize = 20;
const PADDED: usize = 24;

/// A buffer for all rings of a device.
#[derive(Debug)]
pub(super) struct InflightBuffer {
    file: Arc<File>,
    size: u64,
    offset: u64,
    rings: u16,
    ring_size: u16,
}

impl InflightBuffer {
    /// The request for one.
    pub(super) fn request(rings: u16, ring_size: u16) -> Message {
        let body = body(0, 0, rings, ring_size);
        let code = FrontendReq::GET_INFLIGHT_FD;
        Message::new(DaemonRequest::Inflight, code, body, Reply::Any)
    }

    /// The one that came. A daemon that maps more than its file has would die of SIGBUS.
    pub(super) fn new(rings: u16, ring_size: u16, answer: Option<Answer>) -> Result<Self> {
        let unusable = |reason: String| SessionError::Inflight { reason };
        let Some(Answer { body, mut fds, .. }) = answer else {
            return Err(unusable("none came".to_owned()));
        };
        if ![BODY, PADDED].contains(&body.len()) {
            let len = body.len();
            return Err(unusable(format!("its answer has {len} bytes")));
        }
        let (Some(file), 0) = (fds.pop(), fds.len()) else {
            let count = fds.len();
            return Err(unusable(match count {
                0 => "it has no descriptor".to_owned(),
                more => format!("it has {} descriptors", more + 1),
            }));
        };
        let (size, offset) = (number(&body), number(&body[8..]));
        let needed = u64::from(rings) * (HEAD + DESCRIPTOR * u64::from(ring_size));
        if size < needed {
            return Err(unusable(format!(
                "it has {size} bytes, {needed} are needed"
            )));
        }
        let buffer = Self {
            file: Arc::new(File::from(file)),
            size,
            offset,
            rings,
            ring_size,
        };
        buffer.check_file()?;
        Ok(buffer)
    }

    /// Whether its file is long enough: that of one without seals can become shorter.
    pub(super) fn check_file(&self) -> Result<()> {
        let unusable = |reason: String| SessionError::Inflight { reason };
        let stat = self.file.metadata();
        let stat = stat.map_err(|error| unusable(error.to_string()))?;
        if !stat.is_file() {
            return Err(unusable("its descriptor is none of a file".to_owned()));
        }
        let (size, offset, len) = (self.size, self.offset, stat.len());
        match offset.checked_add(size).is_some_and(|end| end <= len) {
            true => Ok(()),
            false => Err(unusable(format!(
                "it is {size} bytes at {offset:#x}, and its file has {len}"
            ))),
        }
    }

    /// How many rings it has room for.
    pub(super) fn rings(&self) -> u64 {
        self.rings.into()
    }

    /// What gives it to a daemon, before the rings.
    pub(super) fn message(&self, reply: Reply) -> Message {
        let body = body(self.size, self.offset, self.rings, self.ring_size);
        let file = Arc::clone(&self.file);
        let code = FrontendReq::SET_INFLIGHT_FD;
        Message::new(DaemonRequest::Inflight, code, body, reply).with_fds([file as _])
    }
}

fn body(size: u64, offset: u64, rings: u16, ring_size: u16) -> Vec<u8> {
    let mut body = numbers([size, offset]);
    body.extend(
        [rings, ring_size, 0, 0]
            .map(u16::to_ne_bytes)
            .as_flattened(),
    );
    body
}
