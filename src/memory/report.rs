//! The regions of a guest memory as a table for people.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

use super::GuestMemoryShm;
use crate::backing::Seals;
use crate::units::{HumanSize, columns};

/// A table: a line of headings, and a line per region.
///
/// The descriptor is its number in this process; the offset is that of the region in it.
impl<B> fmt::Display for GuestMemoryShm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headings = [
            "guest address",
            "size",
            "page",
            "fd",
            "offset",
            "sealed",
            "backing",
        ];
        let mut rows = vec![headings.map(str::to_owned).to_vec()];
        rows.extend(self.regions.iter().map(|region| {
            let (range, backing) = (region.range(), region.backing());
            let sealed = backing.seals().contains(Seals::RESIZE);
            vec![
                format!("{:#x}..={:#x}", range.start_addr().0, range.last_addr().0),
                HumanSize(range.size()).to_string(),
                HumanSize(backing.page_size()).to_string(),
                backing.as_fd().as_raw_fd().to_string(),
                format!("{:#x}", region.offset()),
                (if sealed { "yes" } else { "no" }).to_owned(),
                backing.kind().to_string(),
            ]
        }));
        f.write_str(&columns("lrrrrll", &rows))
    }
}
