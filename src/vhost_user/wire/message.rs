//! Messages as they are on the wire.
//!
//! See "Message Specification" in the vhost-user specification: a header of 12 bytes (request,
//! flags, size of the body), then the body, all in the byte order of the machine.

use std::fmt;
use std::os::fd::AsFd;
use std::slice;
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;

use super::failure::DaemonRequest;
use crate::vhost_user::table::TableRegion;

/// The bytes of a header.
pub(super) const HEADER: usize = 12;
/// The version, in the two lowest bits of the flags.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// The size of an acknowledgement.
const ACK: usize = 8;
/// The size of a region in a body: guest address, size, user address, offset in the file.
const REGION: usize = 32;

/// A descriptor that goes with a message, kept as long as it may be needed.
pub(crate) type Descriptor = Arc<dyn AsFd + Send + Sync>;

/// A message to a daemon.
pub(crate) struct Message {
    /// What it is about, for errors: a question "still there?" is about the change before it.
    pub(super) about: DaemonRequest,
    pub(super) code: u32,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<Descriptor>,
    /// Whether it had some, which were handed on to be sent.
    pub(super) came_with_fds: bool,
    pub(super) reply: Reply,
}

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    None,
    /// An acknowledgement: 8 bytes, 0 for yes. It is asked for.
    Ack,
    /// A body of one of these lengths.
    Body(&'static [usize]),
    /// The message's own body, with other user addresses in its regions.
    Bases,
    /// A body as long as the message's own; an empty one refuses.
    Like,
    /// A body of any length up to [`LONGEST`], and descriptors ([`Wire::keep_fds`](super::Wire)).
    Any,
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) code: u32,
    pub(super) flags: u32,
    pub(super) size: usize,
}

/// The longest body of an answer of which no more is known.
pub(crate) const LONGEST: usize = 4096;

/// A number, and nothing else.
pub(crate) const NUMBER: Reply = Reply::Body(&[8]);

impl Message {
    pub(crate) fn new(
        about: DaemonRequest,
        code: impl Into<u32>,
        body: Vec<u8>,
        reply: Reply,
    ) -> Self {
        Self {
            about,
            code: code.into(),
            body,
            fds: Vec::new(),
            came_with_fds: false,
            reply,
        }
    }

    #[must_use]
    pub(crate) fn with_fds(mut self, fds: impl IntoIterator<Item = Descriptor>) -> Self {
        self.fds.extend(fds);
        self
    }

    /// GET_FEATURES: messages are handled in order, so its answer says that all before it were
    /// handled, and that the daemon is still there.
    pub(crate) fn barrier(about: DaemonRequest) -> Self {
        Self::new(about, FrontendReq::GET_FEATURES, Vec::new(), NUMBER)
    }

    pub(crate) fn max_slots() -> Self {
        let code = FrontendReq::GET_MAX_MEM_SLOTS;
        Self::new(DaemonRequest::GetMaxSlots, code, Vec::new(), NUMBER)
    }

    pub(crate) fn set_table(regions: &[TableRegion], reply: Reply) -> Self {
        let about = DaemonRequest::SetTable(regions.len());
        // Few: each has a descriptor in the message.
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let body = with_regions([count, 0], regions);
        Self::new(about, FrontendReq::SET_MEM_TABLE, body, reply)
            .with_fds(regions.iter().map(descriptor))
    }

    pub(crate) fn add_region(region: &TableRegion, reply: Reply) -> Self {
        let about = DaemonRequest::AddRegion(region.range());
        let body = with_regions([0, 0], slice::from_ref(region));
        Self::new(about, FrontendReq::ADD_MEM_REG, body, reply).with_fds([descriptor(region)])
    }

    pub(crate) fn remove_region(region: &TableRegion, reply: Reply) -> Self {
        let about = DaemonRequest::RemoveRegion(region.range());
        let body = with_regions([0, 0], slice::from_ref(region));
        Self::new(about, FrontendReq::REM_MEM_REG, body, reply)
    }

    /// The same request once more, with 0 instead of regions: the bases in the answer are known.
    pub(crate) fn acknowledge_bases(about: DaemonRequest) -> Self {
        let code = match about {
            DaemonRequest::SetTable(_) => FrontendReq::SET_MEM_TABLE,
            _ => FrontendReq::ADD_MEM_REG,
        };
        Self::new(about, code, numbers([0]), Reply::None)
    }

    /// A log of `size` bytes. The answer has no body by QEMU's frontend, 8 bytes by libvhost-user
    /// and 16 by rust-vmm's daemons (the specification names none); it cannot refuse.
    pub(crate) fn set_log(size: u64, log: Descriptor) -> Self {
        let about = DaemonRequest::SetLog(size);
        let reply = Reply::Body(&[0, 8, 16]);
        Self::new(about, FrontendReq::SET_LOG_BASE, numbers([size, 0]), reply).with_fds([log])
    }

    /// What it is about.
    pub(crate) fn about(&self) -> DaemonRequest {
        self.about
    }

    /// What comes back.
    pub(crate) fn reply(&self) -> Reply {
        self.reply
    }

    #[must_use]
    pub(crate) fn with_reply(mut self, reply: Reply) -> Self {
        self.reply = reply;
        self
    }

    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Whether it is a mere question.
    pub(crate) fn is_barrier(&self) -> bool {
        self.code == u32::from(FrontendReq::GET_FEATURES)
    }

    pub(super) fn is_table_change(&self) -> bool {
        let changes = [FrontendReq::SET_MEM_TABLE, FrontendReq::ADD_MEM_REG];
        changes.map(u32::from).contains(&self.code)
    }

    /// The fewest bytes that come back, with the header.
    pub(super) fn least_answer(&self) -> usize {
        match self.reply {
            Reply::None => 0,
            Reply::Like | Reply::Any => HEADER,
            Reply::Ack => HEADER + ACK,
            Reply::Bases => HEADER + self.body.len(),
            Reply::Body(sizes) => HEADER + sizes.iter().min().copied().unwrap_or(0),
        }
    }

    /// Whether a body of this size may come back.
    pub(super) fn allows(&self, size: usize) -> bool {
        match self.reply {
            Reply::None => false,
            Reply::Ack => size == ACK,
            Reply::Bases => size == self.body.len(),
            Reply::Like => size == self.body.len() || size == 0,
            Reply::Any => size <= LONGEST,
            Reply::Body(sizes) => sizes.contains(&size),
        }
    }

    pub(super) fn encode(&self, into: &mut Vec<u8>) {
        // A daemon answers with bases whatever it is asked.
        let asks = if self.reply == Reply::Ack {
            NEED_REPLY
        } else {
            0
        };
        let size = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        for field in [self.code, VERSION | asks, size] {
            into.extend(field.to_ne_bytes());
        }
        into.extend(&self.body);
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (body, fds) = (self.body.len(), self.fds.len());
        write!(f, "{} with {body} bytes, {fds} descriptors", self.code)
    }
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER]) -> Self {
        let (fields, _) = bytes.as_chunks();
        let field = |at: usize| u32::from_ne_bytes(fields[at]);
        Self {
            code: field(0),
            flags: field(1),
            size: field(2) as usize,
        }
    }

    /// Whether it is a request.
    pub(super) fn is_request(self) -> bool {
        self.flags & !NEED_REPLY == VERSION
    }

    /// Whether it is one that waits for an answer.
    pub(super) fn asks(self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Whether it is an answer; a daemon may leave the bit of the question in it.
    pub(super) fn is_reply(self) -> bool {
        self.flags & !NEED_REPLY == VERSION | REPLY
    }
}

/// An answer with a number.
pub(super) fn answer(code: u32, value: u64) -> Vec<u8> {
    const SIZE: u32 = 8;
    let mut bytes = [code, VERSION | REPLY, SIZE].map(u32::to_ne_bytes).concat();
    bytes.extend(value.to_ne_bytes());
    bytes
}

/// Numbers of 8 bytes, as they are in bodies.
pub(crate) fn numbers<const N: usize>(numbers: [u64; N]) -> Vec<u8> {
    numbers.map(u64::to_ne_bytes).concat()
}

/// The number that a body starts with, if it does.
pub(crate) fn number(body: &[u8]) -> u64 {
    body.first_chunk()
        .map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// The user addresses in an answer to a message with regions; `None` if anything else is
/// different.
pub(crate) fn bases(sent: &[u8], answer: &[u8]) -> Option<Vec<u64>> {
    let (sent, answer) = (sent.split_at_checked(8)?, answer.split_at_checked(8)?);
    if sent.0 != answer.0 || sent.1.len() != answer.1.len() {
        return None;
    }
    let (sent, _) = sent.1.as_chunks::<REGION>();
    let (answer, _) = answer.1.as_chunks::<REGION>();
    let base = |(sent, answer): (&[u8; REGION], &[u8; REGION])| {
        let same = sent[..16] == answer[..16] && sent[24..] == answer[24..];
        same.then(|| number(&answer[16..]))
    };
    sent.iter().zip(answer).map(base).collect()
}

/// A body of two numbers of 4 bytes, and regions.
fn with_regions(head: [u32; 2], regions: &[TableRegion]) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + regions.len() * REGION);
    body.extend(head.map(u32::to_ne_bytes).as_flattened());
    for region in regions {
        let numbers = [
            region.range().start_addr().0,
            region.range().size(),
            region.user_addr(),
            region.mmap_offset(),
        ];
        body.extend(numbers.map(u64::to_ne_bytes).as_flattened());
    }
    body
}

fn descriptor(region: &TableRegion) -> Descriptor {
    Arc::new(region.backing().clone())
}
