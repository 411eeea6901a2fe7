//! Where a daemon mapped regions while postcopy listens: told to the caller, then acknowledged.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use std::sync::{Mutex, PoisonError};

use super::VhostUserShare;
use super::error::ShareError;
use crate::range::GuestRange;

impl VhostUserShare {
    /// Has `handler` told where the daemon maps each region while postcopy listens, before that is
    /// acknowledged.
    ///
    /// While postcopy listens (VHOST_USER_POSTCOPY_LISTEN), a daemon answers SET_MEM_TABLE and
    /// ADD_MEM_REG with the address in its own process of each region's first byte: the base. It
    /// is the *daemon* that registers these addresses with userfaultfd(2), and the frontend has
    /// the descriptor, from VHOST_USER_POSTCOPY_ADVISE. Faults that are read from it name
    /// addresses of the daemon: one at `address` is at
    /// `range.start_addr() + (address - base)` in the guest, and is resolved at `address`. The
    /// base must be known before: from the acknowledgement on, faults can come. So the
    /// handler is called with the region and its base, and then the share acknowledges. That it
    /// listens is said by [`set_postcopy`](Self::set_postcopy).
    ///
    /// QEMU's daemons (libvhost-user, as of QEMU 10.0) hang up at the acknowledgement of
    /// ADD_MEM_REG, so they need CONFIGURE_MEM_SLOTS left out, and return the user addresses that
    /// they were sent instead of their own.
    ///
    /// The handler is called during an update, on the thread that makes it, and stays for all
    /// connections. A later base of a region replaces the one before: a whole table has all
    /// regions mapped anew. It should be quick: the daemon waits, and takes no other message. If
    /// it panics, the share is broken: the daemon goes without its acknowledgement.
    ///
    /// See `VHOST_USER_SET_MEM_TABLE`, `VHOST_USER_ADD_MEM_REG` and `VHOST_USER_POSTCOPY_LISTEN`
    /// in the vhost-user specification ("Front-end message types").
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    ///
    /// use guest_memory_shm::VhostUserShare;
    /// # use guest_memory_shm::mock::MockDaemon;
    /// # use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Features};
    ///
    /// # let daemon = MockDaemon::builder().start_unnamed()?;
    /// # let frontend = Frontend::from_stream(daemon.connect()?, 1);
    /// # let features = Features::empty();
    /// let bases = Arc::new(Mutex::new(Vec::new())); // also for the thread that reads the faults
    /// let known = Arc::clone(&bases);
    /// let share = VhostUserShare::new(&frontend, features)?
    ///     .with_base_handler(move |range, base| known.lock().unwrap().push((range, base)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn with_base_handler(
        mut self,
        handler: impl FnMut(GuestRange, u64) + Send + 'static,
    ) -> Self {
        self.base_handler = Some(Mutex::new(Box::new(handler)));
        self
    }

    /// Says whether postcopy listens: from the acknowledgement of VHOST_USER_POSTCOPY_LISTEN on,
    /// the daemon answers each table with its bases, and has to be acknowledged. A new connection
    /// does not listen.
    pub fn set_postcopy(&mut self, listens: bool) {
        self.listens = listens;
    }

    /// Tells the handler a base. If it panics, the daemon goes without its acknowledgement.
    pub(super) fn tell_base(&mut self, range: GuestRange, base: u64) {
        let Some(handler) = &mut self.base_handler else {
            return;
        };
        let handler = handler.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| handler(range, base))) {
            self.break_off(ShareError::GivenUp {
                reason: "the handler of bases panicked".to_owned(),
            });
            resume_unwind(panic);
        }
    }
}
