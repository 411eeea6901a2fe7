//! SET_LOG_BASE on the wire.
//!
//! The answer has no body by QEMU's frontend, 8 bytes by libvhost-user and 16 by rust-vmm's
//! daemons (the specification names none). vhost's `Frontend` waits for 16, from libvhost-user for
//! ever. So this one message is exchanged here.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg, setsockopt,
};
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag};

use super::error::DaemonFailure;
use super::log::DaemonLog;
use crate::logs;

/// The version, in the two lowest bits of a header's flags, and the bits that it takes.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// The longest body that an answer to this message may have.
const MAX_BODY: usize = 16;

/// Sends the log and waits for the answer, which says only that it was handled, and by which
/// process, if the kernel says it.
///
/// No other call may use the connection meanwhile.
pub(super) fn set_log_base(
    socket: BorrowedFd<'_>,
    log: &DaemonLog,
) -> Result<Option<u32>, DaemonFailure> {
    let credentials = Credentials::wanted(socket);
    send(socket, log).map_err(failed)?;
    let mut header = [0; 12];
    let process = receive(socket, &mut header).map_err(failed)?;
    let field = |at: usize| {
        u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let (request, flags, size) = (field(0), field(4), field(8) as usize);
    let is_reply =
        flags & VERSION_MASK == VERSION && flags & VhostUserHeaderFlag::REPLY.bits() != 0;
    if request != u32::from(FrontendReq::SET_LOG_BASE) || !is_reply || size > MAX_BODY {
        let what =
            format!("to SET_LOG_BASE came request {request}, flags {flags:#x}, {size} bytes");
        return Err(DaemonFailure::protocol(what));
    }
    // libvhost-user returns what it was sent, and DPDK nothing that means a refusal either.
    let mut body = [0; MAX_BODY];
    receive(socket, &mut body[..size]).map_err(failed)?;
    drop(credentials);
    Ok(process)
}

/// While it lives, messages come with the credentials of their senders. Where that cannot be
/// had, the process is unknown.
struct Credentials<'a>(BorrowedFd<'a>);

impl<'a> Credentials<'a> {
    fn wanted(socket: BorrowedFd<'a>) -> Self {
        if let Err(errno) = setsockopt(&socket, PassCred, &true) {
            logs::debug!("which process the daemon is cannot be known: {errno}");
        }
        Self(socket)
    }
}

impl Drop for Credentials<'_> {
    fn drop(&mut self) {
        // vhost's frontend leaves them no room, and would take them for a cut off message.
        let _ = setsockopt(&self.0, PassCred, &false);
    }
}

fn send(socket: BorrowedFd<'_>, log: &DaemonLog) -> io::Result<()> {
    let mut message = Vec::with_capacity(28);
    for field in [FrontendReq::SET_LOG_BASE.into(), VERSION, 16] {
        message.extend_from_slice(&field.to_ne_bytes());
    }
    for field in [log.size(), 0] {
        message.extend_from_slice(&field.to_ne_bytes());
    }
    let fd = [log.as_fd().as_raw_fd()];
    let mut sent = 0;
    while sent < message.len() {
        let rights = [ControlMessage::ScmRights(&fd)];
        // The descriptor goes with the first byte.
        let control = if sent == 0 { &rights[..] } else { &[] };
        let rest = [IoSlice::new(&message[sent..])];
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &rest,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            count => sent += count?,
        }
    }
    Ok(())
}

/// Fills the buffer; gives the process that sent the first byte, if that is known.
fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<u32>> {
    // Room for credentials and nothing else: descriptors, which no answer has, are dropped.
    let mut control = cmsg_space!(UnixCredentials);
    let (mut received, mut process) = (0, None);
    while received < buffer.len() {
        let mut rest = [IoSliceMut::new(&mut buffer[received..])];
        let raw = socket.as_raw_fd();
        let message = match recvmsg::<()>(raw, &mut rest, Some(&mut control), MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            message => message?,
        };
        if message.bytes == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if received == 0 {
            process = message.cmsgs().ok().into_iter().flatten().find_map(sender);
        }
        received += message.bytes;
    }
    Ok(process)
}

fn sender(message: ControlMessageOwned) -> Option<u32> {
    match message {
        // One that our PID namespace does not see is 0.
        ControlMessageOwned::ScmCredentials(sender) => {
            u32::try_from(sender.pid()).ok().filter(|id| *id != 0)
        }
        _ => None,
    }
}

fn failed(error: io::Error) -> DaemonFailure {
    match error.kind() {
        ErrorKind::UnexpectedEof
        | ErrorKind::BrokenPipe
        | ErrorKind::ConnectionReset
        | ErrorKind::NotConnected => DaemonFailure::hung_up(error),
        _ => DaemonFailure::protocol(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const SET_LOG_BASE: u32 = 6;
    const REPLY: u32 = 0x4 | VERSION;

    /// What comes of this answer; and what was sent.
    fn answered(answer: &[u8], hang_up: bool) -> (Result<Option<u32>, DaemonFailure>, Vec<u8>) {
        let (front, mut back) = UnixStream::pair().unwrap();
        back.write_all(answer).unwrap();
        if hang_up {
            back.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let log = DaemonLog::new(24).unwrap();
        let result = set_log_base(front.as_fd(), &log);
        let mut sent = vec![0; 28];
        back.read_exact(&mut sent).unwrap();
        back.set_nonblocking(true).unwrap();
        assert!(back.read(&mut [0]).is_err(), "and nothing more");
        (result, sent)
    }

    fn answer(request: u32, flags: u32, size: u32) -> Vec<u8> {
        let fields = [request, flags, size].map(u32::to_ne_bytes);
        let mut bytes = fields.concat();
        bytes.resize(12 + size as usize, 0xff);
        bytes
    }

    #[test]
    fn answers_of_each_length_that_daemons_give_are_taken_whole() {
        for size in [0, 8, 16] {
            let mut two = answer(SET_LOG_BASE, REPLY, size);
            two.extend(answer(SET_LOG_BASE, REPLY, size));
            let (front, mut back) = UnixStream::pair().unwrap();
            back.write_all(&two).unwrap();
            let log = DaemonLog::new(8).unwrap();
            // The second finds its own answer: the first took no byte too many, or too few.
            set_log_base(front.as_fd(), &log).unwrap();
            set_log_base(front.as_fd(), &log).unwrap();
        }
    }

    #[test]
    fn the_size_is_sent_and_no_acknowledgement_asked_for() {
        let (result, sent) = answered(&answer(SET_LOG_BASE, REPLY, 8), false);
        result.unwrap();
        let mut expected = [SET_LOG_BASE, VERSION, 16].map(u32::to_ne_bytes).concat();
        expected.extend([24, 0].map(u64::to_ne_bytes).concat());
        assert_eq!(sent, expected);
    }

    #[test]
    fn anything_else_is_a_broken_protocol_and_an_early_end_a_hang_up() {
        for bad in [
            answer(5, REPLY, 8),
            answer(SET_LOG_BASE, VERSION, 8),
            answer(SET_LOG_BASE, 0x4, 8),
            answer(SET_LOG_BASE, REPLY, 17),
        ] {
            let (result, _) = answered(&bad, false);
            assert!(
                matches!(result, Err(DaemonFailure::Protocol(_))),
                "{result:?}"
            );
        }
        let whole = answer(SET_LOG_BASE, REPLY, 8);
        for len in [0, 1, 12, 19] {
            let (result, _) = answered(&whole[..len], true);
            assert!(
                matches!(result, Err(DaemonFailure::HungUp(_))),
                "{len}: {result:?}"
            );
        }
    }
}
