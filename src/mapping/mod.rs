//! Mappings of backings into this process, each between two guard pages.
//!
//! The one module that calls mmap(2) and munmap(2). A [`Mapping`] first reserves address space
//! (`PROT_NONE`, no memory), chooses in it a host address that suits huge pages, maps the backing
//! there, and keeps one inaccessible page on either side, so that an access that runs off the end
//! of guest RAM faults instead of reaching whatever the process has there.
#![expect(
    unsafe_code,
    reason = "the memory map of the process is changed and raw memory is handed out here"
)]

use std::fmt;

use nix::sys::mman::{MmapAdvise, madvise};

use crate::backing::ShmBacking;
use crate::host::transparent::{self, ThpObstacle};
use crate::options::CoreDump;
use crate::report::{BuildNote, log_notes};

mod error;
#[cfg(feature = "kvm")]
mod guarded;
mod numa;
mod populate;
mod remove;
mod reserve;
mod scan;
mod span;

pub use error::MapError;
use error::Result;
#[cfg(feature = "kvm")]
pub(crate) use guarded::GuardedWords;
use reserve::{Reservation, placement, rehearse};
use span::Span;
pub(crate) use span::{HostAddr, to_usize};

/// A part of a backing, mapped shared for reading and writing, with a guard page at both ends.
///
/// Dropping it unmaps all of it, hugetlb mappings included.
pub(crate) struct Mapping {
    /// Guard, RAM, guard.
    place: Reservation,
    /// Whether it is mapped by transparent huge pages, but for parts of it.
    is_huge: bool,
    /// What was asked for and the kernel does not do.
    notes: Vec<BuildNote>,
}

// SAFETY: a Mapping owns its range of the address space, which belongs to the process, not to a
// thread. Nothing in it is thread-bound: accesses to the RAM are made by others, through volatile
// or atomic operations (`VolatileSlice`), as is needed for memory that other processes write too.
unsafe impl Send for Mapping {}
// SAFETY: as above; through a shared reference only the address and the length can be read.
unsafe impl Sync for Mapping {}
impl Mapping {
    /// Maps `size` bytes at `offset` of `backing`.
    ///
    /// The host address is congruent with the offset modulo 2 MiB, or 1 GiB for parts that large,
    /// or the page size of the backing where that is larger: the condition under which shmem and
    /// the hypervisor can map huge pages. Where the guest address is congruent with the offset,
    /// it is congruent with the host address too. An alignment that the options ask for comes
    /// first. What may only be read is mapped for reading only.
    ///
    /// # Errors
    ///
    /// [`MapError::Backing`] if the backing does not have that part, or huge pages cannot be
    /// promised; [`MapError::Nodes`]; [`MapError::Reserve`], [`MapError::Map`],
    /// [`MapError::NotShareable`].
    pub(crate) fn new(backing: &ShmBacking, offset: u64, size: u64) -> Result<Self> {
        backing.check_inside(offset, size)?;
        backing.check_not_truncated()?;
        if !backing.is_on_tmpfs() {
            rehearse(backing, offset, size)?;
        }
        let (modulus, congruent) = placement(backing, offset, size);
        let place = Reservation::new(size, congruent, modulus)?;
        place.map(backing, offset)?;
        let mut mapping = Self {
            place,
            is_huge: false,
            notes: Vec::new(),
        };
        // Nodes and advice come before the first page: afterwards they are without effect.
        mapping.bind(backing.map_options().numa)?;
        mapping.advise(backing, offset);
        log_notes(&backing.label(), &mapping.notes);
        Ok(mapping)
    }

    /// The host address of the first byte. It may be kept beside the mapping, not longer.
    pub(crate) fn host_addr(&self) -> HostAddr {
        HostAddr::of(self.ram().start)
    }

    /// The RAM, between the guard pages.
    fn ram(&self) -> Span {
        self.place.ram()
    }

    /// The length in bytes, without the guard pages.
    pub(crate) fn len(&self) -> usize {
        self.ram().len.get()
    }

    /// What was asked for and the kernel does not do.
    pub(crate) fn notes(&self) -> &[BuildNote] {
        &self.notes
    }

    /// Whether it is mapped by transparent huge pages, but for parts of it.
    pub(crate) fn is_huge(&self) -> bool {
        self.is_huge
    }

    fn advise(&mut self, backing: &ShmBacking, offset: u64) {
        let options = backing.map_options();
        // Advice that the kernel does not know (it may be built without the feature) is no reason
        // to fail.
        if options.core_dump == CoreDump::Exclude
            && let Err(errno) = self.advise_one(MmapAdvise::MADV_DONTDUMP)
        {
            let errno = errno as i32;
            self.notes.push(BuildNote::InCoreDumps { errno });
        }
        if options.transparent_huge {
            let obstacle = match self.advise_one(MmapAdvise::MADV_HUGEPAGE) {
                Ok(()) => thp_obstacle(backing, offset, self.len() as u64),
                Err(errno) => Some(ThpObstacle::Refused {
                    errno: errno as i32,
                }),
            };
            // A few parts that are not aligned do not stop the others from being huge.
            self.is_huge = matches!(obstacle, None | Some(ThpObstacle::Alignment { .. }));
            self.notes.extend(obstacle.map(BuildNote::NotHuge));
        }
    }

    fn advise_one(&self, what: MmapAdvise) -> nix::Result<()> {
        // SAFETY: the range is a mapping of ours, whole pages, and neither MADV_DONTDUMP nor
        // MADV_HUGEPAGE changes what is in it.
        unsafe { madvise(self.ram().start, self.ram().len.get(), what) }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:p} + {:#x})", self.ram().start, self.len())
    }
}

/// Why the kernel will not map this part of a backing by transparent huge pages, as far as it can
/// be known: the host address is never the reason, see [`Mapping::new`].
fn thp_obstacle(backing: &ShmBacking, offset: u64, size: u64) -> Option<ThpObstacle> {
    if !backing.is_on_tmpfs() {
        return Some(ThpObstacle::FileSystem);
    }
    let Some(huge) = transparent::page_size() else {
        return Some(ThpObstacle::Kernel);
    };
    let forbidden = transparent::forbidden_on_tmpfs(backing.identity().dev);
    if forbidden.is_some() {
        return forbidden;
    }
    if size < huge {
        return Some(ThpObstacle::Size { size, huge });
    }
    let whole = offset.is_multiple_of(huge) && size.is_multiple_of(huge);
    (!whole).then_some(ThpObstacle::Alignment { offset, size, huge })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::{BackingError, base_page_size};
    use crate::options::RamOptions;

    fn backing(len: u64) -> ShmBacking {
        ShmBacking::create(&RamOptions::new(), len).unwrap()
    }

    fn map(backing: &ShmBacking, offset: u64, size: u64) -> Mapping {
        Mapping::new(backing, offset, size).unwrap()
    }

    #[test]
    fn the_host_address_is_congruent_with_the_offset() {
        let page = base_page_size();
        let small = backing(16 << 20);
        for offset in [0, page, 2 << 20, (2 << 20) + 3 * page, (4 << 20) - page] {
            for size in [page, 1 << 20, 2 << 20, 4 << 20] {
                let host = map(&small, offset, size).ram().start.addr().get() as u64;
                assert_eq!(
                    host % (2 << 20),
                    offset % (2 << 20),
                    "{offset:#x} {size:#x}"
                );
            }
        }
        let large = backing(5 << 30);
        for offset in [0, page, 1 << 30, (1 << 30) + (2 << 20)] {
            let host = map(&large, offset, 2 << 30).ram().start.addr().get() as u64;
            assert_eq!(host % (1 << 30), offset % (1 << 30), "{offset:#x}");
        }
    }

    #[test]
    fn the_reservation_is_the_ram_and_a_page_on_either_side() {
        let page = to_usize(base_page_size());
        let mapping = map(&backing(4 << 20), 0, 4 << 20);
        assert_eq!(mapping.len(), 4 << 20);
        assert_eq!(mapping.place.span().len.get(), (4 << 20) + 2 * page);
        assert_eq!(
            mapping.place.span().start.addr().get() + page,
            mapping.ram().start.addr().get()
        );
    }

    #[test]
    fn what_cannot_be_mapped_leaves_no_reservation() {
        let backing = backing(4096);
        let refused = Mapping::new(&backing, 0, 8192).unwrap_err();
        assert!(matches!(
            refused,
            MapError::Backing(BackingError::Outside { .. })
        ));
        let refused = Reservation::new(1 << 62, 0, 2 << 20).err();
        assert!(matches!(refused, Some(MapError::Reserve { .. })));
        let refused = Reservation::new(u64::MAX - 4095, 0, 2 << 20).err();
        assert!(matches!(refused, Some(MapError::Reserve { .. })));
    }
}
