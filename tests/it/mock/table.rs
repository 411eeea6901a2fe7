//! The table of guest memory, and the log of how it came about.

use super::*;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vhost::VhostUserDirtyLogRegion;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

#[test]
fn the_table_is_what_the_daemon_mapped() {
    let memory = guest(&[(0, 1 << 20), (1 << 32, 1 << 16)]);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (frontend, _) = negotiated(&daemon);
    assert!(daemon.table().is_empty());
    frontend.set_mem_table(&infos(&memory)).unwrap();
    assert_eq!(daemon.table(), expected_table(&memory));
    assert_ne!(daemon.table()[0].identity, daemon.table()[1].identity);

    let logged = daemon.requests();
    let Some(LoggedRequest::SetMemTable(regions)) = logged.last() else {
        panic!("the last of {logged:?} is not the table");
    };
    assert_eq!(regions[1].guest_addr, GuestAddress(1 << 32));
    assert_eq!(
        Some(regions[1].user_addr),
        user_address(&memory, regions[1].guest_addr)
    );
}

#[test]
fn regions_come_and_go_and_the_log_shows_their_order() {
    let memory = guest(&[(0, 1 << 20), (1 << 30, 1 << 16), (2 << 30, 1 << 16)]);
    let regions = infos(&memory);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (mut frontend, _) = negotiated(&daemon);
    assert_eq!(frontend.get_max_mem_slots().unwrap(), 509);
    daemon.clear_requests();
    for region in &regions {
        frontend.add_mem_region(region).unwrap();
    }
    assert_eq!(daemon.table(), expected_table(&memory));
    round_trip(
        &memory,
        &mut frontend,
        GuestAddress(2 << 30),
        &pattern(4096, 1),
    );

    for region in regions[1..].iter().rev() {
        frontend.remove_mem_region(region).unwrap();
    }
    assert_eq!(daemon.table(), expected_table(&memory)[..1]);
    assert_eq!(
        changes(&daemon),
        [
            ("add", 0),
            ("add", 1 << 30),
            ("add", 2 << 30),
            ("rem", 2 << 30),
            ("rem", 1 << 30)
        ]
    );
    // What was removed is out of the device's reach.
    let mut driver = started(&memory, &mut frontend, 16);
    let error = driver.read(0, &[(GuestAddress(1 << 30), 512)]).unwrap_err();
    assert!(
        matches!(error, BlkError::Status { status: 1, .. }),
        "{error}"
    );
}

#[test]
fn more_regions_than_slots_are_refused_and_the_connection_stays() {
    let memory = guest(&[(0, 1 << 16), (1 << 20, 1 << 16), (2 << 20, 1 << 16)]);
    let regions = infos(&memory);
    let daemon = MockDaemon::builder()
        .with_max_mem_slots(2)
        .start_unnamed()
        .unwrap();
    let (mut frontend, _) = negotiated(&daemon);
    assert_eq!(frontend.get_max_mem_slots().unwrap(), 2);
    frontend.add_mem_region(&regions[0]).unwrap();
    frontend.add_mem_region(&regions[1]).unwrap();
    assert!(frontend.add_mem_region(&regions[2]).is_err());
    assert_eq!(daemon.table(), expected_table(&memory)[..2]);
    frontend.remove_mem_region(&regions[0]).unwrap();
    frontend.add_mem_region(&regions[2]).unwrap();
    assert_eq!(daemon.table(), expected_table(&memory)[1..]);
}

/// Sends changes of one region each, without a wait in between; gives the values of the answers.
/// There are fewer if the daemon hangs up.
fn answers_to(
    mut socket: &UnixStream,
    changes: &[(FrontendReq, &VhostUserMemoryRegionInfo)],
) -> Vec<u64> {
    for (request, region) in changes {
        // Version 1, with the wish for an answer.
        let header = [u32::from(*request), 1 | 1 << 3, 40].map(u32::to_ne_bytes);
        let body = [
            0,
            region.guest_phys_addr,
            region.memory_size,
            region.userspace_addr,
            region.mmap_offset,
        ];
        let bytes = [header.concat(), body.map(u64::to_ne_bytes).concat()].concat();
        if socket.send_with_fd(&bytes[..], region.mmap_handle).is_err() {
            break;
        }
    }
    let mut answer = [0; 20];
    let mut next = || socket.read_exact(&mut answer).ok().map(|()| answer);
    std::iter::from_fn(|| Some(u64::from_ne_bytes(*next()?.last_chunk()?)))
        .take(changes.len())
        .collect()
}

#[test]
fn slots_are_counted_while_changes_are_under_way() {
    let memory = guest(&[(0, 1 << 16), (1 << 20, 1 << 16), (2 << 20, 1 << 16)]);
    let regions = infos(&memory);
    let daemon = MockDaemon::builder()
        .with_max_mem_slots(2)
        .start_unnamed()
        .unwrap();
    let socket = daemon.connect().unwrap();
    agree(
        socket.try_clone().unwrap(),
        VhostUserProtocolFeatures::all(),
    )
    .unwrap();
    let (add, remove) = (FrontendReq::ADD_MEM_REG, FrontendReq::REM_MEM_REG);
    let adds: Vec<_> = regions.iter().map(|region| (add, region)).collect();
    assert_eq!(answers_to(&socket, &adds), [0, 0, 1]);
    let replaces = [(remove, &regions[0]), (add, &regions[2]), adds[0]];
    assert_eq!(answers_to(&socket, &replaces), [0, 0, 1]);
    assert_eq!(daemon.table(), expected_table(&memory)[1..]);
}

#[test]
fn what_was_answered_before_a_hang_up_arrives_whatever_was_sent_since() {
    let memory = guest(&[(0, 1 << 16), (1 << 20, 1 << 16)]);
    let regions = infos(&memory);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    for _ in 0..100 {
        let socket = daemon.connect().unwrap();
        agree(
            socket.try_clone().unwrap(),
            VhostUserProtocolFeatures::all(),
        )
        .unwrap();
        // It refuses a region that it has, and hangs up, with the others in its way.
        let add = |at: usize| (FrontendReq::ADD_MEM_REG, &regions[at]);
        assert_eq!(
            answers_to(&socket, &[add(0), add(0), add(1), add(1)]),
            [0, 1]
        );
        drop(socket);
        daemon.wait_disconnected(LIMIT).unwrap();
    }
}

#[test]
fn a_table_of_nine_regions_is_refused_as_a_whole() {
    let ranges: Vec<_> = (0..9).map(|index| (index << 20, 1 << 16)).collect();
    let memory = guest(&ranges);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (frontend, _) = negotiated(&daemon);
    assert!(frontend.set_mem_table(&infos(&memory)).is_err());
    assert!(daemon.table().is_empty());
    frontend.set_mem_table(&infos(&memory)[..8]).unwrap();
    assert_eq!(daemon.table().len(), 8);
}

#[test]
fn protocol_features_can_be_withheld() {
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let acks = VhostUserProtocolFeatures::REPLY_ACK;
    let builder = MockDaemon::builder;
    for (builder, has_slots, has_acks) in [
        (builder(), true, true),
        (builder().without_mem_slots(), false, true),
        (builder().without_reply_ack(), true, false),
        (
            builder().without_mem_slots().without_reply_ack(),
            false,
            false,
        ),
    ] {
        let daemon = builder.start_unnamed().unwrap();
        let (frontend, features) = negotiated(&daemon);
        assert_eq!(features.contains(slots), has_slots);
        assert_eq!(features.contains(acks), has_acks);
        let memory = guest(&[(0, 1 << 16)]);
        frontend.set_mem_table(&infos(&memory)).unwrap();
        // A barrier, as a frontend without acknowledgements needs it.
        frontend.get_features().unwrap();
        assert_eq!(daemon.table(), expected_table(&memory));
    }
}

#[test]
fn the_device_marks_what_it_writes_in_the_dirty_log() {
    let memory = guest(&[(0, 1 << 20)]);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (mut frontend, _) = negotiated(&daemon);
    frontend.set_mem_table(&infos(&memory)).unwrap();
    let mut driver = started(&memory, &mut frontend, 16);
    let log = File::from(memfd_create("log", MFdFlags::MFD_CLOEXEC).unwrap());
    log.set_len(4096).unwrap();
    let region = VhostUserDirtyLogRegion {
        mmap_size: 4096,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    frontend.set_log_base(0, Some(region)).unwrap();
    assert!(matches!(
        daemon.requests().last(),
        Some(LoggedRequest::SetLogBase {
            size: 4096,
            mmap_offset: 0
        })
    ));

    let bit = |page: u64| {
        let mut byte = [0];
        log.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    };
    driver.write(0, &[(GuestAddress(0x40000), 512)]).unwrap();
    assert!(!bit(0x40), "a page that the device only read is clean");
    driver.read(0, &[(GuestAddress(0x50000), 512)]).unwrap();
    assert!(bit(0x50) && !bit(0x51));
    assert!(bit(0), "the used ring");
}

#[test]
fn the_table_changes_while_the_device_works() {
    let memory = guest(&[(0, 1 << 20), (1 << 30, 1 << 16)]);
    let regions = infos(&memory);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (mut frontend, _) = negotiated(&daemon);
    frontend.add_mem_region(&regions[0]).unwrap();
    let mut driver = started(&memory, &mut frontend, 64);
    let (over, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for index in 0..16 {
                    let buffer = GuestAddress(0x40000 + index * 4096);
                    driver.submit_write(index * 8, &[(buffer, 4096)]).unwrap();
                }
                driver.wait_all().unwrap();
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        // On a busy machine the changes may be over before the device's first request.
        let mut changes = 0;
        let idle = || rounds.load(Ordering::Relaxed) == 0 && !working.is_finished();
        while changes < 200 || idle() {
            changes += 1;
            frontend.add_mem_region(&regions[1]).unwrap();
            assert_eq!(daemon.table().len(), 2);
            frontend.remove_mem_region(&regions[1]).unwrap();
            assert_eq!(daemon.table(), expected_table(&memory)[..1]);
        }
        over.store(true, Ordering::Relaxed);
    });
}
