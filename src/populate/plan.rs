//! Which RAM is populated, cut into chunks that threads take from queues.
//!
//! The cuts are multiples in the backing, where huge pages are aligned, wherever a region begins.
//! There is a queue for each set of nodes, because a thread moves to the nodes of a queue: to move
//! for each chunk would cost more than it gains. In a queue the files take turns, because the
//! kernel lets one thread at a time allocate in a file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use super::part::Part;
use crate::backing::FileIdentity;
use crate::host::NodeSet;
use crate::pool::Queue;

/// The size of a chunk, in bytes: some milliseconds of work, which is how soon progress is seen
/// and cancelling heard. (Twice or half of it makes no difference that can be measured.)
const CHUNK: u64 = 16 << 20;

/// The least that is worth a chunk of its own, in bytes, and the grid of all cuts: no huge page
/// is cut in two.
pub(super) const GRAIN: u64 = 2 << 20;

/// How many chunks each thread should have, so that all end at the same time.
const CHUNKS_PER_THREAD: u64 = 8;

/// A piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Which part.
    pub(super) part: usize,
    /// In bytes from the start of the region.
    pub(super) range: Range<u64>,
}

/// All work, and what the threads need for it.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
    /// One for RAM that may come from anywhere, and one for each set of nodes that RAM is bound
    /// to.
    pub(super) queues: Vec<Queue<Chunk>>,
    /// In bytes.
    pub(super) total: u64,
    /// Held by the thread that allocates in a file: the kernel lets one at a time.
    allocating: BTreeMap<FileIdentity, Mutex<()>>,
}

impl Plan {
    /// Cuts the parts into chunks. With `threads` of them asked for, there are at least as many
    /// chunks, if there is that much RAM.
    pub(super) fn new(parts: Vec<Part>, threads: u32) -> Self {
        let total = parts.iter().map(Part::len).sum();
        let size = chunk_size(total, threads);
        let mut queues: Vec<(NodeSet, Vec<(usize, Chunk)>)> = Vec::new();
        let mut turns: BTreeMap<FileIdentity, usize> = BTreeMap::new();
        for (at, part) in parts.iter().enumerate() {
            let nodes = part.nodes();
            let known = queues.iter().position(|(known, _)| *known == nodes);
            let queue = known.unwrap_or_else(|| {
                queues.push((nodes, Vec::new()));
                queues.len() - 1
            });
            let step = size.next_multiple_of(part.backing().page_size());
            let turn = turns.entry(part.backing().identity()).or_default();
            for chunk in cut(part, at, step) {
                queues[queue].1.push((*turn, chunk));
                *turn += 1;
            }
        }
        // One of each file in turn: threads that work side by side work on different files.
        let queues = queues.into_iter().map(|(nodes, mut chunks)| {
            chunks.sort_by_key(|(turn, _)| *turn);
            Queue::new(nodes, chunks.into_iter().map(|(_, chunk)| chunk).collect())
        });
        let allocating = turns.into_keys().map(|file| (file, Mutex::default()));
        Self {
            total,
            queues: queues.collect(),
            allocating: allocating.collect(),
            parts,
        }
    }

    pub(super) fn chunks(&self) -> usize {
        self.queues.iter().map(Queue::len).sum()
    }

    /// Held by the thread that allocates in the file of this part.
    pub(super) fn allocating(&self, part: &Part) -> &Mutex<()> {
        &self.allocating[&part.backing().identity()]
    }
}

fn chunk_size(total: u64, threads: u32) -> u64 {
    let fair = total / (u64::from(threads) * CHUNKS_PER_THREAD);
    fair.clamp(GRAIN, CHUNK).next_multiple_of(GRAIN)
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

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::options::{NumaPolicy, Populate, RamOptions};
    use crate::region::GuestRegionShm;

    const MIB: u64 = 1 << 20;

    fn whole(options: &RamOptions, size: u64) -> Part {
        let region = GuestRegionShm::<()>::new((GuestAddress(0), size), options).unwrap();
        Part::whole(region.ram().clone(), Populate::Prefault)
    }

    fn taken(queue: &Queue<Chunk>) -> Vec<Chunk> {
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
}
