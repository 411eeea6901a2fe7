//! Options that RAM on an object that exists cannot have.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use guest_memory_shm::{
    Access, AdoptPolicy, BackingError, BackingSource, DiscardData, Error, GuestRom, NodeSet,
    NumaPolicy, OptionsError, PageSize, Populate, RamOptions, Reserve, Sealing, Seals, ShmBacking,
};
use vm_memory::GuestAddress;

use super::{MIB, SIZE, WAYS, adopt, fd_of, files, huge_memfd, memfd};
use crate::isolation::{HugePool, in_own_process, in_own_process_leaving_nothing};
use crate::populate::HUGE;

/// Options, and how their refusal begins.
fn cases() -> Vec<(RamOptions, &'static str)> {
    let new = RamOptions::new;
    vec![
        (
            new().with_backing(BackingSource::PosixShm),
            "qom-type=memory-backend-shm does not go with RAM on a descriptor that is there \
             already: nothing is created, leave the kind of backing out",
        ),
        (
            new().with_backing(BackingSource::File("/dev/shm/x".into())),
            "mem-path=/dev/shm/x does not go with RAM on a descriptor that is there already",
        ),
        (
            new().with_sealing(Sealing::Unsealed),
            "seal=off does not go with RAM on a descriptor that is there already: its seals are \
             what they are",
        ),
        (
            new().with_offset(4096),
            "offset=0x1000 does not go with RAM on a descriptor that is there already: leave \
             offset out, and give it where the RAM is placed",
        ),
        (
            new().with_access(Access::ReadOnly),
            "readonly=on does not go with RAM on a descriptor that is there already: RAM is \
             written",
        ),
        (
            new().with_discard_data(DiscardData::OnDrop),
            "discard-data=on does not go with RAM on a descriptor that is there already: it \
             belongs to others",
        ),
        (
            new().with_page_size(PageSize::Huge(Some(HUGE))),
            "hugetlb=on,hugetlbsize=2 MiB does not go with a descriptor whose pages are 4 KiB: \
             leave it out",
        ),
        (
            new().with_page_size(PageSize::Huge(None)),
            "hugetlb=on does not go with a descriptor whose pages are 4 KiB",
        ),
        (
            new().with_size(MIB),
            "size=1 MiB does not match the RAM of 16 MiB: leave the size out",
        ),
        (new().with_name("a b"), "id=a b: expected a letter"),
        (new().with_align(3), "align=0x3: expected a power of two"),
        (
            new()
                .with_populate(Populate::Allocate)
                .with_reserve(Reserve::Off),
            "populate=allocate and reserve=off contradict each other",
        ),
        (
            new().with_numa(NumaPolicy::Bind(NodeSet::new())),
            "policy=bind: it needs nodes",
        ),
    ]
}

#[test]
fn what_belongs_to_creating_is_refused_by_option_value_and_way_out() {
    in_own_process_leaving_nothing!(|| {
        for (options, start) in cases() {
            for (name, way) in WAYS {
                for (file, _) in files(SIZE) {
                    let refused = way(&file, SIZE, &options).unwrap_err();
                    let is_about_options = matches!(
                        refused,
                        Error::Options(_) | Error::Backing(BackingError::Options(_))
                    );
                    assert!(is_about_options, "{name}: {refused:?}");
                    assert!(refused.to_string().starts_with(start), "{name}: {refused}");
                }
            }
        }
    });
}

#[test]
fn a_descriptor_with_refused_options_comes_back_unsealed() {
    let memfd = memfd(SIZE);
    for (options, start) in cases() {
        let policy = AdoptPolicy::new().with_added_seals().with_options(options);
        let fd = fd_of(&memfd);
        let number = fd.as_raw_fd();
        let refused = ShmBacking::adopt(fd, &policy).unwrap_err();
        assert!(refused.to_string().starts_with(start), "{refused}");
        assert_eq!(refused.into_fd().as_raw_fd(), number);
        let plain = adopt(&memfd, &RamOptions::new()).unwrap();
        assert_eq!(plain.seals(), Seals::empty());
    }
}

#[test]
fn its_own_size_and_the_default_options_in_words_are_taken() {
    for (file, _) in files(SIZE) {
        let words = "memory-backend-memfd,id=ram0,size=16M,policy=bind,host-nodes=0,prealloc=on";
        for (name, way) in WAYS {
            let memory = way(&file, SIZE, &words.parse().unwrap()).unwrap();
            let region = super::region(&memory);
            assert_eq!(region.backing().allocated().unwrap(), SIZE, "{name}");
            assert_eq!(region.backing().name(), Some("ram0"));
        }
    }
}

#[test]
fn huge_pages_are_those_that_the_descriptor_has() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 1) else {
            return;
        };
        let file = File::from(huge_memfd(HUGE));
        let with = |page_size| adopt(&file, &RamOptions::new().with_page_size(page_size));
        assert!(with(PageSize::Base).unwrap().is_hugetlb());
        assert!(with(PageSize::Huge(Some(HUGE))).unwrap().is_hugetlb());
        assert!(with(PageSize::Huge(Some(1 << 30))).is_err());
        let odd = adopt(&file, &RamOptions::new().with_align(4096)).unwrap_err();
        assert_eq!(
            odd.to_string(),
            "align=0x1000: expected a power of two that is at least the page size 2 MiB"
        );
        drop(file);
        drop(pool);
    });
}

#[test]
fn a_rom_stays_one_and_is_not_populated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rom");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let options = RamOptions::new()
        .with_backing(BackingSource::File(path))
        .with_access(Access::ReadOnly);
    let rom = GuestRom::new((GuestAddress(0), 8192), &options).unwrap();
    let named = rom
        .backing()
        .with_options(&RamOptions::new().with_name("rom"));
    let named = named.unwrap();
    assert_eq!((named.name(), named.as_fd().as_raw_fd()), {
        (Some("rom"), rom.backing().as_fd().as_raw_fd())
    });
    let place = guest_memory_shm::GuestRegionShm::<()>::from_backing;
    assert!(matches!(
        place(&named, 0, (GuestAddress(0), 8192)),
        Err(guest_memory_shm::MemoryError::ReadOnlyRam)
    ));
    let populated = RamOptions::new().with_populate(Populate::Allocate);
    assert!(matches!(
        rom.backing().with_options(&populated),
        Err(BackingError::Options(OptionsError::Conflict { .. }))
    ));
}
