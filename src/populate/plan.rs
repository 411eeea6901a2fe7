//! Which RAM is populated, cut into chunks that threads take from queues.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::backing::{FileIdentity, ShmBacking};
use crate::error::PopulateError;
use crate::options::{NodeSet, NumaPolicy, OnShortage, Populate};
use crate::ram::Ram;
use crate::range::{GuestRange, outwards};

/// The size of a chunk, in bytes: some milliseconds of work, which is how soon progress is seen
/// and cancelling heard. (Twice or half of it makes no difference that can be measured.)
const CHUNK: u64 = 16 << 20;

/// The least that is worth a chunk of its own, in bytes, and the grid of all cuts: no huge page
/// is cut in two.
pub(super) const GRAIN: u64 = 2 << 20;

/// How many chunks each thread should have, so that all end at the same time.
const CHUNKS_PER_THREAD: u64 = 8;

/// A part of a region that is to be populated.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) ram: Ram,
    /// In bytes from the start of the region, whole pages, not empty.
    pub(super) range: Range<u64>,
    pub(super) mode: Populate,
    pub(super) on_shortage: OnShortage,
}

/// A piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Which part.
    pub(super) part: usize,
    /// In bytes from the start of the region.
    pub(super) range: Range<u64>,
}

/// Chunks in the order in which they are taken.
#[derive(Debug)]
pub(super) struct Queue {
    /// Where threads should run while they work on it.
    pub(super) nodes: NodeSet,
    chunks: Vec<Chunk>,
    next: AtomicUsize,
}

/// All work, and what the threads need for it.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
    pub(super) queues: Vec<Queue>,
    /// In bytes.
    pub(super) total: u64,
    /// For each part, the number of its backing.
    backings: Vec<usize>,
    /// For each backing, who may allocate: the kernel lets one at a time.
    allocating: Vec<Mutex<()>>,
}

impl Part {
    pub(super) fn whole(ram: Ram, mode: Populate) -> Self {
        let range = 0..ram.mapping.len() as u64;
        Self {
            ram,
            range,
            mode,
            on_shortage: OnShortage::default(),
        }
    }

    pub(super) fn with_on_shortage(self, on_shortage: OnShortage) -> Self {
        Self {
            on_shortage,
            ..self
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    pub(super) fn backing(&self) -> &ShmBacking {
        &self.ram.backing
    }

    /// Where a range of the region is in the backing.
    pub(super) fn in_backing(&self, range: &Range<u64>) -> Range<u64> {
        self.ram.offset + range.start..self.ram.offset + range.end
    }

    /// The guest addresses of a range of the region.
    pub(super) fn in_guest(&self, range: &Range<u64>) -> GuestRange {
        let start = self.ram.range.start_addr().0 + range.start;
        // A chunk is not empty and lies in the pages of a region, of the last of which there may
        // be less in the guest.
        let end = range.end.min(self.ram.range.size());
        GuestRange::new(vm_memory::GuestAddress(start), end - range.start).unwrap_or(self.ram.range)
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
    fn nodes(&self) -> NodeSet {
        match self.backing().map_options().numa {
            NumaPolicy::Bind(nodes) | NumaPolicy::Preferred(nodes) => nodes,
            _ => NodeSet::new(),
        }
    }
}

/// The parts of the regions, sorted by address, that lie in `range`, in whole pages.
pub(super) fn select(
    rams: impl Iterator<Item = Ram>,
    range: GuestRange,
    mode: Populate,
) -> Result<Vec<Part>, PopulateError> {
    let mut parts = Vec::new();
    // The first address that is not found yet, and how much is missing from there on.
    let mut start = range.start_addr();
    let mut missing = range.size();
    for ram in rams {
        let Some(at) = start.0.checked_sub(ram.range.start_addr().0) else {
            break;
        };
        if missing == 0 || at >= ram.range.size() {
            continue;
        }
        let len = missing.min(ram.range.size() - at);
        parts.push(Part {
            // Whole pages are mapped: this stays inside.
            range: outwards(at..at + len, ram.backing.page_size()),
            ..Part::whole(ram, mode)
        });
        missing -= len;
        start.0 = start.0.wrapping_add(len);
    }
    if missing > 0 {
        return Err(PopulateError::NotRam { range, start });
    }
    Ok(parts)
}

impl Plan {
    /// Cuts the parts into chunks. With `threads` of them asked for, there are at least as many
    /// chunks, if there is that much RAM.
    pub(super) fn new(parts: Vec<Part>, threads: u32) -> Self {
        let total = parts.iter().map(Part::len).sum();
        let size = chunk_size(total, threads);
        let (backings, count) = number(&parts);
        let mut queues: Vec<(NodeSet, Vec<Vec<Chunk>>)> = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            let nodes = part.nodes();
            let queue = match queues.iter().position(|queue| queue.0 == nodes) {
                Some(found) => found,
                None => {
                    queues.push((nodes, vec![Vec::new(); count]));
                    queues.len() - 1
                }
            };
            let step = size.next_multiple_of(part.backing().page_size());
            queues[queue].1[backings[at]].extend(cut(part, at, step));
        }
        Self {
            total,
            queues: queues
                .into_iter()
                .map(|(nodes, lists)| Queue::new(nodes, interleave(lists)))
                .collect(),
            backings,
            allocating: (0..count).map(|_| Mutex::new(())).collect(),
            parts,
        }
    }

    pub(super) fn chunks(&self) -> usize {
        self.queues.iter().map(Queue::len).sum()
    }

    /// Who may allocate in the backing of this part.
    pub(super) fn allocating(&self, part: usize) -> &Mutex<()> {
        &self.allocating[self.backings[part]]
    }
}

impl Queue {
    pub(super) fn new(nodes: NodeSet, chunks: Vec<Chunk>) -> Self {
        Self {
            nodes,
            chunks,
            next: AtomicUsize::new(0),
        }
    }

    /// The next chunk, which is the caller's from then on.
    pub(super) fn take(&self) -> Option<&Chunk> {
        self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// A queue of what was taken from this one.
    pub(super) fn taken(&self) -> Self {
        let taken = self.next.load(Ordering::Relaxed).min(self.chunks.len());
        Self::new(self.nodes, self.chunks[..taken].to_vec())
    }
}

fn chunk_size(total: u64, threads: u32) -> u64 {
    let fair = total / (u64::from(threads) * CHUNKS_PER_THREAD);
    fair.clamp(GRAIN, CHUNK).next_multiple_of(GRAIN)
}

/// The number of each part's backing, and how many there are.
fn number(parts: &[Part]) -> (Vec<usize>, usize) {
    let mut known: Vec<FileIdentity> = Vec::new();
    let numbers = parts
        .iter()
        .map(|part| {
            let identity = part.backing().identity();
            let found = known.iter().position(|other| *other == identity);
            found.unwrap_or_else(|| {
                known.push(identity);
                known.len() - 1
            })
        })
        .collect();
    (numbers, known.len())
}

/// The chunks of a part, cut at multiples of `step` in the backing.
fn cut(part: &Part, number: usize, step: u64) -> impl Iterator<Item = Chunk> + use<> {
    let range = part.range.clone();
    let offset = part.ram.offset;
    let mut start = range.start;
    std::iter::from_fn(move || {
        let at = offset + start;
        let end = range.end.min(start + (step - at % step));
        let chunk = Chunk {
            part: number,
            range: start..end,
        };
        start = end;
        (!chunk.range.is_empty()).then_some(chunk)
    })
}

/// One of each list in turn: threads that work side by side work on different backings.
fn interleave(lists: Vec<Vec<Chunk>>) -> Vec<Chunk> {
    let mut chunks = Vec::with_capacity(lists.iter().map(Vec::len).sum());
    let mut lists: Vec<_> = lists.into_iter().map(Vec::into_iter).collect();
    while !lists.is_empty() {
        lists.retain_mut(|list| match list.next() {
            Some(chunk) => {
                chunks.push(chunk);
                true
            }
            None => false,
        });
    }
    chunks
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::options::RamOptions;
    use crate::region::GuestRegionShm;

    const MIB: u64 = 1 << 20;

    fn ram(options: &RamOptions, start: u64, size: u64) -> Ram {
        let region = GuestRegionShm::<()>::new(GuestAddress(start), size, options).unwrap();
        region.ram().clone()
    }

    fn whole(options: &RamOptions, size: u64) -> Part {
        Part::whole(ram(options, 0, size), Populate::Prefault)
    }

    fn taken(queue: &Queue) -> Vec<Chunk> {
        std::iter::from_fn(|| queue.take().cloned()).collect()
    }

    #[test]
    fn chunks_cover_each_part_without_a_gap_and_cut_no_huge_page() {
        for (size, threads) in [(4096, 1), (2 * MIB + 4096, 3), (100 * MIB, 2), (3 << 30, 8)] {
            let plan = Plan::new(vec![whole(&RamOptions::new(), size)], threads);
            let chunks = taken(&plan.queues[0]);
            assert_eq!(chunks.len(), plan.queues[0].len());
            let mut end = 0;
            for chunk in &chunks {
                assert_eq!(chunk.range.start, end);
                assert!(end.is_multiple_of(GRAIN), "{chunk:?}");
                assert!(chunk.range.end - end <= CHUNK, "{chunk:?}");
                end = chunk.range.end;
            }
            assert_eq!((end, plan.total), (size, size));
            let most = size.div_ceil(GRAIN).min(u64::from(threads));
            assert!(chunks.len() as u64 >= most, "{} chunks", chunks.len());
        }
    }

    #[test]
    fn backings_are_worked_on_in_turn() {
        let parts = vec![
            whole(&RamOptions::new(), 8 * MIB),
            whole(&RamOptions::new(), 4 * MIB),
        ];
        let plan = Plan::new(parts, 8);
        let order: Vec<usize> = taken(&plan.queues[0])
            .iter()
            .map(|chunk| chunk.part)
            .collect();
        assert_eq!(order, [0, 1, 0, 1, 0, 0]);
    }

    #[test]
    fn ram_of_a_node_has_a_queue_of_its_own() {
        let nodes = NodeSet::from_nodes([0]).unwrap();
        let bound = RamOptions::new().with_numa(NumaPolicy::Bind(nodes));
        let spread = RamOptions::new().with_numa(NumaPolicy::Interleave(nodes));
        let parts = vec![
            whole(&RamOptions::new(), MIB),
            whole(&bound, MIB),
            whole(&spread, MIB),
        ];
        let plan = Plan::new(parts, 1);
        let queues: Vec<_> = plan.queues.iter().map(|q| (q.nodes, q.len())).collect();
        assert_eq!(queues, [(NodeSet::new(), 2), (nodes, 1)]);
    }

    #[test]
    fn a_range_is_rounded_to_pages_and_must_be_ram() {
        let rams = || {
            let options = RamOptions::new();
            [
                ram(&options, 0, MIB),
                ram(&options, MIB, MIB),
                ram(&options, 4 * MIB, MIB),
            ]
            .into_iter()
        };
        let select = |start, size| {
            let range = GuestRange::new(GuestAddress(start), size).unwrap();
            select(rams(), range, Populate::Allocate)
        };
        let ranges = |start, size| -> Vec<(u64, Range<u64>)> {
            let parts = select(start, size).unwrap();
            parts
                .iter()
                .map(|part| (part.ram.range.start_addr().0, part.range.clone()))
                .collect()
        };
        assert_eq!(ranges(0, 1), [(0, 0..4096)]);
        assert_eq!(ranges(4095, 2), [(0, 0..8192)]);
        assert_eq!(ranges(MIB - 1, 2), [(0, MIB - 4096..MIB), (MIB, 0..4096)]);
        assert_eq!(ranges(4 * MIB, MIB), [(4 * MIB, 0..MIB)]);
        for (start, size, missing) in [
            (0, 2 * MIB + 1, 2 * MIB),
            (2 * MIB, 1, 2 * MIB),
            (4 * MIB - 1, 2, 4 * MIB - 1),
            (5 * MIB, 4096, 5 * MIB),
            (4 * MIB, MIB + 1, 5 * MIB),
        ] {
            match select(start, size) {
                Err(PopulateError::NotRam { start, .. }) => assert_eq!(start.0, missing),
                other => panic!("{start:#x} {size:#x}: {other:?}"),
            }
        }
    }
}
