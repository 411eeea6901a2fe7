//! Backings: the objects that back RAM, each a descriptor of known size whose pages can be shared.
//!
//! A [`ShmBacking`] is created from [`RamOptions`](crate::RamOptions), or adopted from a
//! descriptor that came from elsewhere. Either way its length, its page size and its seals are
//! known and checked before anything is mapped, because a mapping that reaches past the end of its
//! file is SIGBUS.
//!
//! Creating takes three steps. Options are [`Resolved`] once, against this machine and what is
//! at the path; with a length they become a [`Request`], and all requests are checked together;
//! then each becomes a [provisional](request::Provisional) backing, which leaves nothing behind
//! unless it is kept. RAM on a backing that exists takes the same way, with the options that the
//! backing was given.

mod adopt;
mod capacity;
mod error;
mod existing;
mod extents;
mod file;
mod file_end;
mod file_error;
mod file_open;
mod gate;
#[cfg(feature = "vhost-user")]
mod growable;
mod hugetlb;
mod kind;
mod made;
mod memfd;
mod notes;
mod place;
mod posix_shm;
mod request;
mod seals;
mod shm_backing;

pub(crate) use crate::host::base_page_size;
pub use adopt::AdoptPolicy;
pub use error::{AdoptError, BackingError};
pub(crate) use extents::Allocation;
pub use file_error::FileError;
pub(crate) use gate::{Closed, DiscardGate, Passage};
pub(crate) use hugetlb::{check_groups, check_pool};
pub use kind::{BackingKind, FileIdentity};
pub(crate) use request::{Request, Resolved, memory_notes};
pub use seals::Seals;
pub use shm_backing::ShmBacking;
