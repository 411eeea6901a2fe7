//! Operations on RAM alone.

use crate::isolation::shm_dir;
use std::fs::{self, File};
use std::num::NonZeroU32;
use std::path::Path;

use guest_memory_shm::receive::{ReceivePolicy, ReceivedRegion, ReceivedTable};
use guest_memory_shm::{
    Access, AdoptPolicy, BackingError, BackingSource, CoreDump, Error, GuestMemoryShm,
    GuestRegionShm, GuestRom, NodeSet, NumaPolicy, OnFailure, PageSize, Populate, PopulateOptions,
    Populated, RamOptions, ShmBacking,
};
use nix::errno::Errno;
use tempfile::TempDir;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::call::WITHOUT_SCANS;
use super::{Operation, Outcome, Stage, says_something};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Two regions of this size, with a hole between them.
const SIZE: u64 = 2 * MIB;
const REGIONS: [(GuestAddress, u64); 2] =
    [(GuestAddress(0), SIZE), (GuestAddress(4 * SIZE), SIZE)];

pub(super) const BUILDS: &[Operation] = &[
    Operation::new("build a memfd", |stage| build(stage, &RamOptions::new())),
    Operation::new("build with all options", |stage| {
        build(stage, &all_options())
    }),
    Operation::new("build POSIX shm", |stage| build(stage, &posix_shm())),
    Operation::new("build allocated POSIX shm", |stage| {
        build(stage, &posix_shm().with_populate(Populate::Allocate))
    }),
    Operation::new("build a new file", build_new_file),
    Operation::new("build on a file", build_on_file),
    Operation::new("map a ROM", map_rom),
    Operation::new("adopt", adopt),
    Operation::new("map a backing", map_adopted),
    Operation::new("adopt with all options", adopt_with_options),
    Operation::new("drop", drop_all),
];

pub(super) const HUGE: &[Operation] = &[
    Operation::new("build huge pages", |stage| build(stage, &huge())),
    Operation::new("build populated huge pages", |stage| {
        build(stage, &huge().with_populate(Populate::Prefault))
    }),
    Operation::new("discard huge pages", |stage| discard(stage, &huge())),
    Operation::new("tell of huge pages", |stage| tell(stage, &huge())),
];

pub(super) const USES: &[Operation] = &[
    Operation::new("prefault", |stage| populate(stage, Populate::Prefault)),
    Operation::new("allocate", |stage| populate(stage, Populate::Allocate)),
    Operation::new("prefault in the background", |stage| {
        populate_in_background(stage, Populate::Prefault)
    }),
    Operation::new("discard", |stage| discard(stage, &RamOptions::new())),
    Operation::new("tell", |stage| tell(stage, &RamOptions::new())),
    Operation::new("tell on Linux 6.1", |stage| tell(stage, &RamOptions::new()))
        .without(WITHOUT_SCANS),
    Operation::new("receive a table", receive),
];

fn all_options() -> RamOptions {
    RamOptions::new()
        .with_name("all")
        .with_numa(NumaPolicy::Bind(NodeSet::from_nodes([0]).unwrap()))
        .with_page_size(PageSize::Transparent)
        .with_core_dump(CoreDump::Exclude)
        .with_populate(Populate::Prefault)
        .with_populate_threads(NonZeroU32::new(2).unwrap())
}

fn posix_shm() -> RamOptions {
    RamOptions::new().with_backing(BackingSource::PosixShm)
}

fn huge() -> RamOptions {
    RamOptions::new().with_page_size(PageSize::Huge(Some(2 * MIB)))
}

fn try_new(options: &RamOptions) -> Result<GuestMemoryShm, Error> {
    let builder = GuestMemoryShm::builder();
    Ok(builder.add_ram(options.clone(), REGIONS).build()?)
}

fn new(options: &RamOptions) -> GuestMemoryShm {
    try_new(options).expect("nothing fails yet")
}

/// Asserts how often the path of a file is looked at, whatever it is created for.
pub(super) fn looks() {
    let dir = shm_dir();
    let (new, old) = (dir.path().join("new"), dir.path().join("old"));
    let made = File::create(&old).unwrap();
    made.set_len(2 * SIZE).unwrap();
    let ways: [fn(&RamOptions); 3] = [
        |options| drop(try_new(options).unwrap()),
        |options| drop(ShmBacking::create(options, 2 * SIZE).unwrap()),
        |options| {
            let region = GuestRegionShm::<()>::new((GuestAddress(0), 2 * SIZE), options);
            drop(region.unwrap());
        },
    ];
    // Nothing is at a path only if no link is there either; and its folder is looked at instead.
    for (path, expected) in [(&old, 1), (&dir.path().to_owned(), 1), (&new, 3)] {
        for way in ways {
            let looks = |options: &RamOptions| {
                let stage = Stage::counting(&[]);
                stage.attacked(|| way(options));
                stage.looks()
            };
            // Control groups are looked for in any case.
            let looks = looks(&file_options(path)) - looks(&RamOptions::new());
            assert_eq!(looks, expected, "{}", path.display());
            if path == &new {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

/// Asserts that the ends of each region can be written and read, through other mappings, too.
fn works(memory: &GuestMemoryShm) {
    for region in memory.arc_regions() {
        let range = region.range();
        for at in [range.start_addr(), GuestAddress(range.last_addr().0 - 7)] {
            memory.write_obj(at.0 ^ 0x5a5a, at).unwrap();
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), at.0 ^ 0x5a5a);
        }
    }
}

/// What is allocated of all backings.
fn allocated(memory: &GuestMemoryShm) -> u64 {
    let backing = memory.iter().next().expect("there are regions").backing();
    backing.allocated().unwrap()
}

fn build(stage: &Stage, options: &RamOptions) -> Outcome {
    match stage.attacked(|| try_new(options)) {
        Ok(memory) => {
            if options.populate() != Populate::Lazy {
                assert_eq!(allocated(&memory), 2 * SIZE, "not all is populated");
            }
            works(&memory);
            Outcome::Done
        }
        Err(error) => {
            // Only a kernel without them has none: what cannot be read is not absent.
            let has_none = matches!(
                error,
                Error::Backing(BackingError::NoSuchHugePageSize { .. })
            );
            assert!(!has_none || stage.errno() == Some(Errno::ENOENT), "{error}");
            says_something(&error)
        }
    }
}

fn file_options(path: &Path) -> RamOptions {
    RamOptions::new().with_backing(BackingSource::File(path.to_owned()))
}

fn build_new_file(stage: &Stage) -> Outcome {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ram");
    let options = file_options(&path).with_populate(Populate::Allocate);
    let outcome = build(stage, &options);
    let there = fs::read_dir(folder.path()).unwrap().count();
    match &outcome {
        Outcome::Done => assert_eq!(there, 1),
        Outcome::Refused(_) => assert_eq!(there, 0, "a file is left"),
    }
    outcome
}

fn build_on_file(stage: &Stage) -> Outcome {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ram");
    let before = b"contents".repeat(2 * SIZE as usize / 8);
    fs::write(&path, &before).unwrap();
    let outcome = match stage.attacked(|| try_new(&file_options(&path))) {
        Ok(memory) => {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(5)).unwrap(), b'n');
            Outcome::Done
        }
        Err(error) => says_something(&error),
    };
    assert!(fs::read(&path).unwrap() == before, "the file was changed");
    outcome
}

fn map_rom(stage: &Stage) -> Outcome {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("rom");
    fs::write(&path, [7; 2 * PAGE as usize]).unwrap();
    let options = file_options(&path).with_access(Access::ReadOnly);
    match stage.attacked(|| GuestRom::new((GuestAddress(0), 2 * PAGE), &options)) {
        Ok(rom) => {
            let mut byte = [0];
            rom.read(PAGE, &mut byte).unwrap();
            assert_eq!(byte, [7]);
            Outcome::Done
        }
        Err(error) => says_something(&error),
    }
}

fn adopt(stage: &Stage) -> Outcome {
    let theirs = ShmBacking::create(&RamOptions::new(), SIZE).unwrap();
    let fd = File::from(
        std::os::fd::AsFd::as_fd(&theirs)
            .try_clone_to_owned()
            .unwrap(),
    );
    let policy = AdoptPolicy::new().with_min_len(SIZE).with_added_seals();
    let adopted = stage.attacked(|| ShmBacking::adopt(fd.into(), &policy));
    match adopted {
        Ok(backing) => {
            assert_eq!(backing, theirs);
            assert_eq!(backing.seals(), theirs.seals());
            Outcome::Done
        }
        Err(error) => {
            let outcome = says_something(&error);
            // It is the caller's again.
            assert_eq!(File::from(error.into_fd()).metadata().unwrap().len(), SIZE);
            outcome
        }
    }
}

fn map_adopted(stage: &Stage) -> Outcome {
    let backing = ShmBacking::create(&RamOptions::new(), SIZE).unwrap();
    let start = GuestAddress(0);
    let region = stage.attacked(|| GuestRegionShm::<()>::from_backing(&backing, 0, (start, SIZE)));
    match region {
        Ok(region) => {
            works(&GuestMemoryShm::from_regions(vec![region]).unwrap());
            Outcome::Done
        }
        Err(error) => says_something(&error),
    }
}

fn adopt_with_options(stage: &Stage) -> Outcome {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(SIZE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7], PAGE).unwrap();
    let fd = file.try_clone().unwrap().into();
    let policy = AdoptPolicy::new().with_options(all_options());
    let made = stage.attacked(|| -> Result<_, Error> {
        let backing = ShmBacking::adopt(fd, &policy)?;
        let half = SIZE / 2;
        let builder = GuestMemoryShm::builder();
        let halves = [(GuestAddress(0), half), (GuestAddress(SIZE), half)];
        Ok(builder.add_backing(&backing, 0, halves).build()?)
    });
    let there = || {
        let backing = ShmBacking::adopt(file.try_clone().unwrap().into(), &AdoptPolicy::new());
        backing.unwrap().allocated().unwrap()
    };
    match made {
        Ok(memory) => {
            assert_eq!(there(), SIZE, "not all is populated");
            assert_eq!(memory.read_obj::<u8>(GuestAddress(PAGE)).unwrap(), 7);
            works(&memory);
            Outcome::Done
        }
        Err(error) => {
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, PAGE).unwrap();
            assert_eq!(byte, [7]);
            assert!(there() >= PAGE);
            says_something(&error)
        }
    }
}

fn drop_all(stage: &Stage) -> Outcome {
    let memory = new(&posix_shm());
    works(&memory);
    stage.attacked(move || drop(memory));
    Outcome::Done
}

fn options(mode: Populate) -> PopulateOptions<'static> {
    PopulateOptions::new(mode).with_threads(NonZeroU32::new(2).unwrap())
}

fn populated(memory: &GuestMemoryShm, done: Result<Populated, Error>, kept: bool) -> Outcome {
    match done {
        Ok(populated) => {
            assert_eq!((populated.bytes, allocated(memory)), (2 * SIZE, 2 * SIZE));
            works(memory);
            Outcome::Done
        }
        Err(error) => {
            assert!(kept || allocated(memory) == 0, "pages are left");
            // It goes on from there.
            let rest = memory.populate(PopulateOptions::new(Populate::Prefault));
            assert_eq!(rest.unwrap().bytes, 2 * SIZE);
            says_something(&error)
        }
    }
}

fn populate(stage: &Stage, mode: Populate) -> Outcome {
    let memory = new(&RamOptions::new());
    let done = stage.attacked(|| memory.populate(options(mode)));
    populated(&memory, done.map_err(Error::from), false)
}

fn populate_in_background(stage: &Stage, mode: Populate) -> Outcome {
    let memory = new(&RamOptions::new());
    let options = options(mode).with_on_failure(OnFailure::GiveBack);
    let done = stage.attacked(|| memory.populate_in_background(options)?.wait());
    populated(&memory, done.map_err(Error::from), false)
}

fn discard(stage: &Stage, options: &RamOptions) -> Outcome {
    let memory = new(&options.clone().with_populate(Populate::Prefault));
    works(&memory);
    let (start, len) = (GuestAddress(4 * SIZE), SIZE);
    memory.write_obj(1_u64, start).unwrap();
    let done = stage.attacked(|| memory.discard((start, len)));
    let rest = 2 * SIZE - len;
    let outcome = match done {
        Ok(discarded) if discarded.kept() == 0 => {
            assert_eq!(allocated(&memory), rest);
            assert_eq!(memory.read_obj::<u64>(start).unwrap(), 0);
            Outcome::Done
        }
        Ok(discarded) => {
            assert_eq!(discarded.len() + discarded.kept(), len);
            Outcome::Refused(format!("{discarded:?}"))
        }
        Err(error) => says_something(&error),
    };
    assert!((rest..=2 * SIZE).contains(&allocated(&memory)));
    // Nothing else was touched.
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0x5a5a);
    works(&memory);
    outcome
}

fn tell(stage: &Stage, options: &RamOptions) -> Outcome {
    let memory = new(options);
    let start = GuestAddress(4 * SIZE);
    memory.write_obj(1_u64, start).unwrap();
    let page = memory.iter().next().unwrap().backing().page_size();
    let told =
        stage.attacked(|| -> Result<_, Error> { Ok((memory.stats()?, memory.extents(0)?)) });
    match told {
        Ok((stats, extents)) => {
            assert_eq!((stats.size(), stats.allocated()), (2 * SIZE, page));
            let found: Vec<_> = extents
                .ranges
                .iter()
                .map(|r| (r.start_addr(), r.size()))
                .collect();
            // Of huge pages it may be known how many there are, and not which.
            match extents.unlocated {
                0 => assert_eq!(found, [(start, page)]),
                unlocated => assert_eq!((found.len(), unlocated), (0, page)),
            }
            Outcome::Done
        }
        Err(error) => says_something(&error),
    }
}

fn receive(stage: &Stage) -> Outcome {
    let theirs = |len| ShmBacking::create(&RamOptions::new(), len).unwrap();
    let file = |backing: &ShmBacking| {
        std::os::fd::AsFd::as_fd(backing)
            .try_clone_to_owned()
            .unwrap()
    };
    let (one, two, three) = (theirs(MIB), theirs(MIB), theirs(MIB));
    let region = |number: u64| ReceivedRegion {
        guest_addr: GuestAddress(2 * number * MIB),
        size: MIB,
        user_addr: (1 << 40) + 2 * number * MIB,
        mmap_offset: 0,
    };
    let files = [file(&one), file(&two)];
    let third = file(&three);
    let seals = AdoptPolicy::new().with_required_seals();
    let policy = ReceivePolicy::new().with_descriptors(seals);
    let received = stage.attacked(|| {
        let table = ReceivedTable::<()>::new(policy).set([region(0), region(1)], files)?;
        table.add(region(2), [third])?.remove(region(0))
    });
    match received {
        Ok(table) => {
            assert_eq!(table.regions(), [region(1), region(2)]);
            works(table.memory());
            Outcome::Done
        }
        Err(error) => {
            assert_ne!(error.reply_code(), 0);
            says_something(&error)
        }
    }
}
