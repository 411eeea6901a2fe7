//! Memory slots of a hypervisor, KVM's first of all, kept equal to the guest's memory.
//!
//! - [`HypervisorVm`]: the four calls that are made, which kvm-ioctls' `VmFd` answers;
//! - [`LogBuffer`]: where a dirty log is written to, whatever its length;
//! - [`SlotNumbers`]: which slot numbers are taken;
//! - [`KvmSlot`]: one slot, which keeps its memory mapped;
//! - [`KvmSlots`]: all of them, as a listener of an [`AddressSpace`](crate::AddressSpace).

mod assigned;
mod claims;
mod dirty;
mod error;
mod hypervisor;
mod listener;
mod log_buffer;
mod numbers;
mod roms;
mod slot;
mod slots;
mod vm_fd;

pub use dirty::DirtyPages;
pub use error::{KvmError, SlotChange};
pub use hypervisor::{HypervisorVm, SlotFlags, SlotMapping};
pub use log_buffer::LogBuffer;
pub use numbers::{SlotNumber, SlotNumbers};
pub use slot::KvmSlot;
pub use slots::KvmSlots;
