//! A Unix socket that is never waited on: each call has `MSG_DONTWAIT`, because the flag of the
//! descriptor would be shared with all who have the socket.
#![expect(
    unsafe_code,
    reason = "received descriptors, and a frontend's, come as bare numbers"
)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{PassCred, SetBool};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, recvmsg, sendmsg, setsockopt};

use vhost::vhost_user::Frontend;
use vmm_sys_util::eventfd::EventFd;

use crate::host::process::Sender;
use crate::logs;

/// The most descriptors of one message (`SCM_MAX_FD` of the kernel).
pub(crate) const MAX_FDS: usize = 253;

/// What came by one call.
pub(super) struct Received {
    /// 0: the other end has hung up.
    pub(super) bytes: usize,
    /// The process that sent it, if it is told ([`pass_credentials`]).
    pub(super) sender: Sender,
    pub(super) fds: Vec<OwnedFd>,
}

/// Room for what comes beside the bytes.
#[derive(Debug)]
pub(super) struct Control(Vec<u8>);

impl Control {
    /// With room for all descriptors that can come; otherwise the kernel closes those for which
    /// there is none beside, or instead of, the credentials.
    pub(super) fn new(with_fds: bool) -> Self {
        // Credentials are three numbers, and a pidfd is one.
        let number = size_of::<u32>();
        let data = [3 * number, number, MAX_FDS * size_of::<RawFd>()];
        let parts = if with_fds { 3 } else { 2 };
        let room = |data: &usize| HEADER + data.next_multiple_of(ALIGN);
        Self(vec![0; data[..parts].iter().map(room).sum()])
    }
}

/// Sends as much of `bytes` as there is room for, the descriptors with the first byte.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> Result<usize, Errno> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            flags,
            None,
        ) {
            Err(Errno::EINTR) => {}
            sent => return sent,
        }
    }
}

/// Receives what is there, at most as much as `buffer` has room for.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut Control,
) -> Result<Received, Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    // The kernel writes only what it has to say.
    control.0.fill(0);
    let bytes = loop {
        let mut into = [IoSliceMut::new(buffer)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control.0), flags) {
            Err(Errno::EINTR) => {}
            message => break message?.bytes,
        }
    };
    let (mut sender, mut fds) = (Sender::default(), Vec::new());
    // Read by hand: nix shows nothing where some were cut off, and those that were not are in our
    // table of descriptors.
    for (kind, data) in parts(&control.0) {
        let (numbers, _) = data.as_chunks();
        match kind {
            libc::SCM_RIGHTS => {
                fds.extend(numbers.iter().map(|fd| adopt(RawFd::from_ne_bytes(*fd))))
            }
            // A process that our PID namespace does not see is 0.
            libc::SCM_CREDENTIALS => {
                let id = numbers.first().map(|id| u32::from_ne_bytes(*id));
                sender.id = id.filter(|id| *id != 0);
            }
            // A VMM may have asked for them, too.
            SCM_PIDFD => {
                let number = numbers.first().map(|fd| RawFd::from_ne_bytes(*fd));
                sender.pidfd = number.map(|fd| match fd {
                    0.. => Ok(Arc::new(adopt(fd))),
                    errno => Err(Errno::from_raw(-errno)),
                });
            }
            _ => {}
        }
    }
    Ok(Received { bytes, sender, fds })
}

/// A part begins where a word of the kernel can, and so does its data (`CMSG_ALIGN`). The
/// alignment of `libc::cmsghdr` is another with musl.
const ALIGN: usize = size_of::<usize>();

/// The size of the header of a part: length, level, kind.
const HEADER: usize = size_of::<libc::cmsghdr>();

/// The parts of a control buffer that are of the level `SOL_SOCKET`: kind and data. On a socket
/// that is no Unix socket there are others, whose kinds have the same numbers: an SCTP socket
/// gives numbers that the other end chose as kind 1, which must not pass for descriptors.
fn parts(control: &[u8]) -> impl Iterator<Item = (i32, &[u8])> {
    let mut rest = control;
    let all = std::iter::from_fn(move || {
        let (len, fields) = rest.split_first_chunk()?;
        let len = usize::from_ne_bytes(*len);
        // On 64-bit systems the two fields follow at once.
        let (level, fields) = fields.split_first_chunk::<4>()?;
        let (kind, _) = fields.split_first_chunk()?;
        let data = rest.get(HEADER..len)?;
        rest = rest.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((i32::from_ne_bytes(*level), i32::from_ne_bytes(*kind), data))
    });
    all.filter_map(|(level, kind, data)| (level == libc::SOL_SOCKET).then_some((kind, data)))
}

/// Takes ownership of a descriptor that recvmsg(2) has just installed.
fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the only caller passes each number of an SCM_RIGHTS list once, and that of an
    // SCM_PIDFD if it is no error. Nothing else of the level SOL_SOCKET has these kinds, so the
    // kernel has just written it to a buffer that was zeroed: it opened the descriptor for this
    // message a moment ago, no one else has learned its number, and it needs nothing but close(2)
    // to be released.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A message comes with a pidfd of its sender (include/linux/socket.h).
const SCM_PIDFD: i32 = 4;

/// That messages come with [`SCM_PIDFD`], since Linux 6.5.
#[derive(Clone)]
struct PassPidfd;

nix::setsockopt_impl!(
    PassPidfd,
    libc::SOL_SOCKET,
    libc::SO_PASSPIDFD,
    bool,
    SetBool
);

/// Has each message come with the process that sent it, or not: its number, for people, and its
/// pidfd, to know when it is dead.
pub(super) fn pass_credentials(socket: BorrowedFd<'_>, wanted: bool) {
    let set = setsockopt(&socket, PassCred, &wanted);
    if let Err(errno) = set.and(setsockopt(&socket, PassPidfd, &wanted)) {
        logs::debug!("which process the daemon is may remain unknown: {errno}");
    }
}

/// Checks that this is a Unix stream socket that is connected, or was. No byte is sent, and no
/// call is made that exchanging messages does not make.
pub(crate) fn check_connected(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let nowhere = UnixAddr::new_unnamed();
    // On such a one a message with an address is EISCONN, whatever the address.
    match sendmsg(socket.as_raw_fd(), &[], &[], flags, Some(&nowhere)) {
        // One of another kind, which took an empty message.
        Ok(_) => Err(Errno::ESOCKTNOSUPPORT),
        Err(errno @ (Errno::ENOTSOCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOTCONN)) => {
            Err(errno)
        }
        // Other answers, of a sandbox or for want of memory, say nothing of the socket.
        Err(_) => Ok(()),
    }
}

/// What is there to be received.
pub(super) enum Seen {
    Nothing,
    Bytes,
    /// The other end has hung up, and all that it said was received.
    End(io::Error),
}

/// Looks what is there, and leaves it there.
pub(super) fn look(socket: BorrowedFd<'_>) -> Seen {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    loop {
        match recv(socket.as_raw_fd(), &mut [0], flags) {
            Ok(0) => return Seen::End(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Seen::Bytes,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Seen::Nothing,
            Err(errno) => return Seen::End(errno.into()),
        }
    }
}

/// A socket that a share takes as its connection: one's own, or a copy of the one that vhost's
/// `Frontend` has.
///
/// ```
/// use std::os::unix::net::UnixStream;
///
/// use guest_memory_shm::DaemonSocket;
///
/// let (ours, _daemons) = UnixStream::pair()?;
/// let socket = ours.into_socket()?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub trait DaemonSocket {
    /// The socket.
    ///
    /// # Errors
    ///
    /// No descriptor is left for a copy.
    fn into_socket(self) -> io::Result<OwnedFd>;
}

impl DaemonSocket for OwnedFd {
    fn into_socket(self) -> io::Result<OwnedFd> {
        Ok(self)
    }
}

impl DaemonSocket for UnixStream {
    fn into_socket(self) -> io::Result<OwnedFd> {
        Ok(self.into())
    }
}

/// Takes the frontend's lock: none of its clones may have a request under way.
impl DaemonSocket for &Frontend {
    fn into_socket(self) -> io::Result<OwnedFd> {
        // SAFETY: the number is that of the frontend's socket, which it keeps open as long as it
        // lives, and it is borrowed here.
        let socket = unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) };
        socket.try_clone_to_owned()
    }
}

/// A copy of an eventfd's descriptor.
pub(crate) fn copy_of(event: &EventFd) -> io::Result<OwnedFd> {
    // SAFETY: the number is that of the eventfd's descriptor, which it keeps open as long as it
    // lives, and it is borrowed here.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    fd.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_of_the_level_of_sockets_is_told() {
        let part = |level: i32, data: u32| {
            let fields = [level, libc::SCM_RIGHTS].map(i32::to_ne_bytes);
            let len = (HEADER + size_of::<u32>()).to_ne_bytes();
            let mut part = [&len[..], fields.as_flattened(), &data.to_ne_bytes()].concat();
            part.resize(part.len().next_multiple_of(ALIGN), 0);
            part
        };
        // What SCTP tells of a message (SCTP_SNDRCV), among descriptors.
        let control = [
            part(libc::SOL_SOCKET, 7),
            part(libc::IPPROTO_SCTP, 8),
            part(libc::SOL_SOCKET, 9),
            vec![0; 64],
        ];
        let control = control.concat();
        let seven_and_nine = [7_u32, 9].map(u32::to_ne_bytes);
        let told: Vec<_> = parts(&control).collect();
        let expected = seven_and_nine
            .each_ref()
            .map(|data| (libc::SCM_RIGHTS, &data[..]));
        assert_eq!(told, expected);
    }
}
