//! Populating: what each mode brings in, and nothing else.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use guest_memory_shm::{
    BackingSource, Error, GuestMemoryShm, GuestRange, GuestRegionShm, MemoryError, NodeSet,
    NumaPolicy, PageSize, Populate, PopulateError, PopulateOptions, RamOptions, ResourceLimit,
    ShmBacking,
};
use nix::sys::resource::{UsageWho, getrusage};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::isolation::{HugePool, PAGE, assert_refused, in_own_process};
use crate::proc::leaves_nothing_but_heaps;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const HUGE: u64 = 2 * MIB;
const KINDS: [BackingSource; 2] = [BackingSource::Memfd, BackingSource::PosixShm];

pub(crate) fn memory(options: RamOptions, size: u64) -> GuestMemoryShm {
    GuestMemoryShm::builder()
        .add_ram(options, [(GuestAddress(0), size)])
        .build()
        .unwrap()
}

/// What is allocated of the only backing, or of the first, in bytes.
pub(crate) fn allocated(memory: &GuestMemoryShm) -> u64 {
    let region = memory.iter().next().unwrap();
    region.backing().allocated().unwrap()
}

pub(crate) fn threads(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

pub(crate) fn range(start: u64, size: u64) -> GuestRange {
    GuestRange::new(GuestAddress(start), size).unwrap()
}

/// Whether every page of the range is mapped, or none is: how many page faults this thread takes
/// when it writes to each.
///
/// A few are the kernel's own business, which moves pages: of code, and of RAM, too.
pub(crate) fn is_mapped(memory: &GuestMemoryShm, range: GuestRange) -> bool {
    let faults = || {
        let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
        usage.minor_page_faults().unsigned_abs()
    };
    let pages = range.size() / PAGE;
    assert!(pages >= 64, "too few to tell");
    let before = faults();
    for page in 0..pages {
        let at = GuestAddress(range.start_addr().0 + page * PAGE);
        memory.write_obj(1u8, at).unwrap();
    }
    let taken = faults() - before;
    assert!(
        taken >= pages || taken <= pages / 8,
        "{taken} faults on {pages} pages"
    );
    taken < pages
}

/// The number of threads of this process that populate.
pub(crate) fn populating_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.trim() == "populate").count()
}

/// Asserts that no thread populates. One that was joined may still be listed for an instant.
pub(crate) fn no_thread_populates() {
    let start = Instant::now();
    while populating_threads() > 0 {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "a thread is left"
        );
        std::thread::yield_now();
    }
}

#[test]
fn building_brings_in_what_the_mode_says_and_no_more() {
    let size = 16 * MIB;
    for kind in KINDS {
        for (mode, there, mapped) in [
            (Populate::Lazy, 0, false),
            (Populate::Allocate, size, false),
            (Populate::Prefault, size, true),
        ] {
            let options = RamOptions::new()
                .with_backing(kind.clone())
                .with_populate(mode);
            let memory = memory(options, size);
            assert_eq!(allocated(&memory), there, "{kind:?} {mode:?}");
            let found = is_mapped(&memory, range(0, size));
            assert_eq!(found, mapped, "{kind:?} {mode:?}");
            assert_eq!(allocated(&memory), size);
        }
    }
}

#[test]
fn a_region_is_populated_as_its_options_say() {
    let options = RamOptions::new().with_populate(Populate::Allocate);
    let region = GuestRegionShm::<()>::new((GuestAddress(0), MIB), &options).unwrap();
    assert_eq!(region.backing().allocated().unwrap(), MIB);
    let lazy = GuestRegionShm::<()>::new((GuestAddress(0), MIB), &RamOptions::new()).unwrap();
    assert_eq!(lazy.backing().allocated().unwrap(), 0);
}

#[test]
fn running_ram_is_populated_later_and_keeps_its_contents() {
    let size = 32 * MIB;
    for mode in [Populate::Allocate, Populate::Prefault] {
        let memory = memory(RamOptions::new(), size);
        let written = || (0..size).step_by(3 * PAGE as usize);
        for at in written() {
            memory.write_obj(at, GuestAddress(at)).unwrap();
        }
        let populated = memory.populate(PopulateOptions::new(mode)).unwrap();
        assert_eq!(populated.bytes, size);
        assert_eq!(allocated(&memory), size);
        for at in written() {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), at);
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at + 8)).unwrap(), 0);
        }
        if mode == Populate::Prefault {
            assert!(is_mapped(&memory, range(0, size)));
        }
    }
}

#[test]
fn lazily_populating_does_nothing() {
    let memory = memory(RamOptions::new(), MIB);
    let mut called = false;
    let options = PopulateOptions::new(Populate::Lazy).with_progress(|_| {
        called = true;
    });
    let populated = memory.populate(options).unwrap();
    assert_eq!((populated.bytes, populated.threads), (0, 0));
    assert!(!called);
    assert_eq!(allocated(&memory), 0);
    assert_eq!(
        GuestMemoryShm::<()>::new()
            .populate(PopulateOptions::new(Populate::Prefault))
            .unwrap()
            .bytes,
        0
    );
}

#[test]
fn a_part_is_populated_across_regions_and_only_that() {
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(RamOptions::new(), [(GuestAddress(0), 4 * MIB)])
        .add_ram(RamOptions::new(), [(GuestAddress(4 * MIB), 4 * MIB)])
        .build()
        .unwrap();
    let of = |at: usize| {
        memory
            .iter()
            .nth(at)
            .unwrap()
            .backing()
            .allocated()
            .unwrap()
    };
    let part = range(3 * MIB + 1, 2 * MIB - 1 + PAGE);
    let options = PopulateOptions::new(Populate::Prefault).with_range(part);
    let populated = memory.populate(options).unwrap();
    assert_eq!(populated.bytes, 2 * MIB + PAGE);
    assert_eq!((of(0), of(1)), (MIB, MIB + PAGE));
    assert!(is_mapped(&memory, range(3 * MIB, 2 * MIB)));
    // The control: what is around it is not there.
    assert!(!is_mapped(&memory, range(0, 3 * MIB)));
    assert!(!is_mapped(&memory, range(5 * MIB + PAGE, MIB)));
}

#[test]
fn a_range_that_is_not_all_ram_is_refused_before_anything_is_populated() {
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new(),
            [(GuestAddress(0), MIB), (GuestAddress(4 * MIB), MIB)],
        )
        .build()
        .unwrap();
    let populate = |start, size| {
        let options = PopulateOptions::new(Populate::Allocate).with_range(range(start, size));
        memory.populate(options)
    };
    assert_refused!(
        populate(0, 5 * MIB),
        PopulateError::NotRam { .. },
        "cannot populate 0x0..=0x4fffff (5 MiB): there is no RAM at guest address 0x100000, give \
         a range of RAM only"
    );
    for (start, size) in [(MIB, 1), (4 * MIB - 1, 2), (5 * MIB, 1), (u64::MAX - 1, 1)] {
        let refused = populate(start, size);
        assert!(
            matches!(refused, Err(PopulateError::NotRam { .. })),
            "{start:#x}"
        );
    }
    assert_eq!(allocated(&memory), 0);
}

#[test]
fn progress_only_grows_and_ends_with_all() {
    for (mode, count) in [(Populate::Allocate, 1), (Populate::Prefault, 3)] {
        let size = 48 * MIB + PAGE;
        let memory = memory(RamOptions::new(), size);
        let mut seen = Vec::new();
        let caller = std::thread::current().id();
        let options = PopulateOptions::new(mode)
            .with_threads(threads(count))
            .with_progress(|progress| {
                assert_eq!(std::thread::current().id(), caller);
                seen.push((progress.done, progress.total));
            });
        memory.populate(options).unwrap();
        assert!(seen.len() >= 4, "{seen:?}");
        assert!(seen.is_sorted() && seen[0].0 > 0, "{seen:?}");
        assert!(seen.iter().all(|(_, total)| *total == size), "{seen:?}");
        assert_eq!(seen.last(), Some(&(size, size)));
    }
}

#[test]
fn any_number_of_threads_brings_in_every_page() {
    let size = 64 * MIB;
    for count in [1, 2, 3, 8] {
        let memory = memory(RamOptions::new(), size);
        let options = PopulateOptions::new(Populate::Prefault).with_threads(threads(count));
        let populated = memory.populate(options).unwrap();
        assert_eq!(populated.threads, count);
        assert!(is_mapped(&memory, range(0, size)));
    }
    // The default, and more threads than there is work for.
    let cpus = std::thread::available_parallelism().unwrap().get() as u32;
    for (size, asked, expected) in [
        (64 * MIB, None, 1),
        (128 * MIB, None, cpus.min(2)),
        (PAGE, Some(8), 1),
        (6 * MIB, Some(100), 3),
    ] {
        let memory = memory(RamOptions::new(), size);
        let mut options = PopulateOptions::new(Populate::Allocate);
        if let Some(count) = asked {
            options = options.with_threads(threads(count));
        }
        assert_eq!(memory.populate(options).unwrap().threads, expected);
        assert_eq!(allocated(&memory), size);
    }
}

#[test]
fn backings_are_populated_each_as_its_own_options_say() {
    let adopted = ShmBacking::create(&RamOptions::new(), MIB).unwrap();
    let ram = |mode| RamOptions::new().with_populate(mode);
    let memory = GuestMemoryShm::<()>::builder()
        .add_ram(ram(Populate::Prefault), [(GuestAddress(0), 8 * MIB)])
        .add_ram(
            ram(Populate::Allocate).with_populate_threads(threads(3)),
            [
                (GuestAddress(1 << 32), 2 * MIB),
                (GuestAddress(2 << 32), 2 * MIB),
            ],
        )
        .add_ram(ram(Populate::Lazy), [(GuestAddress(3 << 32), MIB)])
        .add_backing(&adopted, 0, [(GuestAddress(4 << 32), MIB)])
        .build()
        .unwrap();
    let sizes: Vec<u64> = memory
        .iter()
        .map(|region| region.backing().allocated().unwrap())
        .collect();
    assert_eq!(sizes, [8 * MIB, 4 * MIB, 4 * MIB, 0, 0]);
    assert!(is_mapped(&memory, range(0, 8 * MIB)));
    assert!(!is_mapped(&memory, range(1 << 32, 2 * MIB)));
}

#[test]
fn ram_that_is_bound_to_a_node_is_populated_and_the_caller_stays_where_it_was() {
    let allowed = || nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    let before = allowed();
    let node = NodeSet::from_nodes([0]).unwrap();
    let options = RamOptions::new()
        .with_numa(NumaPolicy::Bind(node))
        .with_populate(Populate::Prefault);
    let memory = memory(options, 16 * MIB);
    assert!(is_mapped(&memory, range(0, 16 * MIB)));
    assert_eq!(allowed(), before);
}

/// More than any machine has, less than the address space of a process.
const ENDLESS: u64 = 1 << 46;

#[test]
fn more_than_the_machine_has_is_refused_before_the_first_page() {
    let assert_short = |result: Result<(), Error>| match result {
        Err(Error::Populate(PopulateError::Shortage {
            range, shortage, ..
        })) => {
            assert!(matches!(shortage.limit, ResourceLimit::Machine { .. }));
            assert!(shortage.needed >= ENDLESS && shortage.left < ENDLESS);
            assert_eq!(range.size(), ENDLESS);
        }
        other => panic!("{other:?}"),
    };
    for mode in [Populate::Allocate, Populate::Prefault] {
        let built = GuestMemoryShm::<()>::builder()
            .add_ram(RamOptions::new(), [(GuestAddress(0), MIB)])
            .add_ram(
                RamOptions::new().with_populate(mode),
                [(GuestAddress(1 << 47), ENDLESS)],
            )
            .build();
        assert_short(built.map(drop).map_err(Error::from));
        let options = RamOptions::new().with_populate(mode);
        let built = GuestRegionShm::<()>::new((GuestAddress(0), ENDLESS), &options);
        assert_short(built.map(drop).map_err(Error::from));

        let lazy = memory(RamOptions::new(), ENDLESS);
        let populated = lazy.populate(PopulateOptions::new(mode));
        assert_short(populated.map(drop).map_err(Error::from));
        let started = lazy.populate_in_background(PopulateOptions::new(mode));
        assert_short(started.map(drop).map_err(Error::from));
        assert_eq!(allocated(&lazy), 0);
        // A part of it can be had.
        let part = PopulateOptions::new(mode).with_range(range(ENDLESS / 2, MIB));
        assert_eq!(lazy.populate(part).unwrap().bytes, MIB);
        assert_eq!(allocated(&lazy), MIB);
    }
}

#[test]
fn the_file_of_populated_ram_that_is_refused_is_removed_again() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("ram");
    // A file system is asked first how much it holds, so the RAM is small: what is too much is
    // what is beside it.
    let built = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new()
                .with_backing(BackingSource::File(path.clone()))
                .with_populate(Populate::Prefault),
            [(GuestAddress(0), MIB)],
        )
        .add_ram(
            RamOptions::new().with_populate(Populate::Prefault),
            [(GuestAddress(1 << 47), ENDLESS)],
        )
        .build();
    assert!(matches!(
        built,
        Err(MemoryError::Populate(PopulateError::Shortage { range, .. }))
            if range.start_addr() == GuestAddress(1 << 47)
    ));
    assert!(!path.exists());
}

#[test]
fn huge_pages_of_a_pool_are_taken_when_they_are_populated() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 4) else {
            return;
        };
        let free = pool.free();
        let options = RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)));
        let lazy = memory(options.clone(), 4 * HUGE);
        assert_eq!((pool.free(), pool.reserved()), (free, 4), "the control");
        drop(lazy);
        for mode in [Populate::Allocate, Populate::Prefault] {
            let _populated = memory(options.clone().with_populate(mode), 4 * HUGE);
            assert_eq!(pool.free(), free - 4, "{mode:?}");
        }
        assert_eq!(pool.free(), free);
    });
}

#[test]
fn populating_leaves_no_thread_and_no_descriptor() {
    in_own_process(|| {
        let populate = || {
            let memory = memory(RamOptions::new(), 8 * MIB);
            let options = PopulateOptions::new(Populate::Prefault).with_threads(threads(4));
            memory.populate(options).unwrap();
            no_thread_populates();
        };
        populate();
        leaves_nothing_but_heaps(populate);
        no_thread_populates();
    });
}
