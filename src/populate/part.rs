//! A part of a region that is to be populated, and what is done to its pages.

use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::backing::ShmBacking;
use crate::host::NodeSet;
use crate::host::calls::{is_refused, retried};
use crate::host::memory::Pages;
use crate::options::{NumaPolicy, OnShortage, Populate};
use crate::ram::Ram;
use crate::range::outwards;

/// A part of a region that is to be populated.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) ram: Ram,
    /// In bytes from the start of the region, whole pages, not empty.
    pub(super) range: Range<u64>,
    pub(super) mode: Populate,
    /// What its pages are made of: none where the kernel could drop them, as those of a file on a
    /// disk.
    pub(super) pages: Option<Pages>,
    on_shortage: OnShortage,
}

impl Part {
    /// All pages that have a byte in `range` of the region. `allowed` are the nodes that this
    /// process may take pages from, if they are not all.
    pub(super) fn new(
        ram: Ram,
        range: Range<u64>,
        mode: Populate,
        on_shortage: OnShortage,
        allowed: NodeSet,
    ) -> Self {
        Self {
            range: outwards(range, ram.backing.page_size()),
            pages: pages(&ram.backing, allowed),
            ram,
            mode,
            on_shortage,
        }
    }

    #[cfg(test)]
    pub(super) fn whole(ram: Ram, mode: Populate) -> Self {
        let range = 0..ram.range.size();
        Self::new(ram, range, mode, OnShortage::default(), NodeSet::new())
    }

    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    pub(super) fn backing(&self) -> &ShmBacking {
        &self.ram.backing
    }

    /// The pages of which there must be enough, if that is to be looked at.
    pub(super) fn watched(&self) -> Option<Pages> {
        match self.on_shortage {
            OnShortage::TryAnyway => None,
            OnShortage::Refuse => self.pages,
        }
    }

    /// Whether its pages are to be allocated through the descriptor.
    ///
    /// Not those of a hugetlb pool, which the kernel would clear under the lock of the inode, one
    /// thread at a time. And not where transparent huge pages come: by advice on the mapping they
    /// only come through the mapping, fallocate(2) would bring base pages.
    pub(super) fn through_descriptor(&self) -> bool {
        !self.backing().is_hugetlb() && !self.ram.mapping.is_huge()
    }

    /// The nodes that its pages come from, as far as it matters where the thread runs.
    pub(super) fn nodes(&self) -> NodeSet {
        match self.backing().map_options().numa {
            NumaPolicy::Bind(nodes) | NumaPolicy::Preferred(nodes) => nodes,
            _ => NodeSet::new(),
        }
    }

    /// Allocates without mapping; `false` if the file system cannot do that, or a filter forbids
    /// it.
    pub(super) fn allocate(&self, range: &Range<u64>) -> io::Result<bool> {
        // A file that another process truncated is not made longer: that would hide it.
        if let Ok(Some(_)) = self.backing().truncated_to() {
            return Err(Errno::EFAULT.into());
        }
        let at = self.ram.in_backing(range.clone());
        let file_offset = |offset| i64::try_from(offset).map_err(|_| Errno::EFBIG);
        let (start, len) = (file_offset(at.start)?, file_offset(at.end - at.start)?);
        let flags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match retried(|| fallocate(self.backing(), flags, start, len)) {
            Ok(()) => Ok(true),
            // A signal undoes what it did: where they come faster than it is done, it never is.
            Err(Errno::EOPNOTSUPP | Errno::EINTR) => Ok(false),
            Err(errno) if is_refused(errno) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    pub(super) fn map(&self, range: &Range<u64>) -> io::Result<()> {
        let access = self.backing().map_options().access;
        self.ram.mapping.populate(range.clone(), access)
    }
}

fn pages(backing: &ShmBacking, allowed: NodeSet) -> Option<Pages> {
    let options = backing.map_options();
    if backing.is_hugetlb() {
        return Some(Pages::Huge {
            page_size: backing.page_size(),
            reserving: options.unreserved,
        });
    }
    // Of all policies only this one takes pages from no other node.
    let nodes = match options.numa {
        NumaPolicy::Bind(nodes) if allowed.is_empty() => nodes,
        NumaPolicy::Bind(nodes) => nodes.intersection(allowed),
        _ => allowed,
    };
    backing.is_on_tmpfs().then_some(Pages::Base(nodes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{BackingSource, PageSize, RamOptions};

    #[test]
    fn pages_that_the_kernel_can_drop_are_no_need() {
        let set = |nodes: &[u32]| NodeSet::from_nodes(nodes.iter().copied()).unwrap();
        let of = |options: &RamOptions, allowed| {
            let backing = ShmBacking::create(options, 1 << 20).unwrap();
            pages(&backing, allowed)
        };
        let (plain, anywhere) = (RamOptions::new(), NodeSet::new());
        assert_eq!(of(&plain, anywhere), Some(Pages::Base(anywhere)));
        assert_eq!(of(&plain, set(&[1])), Some(Pages::Base(set(&[1]))));
        let thp = plain.clone().with_page_size(PageSize::Transparent);
        assert_eq!(of(&thp, anywhere), Some(Pages::Base(anywhere)));
        let bound = plain.clone().with_numa(NumaPolicy::Bind(set(&[0])));
        assert_eq!(of(&bound, anywhere), Some(Pages::Base(set(&[0]))));
        assert_eq!(of(&bound, set(&[0, 1])), Some(Pages::Base(set(&[0]))));
        let spread = plain.clone().with_numa(NumaPolicy::Interleave(set(&[0])));
        assert_eq!(of(&spread, anywhere), Some(Pages::Base(anywhere)));
        let file = |dir: &str| plain.clone().with_backing(BackingSource::File(dir.into()));
        assert_eq!(of(&file("/dev/shm"), anywhere), Some(Pages::Base(anywhere)));
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert_eq!(of(&file(disk.path().to_str().unwrap()), anywhere), None);
    }
}
