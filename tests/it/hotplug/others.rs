//! What other VMMs get wrong about memory tables that change, each as a test.

use std::error::Error as _;

use guest_memory_shm::mock::{Fault, LoggedRequest};
use guest_memory_shm::{
    Access, AddressSpaceError, BackingSource, DaemonFailure, GuestRom, ShareError,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::support::chain;

fn daemon() -> MockDaemon {
    MockDaemon::builder().start_unnamed().unwrap()
}

/// The changes of the table among a daemon's requests, by name.
fn changes(daemon: &MockDaemon) -> Vec<&'static str> {
    let name = |request: LoggedRequest| match request {
        LoggedRequest::SetMemTable(_) => Some("set"),
        LoggedRequest::AddMemRegion(_) => Some("add"),
        LoggedRequest::RemoveMemRegion(_) => Some("remove"),
        _ => None,
    };
    daemon.requests().into_iter().filter_map(name).collect()
}

/// Cloud Hypervisor: a resize is not undone when one device refuses the region.
#[test]
fn a_resize_is_undone_when_one_device_refuses_the_region() {
    let (space, daemons) = (space(), [daemon(), daemon(), daemon()]);
    for daemon in &daemons {
        space.attach("device", share(daemon, PATIENCE)).unwrap();
    }
    daemons[1].inject(1, Fault::Refuse);
    space.insert(region(4)).unwrap_err();
    for daemon in &daemons {
        assert_eq!(mapped(daemon), published(&space));
        assert_eq!(daemon.table().len(), 1);
    }
}

/// Cloud Hypervisor: a device that is disconnected makes the resize fail.
#[test]
fn a_resize_goes_on_without_a_device_that_is_disconnected() {
    let (space, gone, there) = (space(), daemon(), daemon());
    let id = space.attach("gone", share(&gone, PATIENCE)).unwrap();
    space.attach("there", share(&there, PATIENCE)).unwrap();
    gone.hang_up();
    gone.wait_disconnected(PATIENCE).unwrap();
    for at in [4, 6] {
        let report = space.insert(region(at)).unwrap();
        assert_eq!(report.stale()[0].name(), "gone");
        assert!(
            report.stale()[0].to_string().contains("hung up"),
            "{report:?}"
        );
    }
    assert_eq!(mapped(&there), published(&space));
    reconnect(&space, &id, &gone).unwrap();
    assert_eq!(mapped(&gone), published(&space));
    assert!(space.listeners().unwrap()[0].stale().is_none());
}

/// How many descriptors of this process are of the file.
fn descriptors_of(ino: u64) -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    // One may be closed meanwhile, by another test.
    let files = fds.filter_map(|fd| std::fs::metadata(fd.path()).ok());
    files
        .filter(|file| std::os::unix::fs::MetadataExt::ino(file) == ino)
        .count()
}

/// What a device held that is gone does not keep RAM from being given back.
#[test]
fn ram_that_is_unplugged_while_a_device_is_away_is_free() {
    let (space, daemon) = (space(), daemon());
    space.attach("gone", share(&daemon, PATIENCE)).unwrap();
    let plug = region(4);
    let ino = plug.backing().identity().ino;
    space.insert(plug).told_all();
    assert!(descriptors_of(ino) > 0);
    daemon.hang_up();
    daemon.wait_disconnected(PATIENCE).unwrap();
    let report = space.remove((GuestAddress(4 * MIB), MIB)).unwrap();
    assert_eq!(report.stale().len(), 1);
    drop(report);
    assert_eq!(descriptors_of(ino), 0);
}

/// Cloud Hypervisor: reconnecting sends the whole table by SET_MEM_TABLE, so that a guest that
/// grew past 8 regions cannot reconnect.
#[test]
fn a_guest_that_grew_past_eight_regions_reconnects() {
    let (space, daemon) = (space(), daemon());
    let id = space.attach("device", share(&daemon, PATIENCE)).unwrap();
    for at in 1..=20 {
        space.insert(region(2 * at)).told_all();
    }
    daemon.hang_up();
    daemon.clear_requests();
    reconnect(&space, &id, &daemon).unwrap();
    assert_eq!(changes(&daemon), ["add"; 21]);
    assert_eq!(mapped(&daemon), published(&space));

    // One that comes back as another program, which takes no single regions, is told so.
    daemon.hang_up();
    daemon.wait_disconnected(PATIENCE).unwrap();
    let simple = MockDaemon::builder()
        .without_mem_slots()
        .start_unnamed()
        .unwrap();
    let (frontend, features) = connect(&simple);
    let done = space.reconnect(&id, &frontend, features);
    drop(frontend);
    let error = chain(&done.unwrap_err());
    assert!(error.contains("21 regions"), "{error}");
    assert_eq!(changes(&simple), [""; 0]);
    assert!(space.listeners().unwrap()[0].is(&id));
    assert!(space.listeners().unwrap()[0].stale().is_some());
    // It is away, as before, and not in the way of all that follows.
    simple.wait_disconnected(PATIENCE).unwrap();
    for at in 8..=20 {
        let report = space.remove((GuestAddress(2 * at * MIB), MIB)).unwrap();
        assert!(report.stale()[0].is(&id));
    }
    reconnect(&space, &id, &simple).unwrap();
    assert_eq!(mapped(&simple), published(&space));
}

/// Cloud Hypervisor: REM_MEM_REG is never sent.
#[test]
fn what_is_unplugged_is_taken_from_the_daemon() {
    let (space, daemon) = (space(), daemon());
    space.attach("device", share(&daemon, PATIENCE)).unwrap();
    space.insert(region(4)).told_all();
    daemon.clear_requests();
    space.remove((GuestAddress(4 * MIB), MIB)).told_all();
    assert_eq!(changes(&daemon), ["remove"]);
    assert_eq!(mapped(&daemon), published(&space));
}

/// crosvm: no acknowledgement is asked for, so that a table that was refused goes unseen.
#[test]
fn a_table_that_is_refused_is_seen_with_acknowledgements_and_without() {
    for builder in [
        MockDaemon::builder(),
        MockDaemon::builder().without_reply_ack(),
    ] {
        for builder in [builder.clone(), builder.without_mem_slots()] {
            let (space, daemon) = (space(), builder.start_unnamed().unwrap());
            let share = share(&daemon, PATIENCE);
            let id = space.attach_required("device", share).unwrap();
            daemon.inject(1, Fault::Refuse);
            space.insert(region(4)).unwrap_err();
            assert_eq!(published(&space).len(), 1);
            if space.listeners().unwrap()[0].stale().is_some() {
                reconnect(&space, &id, &daemon).unwrap();
            }
            assert_eq!(mapped(&daemon), published(&space));
        }
    }
}

/// libkrun: regions without a descriptor are dropped silently from the table.
#[test]
fn every_region_has_a_descriptor_and_is_in_the_table() {
    let (space, daemon) = (space(), daemon());
    space.attach("device", share(&daemon, PATIENCE)).unwrap();
    for (at, backing) in [(4, BackingSource::Memfd), (6, BackingSource::PosixShm)] {
        let options = RamOptions::new().with_backing(backing);
        let region = GuestRegionShm::new((GuestAddress(at * MIB), MIB), &options).unwrap();
        space.insert(region).told_all();
    }
    let memory = space.published().memory();
    assert!(memory.iter().all(|region| region.file_offset().is_some()));
    assert_eq!(memory.memory_table().regions().len(), memory.num_regions());
    assert_eq!(mapped(&daemon), published(&space));
}

/// libkrun: windows of devices are shared as RAM. What is no RAM cannot be in a memory here.
#[test]
fn what_is_no_ram_is_in_no_table() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("firmware");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let options = RamOptions::new()
        .with_backing(BackingSource::File(path))
        .with_access(Access::ReadOnly);
    let _rom = GuestRom::new((GuestAddress(8 * MIB), MIB), &options).unwrap();
    assert!(GuestRegionShm::<()>::new((GuestAddress(8 * MIB), MIB), &options).is_err());
    assert_eq!(
        space().published().memory().memory_table().regions().len(),
        1
    );
}

/// QEMU: a daemon that refuses a region at hotplug is only logged, and the plug succeeds.
#[test]
fn a_refusal_is_an_error_that_names_the_device_the_region_and_the_cause() {
    let (space, daemon) = (space(), daemon());
    space.attach("net0", share(&daemon, PATIENCE)).unwrap();
    daemon.inject(1, Fault::Refuse);
    let plug = region(4);
    let range = plug.range();
    match space.insert(plug).unwrap_err() {
        AddressSpaceError::Change {
            listener,
            error,
            stale,
            ..
        } => {
            assert_eq!((listener.as_str(), error.range()), ("net0", Some(range)));
            assert!(!error.is_away() && stale.is_empty());
            let cause = error.source().and_then(|cause| cause.downcast_ref());
            assert!(matches!(
                cause.and_then(ShareError::failure),
                Some(DaemonFailure::Refused(_))
            ));
        }
        other => panic!("{other}"),
    }
}

/// QEMU: a daemon that hangs blocks all others indefinitely.
#[test]
fn a_silent_device_costs_its_deadline_and_others_no_more() {
    let (space, silent, there) = (space(), daemon(), daemon());
    let id = space.attach("silent", share(&silent, PATIENCE)).unwrap();
    space.attach("there", share(&there, PATIENCE)).unwrap();
    silent.inject(1, Fault::NeverAnswer);
    set_limit(&space, &id, Duration::from_millis(80));
    let report = space.insert(region(4)).unwrap();
    assert!(
        report.stale()[0]
            .to_string()
            .contains("did not answer within 80ms")
    );
    assert_eq!(mapped(&there), published(&space));
}

/// All silent at once: were they told one after the other, the last would be told only after the
/// deadlines of the others, each of which fails the test by its length.
#[test]
fn devices_are_told_side_by_side() {
    let space = space();
    let silent: Vec<_> = (0..3).map(|_| daemon()).collect();
    let last = daemon();
    for daemon in &silent {
        daemon.inject(2, Fault::NeverAnswer);
        space
            .attach("silent", share(daemon, Duration::from_secs(3600)))
            .unwrap();
    }
    space.attach("last", share(&last, PATIENCE)).unwrap();
    last.clear_requests();
    std::thread::scope(|scope| {
        let plug = scope.spawn(|| space.insert(region(4)).unwrap_err());
        // It hears of it while the others have an hour left.
        last.wait_requests(1, PATIENCE).unwrap();
        assert_eq!(changes(&last), ["add"]);
        // To hang up is to refuse.
        silent.iter().for_each(MockDaemon::hang_up);
        plug.join().unwrap();
    });
    assert_eq!(published(&space).len(), 1);
    assert_eq!(mapped(&last), published(&space));
}
