//! The texts and codes of a daemon's refusals.

use std::error::Error as _;

use vm_memory::GuestAddress;

use super::*;
use crate::range::InvalidRange;

fn at(size: u64) -> (GuestAddress, u64) {
    (GuestAddress(0x1000), size)
}

#[test]
fn texts_name_the_region_the_limit_and_the_way_out() {
    let cases = [
        (
            ReceiveError::Payload {
                message: "SET_MEM_TABLE",
                len: 39,
                expected: 40,
            },
            22,
            "the payload of SET_MEM_TABLE has 39 bytes and must have 40: the frontend and \
             this daemon do not speak the same protocol",
        ),
        (
            ReceiveError::NoRegions,
            22,
            "the memory table has no region, and a daemon without memory can do nothing: send \
             one",
        ),
        (
            ReceiveError::Descriptors {
                regions: 3,
                descriptors: 1,
            },
            22,
            "3 regions came with 1 file descriptor: send one for each region",
        ),
        (
            ReceiveError::TooManyRegions {
                regions: 9,
                limit: 8,
            },
            28,
            "9 regions are more than the 8 that this daemon takes: use fewer regions, or have \
             the daemon offer more memory slots (ReceivePolicy::with_mem_slots)",
        ),
        (
            ReceiveError::TooMuchMemory {
                size: 2 << 30,
                limit: 1 << 30,
            },
            27,
            "2 GiB of memory are more than the 1 GiB that this daemon maps: share less, or \
             have the daemon allow more (ReceivePolicy::with_max_size)",
        ),
        (
            ReceiveError::region(
                2,
                at(0),
                InvalidRange::Empty {
                    start: GuestAddress(0x1000),
                },
            ),
            22,
            "region 0x1000 (0 bytes): the range at guest address 0x1000 has size 0: give it at \
             least one page",
        ),
        (
            ReceiveError::Wraps {
                index: 1,
                guest_addr: GuestAddress(0x1000),
                part: RangePart::UserAddress,
                start: u64::MAX - 4095,
                size: 8192,
                limit: u64::MAX,
            },
            22,
            "the region at guest address 0x1000 has 8 KiB at user address 0xfffffffffffff000, \
             which ends past 0xffffffffffffffff: lower its user address or its size",
        ),
        (
            ReceiveError::Overlap {
                index: 1,
                part: RangePart::Address,
                range: (4096, 4096),
                other: Some(0),
                other_range: (0, 8192),
            },
            17,
            "the region with the guest addresses 0x1000..=0x1fff (4 KiB) overlaps another of the \
             same message, which has 0x0..=0x1fff (8 KiB): move or shorten one of them",
        ),
        (
            ReceiveError::Overlap {
                index: 0,
                part: RangePart::UserAddress,
                range: (4096, 4096),
                other: None,
                other_range: (0, 8192),
            },
            17,
            "the region with the user addresses 0x1000..=0x1fff (4 KiB) overlaps one that is \
             there already, which has 0x0..=0x1fff (8 KiB): move or shorten one of them",
        ),
        (
            ReceiveError::region(
                4,
                at(3 << 20),
                InvalidRange::Unaligned {
                    part: RangePart::Offset,
                    value: 0x30_0000,
                    page_size: 2 << 20,
                },
            ),
            22,
            "region 0x1000..=0x300fff (3 MiB): offset 0x300000 is not a multiple of the page size \
             2 MiB: the nearest is 0x200000",
        ),
        (
            ReceiveError::region(
                0,
                at(2 << 20),
                BackingError::TooShort {
                    len: 1 << 20,
                    needed: 2 << 20,
                },
            ),
            6,
            "region 0x1000..=0x200fff (2 MiB): cannot adopt a file of 1 MiB for RAM of 2 MiB: \
             touching RAM past the end of the file would be SIGBUS, make the file longer first",
        ),
        (
            ReceiveError::NoSuchRegion {
                guest_addr: 0,
                user_addr: 0x1000,
                size: 4096,
            },
            2,
            "there is no region of 4 KiB at guest address 0x0 and user address 0x1000: remove \
             a region as it was added",
        ),
        (
            ReceiveError::NotMapped { user_addr: 0x1000 },
            14,
            "user address 0x1000 is in no region of the memory table: send the table before \
             the addresses in it, and addresses in terms of that table",
        ),
        (
            ReceiveError::RingEnds {
                user_addr: 0x1000,
                len: 8192,
                left: 4096,
            },
            14,
            "8 KiB at user address 0x1000 run past the end of their region, 4 KiB further on: \
             a ring must lie inside one region",
        ),
    ];
    for (error, code, text) in cases {
        assert_eq!(error.to_string(), text);
        assert_eq!(error.reply_code(), code, "{text}");
    }
}

#[test]
fn a_region_that_is_not_mapped_says_why_and_what_the_system_said() {
    let refused = ReceiveError::region(
        3,
        at(1 << 20),
        BackingError::Inspect {
            source: std::io::Error::from_raw_os_error(9),
        },
    );
    assert_eq!(
        refused.to_string(),
        "region 0x1000..=0x100fff (1 MiB): cannot ask the kernel about a descriptor that is RAM \
         or is to become RAM"
    );
    let cause = refused.source().expect("the system said why").to_string();
    assert!(cause.contains("os error 9"), "{cause}");
    assert_eq!(refused.reply_code(), 9);
    let codes = [
        (BackingError::NotWritable.into(), 9),
        (MemoryError::NoRanges, 12),
    ];
    for (cause, code) in codes {
        assert_eq!(ReceiveError::region(3, at(4096), cause).reply_code(), code);
    }
}
