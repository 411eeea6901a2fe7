//! Options that do not go together, or that the system cannot do: when and how they are refused.

use guest_memory_shm::{
    Access, BackingError, BackingSource, DiscardData, Error, GuestRegionShm, MemoryError, NodeSet,
    NumaPolicy, OptionsError, PageSize, Populate, RamOptions, Reserve, Sealing, ShmBacking,
};
use vm_memory::GuestAddress;

use crate::isolation::HugePool;
use crate::proc::maps;

const MIB: u64 = 1 << 20;

#[test]
fn typed_options_that_do_not_go_together_are_refused_before_anything_is_created() {
    let memfd = RamOptions::new();
    let shm = RamOptions::new().with_backing(BackingSource::PosixShm);
    let file = RamOptions::new().with_backing(BackingSource::File("/nowhere/x".into()));
    for (options, start) in [
        (memfd.clone().with_name("a b"), "id=a b: expected a letter"),
        (
            memfd.clone().with_align(4096),
            "align does not go with a memfd: only a file has it",
        ),
        (
            memfd.clone().with_offset(4096),
            "offset does not go with a memfd",
        ),
        (
            memfd.clone().with_access(Access::ReadOnly),
            "readonly does not go with a memfd",
        ),
        (
            shm.clone().with_discard_data(DiscardData::OnDrop),
            "discard-data does not go with POSIX shared memory",
        ),
        (
            shm.clone().with_sealing(Sealing::Unsealed),
            "seal=off does not go with POSIX shared memory: it cannot be sealed at all",
        ),
        (
            file.clone().with_sealing(Sealing::Unsealed),
            "seal=off does not go with a file: it cannot be sealed at all",
        ),
        (
            file.clone().with_page_size(PageSize::Huge(None)),
            "hugetlb does not go with a file: its pages are those of its file system",
        ),
        (
            file.clone().with_align(1),
            "align=0x1: expected a power of two",
        ),
        (
            file.with_access(Access::ReadOnly)
                .with_discard_data(DiscardData::OnDrop),
            "discard-data=on and readonly=on contradict each other: discarding writes",
        ),
        (
            RamOptions::new().with_backing(BackingSource::File("".into())),
            "mem-path=: expected the path of a file",
        ),
        (
            memfd.clone().with_numa(NumaPolicy::Bind(NodeSet::new())),
            "policy=bind: it needs nodes",
        ),
        (
            memfd
                .clone()
                .with_populate(Populate::Allocate)
                .with_reserve(Reserve::Off),
            "populate=allocate and reserve=off contradict each other",
        ),
        (
            memfd.with_size(5000),
            "size 4.8 KiB (5000 bytes) is not a multiple",
        ),
    ] {
        let refused = options.check().unwrap_err().to_string();
        assert!(refused.starts_with(start), "{refused}");
        // As it is said of options alone, so it is of those that RAM is to be built from.
        let created = ShmBacking::create(&options, 2 * MIB).unwrap_err();
        assert_eq!(created.to_string(), refused);
    }
    let posix_huge = shm.with_page_size(PageSize::Huge(None));
    assert!(matches!(
        posix_huge.check(),
        Err(OptionsError::NotOfBacking { .. })
    ));
}

#[test]
fn a_size_that_is_set_must_be_that_of_the_ranges() {
    let options = RamOptions::new().with_size(MIB);
    let refused = GuestRegionShm::<()>::new((GuestAddress(0), 2 * MIB), &options).unwrap_err();
    assert!(matches!(
        refused,
        MemoryError::Backing(BackingError::Options(OptionsError::SizeMismatch { set, ram, .. }))
            if (set, ram) == (MIB, 2 * MIB)
    ));
    let region = GuestRegionShm::<()>::new((GuestAddress(0), MIB), &options).unwrap();
    assert_eq!(region.backing().size(), MIB);
}

#[test]
fn options_without_a_size_are_written_and_not_read() {
    let text = RamOptions::new().to_string();
    assert_eq!(text, "memory-backend-memfd,dump=off");
    let refused = text.parse::<RamOptions>().unwrap_err();
    assert!(matches!(
        refused,
        OptionsError::Missing {
            property: "size",
            ..
        }
    ));
}

/// What a string asks for can be read, and only building finds that this system does not have it.
fn built(text: &str) -> Result<GuestRegionShm, Error> {
    let options: RamOptions = text.parse()?;
    Ok(GuestRegionShm::new(
        (GuestAddress(0), options.size().unwrap()),
        &options,
    )?)
}

#[test]
fn what_only_the_system_knows_is_refused_when_ram_is_built() {
    for (text, start) in [
        (
            "memory-backend-memfd,size=1M,policy=bind,host-nodes=127",
            "cannot place RAM on host-nodes=127 (policy=bind): ",
        ),
        (
            "memory-backend-memfd,size=3M,hugetlb=on",
            "size 3 MiB is not a multiple of the page size 2 MiB: the nearest larger is 4 MiB",
        ),
        (
            "memory-backend-memfd,size=2M,hugetlb=on,hugetlbsize=4K",
            "huge pages of 4 KiB are not offered by this kernel",
        ),
        (
            "memory-backend-shm,size=1P",
            "1 PiB more are needed, and the file system of /dev/shm holds ",
        ),
    ] {
        assert!(text.parse::<RamOptions>().is_ok(), "{text}");
        let refused = built(text).unwrap_err().to_string();
        assert!(refused.starts_with(start), "{text}: {refused}");
    }
    let Some(_empty) = HugePool::with_available(2 * MIB, 0) else {
        return;
    };
    let refused = built("memory-backend-memfd,size=2M,hugetlb=on").unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("1 more huge page of 2 MiB is needed, and 0 can be had ")
    );
    // Without a reservation there is nothing to be refused: QEMU's rule, too.
    assert!(built("memory-backend-memfd,size=2M,hugetlb=on,reserve=off").is_ok());
}

#[test]
fn the_ram_of_a_string_is_what_the_string_says() {
    let region = built("memory-backend-memfd,id=ram-from-string,size=1.5M").unwrap();
    assert_eq!(region.backing().size(), 3 * MIB / 2);
    let start = region.as_ptr().addr() as u64;
    let line = maps().into_iter().find(|line| line.range.start == start);
    let line = line.unwrap();
    assert_eq!(line.path, "/memfd:ram-from-string (deleted)");
    assert_eq!(line.permissions, "rw-s");
    assert_eq!(line.range.end - line.range.start, 3 * MIB / 2);
}
