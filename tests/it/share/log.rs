//! Daemons that log what they write, while their table changes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_memory_shm::StoppedLog;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::*;
use crate::frontend;

pub(super) const PAGE: u64 = 4096;
/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

pub(super) fn logging(peer: &Peer) -> (VhostUserShare, Vmm) {
    let vmm = peer.connect_also(Features::LOG_SHMFD);
    (vmm.share(), vmm)
}

/// The numbers of the pages that are dirty, but for the rings: the device writes there for a
/// moment after it has answered, to be notified of the next request.
pub(super) fn drain(share: &mut VhostUserShare) -> BTreeSet<u64> {
    let mut dirty = pages(&share.drain_dirty());
    dirty.remove(&(RINGS.0 / PAGE));
    dirty
}

pub(super) fn pages(ranges: &[GuestRange]) -> BTreeSet<u64> {
    let pages = ranges.iter().flat_map(|range| {
        let first = range.start_addr().0 / PAGE;
        first..first + range.size() / PAGE
    });
    pages.collect()
}

/// Has the device write to the page at this address.
fn touch(driver: &mut BlkDriver<&GuestMemoryShm>, addr: u64) -> u64 {
    driver.read(0, &[(GuestAddress(addr), 512)]).unwrap();
    addr / PAGE
}

/// The messages about table and log since the log of requests was cleared: regions in MiB, the
/// sizes of logs in MiB of guest memory.
fn messages(peer: &Peer) -> Vec<(&'static str, u64)> {
    let requests = peer.daemon.requests();
    let messages = requests.iter().filter_map(|request| match request {
        LoggedRequest::AddMemRegion(region) => Some(("ADD", region.guest_addr.0 / MIB)),
        LoggedRequest::RemoveMemRegion(region) => Some(("REM", region.guest_addr.0 / MIB)),
        LoggedRequest::SetMemTable(regions) => Some(("SET", regions.len() as u64)),
        LoggedRequest::SetLogBase { size, mmap_offset } => {
            assert_eq!((size % 8, *mmap_offset), (0, 0));
            Some(("LOG", size * 8 * PAGE / MIB))
        }
        _ => None,
    });
    messages.collect()
}

fn builders() -> [MockDaemonBuilder; 4] {
    let all = MockDaemon::builder;
    [
        all(),
        all().without_reply_ack(),
        all().without_mem_slots(),
        all().without_mem_slots().without_reply_ack(),
    ]
}

#[test]
fn writes_to_a_region_that_was_plugged_while_the_daemon_logs_are_logged() {
    for builder in builders() {
        let peer = Peer::start(builder);
        let (mut share, mut vmm) = logging(&peer);
        let first = memory(&[0, 10]);
        share.update_memory(&first).unwrap();
        let mut driver = vmm.driver(&first, &share);
        touch(&mut driver, 10 * MIB);
        share.start_log().unwrap();
        assert!(share.is_logging());
        assert_eq!(
            drain(&mut share),
            BTreeSet::new(),
            "what was before is not logged"
        );
        let old = touch(&mut driver, 10 * MIB + PAGE);

        // Past the end of the log, and below it.
        let second = with(&first, &[5, 20]);
        share.update_memory(&second).unwrap();
        let plugged = [5 * MIB, 20 * MIB + 7 * PAGE].map(|addr| touch(&mut driver, addr));
        let dirty = drain(&mut share);
        assert!(
            dirty.contains(&old) && plugged.iter().all(|page| dirty.contains(page)),
            "{dirty:?}"
        );
        assert!(!dirty.contains(&(plugged[0] + 1)) && !dirty.contains(&(plugged[1] - 1)));
        assert_eq!(drain(&mut share), BTreeSet::new());

        // And what stays is logged after others went.
        share.update_memory(&without(&second, &[20])).unwrap();
        drain(&mut share);
        let page = touch(&mut driver, 5 * MIB + 3 * PAGE);
        assert!(drain(&mut share).contains(&page));
    }
}

#[test]
fn the_daemon_does_not_log_by_itself_what_is_plugged() {
    // Why the log is sent again after a region was added: vhost-user-backend needs it.
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, mut vmm) = logging(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    let mut driver = vmm.driver(&first, &share);
    share.start_log().unwrap();
    let region = memory(&[5]).memory_table().regions()[0].clone();
    let region = VhostUserMemoryRegionInfo::from(&region);
    vmm.frontend.add_mem_region(&region).unwrap();
    let page = touch(&mut driver, 5 * MIB);
    assert!(!drain(&mut share).contains(&page));
}

#[test]
fn the_log_goes_before_a_table_that_grows_and_after_each_and_never_gets_smaller() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = logging(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    peer.daemon.clear_requests();
    let expect =
        |share: &mut VhostUserShare, memory: &GuestMemoryShm, expected: &[(&str, u64)]| {
            share.update_memory(memory).unwrap();
            assert_eq!(messages(&peer), expected);
            peer.holds(&memory.memory_table());
            peer.daemon.clear_requests();
        };
    share.start_log().unwrap();
    share.start_log().unwrap();
    let grown = with(&first, &[20]);
    expect(&mut share, &first, &[("LOG", 11)]);
    expect(&mut share, &grown, &[("LOG", 21), ("ADD", 20), ("LOG", 21)]);
    expect(&mut share, &with(&grown, &[5]), &[("ADD", 5), ("LOG", 21)]);
    expect(&mut share, &first, &[("REM", 20), ("REM", 5), ("LOG", 21)]);
    // Grows and loses something; shrinks and gains something.
    let other = memory(&[0, 30]);
    let moves = [
        ("LOG", 31),
        ("REM", 10),
        ("REM", 0),
        ("ADD", 0),
        ("ADD", 30),
        ("LOG", 31),
    ];
    expect(&mut share, &other, &moves);
    let back = with(&without(&other, &[30]), &[3]);
    expect(&mut share, &back, &[("REM", 30), ("ADD", 3), ("LOG", 31)]);
    expect(&mut share, &back, &[]);
    expect(
        &mut share,
        &GuestMemoryShm::new(),
        &[("REM", 3), ("REM", 0)],
    );
    expect(&mut share, &first, &[("ADD", 0), ("ADD", 10), ("LOG", 31)]);
    let stopped = share.stop_log();
    // Other RAM came to these addresses once, which counts as written.
    assert_eq!(pages(&stopped.dirty), (0..MIB / PAGE).collect());
    assert_eq!(stopped.former_daemons, []);
    expect(&mut share, &grown, &[("ADD", 20)]);
}

#[test]
fn without_slots_the_log_goes_around_the_whole_table_and_what_stays_counts_as_dirty() {
    let peer = Peer::start(MockDaemon::builder().without_mem_slots());
    let (mut share, _) = logging(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    share.start_log().unwrap();
    peer.daemon.clear_requests();
    share.update_memory(&with(&first, &[20])).unwrap();
    assert_eq!(messages(&peer), [("LOG", 21), ("SET", 3), ("LOG", 21)]);
    // It replaced these two, without a log, and may have written to them.
    assert_eq!(
        share.drain_dirty(),
        [0, 10].map(|start| { GuestRange::new(GuestAddress(start * MIB), MIB).unwrap() })
    );
    peer.daemon.clear_requests();
    share.update_memory(&first).unwrap();
    assert_eq!(messages(&peer), [("SET", 2), ("LOG", 21)]);
}

#[test]
fn nothing_dirty_is_lost_while_the_log_grows_and_shrinks() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, mut vmm) = logging(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    let mut driver = vmm.driver(&first, &share);
    share.start_log().unwrap();
    let mut written = BTreeSet::new();
    written.insert(touch(&mut driver, 10 * MIB));
    let grown = with(&first, &[40]);
    share.update_memory(&grown).unwrap();
    written.insert(touch(&mut driver, 10 * MIB + PAGE));
    written.insert(touch(&mut driver, 41 * MIB - PAGE));
    // It ends before a page that is dirty.
    share.update_memory(&first).unwrap();
    written.insert(touch(&mut driver, 10 * MIB + 2 * PAGE));
    share.update_memory(&grown).unwrap();
    written.insert(touch(&mut driver, 40 * MIB + PAGE));
    let stopped = share.stop_log();
    assert_eq!(stopped.former_daemons, []);
    let dirty = stopped.dirty;
    assert!(written.is_subset(&pages(&dirty)), "{written:?} {dirty:?}");
    assert!(dirty.is_sorted() && !share.is_logging());
    assert_eq!(share.drain_dirty(), []);
}

#[test]
fn what_is_dirty_in_a_region_that_goes_and_comes_back_is_not_lost() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, mut vmm) = logging(&peer);
    let all = memory(&[0, 10, 20, 30]);
    share.update_memory(&all).unwrap();
    let mut driver = vmm.driver(&all, &share);
    share.start_log().unwrap();
    let written = [10 * MIB, 20 * MIB, 30 * MIB].map(|addr| touch(&mut driver, addr));
    share.update_memory(&without(&all, &[10, 30])).unwrap();
    // Back, as after a change that was undone.
    share.update_memory(&all).unwrap();
    let dirty = drain(&mut share);
    assert!(dirty.is_superset(&written.into()), "{written:?} {dirty:?}");
    assert_eq!(drain(&mut share), BTreeSet::new());
}

#[test]
fn nothing_dirty_is_lost_while_the_device_works_and_the_table_changes() {
    for builder in [
        MockDaemon::builder(),
        MockDaemon::builder().without_mem_slots(),
    ] {
        let peer = Peer::start(builder);
        let (mut share, mut vmm) = logging(&peer);
        let first = memory(&[0, 10]);
        let grown = with(&first, &[40]);
        share.update_memory(&first).unwrap();
        let mut driver = vmm.driver(&first, &share);
        share.start_log().unwrap();
        let (rounds, over) = (AtomicU64::new(0), AtomicBool::new(false));
        let mut dirty = BTreeSet::new();
        let written = thread::scope(|scope| {
            let device = scope.spawn(|| {
                let mut written = BTreeSet::new();
                // Each page once: one that is missed stays missing. A few in each round.
                for page in 0..256 {
                    while rounds.load(Ordering::Acquire) < page / 4 {
                        thread::yield_now();
                    }
                    written.insert(touch(&mut driver, 10 * MIB + page * PAGE));
                }
                over.store(true, Ordering::Release);
                written
            });
            while !over.load(Ordering::Acquire) {
                share.update_memory(&grown).unwrap();
                dirty.extend(drain(&mut share));
                share.update_memory(&first).unwrap();
                rounds.fetch_add(1, Ordering::Release);
            }
            device.join().unwrap()
        });
        dirty.extend(drain(&mut share));
        assert!(
            written.is_subset(&dirty),
            "{:?}",
            written.difference(&dirty)
        );
    }
}

#[test]
fn a_log_goes_on_over_a_new_connection() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, mut vmm) = logging(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    let mut old = vmm.driver(&first, &share);
    share.start_log().unwrap();
    let before = touch(&mut old, 10 * MIB);
    drop(old);
    peer.daemon.hang_up();
    peer.daemon.wait_disconnected(PATIENCE).unwrap();
    share.update_memory(&with(&first, &[20])).unwrap_err();
    assert!(share.broken().is_some());

    // A daemon that cannot: it is said before anything is sent.
    peer.connect().reconnect(&mut share);
    peer.daemon.clear_requests();
    let refused = share.update_memory(&first).unwrap_err();
    assert!(matches!(refused, ShareError::LogNotShared), "{refused}");
    assert_eq!(peer.daemon.requests(), []);

    peer.daemon.hang_up();
    peer.daemon.wait_disconnected(PATIENCE).unwrap();
    let mut vmm = peer.connect_also(Features::LOG_SHMFD);
    vmm.reconnect(&mut share);
    peer.daemon.clear_requests();
    share.update_memory(&first).unwrap();
    let [("LOG", 21), ("ADD", 0), ("ADD", 10), ("LOG", 21)] = messages(&peer)[..] else {
        panic!("{:?}", messages(&peer));
    };
    let mut driver = vmm.driver(&first, &share);
    let after = touch(&mut driver, 10 * MIB + 5 * PAGE);
    let dirty = drain(&mut share);
    assert!(
        dirty.contains(&before) && dirty.contains(&after),
        "{dirty:?}"
    );
}

#[test]
fn a_log_needs_its_protocol_feature() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, _) = peer.share();
    share.update_memory(&memory(&[0])).unwrap();
    peer.daemon.clear_requests();
    let refused = share.start_log().unwrap_err();
    assert!(matches!(refused, ShareError::LogNotShared), "{refused}");
    assert!(!share.is_logging());
    assert_eq!(peer.daemon.requests(), []);
}

#[test]
fn a_refused_region_leaves_the_log_working_for_those_that_are_held() {
    for (refused, taken) in [(1, 20), (2, 10)] {
        let peer = Peer::start(MockDaemon::builder());
        let (mut share, mut vmm) = logging(&peer);
        let first = memory(&[0]);
        share.update_memory(&first).unwrap();
        let mut driver = vmm.driver(&first, &share);
        share.start_log().unwrap();
        peer.daemon.inject(refused, Fault::Refuse);
        share.update_memory(&with(&first, &[10, 20])).unwrap_err();
        assert!(share.broken().is_none());
        let held = share.table().regions().iter();
        let held: Vec<u64> = held.map(|r| r.range().start_addr().0 / MIB).collect();
        assert_eq!(held, [0, taken]);
        assert_eq!(messages(&peer).last(), Some(&("LOG", 21)));
        let page = touch(&mut driver, taken * MIB + 0x80 * PAGE);
        assert!(drain(&mut share).contains(&page));
    }
}

#[test]
fn a_daemon_of_an_address_space_logs_what_is_plugged_and_a_change_that_is_undone_costs_nothing() {
    let peer = Peer::start(MockDaemon::builder());
    let (mut share, mut vmm) = logging(&peer);
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    let mut driver = vmm.driver(&first, &share);
    let space = AddressSpace::new(first.clone());
    let blk = space.attach("blk", share).unwrap();
    // Told after it: what this one refuses is taken back from the other.
    let other = Peer::start(MockDaemon::builder());
    space.attach("net", other.share().0).unwrap();
    space
        .with_listener(&blk, VhostUserShare::start_log)
        .unwrap()
        .unwrap();
    let mut written = BTreeSet::new();
    written.insert(touch(&mut driver, 10 * MIB));
    other.daemon.inject(1, Fault::Refuse);
    space.insert(regions(&[40]).remove(0)).unwrap_err();
    written.insert(touch(&mut driver, 10 * MIB + PAGE));
    space.insert(regions(&[40]).remove(0)).told_all();
    written.insert(touch(&mut driver, 40 * MIB));
    space.remove((GuestAddress(40 * MIB), MIB)).told_all();
    written.insert(touch(&mut driver, 10 * MIB + 2 * PAGE));
    let stopped = space.with_listener(&blk, VhostUserShare::stop_log).unwrap();
    let dirty = &stopped.dirty;
    assert!(written.is_subset(&pages(dirty)), "{written:?} {dirty:?}");
}

#[test]
fn qemu_storage_daemon_logs_what_it_writes_to_a_region_that_was_plugged() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [0x42; 65536]).unwrap();
    let Some(daemon) = StorageDaemon::start(&image, None) else {
        return;
    };
    let stream = UnixStream::connect(&daemon.socket).unwrap();
    let mut vmm = Vmm::negotiate_also(stream, Features::LOG_SHMFD);
    assert!(vmm.features.contains(Features::LOG_SHMFD));
    let mut share = vmm.share();
    let first = memory(&[0, 10]);
    share.update_memory(&first).unwrap();
    let mut driver = vmm.driver(&first, &share);
    share.start_log().unwrap();
    let features = vmm.frontend.get_features().unwrap() & frontend::DISK;
    vmm.frontend.set_features(features | LOG_ALL).unwrap();
    let mut written = BTreeSet::new();
    for round in 0..3 {
        // It would abort if its log had no bits for a page.
        written.insert(touch(&mut driver, 10 * MIB + round * PAGE));
        let grown = with(&first, &[40]);
        share.update_memory(&grown).unwrap();
        written.insert(touch(&mut driver, 40 * MIB + round * PAGE));
        share.update_memory(&first).unwrap();
    }
    written.insert(touch(&mut driver, 10 * MIB + 9 * PAGE));
    let dirty = drain(&mut share);
    assert!(written.is_subset(&dirty), "{written:?} {dirty:?}");
    assert!(!dirty.contains(&(10 * MIB / PAGE + 8)));
    vmm.frontend.set_features(features).unwrap();
    touch(&mut driver, 10 * MIB);
    assert_eq!(share.stop_log(), StoppedLog::default());
}
