//! What the daemon holds after an update, and which messages led there.

use super::*;

#[test]
fn the_daemon_maps_our_files_and_bytes_pass_both_ways() {
    for backing in [BackingSource::Memfd, BackingSource::PosixShm] {
        let memory = GuestMemoryShm::<()>::builder()
            .add_ram(
                RamOptions::new().with_backing(backing),
                [(GuestAddress(0), MIB), (GuestAddress(1 << 32), 2 * MIB)],
            )
            .build()
            .unwrap();
        let peer = Peer::start(MockDaemon::builder());
        let (mut share, mut vmm) = peer.share();
        share.update_table(&memory.memory_table()).unwrap();
        // The same inode: shared, not copied.
        peer.holds(&memory.memory_table());
        let [low, high] = &peer.daemon.table()[..] else {
            panic!()
        };
        assert_eq!(
            (low.identity, low.mmap_offset + MIB),
            (high.identity, high.mmap_offset)
        );

        let mut driver = vmm.driver(&memory, &share);
        for addr in [GuestAddress(0x8_0000), GuestAddress((1 << 32) + 0x1000)] {
            memory.write_slice(&[0x5a; 512], addr).unwrap();
            driver.write(3, &[(addr, 512)]).unwrap();
            let mut sector = [0; 512];
            peer.daemon.disk().read(3 * 512, &mut sector).unwrap();
            assert_eq!(sector, [0x5a; 512], "what the guest wrote");
            peer.daemon.disk().write(3 * 512, &[0xc3; 512]).unwrap();
            driver.read(3, &[(addr, 512)]).unwrap();
            memory.read_slice(&mut sector, addr).unwrap();
            assert_eq!(sector, [0xc3; 512], "what the daemon wrote");
        }
    }
}

/// The daemon's descriptor of the file that backs the only region, opened anew; or, where its mode
/// 0 forbids that (POSIX shm, and not root), ours, which is what the daemon was sent.
fn daemons_descriptor(memory: &GuestMemoryShm) -> File {
    use std::os::fd::AsRawFd;
    let table = memory.memory_table();
    let ours = table.regions()[0].as_fd().as_raw_fd().to_string();
    let identity = table.regions()[0].backing().identity();
    let found = fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .find(|entry| {
            // Others come and go meanwhile.
            entry.file_name() != *ours
                && fs::metadata(entry.path())
                    .is_ok_and(|found| (found.dev(), found.ino()) == (identity.dev, identity.ino))
        });
    let path = found.expect("the daemon holds a descriptor").path();
    match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            File::from(table.regions()[0].as_fd().try_clone_to_owned().unwrap())
        }
        opened => opened.unwrap(),
    }
}

#[test]
fn a_daemon_cannot_truncate_a_memfd() {
    for (backing, sealed) in [
        (BackingSource::Memfd, true),
        (BackingSource::PosixShm, false),
    ] {
        let region = GuestRegionShm::<()>::new(
            (GuestAddress(0), MIB),
            &RamOptions::new().with_backing(backing),
        );
        let memory = GuestMemoryShm::from_regions(vec![region.unwrap()]).unwrap();
        let peer = Peer::start(MockDaemon::builder());
        let (mut share, _) = peer.share();
        share.update_table(&memory.memory_table()).unwrap();

        let theirs = daemons_descriptor(&memory);
        memory.write_obj(42u8, GuestAddress(MIB - 1)).unwrap();
        match sealed {
            true => {
                let refused = theirs.set_len(0).unwrap_err();
                assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
                assert!(theirs.set_len(2 * MIB).is_err());
                assert_eq!(memory.read_obj::<u8>(GuestAddress(MIB - 1)).unwrap(), 42);
            }
            // Touching the memory would be SIGBUS now: that is why it is not the default.
            false => theirs.set_len(0).unwrap(),
        }
        let len = if sealed { MIB } else { 0 };
        assert_eq!(theirs.metadata().unwrap().len(), len);
    }
}

#[test]
fn only_the_difference_is_sent_removals_from_above_then_additions_from_below() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = peer.share();
    let first = memory(&[0, 10, 20, 30]);
    share.update_table(&first.memory_table()).unwrap();
    let added = [0, 10, 20, 30].map(|start| ("ADD", vec![start]));
    assert_eq!(peer.changes(), added);
    assert_eq!(share.max_regions(), Some(509));

    // 20 is another file, 10 and 30 go, 5 and 40 come, 0 stays.
    peer.daemon.clear_requests();
    let second = without(&with(&first, &[5, 20, 40]), &[10, 30]);
    share.update_table(&second.memory_table()).unwrap();
    let expected = [
        ("REM", 30),
        ("REM", 20),
        ("REM", 10),
        ("ADD", 5),
        ("ADD", 20),
        ("ADD", 40),
    ];
    assert_eq!(
        peer.changes(),
        expected.map(|(what, start)| (what, vec![start]))
    );
    peer.holds(&second.memory_table());

    peer.daemon.clear_requests();
    share.update_table(&second.memory_table()).unwrap();
    assert_eq!(peer.daemon.requests(), []);
}

#[test]
fn what_was_removed_is_out_of_the_devices_reach() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, mut vmm) = peer.share();
    let memory = memory(&[0, 10]);
    share.update_table(&memory.memory_table()).unwrap();
    let mut driver = vmm.driver(&memory, &share);
    let buffer = [(GuestAddress(10 * MIB), 512)];
    driver.read(0, &buffer).unwrap();
    share
        .update_table(&without(&memory, &[10]).memory_table())
        .unwrap();
    let refused = driver.read(0, &buffer).unwrap_err();
    assert!(
        matches!(refused, BlkError::Status { status: 1, .. }),
        "{refused}"
    );
    driver.read(0, &[(GuestAddress(0x8000), 512)]).unwrap();
}

#[test]
fn without_slots_the_whole_table_is_sent_and_nine_regions_are_not() {
    let peer = Peer::start(MockDaemon::builder().without_mem_slots());
    let (mut share, _) = peer.share();
    let nine = memory(&[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let eight = without(&nine, &[4]);
    share.update_table(&eight.memory_table()).unwrap();
    assert_eq!(peer.changes(), [("SET", vec![0, 1, 2, 3, 5, 6, 7, 8])]);
    peer.holds(&eight.memory_table());

    peer.daemon.clear_requests();
    let refused = share.update_table(&nine.memory_table()).unwrap_err();
    let ShareError::Table(TableError::TooManyRegions {
        regions: 9,
        limit: 8,
        slots: SlotLimit::Message,
        ..
    }) = refused
    else {
        panic!("{refused}");
    };
    assert_eq!(peer.daemon.requests(), []);
    assert!(share.broken().is_none());
    let seven = without(&eight, &[0]);
    share.update_table(&seven.memory_table()).unwrap();
    peer.holds(&seven.memory_table());
}

#[test]
fn more_regions_than_slots_are_refused_before_anything_is_sent() {
    let peer = Peer::start(MockDaemon::builder().with_max_mem_slots(3));
    let (mut share, _) = peer.share();
    let three = memory(&[0, 1, 2]);
    share.update_table(&three.memory_table()).unwrap();
    peer.daemon.clear_requests();
    let refused = share
        .update_table(&with(&three, &[3]).memory_table())
        .unwrap_err();
    let ShareError::Table(TableError::TooManyRegions {
        regions: 4,
        limit: 3,
        slots: SlotLimit::Daemon,
        ..
    }) = refused
    else {
        panic!("{refused}");
    };
    assert_eq!(peer.daemon.requests(), []);
    // All slots may change hands in one update.
    let others = memory(&[1, 2, 3]);
    share.update_table(&others.memory_table()).unwrap();
    peer.holds(&others.memory_table());
}

#[test]
fn a_daemon_takes_509_regions_of_a_descriptor_each() {
    in_own_process(|| {
        // Ours, and the daemon's in the same process, which has no others.
        if support::may_have_descriptors(2 * 510 + 100) {
            takes_509_regions();
        }
    });
}

fn takes_509_regions() {
    let starts: Vec<u64> = (0..510).collect();
    let all = memory(&starts);
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = peer.share();
    assert!(matches!(
        share.update_table(&all.memory_table()),
        Err(ShareError::Table(TableError::TooManyRegions {
            regions: 510,
            limit: 509,
            ..
        }))
    ));
    let most = without(&all, &[100]);
    share.update_table(&most.memory_table()).unwrap();
    peer.holds(&most.memory_table());
    let mut files: Vec<u64> = peer
        .daemon
        .table()
        .iter()
        .map(|region| region.identity.ino)
        .collect();
    files.sort_unstable();
    files.dedup();
    assert_eq!(files.len(), 509);
}

#[test]
fn without_acknowledgements_the_daemon_is_asked_after_each_change() {
    let slots = MockDaemon::builder().without_reply_ack();
    let whole = MockDaemon::builder()
        .without_reply_ack()
        .without_mem_slots();
    for builder in [slots, whole] {
        let peer = Peer::start(builder);
        let (mut share, _) = peer.share();
        let first = memory(&[0, 2, 4]);
        let second = without(&with(&first, &[6]), &[2]);
        for memory in [first, second] {
            peer.daemon.clear_requests();
            share.update_table(&memory.memory_table()).unwrap();
            // At once, not some time later.
            peer.holds(&memory.memory_table());
            let asked = peer.daemon.requests();
            let asked = asked
                .iter()
                .filter(|request| **request == LoggedRequest::GetFeatures);
            assert_eq!(asked.count(), peer.changes().len());
        }
    }
}

#[test]
fn the_descriptors_of_a_table_outlive_the_memory() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = peer.share();
    let table = {
        let memory = memory(&[0]);
        memory.write_obj(7u64, GuestAddress(0x2000)).unwrap();
        memory.memory_table()
    };
    // The memory is unmapped, the table is still sent.
    share.update_table(&table).unwrap();
    peer.holds(&table);
    assert_eq!(table.regions()[0].backing().allocated().unwrap(), 4096);
    assert!(
        table.regions()[0]
            .backing()
            .as_fd()
            .try_clone_to_owned()
            .is_ok()
    );
}

#[test]
fn a_region_that_is_not_whole_pages_is_refused_before_anything_is_sent() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = peer.share();
    for odd in [(GuestAddress(MIB), 300), (GuestAddress(MIB + 1), 4096)] {
        let memory = GuestMemoryShm::<()>::from_ranges(&[(GuestAddress(0), 4096), odd]).unwrap();
        let partial = |error: ShareError| match error {
            ShareError::Table(TableError::Range(InvalidRange::PartialPages { range, .. })) => {
                assert_eq!((range.start_addr(), range.size()), (odd.0, odd.1 as u64));
            }
            error => panic!("{error:?}"),
        };
        partial(share.check_memory(&memory).unwrap_err());
        partial(share.update_memory(&memory).unwrap_err());
        partial(share.update_table(&memory.memory_table()).unwrap_err());
        assert!(share.broken().is_none());
    }
    assert_eq!(peer.changes(), []);
    peer.holds(&MemoryTable::default());
    // The share goes on.
    let whole = memory(&[0]);
    share.update_memory(&whole).unwrap();
    peer.holds(&whole.memory_table());
}
