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
            Error::HugePoolShort {
                needed: 512,
                available: 40,
                free: 44,
                reserved: 4,
                page_size: 2 << 20,
            },
            "needs 512 huge pages of 2 MiB, 40 are free (44 unused, 4 of them reserved by \
             others): raise /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages by 472 or \
             leave out hugetlb=on (PageSize::Base)",
        ),
        (
            Error::NoSuchHugePageSize {
                page_size: 3 << 20,
                offered: vec![2 << 20, 1 << 30],
            },
            "huge pages of 3 MiB are not offered by this kernel, which has 2 MiB, 1 GiB",
        ),
        (
            Error::FileSizeLimit {
                size: 1 << 30,
                limit: 1 << 20,
            },
            "a backing of 1 GiB exceeds RLIMIT_FSIZE, which is 1 MiB: raise it (ulimit -f)",
        ),
        (
            Error::ShmTooSmall {
                size: 1 << 30,
                capacity: 64 << 20,
                free: 60 << 20,
            },
            "POSIX shared memory of 1 GiB does not fit into the file system behind it, which \
             holds 64 MiB (60 MiB of them free): remount /dev/shm with a larger size or use a \
             memfd backing",
        ),
        (
            Error::ShmUnavailable {
                source: io::Error::from_raw_os_error(30),
            },
            "cannot create POSIX shared memory: /dev/shm is read-only, remount it read-write; \
             or use a memfd backing",
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
