//! Least privilege: daemons that see a part of the memory, by addresses that say nothing of ours.

use super::*;

const CONSTANT: u64 = 0x2000_0000_0000;

fn view(only: &[u64]) -> TableView {
    let only = only
        .iter()
        .map(|start| GuestRange::new(GuestAddress(start * MIB), MIB).unwrap());
    TableView::default()
        .only(only)
        .with_opaque_addresses(CONSTANT)
}

/// The user addresses of our mappings never pass the socket.
#[track_caller]
fn says_nothing_of(peer: &Peer, memory: &GuestMemoryShm) {
    let hosts = memory.memory_table();
    let hosts: Vec<u64> = hosts.regions().iter().map(TableRegion::user_addr).collect();
    let mut told = 0;
    for request in peer.daemon.requests() {
        let regions = match request {
            LoggedRequest::SetMemTable(regions) => regions,
            LoggedRequest::AddMemRegion(region) | LoggedRequest::RemoveMemRegion(region) => {
                vec![region]
            }
            _ => continue,
        };
        for region in regions {
            assert_eq!(region.user_addr, region.guest_addr.0 + CONSTANT);
            assert!(!hosts.contains(&region.user_addr));
            told += 1;
        }
    }
    assert!(told > 0, "nothing was told at all");
}

#[test]
fn a_daemon_works_with_a_selection_and_opaque_addresses_and_gets_no_other_region() {
    for builder in [
        MockDaemon::builder(),
        MockDaemon::builder().without_mem_slots(),
    ] {
        let peer = Peer::start(builder);
        let (share, mut vmm) = peer.share();
        let mut share = share.with_view(view(&[0, 10, 30]));
        let memory = memory(&[0, 10, 20]);
        share.check_memory(&memory).unwrap();
        share.update_memory(&memory).unwrap();
        let seen = memory.memory_table_as(share.view()).unwrap();
        peer.holds(&seen);
        assert_eq!(seen.regions().len(), 2);

        let mut driver = vmm.driver(&memory, &share);
        let buffer = GuestAddress(10 * MIB + 0x1000);
        memory.write_slice(&[0x77; 512], buffer).unwrap();
        driver.write(0, &[(buffer, 512)]).unwrap();
        let mut sector = [0; 512];
        peer.daemon.disk().read(0, &mut sector).unwrap();
        assert_eq!(sector, [0x77; 512]);
        // A guest that points it to the rest gets an error.
        let refused = driver
            .read(0, &[(GuestAddress(20 * MIB), 512)])
            .unwrap_err();
        assert!(
            matches!(refused, BlkError::Status { status: 1, .. }),
            "{refused}"
        );

        // Outside the selection nothing is said, inside it is.
        peer.daemon.clear_requests();
        let more = with(&without(&memory, &[20]), &[21, 40]);
        share.check_memory(&more).unwrap();
        share.update_memory(&more).unwrap();
        assert_eq!(peer.changes(), []);
        let more = with(&more, &[30]);
        share.update_memory(&more).unwrap();
        peer.holds(&more.memory_table_as(share.view()).unwrap());
        driver.read(0, &[(buffer, 512)]).unwrap();
        says_nothing_of(&peer, &more);
    }
}

#[test]
fn a_region_that_is_plugged_counts_for_the_daemons_slots_only_if_it_sees_it() {
    let peer = Peer::start(MockDaemon::builder().with_max_mem_slots(1));
    let (share, _) = peer.share();
    let mut share = share.with_view(view(&[0]));
    share.update_memory(&memory(&[0, 1, 2])).unwrap();
    assert!(matches!(
        share
            .with_view(TableView::default())
            .check_memory(&memory(&[0, 1, 2])),
        Err(ShareError::Table(TableError::TooManyRegions {
            regions: 3,
            limit: 1,
            ..
        }))
    ));
}

#[test]
fn a_constant_that_does_not_fit_is_found_before_anything_is_sent() {
    let peer = Peer::start(MockDaemon::builder());
    let (share, _) = peer.share();
    let constant = u64::MAX - 4095;
    let view = TableView::default().with_opaque_addresses(constant);
    let mut share = share.with_view(view);
    peer.daemon.clear_requests();
    let refused = share.update_memory(&memory(&[0])).unwrap_err();
    assert!(
        matches!(
            refused,
            ShareError::Table(TableError::OpaqueConstant { .. })
        ),
        "{refused}"
    );
    assert!(share.check_memory(&memory(&[0])).is_err());
    assert_eq!(peer.daemon.requests(), []);
    assert!(share.broken().is_none());
}

#[test]
fn qemu_storage_daemon_works_with_a_selection_and_opaque_addresses() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [0x42; 65536]).unwrap();
    let Some(daemon) = StorageDaemon::start(&image, None) else {
        return;
    };
    let mut vmm = Vmm::negotiate(UnixStream::connect(&daemon.socket).unwrap());
    let mut share = vmm.share().with_view(view(&[0, 10, 30]));
    let memory = memory(&[0, 10, 20]);
    share.update_memory(&memory).unwrap();

    // Its mappings are of our files: those that it sees, and no other.
    let mapped = |memory: &GuestMemoryShm| -> Vec<bool> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.process.pid())).unwrap();
        let regions = memory.memory_table();
        let inodes = regions
            .regions()
            .iter()
            .map(|r| r.backing().identity().ino.to_string());
        inodes
            .map(|inode| {
                maps.lines()
                    .any(|line| line.split_whitespace().nth(4) == Some(&inode))
            })
            .collect()
    };
    assert_eq!(mapped(&memory), [true, true, false]);

    let mut driver = vmm.driver(&memory, &share);
    let buffer = GuestAddress(10 * MIB);
    driver.read(0, &[(buffer, 512)]).unwrap();
    assert_eq!(
        memory.read_obj::<u64>(buffer).unwrap(),
        0x4242_4242_4242_4242
    );

    let more = with(&memory, &[21, 30]);
    share.update_memory(&more).unwrap();
    assert_eq!(mapped(&more), [true, true, false, false, true]);
    let buffer = GuestAddress(30 * MIB);
    more.write_slice(&[0x99; 512], buffer).unwrap();
    driver.write(3, &[(buffer, 512)]).unwrap();
    driver.flush().unwrap();
    assert_eq!(fs::read(&image).unwrap()[3 * 512..4 * 512], [0x99; 512]);
}

#[test]
fn used_as_a_listener_a_share_takes_memories_and_by_its_own_names_tables() {
    use guest_memory_shm::MemoryListener;

    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = peer.share();
    let first = memory(&[0]);
    share.check(&first).unwrap();
    share.update(&first).unwrap();
    peer.holds(&first.memory_table());
    let second = with(&first, &[10]);
    share.check_table(&second.memory_table()).unwrap();
    share.update_table(&second.memory_table()).unwrap();
    peer.holds(&second.memory_table());
}
