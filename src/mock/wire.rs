//! vhost-user messages on a Unix stream socket, file descriptors included.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc::{SCM_RIGHTS, SOL_SOCKET};
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserHeaderFlag};

use crate::logs;

/// Bytes of the header: request, flags and body size, each a native-endian `u32`.
const HEADER_SIZE: usize = 12;

/// The kernel's limit for one message (SCM_MAX_FD). With room for all of them only this process's
/// limit of descriptors can cut some of them off.
const MAX_FDS: usize = 253;

/// Bytes before a control message's data: its length in the machine's word size, its level and its
/// type (`struct cmsghdr`, see cmsg(3)). Its data begins there, as `CMSG_ALIGN` of it is itself.
const CONTROL_HEADER: usize = size_of::<usize>() + 8;

/// The protocol version that every header carries in its lowest bits.
const VERSION: u32 = 1;

/// One message in either direction.
#[derive(Debug)]
pub(super) struct Message {
    /// The request's number; an answer repeats it.
    pub(super) request: u32,
    pub(super) flags: u32,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    /// A request without body, descriptors or a wish for an acknowledgement.
    pub(super) fn bare(request: impl Into<u32>) -> Message {
        Message {
            request: request.into(),
            flags: VERSION,
            body: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// An answer that consists of one number, as acknowledgements do.
    pub(super) fn answer(request: u32, value: u64) -> Message {
        Message {
            request,
            flags: VERSION | VhostUserHeaderFlag::REPLY.bits(),
            body: value.to_ne_bytes().to_vec(),
            fds: Vec::new(),
        }
    }

    /// The request by name, if the vhost crate knows it.
    pub(super) fn code(&self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.request).ok()
    }

    pub(super) fn wants_answer(&self) -> bool {
        self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0
    }

    pub(super) fn without_answer(mut self) -> Message {
        self.flags &= !VhostUserHeaderFlag::NEED_REPLY.bits();
        self
    }

    /// The native-endian `u64` at `offset` of the body.
    pub(super) fn u64_at(&self, offset: usize) -> Option<u64> {
        let bytes = self.body.get(offset..offset.checked_add(8)?)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    }

    /// Sends the first bytes of the message, without descriptors.
    pub(super) fn send_part(&self, mut socket: &UnixStream, len: usize) -> io::Result<()> {
        let bytes = self.bytes()?;
        socket.write_all(&bytes[..len.min(bytes.len())])
    }

    fn bytes(&self) -> io::Result<Vec<u8>> {
        let size = u32::try_from(self.body.len()).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(HEADER_SIZE + self.body.len());
        for field in [self.request, self.flags, size] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.body);
        Ok(bytes)
    }

    /// Sends the message with its descriptors.
    pub(super) fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let bytes = self.bytes()?;
        let raw: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let sent = loop {
            match sendmsg::<()>(
                socket.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Err(Errno::EINTR) => {}
                sent => break sent?,
            }
        };
        // The descriptors went with the first byte: the rest, if any, is plain data. Rust programs
        // ignore SIGPIPE unless told otherwise, so that write_all cannot kill the process here.
        let mut socket = socket;
        socket.write_all(&bytes[sent..])
    }
}

/// Receives messages; keeps its control buffer from one to the next.
#[derive(Debug)]
pub(super) struct Receiver {
    control: Vec<u8>,
}

impl Receiver {
    pub(super) fn new() -> Receiver {
        Receiver {
            control: cmsg_space!([RawFd; MAX_FDS]),
        }
    }

    /// The next message, or `None` where the peer hung up between two messages.
    ///
    /// One whose descriptors did not all arrive is an error: the kernel drops those for which this
    /// process has no numbers left. Those that arrived are closed.
    pub(super) fn receive(&mut self, socket: &UnixStream) -> io::Result<Option<Message>> {
        let mut header = [0; HEADER_SIZE];
        let mut filled = 0;
        let mut fds = Vec::new();
        while filled < HEADER_SIZE {
            match self.receive_some(socket, &mut header[filled..], &mut fds)? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                received => filled += received,
            }
        }

        let field = |index: usize| {
            let at = index * 4;
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let size = field(2) as usize;
        if size > MAX_MSG_SIZE {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!(
                    "vhost-user message with a body of {size} bytes, the limit is {MAX_MSG_SIZE}"
                ),
            ));
        }
        let mut body = vec![0; size];
        let mut socket = socket;
        socket.read_exact(&mut body)?;
        Ok(Some(Message {
            request: field(0),
            flags: field(1),
            body,
            fds,
        }))
    }

    /// Receives some bytes, and adds the descriptors that came with them.
    fn receive_some(
        &mut self,
        socket: &UnixStream,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> io::Result<usize> {
        // The kernel writes only what it has to say.
        self.control.fill(0);
        let mut iov = [IoSliceMut::new(buffer)];
        let (bytes, flags) = loop {
            match recvmsg::<()>(
                socket.as_raw_fd(),
                &mut iov,
                Some(&mut self.control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(Errno::EINTR) => {}
                received => {
                    let received = received?;
                    break (received.bytes, received.flags);
                }
            }
        };
        // nix shows nothing where some were cut off; but those that were not are in our table.
        fds.extend(rights(&self.control).map(adopt));
        if flags.contains(MsgFlags::MSG_CTRUNC) {
            let reason = "no descriptors are left for those that came with a message: raise \
                          RLIMIT_NOFILE (ulimit -n)";
            logs::warn!("mock daemon: hangs up: {reason}");
            return Err(io::Error::other(reason));
        }
        Ok(bytes)
    }
}

/// The descriptors in a control buffer that was all zeroes before the kernel wrote to it. Unix
/// sockets have one control message for all of them, and no other unless it is asked for.
fn rights(control: &[u8]) -> impl Iterator<Item = RawFd> {
    let rights = || {
        let (len, rest) = control.split_first_chunk()?;
        let (level, rest) = rest.split_first_chunk()?;
        let (kind, _) = rest.split_first_chunk()?;
        let is_rights =
            i32::from_ne_bytes(*level) == SOL_SOCKET && i32::from_ne_bytes(*kind) == SCM_RIGHTS;
        let data = control.get(CONTROL_HEADER..usize::from_ne_bytes(*len))?;
        is_rights.then_some(data)
    };
    let (fds, _) = rights().unwrap_or_default().as_chunks();
    fds.iter().map(|fd| RawFd::from_ne_bytes(*fd))
}

/// Takes ownership of a descriptor that recvmsg has just installed.
#[expect(
    unsafe_code,
    reason = "nix hands received descriptors over as bare integers"
)]
fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the only caller passes each number of an SCM_RIGHTS list once, which the kernel has
    // just written: it opened the descriptor for this message a moment ago, no one else has
    // learned its number, and it needs nothing but close() to be released.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_message_arrives_with_its_body_and_descriptors() {
        let (left, right) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        let inodes: Vec<u64> = files.iter().map(|f| f.metadata().unwrap().ino()).collect();
        let message = Message {
            request: 5,
            flags: 9,
            body: (0..=255).collect(),
            fds: files.into_iter().map(OwnedFd::from).collect(),
        };
        message.send(&left).unwrap();
        Message::bare(FrontendReq::GET_FEATURES)
            .send(&left)
            .unwrap();
        drop(left);

        let mut receiver = Receiver::new();
        let first = receiver.receive(&right).unwrap().unwrap();
        assert_eq!((first.request, first.flags), (5, 9));
        assert!(first.wants_answer());
        assert_eq!(first.body, message.body);
        let got: Vec<u64> = first
            .fds
            .into_iter()
            .map(|fd| File::from(fd).metadata().unwrap().ino())
            .collect();
        assert_eq!(got, inodes);
        let second = receiver.receive(&right).unwrap().unwrap();
        assert_eq!(second.code(), Some(FrontendReq::GET_FEATURES));
        assert!(second.fds.is_empty() && second.body.is_empty());
        assert!(receiver.receive(&right).unwrap().is_none());
    }

    #[test]
    fn an_oversized_or_cut_off_message_is_an_error() {
        let (mut left, right) = UnixStream::pair().unwrap();
        let header: Vec<u8> = [5u32, 1, 4097]
            .iter()
            .flat_map(|f| f.to_ne_bytes())
            .collect();
        left.write_all(&header).unwrap();
        let error = Receiver::new().receive(&right).unwrap_err();
        assert!(error.to_string().contains("4097"), "{error}");

        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&header[..7]).unwrap();
        drop(left);
        let error = Receiver::new().receive(&right).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
}
