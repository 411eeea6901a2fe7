//! What must know the guest's memory: listeners, told the memory as a whole or region by region.
//!
//! Each listener of this crate is implemented beside its type.

mod error;
mod exchange;
mod memory;
mod regions;

pub use error::ListenerError;
pub(crate) use exchange::drive;
pub use exchange::{Exchange, WaitFor};
pub use memory::MemoryListener;
pub use regions::{RegionAdapter, RegionListener};
