//! Why a session with a daemon cannot do what it is told.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestAddress;

use crate::vhost_user::share::ShareError;

/// What a session's calls return.
pub(super) type Result<T, E = SessionError> = std::result::Result<T, E>;

/// Why a session with a daemon cannot do what it is told.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Nobody can be reached at the socket.
    #[error(
        "no daemon can be reached at {}: start it, or wait until it listens",
        path.display()
    )]
    #[non_exhaustive]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },

    /// The session was made of a socket, and does not know where to connect again.
    #[error("the session has no path to connect to again: give it a new socket (reconnect_on)")]
    NoPath,

    /// The daemon lacks virtio features that are required, or that were agreed on before.
    #[error(
        "the daemon does not offer the virtio features {missing:#x}, which are required: it \
         offers {offered:#x}"
    )]
    #[non_exhaustive]
    Features {
        /// Those that it lacks.
        missing: u64,
        /// Those that it offers.
        offered: u64,
    },

    /// The daemon lacks `VHOST_USER_F_PROTOCOL_FEATURES`, or a protocol feature that a call needs.
    #[error("the daemon does not offer {what}, which this needs")]
    #[non_exhaustive]
    NotOffered {
        /// Its name.
        what: &'static str,
    },

    /// There is no such ring.
    #[error("there is no ring {index}: the daemon has {rings}")]
    #[non_exhaustive]
    NoSuchRing {
        /// The ring.
        index: u32,
        /// How many there are.
        rings: u64,
    },

    /// A ring's size is no power of two from 2 to the limit: 32,768, or, where the daemon notes
    /// what is in flight,
    /// [`SessionOptions::with_max_ring_size`](crate::SessionOptions::with_max_ring_size).
    #[error("a ring of {size} descriptors: it is to be a power of two, at most {limit}")]
    #[non_exhaustive]
    RingSize {
        /// The size.
        size: u16,
        /// The largest.
        limit: u16,
    },

    /// The daemon's in-flight buffer cannot be used.
    #[error(
        "the daemon's in-flight buffer cannot be used: {reason}; leave INFLIGHT_SHMFD out \
         (SessionOptions::without_protocol_features), or mend the daemon"
    )]
    #[non_exhaustive]
    Inflight {
        /// Why not.
        reason: String,
    },

    /// A part of a ring is not in the memory that the daemon holds, or not in one region.
    #[error(
        "the {part} of ring {index}, {len} bytes at {:#x}, is not wholly in one region that the \
         daemon holds",
        addr.0
    )]
    #[non_exhaustive]
    RingNotShared {
        /// The ring.
        index: u32,
        /// Which part.
        part: &'static str,
        /// Where it begins.
        addr: GuestAddress,
        /// Its size in bytes.
        len: u64,
    },

    /// A descriptor of a ring cannot be used.
    #[error("a descriptor of ring {index} cannot be used")]
    #[non_exhaustive]
    RingDescriptor {
        /// The ring.
        index: u32,
        /// Why not.
        source: io::Error,
    },

    /// The ring runs already, or does not run.
    #[error("ring {index} {}", if *runs { "runs already: stop it first" } else { "does not run" })]
    #[non_exhaustive]
    RingState {
        /// The ring.
        index: u32,
        /// Whether it runs.
        runs: bool,
    },

    /// The guest has to reset the device before rings are started.
    #[error(
        "the daemon was restarted, and it is not known which requests it had completed: have the \
         guest reset the device (forget_rings), then start its rings"
    )]
    NeedsReset,

    /// The daemon has not been told all that it was told before: nothing else can be said to it.
    #[error("the daemon is being reconnected: go on with that first")]
    Reconnecting,

    /// The message is one that the session sends by itself.
    #[error("message {code} is one that the session sends by itself: use its own calls")]
    #[non_exhaustive]
    OwnMessage {
        /// Its number.
        code: u32,
    },

    /// The message has more descriptors than the kernel sends by one call.
    #[error("a message with {count} descriptors: the kernel sends at most {limit} with one")]
    #[non_exhaustive]
    TooManyDescriptors {
        /// How many it has.
        count: usize,
        /// The most.
        limit: usize,
    },

    /// The backend channel cannot be made, or has ended.
    #[error("the channel for the daemon's own requests cannot be used")]
    #[non_exhaustive]
    Channel {
        /// Why not.
        source: io::Error,
    },

    /// The daemon failed, or its memory cannot be what it should.
    #[error(transparent)]
    Share(#[from] ShareError),
}
