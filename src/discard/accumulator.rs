//! Small reports of free memory, collected into pages that the host can give back.

use std::ops::Range;
use std::sync::{Arc, Weak};

use vm_memory::GuestAddress;

use super::collector::{Collector, Units};
use super::discarded::{Discarded, split};
use super::error::DiscardError;
use super::pieces::{pieces, transparent_huge_page};
use crate::backing::base_page_size;
use crate::mapping::Mapping;
use crate::memory::GuestMemoryShm;
use crate::ram::Ram;
use crate::range::{GuestRange, InvalidRange, outwards};

/// Refused reports on base pages are noted in bitmaps for so many bytes.
const CHUNK: u64 = 2 << 20;

/// Collects reports of free guest memory that are smaller than the pages of the backing, and
/// discards each page of the backing as soon as all of it is reported.
///
/// A balloon reports 4 KiB at a time. Of a huge page of hugetlb no such part can be given back,
/// and a transparent huge page would be split by the first. So the reports are noted, in units of
///
/// | backing | unit |
/// |---|---|
/// | hugetlb | its page size |
/// | [`PageSize::Transparent`](crate::PageSize::Transparent) | a transparent huge page, 2 MiB on x86-64 |
/// | others | a base page: discarded at once |
///
/// and a unit is discarded when the last of its pages is reported. (So it is where the system
/// forbids the transparent huge pages that were asked for: the switch may change while the guest
/// runs.) What the guest takes back before that (it deflates the balloon) must be
/// [removed](Self::remove), and so must RAM that is unplugged. A region in place of another one
/// starts anew by itself.
///
/// It takes 32 KiB for each GiB that lies in units reported in part, and about 150 bytes per such
/// unit; nothing for units of which all or nothing was reported. Reports are counted in whole base
/// pages.
///
/// ```
/// use guest_memory_shm::{DiscardAccumulator, GuestMemoryShm, PageSize, RamOptions};
/// use vm_memory::GuestAddress;
///
/// let memory = GuestMemoryShm::<()>::builder()
///     .add_ram(
///         RamOptions::new().with_page_size(PageSize::Transparent),
///         [(GuestAddress(0), 64 << 20)],
///     )
///     .build()?;
/// let mut balloon = DiscardAccumulator::new();
/// for page in 0..511 {
///     let discarded = balloon.add(&memory, (GuestAddress(page * 4096), 4096))?;
///     assert_eq!(discarded.freed, 0);
/// }
/// assert_eq!(balloon.pending(), 511 * 4096);
/// let last = balloon.add(&memory, (GuestAddress(511 * 4096), 4096))?;
/// assert_eq!((last.freed, balloon.pending()), (2 << 20, 0));
/// # Ok::<(), guest_memory_shm::Error>(())
/// ```
#[derive(Debug)]
pub struct DiscardAccumulator {
    collector: Collector<Owner>,
}

/// The region that a unit is of. This does not keep it mapped, but no other region is
/// ever taken for it.
#[derive(Clone, Debug)]
struct Owner(Weak<Mapping>);

impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        self.0.ptr_eq(&other.0)
    }
}

impl Owner {
    fn of(ram: &Ram) -> Self {
        Self(Arc::downgrade(&ram.mapping))
    }
}

impl DiscardAccumulator {
    /// An accumulator that has noted nothing.
    pub fn new() -> Self {
        Self {
            collector: Collector::new(base_page_size()),
        }
    }

    /// Notes that a range of `memory` is free, and discards what is complete now.
    ///
    /// What is freed is of this report and of earlier ones. What is kept is of this one, and will
    /// not be given back: less than a base page at its ends, and parts of transparent huge pages
    /// that could not be split. The rest is [`pending`](Self::pending).
    ///
    /// # Errors
    ///
    /// Those of [`GuestMemoryShm::discard`]. If a range is none, or is not all RAM, nothing is
    /// noted. If what is complete cannot be discarded, as while discards are inhibited, all of the
    /// report is noted, and [`flush`](Self::flush) tries again. A balloon device goes on after
    /// [`DiscardError::Inhibited`](crate::DiscardError::Inhibited), and flushes when the
    /// [`DiscardInhibitor`](crate::DiscardInhibitor) is dropped: no call tells it of that.
    pub fn add<B>(
        &mut self,
        memory: &GuestMemoryShm<B>,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
    ) -> Result<Discarded, DiscardError> {
        let range = GuestRange::at(range)?;
        let mut discarded = Discarded::default();
        let mut complete = Vec::new();
        for piece in pieces(memory, range)? {
            let (pages, cut) = split(piece.inside, base_page_size());
            discarded += Discarded { freed: 0, ..cut };
            if pages.is_empty() {
                continue;
            }
            let pages = piece.ram.in_guest(pages).addrs();
            let (units, owner) = (units(piece.ram), Owner::of(piece.ram));
            for part in self.collector.add(&units, &owner, pages) {
                complete.push((units, owner.clone(), part));
            }
        }
        let mut complete = complete.into_iter();
        while let Some((units, owner, part)) = complete.next() {
            match discard(memory, &part) {
                Ok(of_part) => discarded += of_part,
                Err(error) => {
                    self.collector.put_back(&units, &owner, part);
                    for (units, owner, part) in complete {
                        self.collector.put_back(&units, &owner, part);
                    }
                    return Err(error);
                }
            }
        }
        Ok(discarded)
    }

    /// Forgets that `range` is free, because the guest uses it again: all pages that have a part
    /// in it. Units that are given back already are not affected.
    ///
    /// # Errors
    ///
    /// If it is no range: nothing is forgotten.
    pub fn remove(
        &mut self,
        range: impl TryInto<GuestRange, Error: Into<InvalidRange>>,
    ) -> Result<(), InvalidRange> {
        let range = GuestRange::at(range)?;
        let pages = outwards(range.addrs(), base_page_size());
        self.collector.remove(pages);
        Ok(())
    }

    /// Discards what is noted, as far as the pages of the backings allow: complete units that were
    /// refused before, and what is reported of transparent huge pages, which are split by that.
    ///
    /// For hosts that need memory more than huge pages. Parts of hugetlb pages stay noted; what
    /// was noted of RAM that is not in `memory` any more is forgotten.
    ///
    /// # Errors
    ///
    /// Those of [`GuestMemoryShm::discard`]; what could not be discarded stays noted.
    pub fn flush<B>(&mut self, memory: &GuestMemoryShm<B>) -> Result<Discarded, DiscardError> {
        let (mut ready, mut gone) = (Vec::new(), Vec::new());
        for unit in self.collector.units() {
            let start = GuestAddress(unit.range.start);
            match memory.find(start).map(|(region, _)| region.ram()) {
                Some(ram) if Owner::of(ram) == unit.region => {
                    let page = base_page_size();
                    ready.extend(if ram.backing.is_hugetlb() {
                        unit.ready(page)
                    } else {
                        unit.runs(page)
                    });
                }
                _ => gone.push(unit.range.clone()),
            }
        }
        for range in gone {
            self.collector.remove(range);
        }
        let mut discarded = Discarded::default();
        for range in ready {
            discarded += discard(memory, &range)?;
            self.collector.remove(range);
        }
        Ok(discarded)
    }

    /// Forgets all that is noted: for a guest that was reset.
    pub fn clear(&mut self) {
        self.collector.clear();
    }

    /// How many bytes are noted as free and not given back yet.
    pub fn pending(&self) -> u64 {
        self.collector.pending()
    }
}

impl Default for DiscardAccumulator {
    fn default() -> Self {
        Self::new()
    }
}

fn discard<B>(memory: &GuestMemoryShm<B>, range: &Range<u64>) -> Result<Discarded, DiscardError> {
    memory.discard((GuestAddress(range.start), range.end - range.start))
}

fn units(ram: &Ram) -> Units {
    let (size, whole) = if ram.backing.is_hugetlb() {
        (ram.backing.page_size(), true)
    } else if ram.backing.map_options().transparent_huge {
        (transparent_huge_page(), true)
    } else {
        (CHUNK, false)
    };
    let Range { start, end } = ram.range.addrs();
    Units {
        start,
        end,
        offset: ram.offset,
        size,
        whole,
    }
}
