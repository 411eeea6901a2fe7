//! Tables that are refused for their numbers, and what is left as it was.

use guest_memory_shm::{BackingError, InvalidRange, MemoryError, RangePart};

use super::*;
use crate::isolation::in_own_process;
use crate::proc::leaves_nothing;

/// Sends what `make` makes to a daemon that has a table of two regions: it is refused, no
/// descriptor and no mapping is left of it, and the old table is whole.
///
/// For a process of its own.
#[track_caller]
fn refused(make: impl Fn() -> (Vec<ReceivedRegion>, Vec<File>)) -> ReceiveError {
    let old = table(2);
    old.memory().write_obj(0x5a_u8, GuestAddress(3)).unwrap();
    let refused = leaves_nothing(|| {
        let (regions, files) = make();
        map(&regions, files).unwrap_err()
    });
    assert_ne!(refused.reply_code(), 0);
    is_whole(&old);
    refused
}

/// As [`refused`], for a region that is added to the table of two.
#[track_caller]
fn refused_to_add(region: ReceivedRegion, make: impl Fn() -> File) -> ReceiveError {
    let old = table(2);
    old.memory().write_obj(0x5a_u8, GuestAddress(3)).unwrap();
    let refused = leaves_nothing(|| old.add(region, [make()]).unwrap_err());
    assert_ne!(refused.reply_code(), 0);
    is_whole(&old);
    // The next good one is taken.
    assert_eq!(old.add(good(2), [sealed(MIB)]).unwrap().regions().len(), 3);
    refused
}

#[track_caller]
fn is_whole(old: &ReceivedTable) {
    assert_eq!(old.regions(), [good(0), good(1)]);
    assert_eq!(old.memory().num_regions(), 2);
    assert_eq!(old.memory().read_obj::<u8>(GuestAddress(3)).unwrap(), 0x5a);
    assert_eq!(old.ring(USER, MIB).unwrap(), GuestAddress(0));
}

fn files(count: usize) -> Vec<File> {
    (0..count).map(|_| sealed(MIB)).collect()
}

#[test]
fn a_table_without_regions_is_refused() {
    in_own_process(|| {
        let empty = refused(|| (Vec::new(), Vec::new()));
        assert!(matches!(empty, ReceiveError::NoRegions), "{empty:?}");
        let files_only = refused(|| (Vec::new(), files(1)));
        assert!(matches!(files_only, ReceiveError::NoRegions));
    });
}

#[test]
fn a_descriptor_too_few_or_too_many_is_refused() {
    in_own_process(|| {
        for (regions, descriptors) in [(1, 0), (1, 2), (3, 2), (8, 0), (2, 9)] {
            let error = refused(|| ((0..regions).map(good).collect(), files(descriptors)));
            let ReceiveError::Descriptors {
                regions: r,
                descriptors: d,
                ..
            } = error
            else {
                panic!("{error:?}");
            };
            assert_eq!((r as u64, d), (regions, descriptors));
            assert_eq!(error.reply_code(), 22);
        }
    });
}

#[test]
fn a_ninth_region_is_refused() {
    in_own_process(|| {
        let error = refused(|| ((0..9).map(good).collect(), files(9)));
        assert!(
            matches!(
                error,
                ReceiveError::TooManyRegions {
                    regions: 9,
                    limit: 8,
                    ..
                }
            ),
            "{error:?}"
        );
        assert_eq!(error.reply_code(), 28);
    });
}

#[test]
fn more_memory_than_the_policy_allows_is_refused() {
    let policy = require_seals().with_max_size(3 * MIB);
    let three = map_table((0..3).map(good), files(3), &policy).unwrap();
    let fourth = three.add(good(3), [sealed(MIB)]).unwrap_err();
    let ReceiveError::TooMuchMemory { size, limit, .. } = fourth else {
        panic!("{fourth:?}");
    };
    assert_eq!((size, limit), (4 << 20, 3 * MIB));
    assert_eq!(fourth.reply_code(), 27);
    // Sums beyond 64 bits are no way around it.
    let half = 1 << 62;
    let giants = (0..4).map(|n| region(n * half, half - MIB, n * half, 0));
    let policy = require_seals().with_max_size(u64::MAX / 2);
    let error = map_table(giants, files(4), &policy).unwrap_err();
    assert!(
        matches!(error, ReceiveError::TooMuchMemory { .. }),
        "{error:?}"
    );
}

#[test]
fn a_region_of_size_zero_is_refused() {
    in_own_process(|| {
        let empty = ReceivedRegion { size: 0, ..good(2) };
        let error = refused(|| (vec![good(0), empty], files(2)));
        let cause = cause_at(1, &error);
        assert!(
            matches!(cause, MemoryError::Range(InvalidRange::Empty { .. })),
            "{error:?}"
        );
        let error = refused_to_add(empty, || sealed(MIB));
        let cause = cause_at(0, &error);
        assert!(
            matches!(cause, MemoryError::Range(InvalidRange::Empty { .. })),
            "{error:?}"
        );
    });
}

#[test]
fn a_region_that_wraps_in_the_guest_the_frontend_or_the_file_is_refused() {
    in_own_process(|| {
        let last = u64::MAX - (u64::MAX % PAGE);
        let top = |at: u64| ReceivedRegion {
            size: at,
            ..good(5)
        };
        for (part, region) in [
            (RangePart::Address, region(last, PAGE, USER, 0)),
            (RangePart::Address, region(last, 2 * PAGE, USER, 0)),
            (RangePart::Address, region(PAGE, last, USER, 0)),
            (RangePart::UserAddress, region(8 * MIB, PAGE, last, 0)),
            (
                RangePart::UserAddress,
                region(8 * MIB, MIB, u64::MAX - MIB + 1, 0),
            ),
            (RangePart::UserAddress, region(0, 1 << 63, 1 << 63, 0)),
            (RangePart::Offset, region(8 * MIB, MIB, USER, last)),
            (
                RangePart::Offset,
                region(8 * MIB, MIB, USER, (1 << 63) - MIB),
            ),
            (RangePart::Offset, region(8 * MIB, MIB, USER, 1 << 63)),
        ] {
            let at = |error: ReceiveError| match error {
                ReceiveError::Wraps { index, part, .. } => (index, part),
                error => panic!("{error:?} for {region:x?}"),
            };
            assert_eq!(at(refused(|| (vec![region], files(1)))), (0, part));
            let second = refused(|| (vec![good(3), region], files(2)));
            assert_eq!(second.reply_code(), 22);
            assert_eq!(at(second), (1, part));
            assert_eq!(at(refused_to_add(region, || sealed(MIB))), (0, part));
        }
        let error = refused(|| (vec![top(u64::MAX)], files(1)));
        assert!(matches!(error, ReceiveError::Wraps { .. }), "{error:?}");
    });
}

#[test]
fn regions_that_overlap_in_the_guest_or_in_the_frontend_are_refused() {
    in_own_process(|| {
        let two = 2 * MIB;
        // One page, all of it, inside and around; in either order.
        for (start, size) in [
            (two - PAGE, two),
            (two + MIB - PAGE, two),
            (two, MIB),
            (two + PAGE, PAGE),
            (0, 8 * MIB),
        ] {
            let far = 64 * MIB;
            for (part, hostile) in [
                (RangePart::Address, region(start, size, USER + far, 0)),
                (RangePart::UserAddress, region(far, size, USER + start, 0)),
            ] {
                for regions in [[good(1), hostile], [hostile, good(1)]] {
                    let long = || vec![sealed(8 * MIB), sealed(8 * MIB)];
                    let error = refused(|| (regions.to_vec(), long()));
                    let ReceiveError::Overlap {
                        index,
                        part: found,
                        other,
                        ..
                    } = error
                    else {
                        panic!("{error:?}");
                    };
                    assert_eq!((index, found, other), (1, part, Some(0)));
                    assert_eq!(error.reply_code(), 17);
                }
                let error = refused_to_add(hostile, || sealed(8 * MIB));
                let ReceiveError::Overlap {
                    index,
                    part: found,
                    other,
                    ..
                } = error
                else {
                    panic!("{error:?}");
                };
                assert_eq!((index, found, other), (0, part, None));
            }
        }
    });
}

#[test]
fn an_overlap_is_found_among_many_regions() {
    let mut regions: Vec<_> = (0..8).map(good).collect();
    regions.reverse();
    regions[6].user_addr = good(6).user_addr + MIB - PAGE;
    let error = map(&regions, files(8)).unwrap_err();
    let ReceiveError::Overlap {
        index,
        part,
        range,
        other,
        other_range,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!((index, other, part), (6, Some(1), RangePart::UserAddress));
    assert_eq!(range, (regions[6].user_addr, MIB));
    assert_eq!(other_range, (good(6).user_addr, MIB));
}

#[test]
fn neighbours_do_not_overlap() {
    let regions = [region(MIB, MIB, USER, 0), region(0, MIB, USER + MIB, 0)];
    assert_eq!(map(&regions, files(2)).unwrap().regions().len(), 2);
}

/// What of region 0 is not at a page, and its value.
fn unaligned(error: &ReceiveError) -> (RangePart, u64) {
    match cause_at(0, error) {
        MemoryError::Range(InvalidRange::Unaligned {
            part,
            value,
            page_size: PAGE,
            ..
        }) => (*part, *value),
        _ => panic!("{error:?}"),
    }
}

#[test]
fn what_is_not_at_pages_is_refused() {
    in_own_process(|| {
        for odd in [1, 8, 512, PAGE - 1] {
            for (at, region) in [
                (RangePart::Address, region(8 * MIB + odd, PAGE, USER, 0)),
                (RangePart::Offset, region(8 * MIB, PAGE, USER, odd)),
            ] {
                let error = refused(|| (vec![region], files(1)));
                assert_eq!(error.reply_code(), 22);
                let (part, value) = unaligned(&error);
                assert_eq!((part, value % PAGE), (at, odd));
            }
            let part = region(8 * MIB, PAGE + odd, USER + 64 * MIB, 0);
            for error in [
                refused(|| (vec![part], files(1))),
                refused_to_add(part, || sealed(MIB)),
            ] {
                assert_eq!(unaligned(&error), (RangePart::Size, PAGE + odd));
            }
        }
    });
}

#[test]
fn user_addresses_need_no_alignment() {
    // They are numbers of the frontend's choice: opaque, as least privilege wants them.
    let odd = region(0, MIB, 5, 0);
    let table = map(&[odd], files(1)).unwrap();
    assert_eq!(table.guest_addr(5), Some(GuestAddress(0)));
    assert_eq!(table.guest_addr(4), None);
}

#[test]
fn a_region_that_is_longer_than_its_file_is_refused() {
    in_own_process(|| {
        for (offset, size, len) in [
            (0, MIB + PAGE, MIB),
            (PAGE, MIB, MIB),
            (MIB, PAGE, MIB),
            (64 * MIB, PAGE, MIB),
            (0, 1 << 62, MIB),
            (0, PAGE, 0),
        ] {
            let long = region(8 * MIB, size, USER + 64 * MIB, offset);
            for (at, error) in [
                (0, refused(|| (vec![long], vec![sealed(len)]))),
                (
                    1,
                    refused(|| (vec![good(0), long], vec![sealed(MIB), sealed(len)])),
                ),
                (0, refused_to_add(long, || sealed(len))),
            ] {
                let MemoryError::Backing(BackingError::TooShort { len: l, needed, .. }) =
                    cause_at(at, &error)
                else {
                    panic!("{error:?}");
                };
                assert_eq!((*l, *needed), (len, offset + size));
                assert_eq!(error.reply_code(), 6);
            }
        }
    });
}

#[test]
fn no_descriptor_is_looked_at_before_the_numbers_are_right() {
    // With added seals the look would be seen.
    let policy = AdoptPolicy::new().with_added_seals();
    let policy = ReceivePolicy::new().with_descriptors(policy);
    let file = unsealed(MIB);
    let overlapping = [
        good(0),
        ReceivedRegion {
            guest_addr: GuestAddress(PAGE),
            ..good(1)
        },
    ];
    let clones = [&file, &file].map(|file| file.try_clone().unwrap());
    assert!(map_table(overlapping, clones, &policy).is_err());
    assert_eq!(fcntl(&file, FcntlArg::F_GET_SEALS), Ok(0));
    let taken = map_table([good(0)], [file.try_clone().unwrap()], &policy);
    assert!(taken.is_ok());
    assert_ne!(fcntl(&file, FcntlArg::F_GET_SEALS), Ok(0));
}
