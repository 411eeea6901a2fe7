//! The texts of errors, which people act on.

use super::*;

#[test]
fn texts_name_the_values_and_the_way_out() {
    let range = |start, size| GuestRange::new(GuestAddress(start), size).unwrap();
    let cases: Vec<(Error, &str)> = vec![
        (
            Error::EmptyRange {
                start: GuestAddress(0x1000),
            },
            "the range at guest address 0x1000 has size 0: give it at least one page",
        ),
        (
            Error::RangeOverflow {
                start: GuestAddress(u64::MAX - 4095),
                size: 8192,
            },
            "the range of 8 KiB at guest address 0xfffffffffffff000 has no 64-bit address behind \
             it: lower its address or its size",
        ),
        (
            Error::UnalignedAddress {
                range: range(0x30_0000, 0x20_0000),
                page_size: 2 << 20,
            },
            "guest address 0x300000 is not a multiple of the page size 2 MiB: the nearest is \
             0x200000",
        ),
        (
            Error::UnalignedSize {
                size: 5000,
                page_size: 4096,
            },
            "size 4.8 KiB (5000 bytes) is not a multiple of the page size 4 KiB: the nearest \
             larger is 8 KiB",
        ),
        (
            Error::Overlap {
                first: range(0, 8192),
                second: range(4096, 4096),
            },
            "guest ranges 0x0..=0x1fff (8 KiB) and 0x1000..=0x1fff (4 KiB) overlap: move or \
             shorten one of them",
        ),
        (
            Error::NoSuchHugePageSize {
                page_size: 3 << 20,
                offered: vec![2 << 20, 1 << 30],
            },
            "huge pages of 3 MiB are not offered by this kernel, which has 2 MiB, 1 GiB",
        ),
        (
            Error::ShmUnavailable {
                source: io::Error::from_raw_os_error(30),
            },
            "cannot create POSIX shared memory: /dev/shm is read-only, remount it read-write; \
             or use a memfd backing",
        ),
        (
            Error::TooManyRegions {
                regions: 9,
                limit: 8,
                slots: SlotLimit::Message,
            },
            "the memory table has 9 regions, SET_MEM_TABLE carries 8: negotiate \
             CONFIGURE_MEM_SLOTS with the daemon or use fewer regions; nothing was sent",
        ),
        (
            Error::TooManyRegions {
                regions: 33,
                limit: 32,
                slots: SlotLimit::Daemon,
            },
            "the memory table has 33 regions, the daemon has 32 memory slots: use fewer \
             regions or another daemon; nothing was sent",
        ),
        (
            Error::TooManyRegions {
                regions: 65,
                limit: 64,
                slots: SlotLimit::Kernel,
            },
            "the memory table has 65 regions, in-kernel vhost takes 64: load the module vhost \
             with a larger max_mem_regions or use fewer regions; nothing was sent",
        ),
        (
            Error::DaemonRefused {
                change: MemTableChange::SetTable(2),
                source: "1".into(),
            },
            "the daemon refused to take a memory table of 2 regions: it may be out of memory, \
             address space or memory slots, or its policy (seals) forbids it: look at its log",
        ),
        (
            Error::DaemonSilent {
                change: MemTableChange::Add(range(1 << 32, 1 << 30)),
                limit: Duration::from_secs(5),
            },
            "the daemon did not answer within 5s when told to add the region \
             0x100000000..=0x13fffffff (1 GiB): the connection was closed, restart the daemon \
             or allow more with VhostUserShare::with_time_limit",
        ),
    ];
    for (error, text) in cases {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn the_error_is_small_enough_to_return() {
    assert!(size_of::<Error>() <= 64, "{}", size_of::<Error>());
    assert!(size_of::<AdoptError>() <= 16);
}
