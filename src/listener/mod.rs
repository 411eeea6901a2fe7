//! What must know the guest's memory: listeners, told the memory as a whole or region by region.
//!
//! Each listener of this crate is implemented beside its type.

mod error;
mod memory;
mod regions;

pub use error::ListenerError;
pub use memory::MemoryListener;
pub use regions::{RegionAdapter, RegionListener};
