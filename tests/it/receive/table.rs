//! Tables that are taken: what the daemon can read, translate, add and remove.

use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};

use super::*;
use crate::isolation::in_own_process;
use crate::proc::{Holdings, leaves_nothing, maps};

#[test]
fn what_the_daemon_writes_is_in_the_frontends_file_and_the_other_way_round() {
    let files = [sealed(MIB), sealed(3 * MIB)];
    // In no order, and the second from the middle of its file.
    let regions = [region(MIB, MIB, USER + MIB, 0), region(0, MIB, USER, MIB)];
    let clones = files.iter().map(|file| file.try_clone().unwrap()).collect();
    let table = map(&regions, clones).unwrap();
    assert_eq!(table.regions(), [regions[1], regions[0]]);
    assert_eq!(table.memory().num_regions(), 2);

    for (region, file) in regions.iter().zip(&files) {
        for at in [0, MIB - 8] {
            let addr = region.guest_addr.0 + at;
            table
                .memory()
                .write_obj(addr + 7, GuestAddress(addr))
                .unwrap();
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, region.mmap_offset + at)
                .unwrap();
            assert_eq!(u64::from_ne_bytes(bytes), addr + 7);

            file.write_all_at(&[0xa5; 8], region.mmap_offset + at)
                .unwrap();
            let read: u64 = table.memory().read_obj(GuestAddress(addr)).unwrap();
            assert_eq!(read, u64::from_ne_bytes([0xa5; 8]));
        }
    }
    // Nothing else of the file.
    let mut before = [1; 4096];
    files[1].read_exact_at(&mut before, MIB - PAGE).unwrap();
    assert_eq!(before, [0; 4096]);
}

#[test]
fn a_table_as_qemu_sends_it_around_the_vga_window_is_taken() {
    let file = sealed(8 * MIB);
    let regions = [
        region(0, 0xa_0000, USER, 0),
        region(0xc_0000, 8 * MIB - 0xc_0000, USER + 0xc_0000, 0xc_0000),
    ];
    let clones = regions.iter().map(|_| file.try_clone().unwrap()).collect();
    let table = map(&regions, clones).unwrap();
    assert_eq!(
        table.guest_addr(USER + 0x9_ffff),
        Some(GuestAddress(0x9_ffff))
    );
    assert_eq!(table.guest_addr(USER + 0xa_0000), None);
    assert_eq!(table.guest_addr(USER + 0xb_ffff), None);
    assert_eq!(
        table.guest_addr(USER + 0xc_0000),
        Some(GuestAddress(0xc_0000))
    );
    table
        .memory()
        .write_obj(1_u8, GuestAddress(8 * MIB - 1))
        .unwrap();
    assert!(
        table
            .memory()
            .write_obj(1_u8, GuestAddress(0xa_0000))
            .is_err()
    );
}

#[test]
fn eight_regions_are_taken_and_more_where_more_slots_are_offered() {
    assert_eq!(table(8).regions().len(), 8);
    let files = || (0..9).map(|_| sealed(MIB));
    let refused = map_table((0..9).map(good), files(), &ReceivePolicy::new()).unwrap_err();
    assert!(
        matches!(
            refused,
            ReceiveError::TooManyRegions {
                regions: 9,
                limit: 8,
                ..
            }
        ),
        "{refused:?}"
    );
    let more = ReceivePolicy::new().with_mem_slots(9);
    let nine: ReceivedTable = map_table((0..9).map(good), files(), &more).unwrap();
    assert_eq!(nine.memory().num_regions(), 9);
    let tenth = nine.add(good(9), [sealed(MIB)]).unwrap_err();
    assert!(
        matches!(
            tenth,
            ReceiveError::TooManyRegions {
                regions: 10,
                limit: 9,
                ..
            }
        ),
        "{tenth:?}"
    );
    // A slot that is free again can be used again.
    let eight = nine.remove(good(3)).unwrap();
    assert_eq!(
        eight.add(good(9), [sealed(MIB)]).unwrap().regions().len(),
        9
    );

    let few = ReceivePolicy::new().with_mem_slots(1);
    assert!(map_table([good(0), good(1)], files().take(2), &few).is_err());
}

#[test]
fn a_table_of_all_509_slots_is_filled_and_emptied_one_by_one() {
    // A process of its own has the descriptors for it, however many other tests run.
    crate::isolation::in_own_process(|| {
        fills_and_empties_509_slots();
    });
}

fn fills_and_empties_509_slots() {
    let file = sealed(509 * PAGE);
    let at = |n: u64| region(n * 2 * PAGE, PAGE, USER + (1000 - n) * PAGE, n * PAGE);
    let mut table = ReceivedTable::<()>::new(require_seals().with_mem_slots(509));
    for n in 0..509 {
        table = table.add(at(n), [file.try_clone().unwrap()]).unwrap();
    }
    for n in 0..509 {
        let user = USER + (1000 - n) * PAGE + 5;
        assert_eq!(table.guest_addr(user), Some(GuestAddress(n * 2 * PAGE + 5)));
    }
    assert!(table.add(at(600), [file.try_clone().unwrap()]).is_err());
    for n in (0..509).rev() {
        table = table.remove(at(n)).unwrap();
    }
    assert!(table.regions().is_empty());
    assert_eq!(table.memory().num_regions(), 0);
}

#[test]
fn adding_and_removing_leaves_the_other_regions_where_they_are() {
    let old = table(2);
    let host = |table: &ReceivedTable, n: u64| {
        let addr = GuestAddress(2 * n * MIB);
        table.memory().get_host_address(addr).unwrap().addr()
    };
    let new = old.add(good(2), [sealed(MIB)]).unwrap();
    assert_eq!(
        (host(&new, 0), host(&new, 1)),
        (host(&old, 0), host(&old, 1))
    );
    assert_eq!(old.regions().len(), 2, "the old one never changes");
    assert_eq!(old.guest_addr(USER + 4 * MIB), None);
    assert_eq!(new.guest_addr(USER + 4 * MIB), Some(GuestAddress(4 * MIB)));

    let less = new.remove(good(0)).unwrap();
    assert_eq!(host(&less, 1), host(&old, 1));
    assert_eq!(less.guest_addr(USER), None);
    assert!(less.memory().find_region(GuestAddress(0)).is_none());
}

#[test]
fn a_region_is_removed_by_its_addresses_and_size_whatever_the_offset() {
    let table = table(2);
    let given = good(1);
    let wrong = [
        ReceivedRegion {
            guest_addr: GuestAddress(0),
            ..given
        },
        ReceivedRegion {
            user_addr: given.user_addr + PAGE,
            ..given
        },
        ReceivedRegion {
            size: given.size - PAGE,
            ..given
        },
        ReceivedRegion { size: 0, ..given },
        ReceivedRegion {
            size: u64::MAX,
            ..given
        },
        good(7),
    ];
    for region in wrong {
        let refused = table.remove(region).unwrap_err();
        assert!(
            matches!(refused, ReceiveError::NoSuchRegion { .. }),
            "{refused:?}"
        );
        assert_eq!(refused.reply_code(), 2);
    }
    let offset = ReceivedRegion {
        mmap_offset: 12345,
        ..given
    };
    let less = table.remove(offset).unwrap();
    assert_eq!(less.regions(), [good(0)]);
    // Not twice.
    assert!(less.remove(given).is_err());
    assert!(less.remove(good(0)).unwrap().regions().is_empty());
    assert!(ReceivedTable::<()>::default().remove(given).is_err());
}

#[test]
fn a_removed_region_stays_mapped_as_long_as_a_queue_uses_it() {
    crate::isolation::in_own_process(|| {
        let nothing = Holdings::now();
        let file = sealed(MIB);
        let empty = ReceivedTable::<()>::new(require_seals());
        let old = empty.add(good(0), [file.try_clone().unwrap()]).unwrap();
        let published = GuestMemoryAtomic::new(old.memory().clone());
        let queue = published.memory();

        let table = old.remove(good(0)).unwrap();
        drop(old);
        published.lock().unwrap().replace(table.memory().clone());
        queue.write_obj(42_u8, GuestAddress(5)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5).unwrap();
        assert_eq!(byte, [42]);
        assert_eq!(published.memory().num_regions(), 0);

        drop(queue);
        drop((table, published, empty, file));
        assert_eq!(Holdings::now(), nothing);
    });
}

#[test]
fn the_new_table_is_complete_before_the_old_one_goes() {
    let file = sealed(MIB);
    let old = map(&[good(0)], vec![file.try_clone().unwrap()]).unwrap();
    let new = map(&[good(0)], vec![file.try_clone().unwrap()]).unwrap();
    // The same file at the same addresses, twice: both are there.
    let host = |table: &ReceivedTable| {
        let host = table.memory().get_host_address(GuestAddress(0)).unwrap();
        host.addr() as u64
    };
    assert_ne!(host(&old), host(&new));
    for start in [host(&old), host(&new)] {
        assert!(maps().iter().any(|line| line.range.start == start));
    }
    old.memory().write_obj(7_u8, GuestAddress(1)).unwrap();
    drop(old);
    assert_eq!(new.memory().read_obj::<u8>(GuestAddress(1)).unwrap(), 7);
}

#[test]
fn a_ring_must_lie_inside_one_region() {
    // Neighbours in the guest, in the frontend and in the file: still two regions.
    let file = sealed(2 * MIB);
    let regions = [region(0, MIB, USER, 0), region(MIB, MIB, USER + MIB, MIB)];
    let clones = regions.iter().map(|_| file.try_clone().unwrap()).collect();
    let table = map(&regions, clones).unwrap();
    let end = USER + MIB;

    for (user, len, guest) in [
        (USER, 1, 0),
        (USER, MIB, 0),
        (end - 4096, 4096, MIB - 4096),
        (end - 1, 1, MIB - 1),
        (end - 1, 0, MIB - 1),
        (end, MIB, MIB),
    ] {
        assert_eq!(table.ring(user, len).unwrap(), GuestAddress(guest));
    }
    for (user, len, left) in [
        (end - 4096, 4097, 4096),
        (USER, MIB + 1, MIB),
        (USER, u64::MAX, MIB),
        (end + MIB - 1, 2, 1),
        (end + 5, u64::MAX, MIB - 5),
    ] {
        let refused = table.ring(user, len).unwrap_err();
        let ReceiveError::RingEnds {
            user_addr,
            len: refused_len,
            left: found,
            ..
        } = refused
        else {
            panic!("{refused:?}");
        };
        assert_eq!((user_addr, refused_len, found), (user, len, left));
        assert_eq!(refused.reply_code(), 14);
    }
    for user in [0, USER - 1, USER + 2 * MIB, u64::MAX] {
        for len in [0, 1, u64::MAX] {
            let refused = table.ring(user, len).unwrap_err();
            assert!(
                matches!(refused, ReceiveError::NotMapped { user_addr, .. } if user_addr == user)
            );
            assert_eq!(refused.reply_code(), 14);
        }
    }
}

#[test]
fn regions_up_to_the_last_address_are_taken() {
    let last = u64::MAX - (u64::MAX % PAGE);
    let top = region(last - PAGE, PAGE, last - PAGE, 0);
    let table = map(&[top], vec![sealed(PAGE)]).unwrap();
    assert_eq!(table.guest_addr(last - 1), Some(GuestAddress(last - 1)));
    assert_eq!(table.guest_addr(last), None);
    assert_eq!(table.ring(last - 1, 1).unwrap(), GuestAddress(last - 1));
    assert!(table.ring(last - 1, 2).is_err());
    table
        .memory()
        .write_obj(1_u8, GuestAddress(last - 1))
        .unwrap();
}

#[test]
fn the_same_part_of_a_file_may_be_at_two_guest_addresses() {
    let file = sealed(MIB);
    let clones = vec![file.try_clone().unwrap(), file];
    let regions = [region(0, MIB, USER, 0), region(4 * MIB, MIB, USER + MIB, 0)];
    let table = map(&regions, clones).unwrap();
    table.memory().write_obj(9_u8, GuestAddress(3)).unwrap();
    assert_eq!(
        table
            .memory()
            .read_obj::<u8>(GuestAddress(4 * MIB + 3))
            .unwrap(),
        9
    );
}

#[test]
fn a_daemon_takes_a_table_that_this_crate_made() {
    let theirs = GuestMemoryShm::<()>::builder()
        .add_ram(
            RamOptions::new(),
            [(GuestAddress(0), MIB), (GuestAddress(1 << 32), 2 * MIB)],
        )
        .build()
        .unwrap();
    let sent = theirs.memory_table();
    let regions = sent.regions().iter().map(|r| {
        region(
            r.range().start_addr().0,
            r.range().size(),
            r.user_addr(),
            r.mmap_offset(),
        )
    });
    let files: Vec<OwnedFd> = sent
        .regions()
        .iter()
        .map(|r| r.as_fd().try_clone_to_owned().unwrap())
        .collect();
    let ours: ReceivedTable = map_table(regions, files, &require_seals()).unwrap();
    let addr = GuestAddress((1 << 32) + 0x1234);
    let user = sent.user_addr(addr).unwrap();
    assert_eq!(ours.guest_addr(user), Some(addr));
    theirs.write_obj(0xbeef_u16, addr).unwrap();
    assert_eq!(ours.memory().read_obj::<u16>(addr).unwrap(), 0xbeef);
    // A clone is a handle: the same regions.
    let clone = ours.clone();
    let (a, b) = (ours.memory().arc_regions(), clone.memory().arc_regions());
    assert!(a.iter().zip(&b).all(|(a, b)| Arc::ptr_eq(a, b)));
}

/// `Option<AtomicBitmap>` is no `NewBitmap`.
#[test]
fn a_function_makes_the_bitmaps_of_all_tables_that_follow() {
    let none = ReceivedTable::<Option<AtomicBitmap>>::with_bitmap(require_seals(), |range| {
        let page = NonZeroUsize::new(4096).unwrap();
        (range.size() > MIB).then(|| AtomicBitmap::new(range.size() as usize, page))
    });
    let large = region(0, 2 * MIB, USER, 0);
    let one = none.set([large], [sealed(2 * MIB)]).unwrap();
    let two = one.add(good(1), [sealed(MIB)]).unwrap();
    for addr in [0x3000, 2 * MIB + 0x3000] {
        two.memory().write_obj(1_u8, GuestAddress(addr)).unwrap();
    }
    let bitmaps = two.memory().iter().map(|region| region.dirty_bitmap());
    let dirty = bitmaps.map(|bits| bits.as_ref().map(|bits| bits.is_bit_set(3)));
    assert_eq!(dirty.collect::<Vec<_>>(), [Some(true), None]);
}

#[test]
fn a_function_that_panics_leaves_nothing() {
    in_own_process(|| {
        let empty = ReceivedTable::<()>::with_bitmap(require_seals(), |range| {
            assert_eq!(
                range.start_addr(),
                GuestAddress(0),
                "no bitmap for that one"
            );
        });
        let table = empty.set([good(0)], [sealed(MIB)]).unwrap();
        leaves_nothing(|| {
            let added = AssertUnwindSafe(|| table.add(good(1), [sealed(MIB)]));
            assert!(catch_unwind(added).is_err());
        });
        assert_eq!(table.memory().num_regions(), 1);
    });
}
