//! Regions and errors in the terms of the vhost crate, for daemons that are made with it.

use std::io;

use vhost::vhost_user::Error as ProtocolError;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::GuestAddress;

use super::error::ReceiveError;
use super::wire::ReceivedRegion;

impl From<&VhostUserMemoryRegion> for ReceivedRegion {
    /// A region of SET_MEM_TABLE.
    fn from(region: &VhostUserMemoryRegion) -> Self {
        Self {
            guest_addr: GuestAddress(region.guest_phys_addr),
            size: region.memory_size,
            user_addr: region.user_addr,
            mmap_offset: region.mmap_offset,
        }
    }
}

impl From<&VhostUserSingleMemoryRegion> for ReceivedRegion {
    /// The region of ADD_MEM_REG or REM_MEM_REG.
    fn from(region: &VhostUserSingleMemoryRegion) -> Self {
        let region: &VhostUserMemoryRegion = region;
        region.into()
    }
}

impl From<ReceiveError> for ProtocolError {
    /// What a handler of the vhost crate returns, which answers 1 for it whatever the
    /// [code](ReceiveError::reply_code).
    fn from(error: ReceiveError) -> Self {
        Self::ReqHandlerError(io::Error::other(error))
    }
}
