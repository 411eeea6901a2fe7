//! The accumulator of balloon reports, against a naive model and the kernel's count of pages.

use std::collections::BTreeSet;
use std::sync::Arc;

use guest_memory_shm::{
    DiscardAccumulator, DiscardError, GuestMemoryShm, GuestRegionShm, InvalidRange, PageSize,
    RamOptions,
};
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::isolation::PAGE;

const HUGE: u64 = 2 << 20;

/// RAM that is meant to have transparent huge pages: whether it has or not, it is discarded in
/// units of 2 MiB.
fn transparent(ranges: &[(u64, u64)]) -> GuestMemoryShm {
    let options = RamOptions::new().with_page_size(PageSize::Transparent);
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(addr, size)| (GuestAddress(*addr), *size))
        .collect();
    GuestMemoryShm::<()>::builder()
        .add_ram(options, ranges)
        .build()
        .unwrap()
}

fn allocated(memory: &GuestMemoryShm) -> u64 {
    memory.iter().next().unwrap().backing().allocated().unwrap()
}

#[test]
fn base_pages_are_discarded_at_once() {
    let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), HUGE as usize)]).unwrap();
    memory.write_slice(&[7; 3 * 4096], GuestAddress(0)).unwrap();
    let mut balloon = DiscardAccumulator::new();
    let discarded = balloon
        .add(&memory, (GuestAddress(PAGE - 8), PAGE + 16))
        .unwrap();
    assert_eq!(
        (discarded.freed, discarded.kept(), balloon.pending()),
        (PAGE, 16, 0)
    );
    assert_eq!(allocated(&memory), 2 * PAGE);
}

#[test]
fn refused_reports_are_kept_until_they_can_be_discarded() {
    let small = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), HUGE as usize)]).unwrap();
    for memory in [small, transparent(&[(0, HUGE)])] {
        memory
            .write_slice(&[7; HUGE as usize], GuestAddress(0))
            .unwrap();
        let mut balloon = DiscardAccumulator::new();
        let inhibitor = memory.inhibit_discards();
        let refused = balloon.add(&memory, (GuestAddress(0), HUGE));
        let inhibited = |result| matches!(result, Err(DiscardError::Inhibited { .. }));
        assert!(inhibited(refused));
        assert!(inhibited(balloon.flush(&memory)));
        assert_eq!((balloon.pending(), allocated(&memory)), (HUGE, HUGE));
        // What the guest takes back meanwhile is not discarded later.
        balloon.remove((GuestAddress(3 * PAGE + 1), PAGE)).unwrap();
        drop(inhibitor);
        let flushed = balloon.flush(&memory).unwrap();
        assert_eq!((flushed.freed, balloon.pending()), (HUGE - 2 * PAGE, 0));
        assert_eq!(allocated(&memory), 2 * PAGE);
        let byte: u8 = memory.read_obj(GuestAddress(4 * PAGE)).unwrap();
        assert_eq!(byte, 7);
    }
}

#[test]
fn what_is_no_ram_is_refused_and_not_noted() {
    let memory = transparent(&[(0, HUGE)]);
    let mut balloon = DiscardAccumulator::new();
    let refused = balloon.add(&memory, (GuestAddress(PAGE), HUGE));
    assert!(matches!(refused, Err(DiscardError::NotRam { .. })));
    let refused = balloon.add(&memory, (GuestAddress(PAGE), 0));
    assert!(matches!(
        refused,
        Err(DiscardError::Range(InvalidRange::Empty { .. }))
    ));
    assert_eq!(balloon.pending(), 0);
    balloon
        .remove((GuestAddress(u64::MAX), u64::MAX))
        .unwrap_err();
    balloon.remove((GuestAddress(0), 0)).unwrap_err();
}

#[test]
fn a_region_in_place_of_another_starts_anew() {
    let memory = transparent(&[(0, HUGE), (HUGE, HUGE)]);
    let mut balloon = DiscardAccumulator::new();
    balloon
        .add(&memory, (GuestAddress(HUGE), HUGE - PAGE))
        .unwrap();
    balloon.add(&memory, (GuestAddress(0), PAGE)).unwrap();

    let (rest, _) = memory.remove_region(GuestAddress(HUGE), HUGE).unwrap();
    let options = RamOptions::new().with_page_size(PageSize::Transparent);
    let new = GuestRegionShm::new((GuestAddress(HUGE), HUGE), &options).unwrap();
    let memory = rest.insert_region(Arc::new(new)).unwrap();
    memory.write_obj(7u8, GuestAddress(HUGE)).unwrap();
    let discarded = balloon
        .add(&memory, (GuestAddress(2 * HUGE - PAGE), PAGE))
        .unwrap();
    assert_eq!((discarded.freed, balloon.pending()), (0, 2 * PAGE));
    let byte: u8 = memory.read_obj(GuestAddress(HUGE)).unwrap();
    assert_eq!(byte, 7);
    // What was noted of RAM that is gone is forgotten.
    let (rest, _) = memory.remove_region(GuestAddress(HUGE), HUGE).unwrap();
    let flushed = balloon.flush(&rest).unwrap();
    assert_eq!((flushed.freed, balloon.pending()), (PAGE, 0));
    balloon.add(&rest, (GuestAddress(0), PAGE)).unwrap();
    balloon.clear();
    assert_eq!(balloon.pending(), 0);
}

const PAGES: u64 = 3 * 512 + 100;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// The model: the set of reported pages, and that of the pages that exist. A unit goes when
    /// all of its pages are reported. Two regions without a gap, the second in the middle of a
    /// unit of the backing.
    #[test]
    fn a_balloon_frees_what_the_model_says(
        ops in prop::collection::vec((any::<bool>(), 0..PAGES, 1..700u64), 1..40),
    ) {
        let first = 600;
        let memory = transparent(&[(0, first * PAGE), (first * PAGE, (PAGES - first) * PAGE)]);
        let unit = |page: u64| (page < first, page / 512);
        for page in 0..PAGES {
            memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let mut balloon = DiscardAccumulator::new();
        let mut reported = BTreeSet::new();
        let mut existing: BTreeSet<u64> = (0..PAGES).collect();
        for (add, from, len) in ops {
            let to = (from + len).min(PAGES);
            let (addr, len) = (GuestAddress(from * PAGE), (to - from) * PAGE);
            if !add {
                balloon.remove((addr, len)).unwrap();
                reported.retain(|page| !(from..to).contains(page));
            } else {
                reported.extend(from..to);
                let touched: BTreeSet<_> = (from..to).map(unit).collect();
                let mut freed = 0;
                for touched in touched {
                    let of: Vec<u64> = (0..PAGES).filter(|page| unit(*page) == touched).collect();
                    if of.iter().all(|page| reported.contains(page)) {
                        freed += of.len() as u64;
                        reported.retain(|page| !of.contains(page));
                        existing.retain(|page| !of.contains(page));
                    }
                }
                let discarded = balloon.add(&memory, (addr, len)).unwrap();
                prop_assert_eq!((discarded.freed, discarded.kept()), (freed * PAGE, 0));
            }
            prop_assert_eq!(balloon.pending(), reported.len() as u64 * PAGE);
            prop_assert_eq!(allocated(&memory), existing.len() as u64 * PAGE);
        }
        let flushed = balloon.flush(&memory).unwrap();
        prop_assert_eq!((flushed.freed, balloon.pending()), (reported.len() as u64 * PAGE, 0));
        existing.retain(|page| !reported.contains(page));
        prop_assert_eq!(allocated(&memory), existing.len() as u64 * PAGE);
        for page in 0..PAGES {
            let byte: u8 = memory.read_obj(GuestAddress(page * PAGE)).unwrap();
            prop_assert_eq!(byte == 1, existing.contains(&page));
        }
    }
}
