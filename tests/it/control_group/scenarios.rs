//! What processes in a group do, and what must come of it there.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use guest_memory_shm::{
    Error, GuestMemoryShm, OnFailure, OnShortage, PageSize, Populate, PopulateError,
    PopulateHandle, PopulateOptions, RamOptions, Reserve, ResourceLimit,
};
use vm_memory::GuestAddress;

use super::group::{SCENARIO, as_scenario};
use super::{LIMIT, TOO_MUCH};
use crate::populate::{HUGE, MIB, allocated, memory, threads};
use crate::support::Process;

/// What a process in a group plays; nothing without one.
#[test]
fn scenario() {
    let Ok(scenario) = std::env::var(SCENARIO) else {
        return;
    };
    match scenario.as_str() {
        "build" => build(),
        "build from a string" => build_from_a_string(),
        "later" => later(),
        "in the background" => in_the_background(),
        "many in the background" => many_in_the_background(),
        "try anyway" => try_anyway(),
        "build and try anyway" => {
            let options = RamOptions::new().with_on_shortage(OnShortage::TryAnyway);
            memory(options.with_populate(Populate::Prefault), TOO_MUCH);
        }
        "touch" => {
            let memory = memory(RamOptions::new(), TOO_MUCH);
            let all = vec![1; MIB as usize];
            for at in (0..TOO_MUCH).step_by(MIB as usize) {
                memory.write_slice(&all, GuestAddress(at)).unwrap();
            }
        }
        "fit" => fit(),
        "there already" => there_already(),
        "beside a file" => beside_a_file(),
        "another takes the rest" => another_takes_the_rest(),
        "the other" => the_other(),
        "lazy" => lazy(),
        "huge pages" => huge_pages(),
        other => panic!("{other}"),
    }
}

const MODES: [Populate; 2] = [Populate::Allocate, Populate::Prefault];

/// Asserts that it is refused by the limit of the group, and says so.
fn assert_short<T: std::fmt::Debug>(result: Result<T, impl Into<Error>>, needed: u64) {
    match result.map_err(Into::into) {
        Err(error @ Error::Populate(PopulateError::Shortage { .. })) => {
            let text = error.to_string();
            let Error::Populate(PopulateError::Shortage { shortage, .. }) = error else {
                unreachable!();
            };
            let ResourceLimit::ControlGroup { file, .. } = &shortage.limit else {
                panic!("{text}");
            };
            assert!(file.is_file(), "{text}");
            // And at most one byte in 128 besides.
            assert!(shortage.needed >= needed, "{text}");
            assert!(shortage.needed <= needed + needed / 100, "{text}");
            assert!(shortage.left < LIMIT, "{text}");
            assert!(text.contains(file.to_str().unwrap()), "{text}");
            assert!(text.contains("OnShortage::TryAnyway"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

fn build() {
    for mode in MODES {
        let options = RamOptions::new().with_populate(mode);
        let built = GuestMemoryShm::<()>::builder()
            .add_ram(options.clone(), [(GuestAddress(0), TOO_MUCH / 2)])
            .add_ram(options, [(GuestAddress(1 << 32), TOO_MUCH / 2)])
            .build();
        assert_short(built, TOO_MUCH);
    }
}

fn build_from_a_string() {
    for text in [
        "memory-backend-memfd,size=256M,prealloc=on",
        "memory-backend-shm,size=256M,populate=allocate",
        "memory-backend-file,size=256M,mem-path=/dev/shm,share=on,prealloc=on",
    ] {
        let options: RamOptions = text.parse().unwrap();
        let built = GuestMemoryShm::<()>::builder()
            .add_ram(options, [(GuestAddress(0), TOO_MUCH)])
            .build();
        assert_short(built, TOO_MUCH);
    }
}

fn later() {
    let memory = memory(RamOptions::new(), TOO_MUCH);
    memory.write_obj(7u8, GuestAddress(5 * MIB)).unwrap();
    let before = allocated(&memory);
    for mode in MODES {
        let populated = memory.populate(PopulateOptions::new(mode));
        assert_short(populated.map_err(Error::from), TOO_MUCH - before);
        assert_eq!(allocated(&memory), before, "{mode:?}");
    }
}

fn in_the_background() {
    let memory = memory(RamOptions::new(), TOO_MUCH);
    for mode in MODES {
        let started = memory.populate_in_background(PopulateOptions::new(mode));
        assert_short(started.map_err(Error::from), TOO_MUCH);
        assert_eq!(allocated(&memory), 0, "{mode:?}");
    }
}

/// Each of them fits, and not all together.
fn many_in_the_background() {
    let size = TOO_MUCH / 8;
    let memories: Vec<_> = (0..32).map(|_| memory(RamOptions::new(), size)).collect();
    for mode in MODES.repeat(4) {
        let start = |memory: &GuestMemoryShm| {
            let options = PopulateOptions::new(mode).with_threads(threads(1));
            memory.populate_in_background(options.with_on_failure(OnFailure::GiveBack))
        };
        let started: Vec<_> = memories.iter().map(start).collect();
        let done = started
            .into_iter()
            .map(|handle| handle.and_then(PopulateHandle::wait));
        let failed: Vec<_> = done.filter_map(Result::err).collect();
        assert!(!failed.is_empty(), "{failed:?}");
        for error in failed {
            let short = matches!(error, PopulateError::Shortage { .. });
            assert!(short, "{error}");
        }
    }
}

fn try_anyway() {
    let memory = memory(RamOptions::new(), TOO_MUCH);
    let options = PopulateOptions::new(Populate::Allocate);
    let populated = memory.populate(options.with_on_shortage(OnShortage::TryAnyway));
    panic!("it was not ended: {populated:?}");
}

fn fit() {
    for mode in MODES {
        let fits = memory(RamOptions::new().with_populate(mode), LIMIT / 2);
        assert_eq!(allocated(&fits), LIMIT / 2);
        let part = memory(RamOptions::new(), TOO_MUCH);
        let range = crate::populate::range(0, LIMIT / 8);
        part.populate(PopulateOptions::new(mode).with_range(range))
            .unwrap();
        assert_eq!(allocated(&part), LIMIT / 8);
    }
}

fn there_already() {
    let size = LIMIT * 5 / 8;
    let memory = memory(RamOptions::new().with_populate(Populate::Allocate), size);
    for mode in MODES {
        memory.populate(PopulateOptions::new(mode)).unwrap();
        let handle = memory
            .populate_in_background(PopulateOptions::new(mode))
            .unwrap();
        assert_eq!(handle.wait().unwrap().bytes, size);
    }
}

/// The pages of a file on a disk fill the group, and are dropped.
fn beside_a_file() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("file");
    let mut file = fs::File::create(&path).unwrap();
    for _ in 0..LIMIT / MIB {
        file.write_all(&vec![1; MIB as usize]).unwrap();
    }
    file.sync_all().unwrap();
    // Read again, so that the pages are there, and are not as new as those that were written.
    let mut file = fs::File::open(&path).unwrap();
    assert_eq!(
        std::io::copy(&mut file, &mut std::io::sink()).unwrap(),
        LIMIT
    );
    fit();
}

fn another_takes_the_rest() {
    // More than half of the group, and the other takes nearly half.
    let size = 200 * MIB;
    for (count, mode) in [
        (1, Populate::Prefault),
        (2, Populate::Prefault),
        (2, Populate::Allocate),
    ] {
        for on_failure in [OnFailure::GiveBack, OnFailure::Keep] {
            let memory = memory(RamOptions::new(), size);
            let mut other = None;
            let mut done = 0;
            let options = PopulateOptions::new(mode)
                .with_threads(threads(count))
                .with_on_failure(on_failure)
                .with_progress(|progress| {
                    done = progress.done;
                    other.get_or_insert_with(start_the_other);
                });
            match memory.populate(options) {
                Err(PopulateError::Shortage { shortage, .. }) => {
                    assert!(shortage.needed > shortage.left, "{shortage}");
                    assert!(shortage.needed <= size, "{shortage}");
                }
                other => panic!("{other:?}"),
            }
            assert!(done > 0 && done < size, "{done}");
            let left = allocated(&memory);
            match on_failure {
                OnFailure::GiveBack => assert_eq!(left, 0),
                _ => assert!(left >= done && left < size, "{left} {done}"),
            }
            // When the other is gone it can be had.
            drop(other);
            memory.populate(PopulateOptions::new(mode)).unwrap();
        }
    }
}

/// Another process in this group that takes memory, and has it when this returns.
fn start_the_other() -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let piped = as_scenario(&mut command, "the other")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut process = Process(piped.spawn().unwrap());
    let out = BufReader::new(process.0.stdout.take().unwrap());
    let has_it = out.lines().any(|line| line.unwrap().contains("has it"));
    assert!(has_it, "the other took the memory");
    process
}

fn the_other() {
    let taken = vec![1_u8; 100 * MIB as usize];
    println!("has it");
    // Until it is killed.
    let _ = std::io::stdin().read_line(&mut String::new());
    assert!(taken.iter().all(|byte| *byte == 1));
}

/// In a group that may have four of them.
fn huge_pages() {
    let options = RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)));
    let build = |options: &RamOptions, pages: u64| {
        GuestMemoryShm::<()>::builder()
            .add_ram(options.clone(), [(GuestAddress(0), pages * HUGE)])
            .build()
            .map_err(Error::from)
    };
    // Promised pages can be had for sure, so they are refused at once; also when the kernel is
    // asked.
    let anyway = options.clone().with_on_shortage(OnShortage::TryAnyway);
    let refused = build(&options, 5).unwrap_err();
    match &refused {
        Error::Shortage(shortage) => {
            assert_eq!((shortage.needed, shortage.left), (5 * HUGE, 4 * HUGE));
            let ResourceLimit::ControlGroup { file, .. } = &shortage.limit else {
                panic!("{refused}");
            };
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(name.starts_with("hugetlb.2MB."), "{refused}");
        }
        other => panic!("{other:?}"),
    }
    let populating = anyway.with_populate(Populate::Prefault);
    match build(&populating, 5) {
        Err(Error::Shortage(_)) => {}
        Err(Error::Populate(PopulateError::Shortage { .. })) => {}
        other => panic!("{other:?}"),
    }
    // What is not promised is refused before the first page.
    let unreserved = options.clone().with_reserve(Reserve::Off);
    let memory = build(&unreserved, 5).unwrap();
    for mode in MODES {
        match memory.populate(PopulateOptions::new(mode)) {
            Err(PopulateError::Shortage { shortage, .. }) => {
                assert_eq!((shortage.needed, shortage.left), (5 * HUGE, 4 * HUGE));
            }
            other => panic!("{mode:?}: {other:?}"),
        }
        // The kernel's own answer is an error, not a signal, and has its cause named.
        let anyway = PopulateOptions::new(mode).with_on_shortage(OnShortage::TryAnyway);
        match memory.populate(anyway) {
            Err(PopulateError::Shortage { .. }) => {}
            other => panic!("{mode:?}: {other:?}"),
        }
        assert_eq!(allocated(&memory), 0, "{mode:?}");
    }
    // What fits is had.
    drop(memory);
    for options in [options, unreserved] {
        let memory = build(&options, 4).unwrap();
        let populate = PopulateOptions::new(Populate::Prefault);
        assert_eq!(memory.populate(populate).unwrap().bytes, 4 * HUGE);
    }
}

fn lazy() {
    let builder = GuestMemoryShm::<()>::builder();
    let (_, report) = builder
        .add_ram(RamOptions::new(), [(GuestAddress(0), TOO_MUCH)])
        .build_with_report()
        .unwrap();
    let text = report.to_string();
    assert!(text.contains("256 MiB more are needed"), "{text}");
    assert!(text.contains("control group's limit in "), "{text}");
    assert_eq!(report.notes().count(), 1, "{text}");
}
