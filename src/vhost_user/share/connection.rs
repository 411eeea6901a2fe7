//! Where memory tables go: a small trait, and its implementation for vhost's `Frontend`.

use std::os::fd::{AsFd, AsRawFd};

#[cfg(feature = "postcopy")]
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::disconnector::Disconnector;
use super::error::{DaemonFailure, DaemonRequest};
use super::log::DaemonLog;
use super::socket::socket_of;
use super::wire;
use crate::vhost_user::table::{MemoryTable, TableError, TableRegion};

/// The frontend's side of a connection to a daemon, as far as memory tables need it.
///
/// vhost's `Frontend` implements it; another frontend, or a test without a socket, can.
pub trait DaemonConnection {
    /// Has every later change acknowledged by the daemon before it returns. Called before the
    /// first message, before the deadline, and only if REPLY_ACK was negotiated.
    fn request_acks(&mut self);

    /// SET_MEM_TABLE: replaces the whole table, by at most
    /// [`max_table_regions`](Self::max_table_regions).
    ///
    /// While postcopy listens the daemon answers with the addresses at which it mapped the
    /// regions, in their order; [`acknowledge_bases`](Self::acknowledge_bases) is called next.
    ///
    /// # Errors
    ///
    /// The way in which the daemon did not take it.
    fn set_mem_table(
        &mut self,
        regions: &[TableRegion],
    ) -> Result<Option<Vec<u64>>, DaemonFailure>;

    /// ADD_MEM_REG: adds one region.
    ///
    /// While postcopy listens the daemon answers with the address at which it mapped it;
    /// [`acknowledge_bases`](Self::acknowledge_bases) is called next.
    ///
    /// # Errors
    ///
    /// The way in which the daemon did not take it.
    fn add_mem_region(&mut self, region: &TableRegion) -> Result<Option<u64>, DaemonFailure>;

    /// REM_MEM_REG: removes one region.
    ///
    /// # Errors
    ///
    /// The way in which the daemon did not take it.
    fn remove_mem_region(&mut self, region: &TableRegion) -> Result<(), DaemonFailure>;

    /// GET_MAX_MEM_SLOTS: how many regions the daemon takes.
    ///
    /// # Errors
    ///
    /// The way in which the daemon did not answer.
    fn max_mem_slots(&mut self) -> Result<u64, DaemonFailure>;

    /// The same request once more, with 0 instead of regions: says that the addresses in the
    /// daemon's answer are known, so that it may cause faults there.
    ///
    /// Called right after each answer with addresses, and before any other message, because the
    /// daemon waits for it. `request` is what was answered: [`SetTable`](DaemonRequest::SetTable)
    /// or [`AddRegion`](DaemonRequest::AddRegion). No answer follows. A connection that never
    /// returns addresses needs none.
    ///
    /// # Errors
    ///
    /// [`DaemonFailure::NoPostcopy`] unless implemented; `Frontend` implements it with the feature
    /// `postcopy`.
    fn acknowledge_bases(&mut self, _request: DaemonRequest) -> Result<(), DaemonFailure> {
        Err(DaemonFailure::NoPostcopy)
    }

    /// SET_LOG_BASE: has the daemon log what it writes in this log, instead of the one before.
    /// Gives the process that answered, if that is known, by its number in our PID namespace:
    /// whether a daemon that was hung up on is dead is what
    /// [`VhostUserShare::stop_log`](crate::VhostUserShare::stop_log) has to say.
    ///
    /// The process is the one that *sent* the answer, as the kernel adds it to a message
    /// (`SCM_CREDENTIALS`, unix(7)); `SO_PEERCRED` would name the one that called listen(2), which
    /// may have been a manager that is long gone.
    ///
    /// Called only if LOG_SHMFD was negotiated. A connection that carries no log refuses it.
    ///
    /// # Errors
    ///
    /// The way in which the daemon did not take it.
    fn set_log_base(&mut self, _log: &DaemonLog) -> Result<Option<u32>, DaemonFailure> {
        Err(DaemonFailure::refused("this connection carries no log"))
    }

    /// A round trip (GET_FEATURES): messages are handled in order, so its answer says that all
    /// before it were handled, and that the daemon is still there.
    ///
    /// # Errors
    ///
    /// The way in which the daemon did not answer.
    fn barrier(&mut self) -> Result<(), DaemonFailure>;

    /// Whether this connection could carry the table at all. Asked before anything is sent.
    ///
    /// # Errors
    ///
    /// Why it could not.
    fn check_table(&self, _table: &MemoryTable) -> Result<(), TableError> {
        Ok(())
    }

    /// How many regions [`set_mem_table`](Self::set_mem_table) carries: 8 by the vhost-user
    /// specification ("Memory regions description"). vhost would let 32 through, which daemons
    /// refuse.
    fn max_table_regions(&self) -> usize {
        8
    }

    /// Whether the table that was there before is still there after a refused SET_MEM_TABLE.
    /// vhost-user promises nothing, and some daemons unmap the old table first.
    fn refusal_keeps_table(&self) -> bool {
        false
    }

    /// What ends the connection from another thread, so that a call that waits returns with an
    /// error, and what sees that the daemon has. `None` if no call of this connection ever waits.
    ///
    /// Asked once for each connection, when a share begins with it; must not wait.
    fn disconnector(&self) -> Option<Disconnector>;
}

/// What a connection's call says.
pub(super) type Answer<T> = Result<T, DaemonFailure>;

impl From<vhost::Error> for DaemonFailure {
    fn from(error: vhost::Error) -> Self {
        let make = match &error {
            vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError) => Self::refused,
            vhost::Error::VhostUserProtocol(
                ProtocolError::Disconnected
                // An answer that ends before it is complete, or that never began.
                | ProtocolError::PartialMessage
                | ProtocolError::SocketBroken(_),
            ) => Self::hung_up,
            _ => Self::protocol,
        };
        make(error)
    }
}

impl DaemonConnection for Frontend {
    /// Sets the header flag `NEED_REPLY` on all messages from now on.
    fn request_acks(&mut self) {
        self.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }

    fn set_mem_table(
        &mut self,
        regions: &[TableRegion],
    ) -> Result<Option<Vec<u64>>, DaemonFailure> {
        let infos: Vec<_> = regions.iter().map(Into::into).collect();
        Ok(VhostBackend::set_mem_table(self, &infos)?)
    }

    fn add_mem_region(&mut self, region: &TableRegion) -> Result<Option<u64>, DaemonFailure> {
        Ok(VhostUserFrontend::add_mem_region(self, &region.into())?)
    }

    fn remove_mem_region(&mut self, region: &TableRegion) -> Result<(), DaemonFailure> {
        Ok(VhostUserFrontend::remove_mem_region(self, &region.into())?)
    }

    fn max_mem_slots(&mut self) -> Result<u64, DaemonFailure> {
        Ok(VhostUserFrontend::get_max_mem_slots(self)?)
    }

    #[cfg(feature = "postcopy")]
    fn acknowledge_bases(&mut self, request: DaemonRequest) -> Result<(), DaemonFailure> {
        let message = match request {
            DaemonRequest::SetTable(_) => FrontendReq::SET_MEM_TABLE,
            _ => FrontendReq::ADD_MEM_REG,
        };
        Ok(self.postcopy_ack_mem_regions(message)?)
    }

    /// Exchanges the message itself, because vhost 0.18 understands the answer of its own daemons
    /// only. No clone of the frontend may make a call meanwhile.
    fn set_log_base(&mut self, log: &DaemonLog) -> Result<Option<u32>, DaemonFailure> {
        wire::set_log_base(socket_of(self), log)
    }

    fn barrier(&mut self) -> Result<(), DaemonFailure> {
        self.get_features()?;
        Ok(())
    }

    fn disconnector(&self) -> Option<Disconnector> {
        Some(self.into())
    }
}

impl From<&TableRegion> for VhostUserMemoryRegionInfo {
    /// The region in vhost's terms. The descriptor in it is valid as long as the region lives.
    #[allow(
        clippy::needless_update,
        reason = "with vhost's feature `xen`, which any crate may turn on, there are more fields"
    )]
    fn from(region: &TableRegion) -> Self {
        Self {
            guest_phys_addr: region.range().start_addr().0,
            memory_size: region.range().size(),
            userspace_addr: region.user_addr(),
            mmap_offset: region.mmap_offset(),
            mmap_handle: region.as_fd().as_raw_fd(),
            ..Self::default()
        }
    }
}
