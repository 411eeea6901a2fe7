//! NUMA nodes, huge page advice, alignment, core dumps, names, and what of them has no effect.

use guest_memory_shm::{
    AdoptPolicy, BackingError, BackingSource, BuildNote, CoreDump, Error, GuestMemoryShm,
    GuestRegionShm, NumaPolicy, PageSize, Populate, RamOptions, Reserve, ResourceLimit,
    ShmBacking, ThpObstacle,
};
use nix::mount::{MsFlags, umount};
use vm_memory::{Bytes, GuestMemoryBackend, MemoryRegionAddress};

use super::{MIB, SIZE, START, WAYS, adopt, files, huge_memfd, memfd, offset, region};
use crate::isolation::{
    HugePool, PAGE, ShmemHuge, assert_refused, in_own_process, mount_tmpfs, own_mounts,
};
use crate::numa::{nodes, numa, numa_maps};
use crate::populate::HUGE;
use crate::proc::{has_vm_flag, leaves_nothing, smaps_at, smaps_value};
use crate::support::huge_pages_short;
use crate::transparent::mapped_huge;

fn policy_of(region: &GuestRegionShm) -> String {
    numa_maps(region.as_ptr()).expect("it is mapped").0
}

#[test]
fn the_kernel_knows_the_policy_of_adopted_ram() {
    if !numa() {
        return;
    }
    let zero = nodes(&[0]);
    for (policy, expected) in [
        (NumaPolicy::Default, "default"),
        (NumaPolicy::Bind(zero), "bind:0"),
        (NumaPolicy::Interleave(zero), "interleave:0"),
    ] {
        let options = RamOptions::new().with_numa(policy);
        for (name, way) in WAYS {
            for (file, in_memory) in files(SIZE) {
                let memory = way(&file, SIZE, &options).unwrap();
                let region = region(&memory);
                region.write_obj(1u8, MemoryRegionAddress(0)).unwrap();
                assert_eq!(policy_of(&region), expected, "{name} {file:?}");
                // It is one of the object, where that is in memory, and so of all its mappings.
                let other = adopt(&file, &RamOptions::new()).unwrap();
                let other = GuestRegionShm::<()>::from_backing(&other, 0, (START, SIZE)).unwrap();
                let of_object = if in_memory { expected } else { "default" };
                assert_eq!(policy_of(&other), of_object, "{name} {file:?}");
            }
        }
    }
}

#[test]
fn ranges_of_one_descriptor_have_each_their_own_policy() {
    if !numa() {
        return;
    }
    let zero = nodes(&[0]);
    for (file, _) in files(3 * MIB) {
        let backing = adopt(&file, &RamOptions::new()).unwrap();
        let with = |policy| {
            backing
                .with_options(&RamOptions::new().with_numa(policy))
                .unwrap()
        };
        let at = |number: u64| [(vm_memory::GuestAddress(number << 30), MIB)];
        let memory = GuestMemoryShm::<()>::builder()
            .add_backing(&with(NumaPolicy::Bind(zero)), 0, at(2))
            .add_backing(&with(NumaPolicy::Interleave(zero)), MIB, at(1))
            .add_backing(&backing, 2 * MIB, at(0))
            .build()
            .unwrap();
        let found: Vec<_> = memory.iter().map(policy_of).collect();
        assert_eq!(found, ["default", "interleave:0", "bind:0"]);
        assert!(memory.iter().all(|region| *region.backing() == backing));
    }
}

#[test]
fn pages_of_adopted_ram_are_where_its_policy_says() {
    if !numa() {
        return;
    }
    let options = RamOptions::new()
        .with_numa(NumaPolicy::Bind(nodes(&[0])))
        .with_populate(Populate::Prefault);
    for (name, way) in WAYS {
        let [(memfd, _), (shm, _), _] = files(SIZE);
        for file in [memfd, shm] {
            let memory = way(&file, SIZE, &options).unwrap();
            let (_, rest) = numa_maps(region(&memory).as_ptr()).unwrap();
            assert!(
                rest.contains(&format!("N0={}", SIZE / PAGE)),
                "{name}: {rest}"
            );
        }
    }
}

#[test]
fn a_node_that_is_not_there_is_refused_and_the_descriptor_comes_back() {
    if !numa() {
        return;
    }
    let present = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap();
    in_own_process(|| {
        let options = RamOptions::new().with_numa(NumaPolicy::Bind(nodes(&[126, 127])));
        let text = format!(
            "cannot place RAM on host-nodes=126-127 (policy=bind): this machine has memory on \
             nodes {}; choose nodes that are there and that this process may use (cpuset)",
            present.trim(),
        );
        for (file, _) in files(MIB) {
            for (_, way) in WAYS {
                let refused = leaves_nothing(|| way(&file, MIB, &options));
                assert_refused!(
                    refused,
                    Error::Backing(BackingError::NoSuchNodes { .. }),
                    text
                );
            }
        }
    });
}

#[test]
fn what_has_no_effect_is_reported_as_for_created_ram() {
    let options: RamOptions = "memory-backend-memfd,id=ram0,size=1M,merge=on,reserve=on"
        .parse()
        .unwrap();
    let reported = |backing: &ShmBacking| {
        let builder = GuestMemoryShm::<()>::builder().add_backing(backing, 0, [(START, MIB)]);
        builder.build_with_report().unwrap().1
    };
    let created = ShmBacking::create(&options, MIB).unwrap();
    let expected = reported(&created).to_string();
    assert!(
        expected.starts_with("ram0: merge=on has no effect"),
        "{expected}"
    );
    assert!(
        expected.contains("ram0: reserve=on reserves nothing"),
        "{expected}"
    );
    for (file, _) in files(MIB) {
        let adopted = adopt(&file, &options).unwrap();
        assert_eq!(adopted.name(), Some("ram0"));
        assert_eq!(reported(&adopted).to_string(), expected);
        let later = adopt(&file, &RamOptions::new()).unwrap();
        assert!(later.notes().is_empty() && reported(&later).is_empty());
        let later = later.with_options(&options).unwrap();
        assert_eq!(reported(&later).to_string(), expected);
        let region = GuestRegionShm::<()>::from_backing(&later, 0, (START, MIB)).unwrap();
        assert_eq!(region.report().to_string(), expected);
        // It keeps its name, and nothing else.
        let plain = later.with_options(&RamOptions::new()).unwrap();
        assert_eq!(plain.name(), Some("ram0"));
        assert!(reported(&plain).is_empty());
    }
}

#[test]
fn a_policy_is_reported_to_have_no_effect_on_new_pages_of_a_disk() {
    if !numa() {
        return;
    }
    let options = RamOptions::new().with_numa(NumaPolicy::Bind(nodes(&[0])));
    let [(memfd, _), _, (disk, _)] = files(MIB);
    let notes = |file| adopt(file, &options).unwrap().notes().to_vec();
    assert!(matches!(notes(&disk)[..], [BuildNote::NotPlaced { .. }]));
    let on_memfd = notes(&memfd);
    let others = |note: &BuildNote| matches!(note, BuildNote::NotPlaced { .. });
    assert!(!on_memfd.iter().any(others), "{on_memfd:?}");
    let created = RamOptions::new()
        .with_backing(BackingSource::File(env!("CARGO_TARGET_TMPDIR").into()))
        .with_numa(NumaPolicy::Bind(nodes(&[0])));
    let created = ShmBacking::create(&created, MIB).unwrap();
    assert_eq!(
        created.notes()[0].to_string(),
        "policy=bind with host-nodes=0 has no effect on new pages of a file on a disk: they come \
         from where the thread runs that needs them first"
    );
}

#[test]
fn adopted_ram_is_mapped_by_huge_pages_where_that_is_allowed() {
    in_own_process(|| {
        let Some(_switch) = ShmemHuge::set("advise") else {
            return;
        };
        let thp = RamOptions::new().with_page_size(PageSize::Transparent);
        for populate in [Populate::Lazy, Populate::Allocate, Populate::Prefault] {
            for (name, way) in WAYS {
                let memfd = memfd(SIZE);
                let memory = way(&memfd, SIZE, &thp.clone().with_populate(populate)).unwrap();
                let region = region(&memory);
                for at in (0..SIZE).step_by(PAGE as usize) {
                    region.write_obj(1u8, MemoryRegionAddress(at)).unwrap();
                }
                assert_eq!(mapped_huge(&region), SIZE, "{name} {populate:?}");
                assert!(region.report().is_empty(), "{}", region.report());
            }
        }
        let memfd = memfd(SIZE);
        let plain = RamOptions::new().with_populate(Populate::Prefault);
        let memory = WAYS[0].1(&memfd, SIZE, &plain).unwrap();
        assert_eq!(mapped_huge(&region(&memory)), 0);
    });
}

#[test]
fn adopted_files_of_a_mount_that_allows_huge_pages_are_mapped_by_them() {
    in_own_process(|| {
        // The mount's option decides, as long as the switch is not set to deny.
        let Some(_switch) = ShmemHuge::set("never") else {
            return;
        };
        if !own_mounts() {
            return;
        }
        let thp = RamOptions::new()
            .with_page_size(PageSize::Transparent)
            .with_populate(Populate::Prefault);
        for (option, huge) in [("size=64m,huge=advise", SIZE), ("size=64m", 0)] {
            mount_tmpfs("/dev/shm", MsFlags::empty(), option);
            let [_, (shm, _), _] = files(SIZE);
            let memory = WAYS[0].1(&shm, SIZE, &thp).unwrap();
            let report = region(&memory).report();
            assert_eq!(mapped_huge(&region(&memory)), huge);
            assert_eq!(report.is_empty(), huge > 0);
            if huge == 0 {
                assert_eq!(
                    report.to_string(),
                    "adopted shm: transparent huge pages will not come: /dev/shm is mounted with \
                     huge=never, remount it with huge=advise"
                );
            }
            drop((memory, shm));
            umount("/dev/shm").unwrap();
        }
    });
}

#[test]
fn advice_that_cannot_be_taken_is_reported_for_each_kind() {
    let options = RamOptions::new().with_page_size(PageSize::Transparent);
    let [_, _, (disk, _)] = files(SIZE);
    let memory = WAYS[0].1(&disk, SIZE, &options).unwrap();
    let report = region(&memory).report();
    let notes: Vec<_> = report.notes().map(|(_, note)| note).collect();
    assert!(
        matches!(notes[..], [BuildNote::NotHuge(ThpObstacle::FileSystem)]),
        "{report}"
    );
}

#[test]
fn core_dumps_and_alignment_of_adopted_ram_are_as_asked_for() {
    const ALIGN: u64 = 64 * MIB;
    for (name, way) in WAYS {
        for (file, _) in files(SIZE) {
            let options = RamOptions::new().with_align(ALIGN);
            let excluded = region(&way(&file, SIZE, &options).unwrap());
            assert_eq!(excluded.as_ptr().addr() as u64 % ALIGN, 0, "{name}");
            assert!(has_vm_flag(&smaps_at(excluded.as_ptr()), "dd"), "{name}");
            let options = RamOptions::new().with_core_dump(CoreDump::Include);
            let included = region(&way(&file, SIZE, &options).unwrap());
            assert!(!has_vm_flag(&smaps_at(included.as_ptr()), "dd"), "{name}");
        }
    }
}

#[test]
fn adopted_huge_pages_are_reserved_unless_it_is_said_otherwise() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 4) else {
            return;
        };
        let (free, reserved) = (pool.free(), pool.reserved());
        let state = |pool: &HugePool| (free - pool.free(), pool.reserved() - reserved);
        let size = 3 * HUGE;
        let file = std::fs::File::from(huge_memfd(size));
        for (name, way) in WAYS {
            for (reserve, promised) in [(None, 3), (Some(Reserve::On), 3), (Some(Reserve::Off), 0)]
            {
                // A promise stays as long as the file.
                let file = std::fs::File::from(huge_memfd(size));
                let options = match reserve {
                    Some(reserve) => RamOptions::new().with_reserve(reserve),
                    None => RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE))),
                };
                leaves_nothing(|| {
                    let memory = way(&file, size, &options).unwrap();
                    assert_eq!(state(&pool), (0, promised), "{name} {reserve:?}");
                    assert!(region(&memory).report().is_empty());
                    let smaps = smaps_at(region(&memory).as_ptr());
                    assert_eq!(smaps_value(&smaps, "KernelPageSize"), "2048 kB");
                    drop(memory);
                });
                drop(file);
                assert_eq!(state(&pool), (0, 0));
            }
        }
        // Populated ones are taken, and those of a part are no more than that.
        let populated = RamOptions::new().with_populate(Populate::Allocate);
        let plain = adopt(&file, &RamOptions::new()).unwrap();
        let backing = plain.with_options(&populated).unwrap();
        let part = GuestRegionShm::<()>::from_backing(&backing, HUGE, (START, HUGE)).unwrap();
        assert_eq!((state(&pool), backing.allocated().unwrap()), ((1, 0), HUGE));
        drop((part, backing, plain, file));
        assert_eq!(state(&pool), (0, 0));
    });
}

#[test]
fn adopted_huge_pages_that_the_pool_does_not_have_are_an_error() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let sparse = RamOptions::new()
            .with_page_size(PageSize::Huge(Some(HUGE)))
            .with_reserve(Reserve::Off);
        let theirs = ShmBacking::create(&sparse, 5 * HUGE).unwrap();
        let fd = std::os::fd::AsFd::as_fd(&theirs).try_clone_to_owned();
        let file = std::fs::File::from(fd.unwrap());
        for mode in [Populate::Lazy, Populate::Allocate, Populate::Prefault] {
            let options = RamOptions::new().with_populate(mode);
            for (name, way) in WAYS {
                let refused = leaves_nothing(|| way(&file, 5 * HUGE, &options)).unwrap_err();
                assert_eq!(
                    huge_pages_short(&refused),
                    Some((5, 2)),
                    "{name}: {refused}"
                );
                assert_eq!((theirs.allocated().unwrap(), pool.free()), (0, 2));
            }
        }
        // The control.
        let options = RamOptions::new().with_populate(Populate::Prefault);
        let two = adopt(&file, &options).unwrap();
        let two = GuestRegionShm::<()>::from_backing(&two, 0, (START, 2 * HUGE)).unwrap();
        assert_eq!((theirs.allocated().unwrap(), pool.free()), (2 * HUGE, 0));
        drop(two);
    });
}

#[test]
fn room_that_a_file_system_does_not_have_is_an_error_or_a_note() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m");
        let [_, (file, _), _] = files(SIZE);
        let text = |needed: &str| {
            format!(
                "{needed} more are needed, and the file system of /dev/shm/{} holds 8 MiB and has \
                 8 MiB free: remove files from it, remount it with a larger size, or use a memfd \
                 backing; RAM that stays sparse is allowed by reserve=off",
                name_in_shm(&file)
            )
        };
        for options in [
            RamOptions::new().with_reserve(Reserve::On),
            RamOptions::new().with_populate(Populate::Allocate),
            RamOptions::new().with_populate(Populate::Prefault),
        ] {
            for (name, way) in WAYS {
                let refused = leaves_nothing(|| way(&file, SIZE, &options));
                let error = refused.unwrap_err();
                let limit = &error.shortage().unwrap().limit;
                assert!(matches!(limit, ResourceLimit::FileSystem { .. }), "{name}");
                assert_eq!(error.to_string(), text("16 MiB"), "{name}");
                // A part of it fits.
                let memory = way(&file, 4 * MIB, &options).unwrap();
                let there = region(&memory).backing().allocated().unwrap();
                let populated = options.populate() != Populate::Lazy;
                assert_eq!(there, if populated { 4 * MIB } else { 0 }, "{name}");
                drop(memory);
                file.set_len(0).unwrap();
                file.set_len(SIZE).unwrap();
            }
        }
        // How sparse it is was another's decision, and is a note.
        for options in [
            RamOptions::new(),
            RamOptions::new().with_reserve(Reserve::Off),
        ] {
            let backing = adopt(&file, &options).unwrap();
            let builder = GuestMemoryShm::<()>::builder();
            let builder = builder.add_backing(&backing, 0, [(START, SIZE)]);
            let (_, report) = builder.build_with_report().unwrap();
            assert_eq!(
                report.to_string(),
                "adopted shm: touching all of the RAM would be SIGBUS: 16 MiB more are needed, \
                 and the file system that backs the RAM holds 8 MiB and has 8 MiB free: remove \
                 files from it, remount it with a larger size, or use a memfd backing; RAM that \
                 stays sparse is allowed by reserve=off; populate it to be told in time"
            );
        }
        drop(file);
        umount("/dev/shm").unwrap();
    });
}

/// The name that the kernel knows a file by that has none.
fn name_in_shm(file: &std::fs::File) -> String {
    use std::os::fd::AsRawFd;

    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    name.trim_end_matches(" (deleted)").to_owned()
}

#[test]
fn ram_larger_than_the_machine_is_reported_as_far_as_it_is_not_there() {
    // More than any machine has.
    let endless = 1 << 46;
    let backing = ShmBacking::adopt(memfd(endless).into(), &AdoptPolicy::new()).unwrap();
    let builder = || GuestMemoryShm::<()>::builder();
    let halves = [
        (START, endless / 2),
        (vm_memory::GuestAddress(1 << 50), endless / 2),
    ];
    let (_, report) = builder()
        .add_backing(&backing, 0, halves)
        .add_backing(
            &backing,
            0,
            [(vm_memory::GuestAddress(1 << 51), endless / 2)],
        )
        .build_with_report()
        .unwrap();
    let notes: Vec<_> = report.notes().collect();
    let [("all RAM", BuildNote::Shortage(short))] = notes[..] else {
        panic!("{report}");
    };
    // The half that is there twice counts once.
    assert_eq!(short.needed, endless);
    let small = builder().add_backing(&backing, 0, [(START, MIB)]);
    assert!(small.build_with_report().unwrap().1.is_empty());
}

#[test]
fn several_files_and_new_ram_have_the_same_options() {
    let [(memfd, _), (shm, _), (disk, _)] = files(2 * MIB);
    let options = RamOptions::new()
        .with_populate(Populate::Allocate)
        .with_core_dump(CoreDump::Include);
    let at = |number: u64| vm_memory::GuestAddress(number << 30);
    let size = MIB as usize;
    let memory = GuestMemoryShm::<()>::from_ranges_with_options(
        [
            (at(0), size, offset(&memfd, MIB)),
            (at(1), size, None),
            (at(2), size, offset(&shm, MIB)),
            (at(3), size, offset(&disk, 0)),
        ],
        &options,
    )
    .unwrap();
    for region in memory.iter() {
        assert!(!has_vm_flag(&smaps_at(region.as_ptr()), "dd"));
        assert_eq!(region.backing().allocated().unwrap(), MIB);
    }
}
