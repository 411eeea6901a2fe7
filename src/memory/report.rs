//! The regions of a guest memory as a table for people.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

use super::GuestMemoryShm;
use crate::backing::Seals;
use crate::units::HumanSize;

/// A table: a line of headings, and a line per region.
///
/// The descriptor is its number in this process; the offset is that of the region in it.
impl<B> fmt::Display for GuestMemoryShm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<35} {:>9} {:>7} {:>4} {:>11} {:<6} backing",
            "guest address", "size", "page", "fd", "offset", "sealed"
        )?;
        for region in self.regions.iter() {
            let (range, backing) = (region.range(), region.backing());
            let addresses = format!("{:#x}..={:#x}", range.start_addr().0, range.last_addr().0);
            let sealed = backing.seals().contains(Seals::RESIZE);
            write!(
                f,
                "\n{addresses:<35} {:>9} {:>7} {:>4} {:>#11x} {:<6} {}",
                HumanSize(range.size()),
                HumanSize(backing.page_size()),
                backing.as_fd().as_raw_fd(),
                region.offset(),
                if sealed { "yes" } else { "no" },
                backing.kind(),
            )?;
        }
        Ok(())
    }
}
