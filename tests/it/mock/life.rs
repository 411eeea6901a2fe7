//! Connections and daemons come to their ends.

use super::*;
use std::error::Error as _;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use vhost::vhost_user::VhostUserFrontend;

/// Fails instead of hanging.
fn drop_in_time(daemon: MockDaemon) {
    let (sender, done) = mpsc::channel();
    let dropping = thread::spawn(move || {
        drop(daemon);
        sender.send(()).unwrap();
    });
    done.recv_timeout(LIMIT)
        .expect("the drop of the daemon hangs");
    dropping.join().unwrap();
}

#[test]
fn a_new_connection_has_an_empty_table_and_the_old_disk() {
    let memory = guest(&[(0, 1 << 20)]);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let data = pattern(4096, 3);
    for round in 0..3 {
        let (mut frontend, _) = negotiated(&daemon);
        assert!(daemon.is_connected());
        assert!(daemon.table().is_empty());
        frontend.set_mem_table(&infos(&memory)).unwrap();
        if round > 0 {
            let mut disk = vec![0; data.len()];
            daemon.disk().read(0, &mut disk).unwrap();
            assert_eq!(disk, data);
        }
        round_trip(&memory, &mut frontend, GuestAddress(0x40000), &data);
        drop(frontend);
        daemon.wait_disconnected(LIMIT).unwrap();
        assert_eq!(
            daemon.table(),
            expected_table(&memory),
            "the last table stays visible"
        );
    }
    let owners = daemon.requests();
    let owners = owners
        .iter()
        .filter(|request| **request == LoggedRequest::SetOwner);
    assert_eq!(owners.count(), 3);
}

#[test]
fn requests_that_a_dead_daemon_left_behind_are_done_by_the_next_one() {
    let memory = guest(&[(0, 1 << 20)]);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut driver = BlkDriver::new(&memory, RINGS, 16)
        .unwrap()
        .with_deadline(LIMIT);
    let buffer = GuestAddress(0x40000);

    let (mut frontend, _) = negotiated(&daemon);
    frontend.set_mem_table(&infos(&memory)).unwrap();
    start(&memory, &mut frontend, &driver);
    driver.flush().unwrap();
    daemon.hang_up();
    daemon.wait_disconnected(LIMIT).unwrap();
    memory.write_slice(&[9; 512], buffer).unwrap();
    let request = driver.submit_write(0, &[(buffer, 512)]).unwrap();

    let (mut frontend, _) = negotiated(&daemon);
    frontend.set_mem_table(&infos(&memory)).unwrap();
    start(&memory, &mut frontend, &driver);
    driver.wait(request).unwrap();
    let mut sector = [0; 512];
    daemon.disk().read(0, &mut sector).unwrap();
    assert_eq!(sector, [9; 512]);
}

#[test]
fn requests_that_a_daemon_overtook_before_it_died_are_done_by_the_next_one() {
    let memory = guest(&[(0, 1 << 20)]);
    let mut driver = BlkDriver::new(&memory, RINGS, 16)
        .unwrap()
        .with_deadline(LIMIT);
    let requests: Vec<_> = (0..3)
        .map(|sector| {
            let buffer = GuestAddress(0x40000 + sector * 512);
            memory.write_slice(&[9; 512], buffer).unwrap();
            driver.submit_write(sector, &[(buffer, 512)]).unwrap()
        })
        .collect();

    // A daemon that completes the last one only. It has written the status of the first, too.
    let layout = driver.ring_layout();
    let [first, _, last] = [0, 1, 2].map(|index| -> u16 {
        let entry = layout.avail.0 + 4 + 2 * index;
        memory.read_obj(GuestAddress(entry)).unwrap()
    });
    let status = |head| GuestAddress(layout.statuses.0 + u64::from(head));
    memory.write_obj(1_u8, status(first)).unwrap();
    memory.write_obj(0_u8, status(last)).unwrap();
    let entry = GuestAddress(layout.used.0 + 4);
    memory.write_obj([u32::from(last), 1], entry).unwrap();
    let index = GuestAddress(layout.used.0 + 2);
    memory.write_obj(1_u16, index).unwrap();

    assert_eq!(driver.resubmit().unwrap(), 2);
    assert_eq!((driver.in_flight(), driver.used_index()), (2, 1));
    assert_eq!(memory.read_obj::<u8>(status(first)).unwrap(), 0xff);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (mut frontend, _) = negotiated(&daemon);
    frontend.set_mem_table(&infos(&memory)).unwrap();
    start(&memory, &mut frontend, &driver);
    for request in requests {
        driver.wait(request).unwrap();
    }
    let mut disk = [0; 3 * 512];
    daemon.disk().read(0, &mut disk).unwrap();
    let sectors: Vec<_> = disk.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [9, 9, 0], "the last was done by the first daemon");
}

#[test]
fn a_second_front_end_waits_for_its_turn() {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (first, _) = negotiated(&daemon);
    let waiting = Frontend::from_stream(daemon.connect().unwrap(), 1);
    let (sender, answered) = mpsc::channel();
    let thread = thread::spawn(move || sender.send(waiting.get_features().is_ok()).unwrap());
    first.get_features().unwrap();
    assert!(answered.try_recv().is_err());
    drop(first);
    assert!(answered.recv_timeout(LIMIT).unwrap());
    thread.join().unwrap();
}

#[test]
fn a_drop_ends_every_kind_of_connection() {
    drop_in_time(MockDaemon::builder().start_unnamed().unwrap());

    // Connected and idle, with a queue that runs; another frontend waits.
    let memory = guest(&[(0, 1 << 20)]);
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let (mut frontend, _) = negotiated(&daemon);
    frontend.set_mem_table(&infos(&memory)).unwrap();
    let driver = BlkDriver::new(&memory, RINGS, 16).unwrap();
    start(&memory, &mut frontend, &driver);
    let waiting = daemon.connect().unwrap();
    drop_in_time(daemon);
    assert!(frontend.get_features().is_err());
    drop(waiting);

    // Silent, or about to answer in an hour, with a frontend that waits for it.
    for fault in [
        Fault::NeverAnswer,
        Fault::AnswerLate(Duration::from_secs(3600)),
    ] {
        let daemon = MockDaemon::builder()
            .with_fault(1, fault)
            .start_unnamed()
            .unwrap();
        let (mut frontend, _) = negotiated(&daemon);
        let region = infos(&memory)[0];
        let requests = daemon.requests().len();
        let waiting = thread::spawn(move || frontend.add_mem_region(&region).is_err());
        daemon.wait_requests(requests + 1, LIMIT).unwrap();
        drop_in_time(daemon);
        assert!(waiting.join().unwrap());
    }

    // In the middle of a message.
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let mut stream = daemon.connect().unwrap();
    stream.write_all(&[1, 0, 0]).unwrap();
    daemon.wait_connected(LIMIT).unwrap();
    drop_in_time(daemon);
}

#[test]
fn a_peer_that_talks_nonsense_is_hung_up_on_and_the_next_one_is_served() {
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    for nonsense in [
        vec![0xff; 12],
        vec![0xff; 4096],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        let mut stream = daemon.connect().unwrap();
        // The daemon may hang up before it has read everything.
        let _ = stream.write_all(&nonsense);
        stream.shutdown(Shutdown::Write).unwrap();
        // An end or a reset, but no answer.
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{answer:?}");
    }
    negotiated(&daemon);
}

#[test]
fn the_socket_file_goes_with_the_daemon_and_others_files_stay() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("blk.sock");
    let daemon = MockDaemon::builder().start(&path).unwrap();
    assert_eq!(daemon.path(), Some(path.as_path()));
    let frontend = Frontend::connect(&path, 1).unwrap();
    frontend.get_features().unwrap();

    let error = MockDaemon::builder().start(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    drop_in_time(daemon);
    assert!(!path.exists());

    let daemon = MockDaemon::builder().start(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "not a socket").unwrap();
    drop_in_time(daemon);
    assert!(path.exists());
}

#[test]
fn options_out_of_range_are_refused_with_their_value() {
    for (builder, value) in [
        (MockDaemon::builder().with_disk_size(513), "513"),
        (
            MockDaemon::builder().with_disk_contents(vec![0; 100]),
            "100",
        ),
        (MockDaemon::builder().with_queues(0), "0 queues"),
        (MockDaemon::builder().with_queues(33), "33"),
    ] {
        let error = builder.start_unnamed().unwrap_err();
        let reason = error.source().unwrap().to_string();
        assert!(reason.contains(value), "{reason}");
    }
}

/// Descriptors belong to the process, and other tests open and close theirs at the same time: the
/// test runs itself once more, alone in a process.
#[test]
fn a_dropped_daemon_leaves_no_descriptor() {
    const ALONE: &str = "GUEST_MEMORY_SHM_MOCK_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = thread::current().name().unwrap().to_owned();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{output:?}"
        );
        return;
    }

    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let memory = guest(&[(0, 1 << 20)]);
    let before = count();
    let directory = tempfile::tempdir().unwrap();
    let daemon = MockDaemon::builder()
        .start(directory.path().join("s"))
        .unwrap();
    let started = count();
    for round in 0..5 {
        let (mut frontend, _) = negotiated(&daemon);
        frontend.set_mem_table(&infos(&memory)).unwrap();
        assert!(
            count() > started,
            "the negative control: a connection has descriptors"
        );
        round_trip(&memory, &mut frontend, GuestAddress(0x40000), &[5; 512]);
        if round % 2 == 0 {
            daemon.inject(1, Fault::HangUpBefore);
            assert!(frontend.set_mem_table(&infos(&memory)).is_err());
        }
        drop(frontend);
        daemon.wait_disconnected(LIMIT).unwrap();
        assert_eq!(count(), started, "after connection {round}");
    }
    drop(daemon);
    assert_eq!(count(), before);
}
