//! Ranges: where RAM lies in the guest, checked before anything is created.
//!
//! Pure arithmetic: no I/O, no unsafe code. A [`GuestRange`] is never empty and never runs past
//! the end of the 64-bit address space, so no later module has to think about overflow.

mod guest_range;
mod placed;
mod rounded;
mod set;

pub(crate) use guest_range::check_disjoint;
pub use guest_range::{GuestRange, InvalidRange, RangePart, ram_around_hole};
pub(crate) use placed::{Difference, Placed, holder, place_of};
pub(crate) use rounded::{inwards, outwards};
pub(crate) use set::RangeSet;
