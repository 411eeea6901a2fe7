//! The share with qemu-storage-daemon, whole, stopped and killed.

use std::sync::{Mutex, mpsc};

use super::relay::{ADD_MEM_REG, relay};
use super::*;

/// Shares three regions with a qemu-storage-daemon to which `act` happens before the second one.
fn update_disturbed(
    limit: Duration,
    act: impl FnOnce(&mut StorageDaemon) + Send + 'static,
) -> Option<(ShareError, MemoryTable)> {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let daemon = StorageDaemon::start(&image, None)?;
    let stream = UnixStream::connect(&daemon.socket).unwrap();
    let daemon = Arc::new(Mutex::new(daemon));
    let (disturbed, mut adds, mut act) = (Arc::clone(&daemon), 0, Some(act));
    let (stream, relay) = relay(stream, move |request, _| {
        adds += usize::from(request == ADD_MEM_REG);
        if let Some(act) = act.take_if(|_| adds == 2) {
            act(&mut disturbed.lock().unwrap());
        }
    });
    let vmm = Vmm::negotiate(stream);
    assert!(vmm.features.contains(Features::CONFIGURE_MEM_SLOTS));
    let mut share = vmm.share().with_deadline(limit);
    let error = share
        .update_table(&memory(&[0, 1, 2]).memory_table())
        .unwrap_err();
    assert!(share.broken().is_some());
    // The relay may be waiting for it.
    daemon.lock().unwrap().process.kill();
    drop(vmm);
    relay.join().unwrap();
    Some((error, share.table().clone()))
}

#[test]
fn qemu_storage_daemon_takes_regions_and_gives_them_back() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [0x42; 4096]).unwrap();
    let Some(daemon) = StorageDaemon::start(&image, None) else {
        return;
    };
    let mut vmm = Vmm::negotiate(UnixStream::connect(&daemon.socket).unwrap());
    let mut share = vmm.share();
    let memory = memory(&[0, 10, 20]);
    share.update_table(&memory.memory_table()).unwrap();
    let mut driver = vmm.driver(&memory, &share);
    for round in 0..3 {
        // It reads through the regions that are there.
        for start in [10, 20] {
            let buffer = GuestAddress(start * MIB + round * 4096);
            driver.read(0, &[(buffer, 512)]).unwrap();
            assert_eq!(
                memory.read_obj::<u64>(buffer).unwrap(),
                0x4242_4242_4242_4242
            );
        }
        share
            .update_table(&without(&memory, &[10, 20]).memory_table())
            .unwrap();
        share.update_table(&memory.memory_table()).unwrap();
    }
}

#[test]
fn a_qemu_storage_daemon_that_is_stopped_during_an_update_is_silent() {
    let disturbed = update_disturbed(Duration::from_secs(2), |daemon| daemon.process.stop());
    if let Some((error, held)) = disturbed {
        assert!(
            matches!(error.failure(), Some(DaemonFailure::Silent(_))),
            "{error:?}"
        );
        assert!(
            error.to_string().contains("add the region 0x100000..="),
            "{error}"
        );
        assert_eq!(held.regions().len(), 1);
    }
}

#[test]
fn a_qemu_storage_daemon_that_is_killed_during_an_update_hung_up() {
    let disturbed = update_disturbed(PATIENCE, |daemon| daemon.process.kill());
    if let Some((error, held)) = disturbed {
        assert!(
            matches!(error.failure(), Some(DaemonFailure::HungUp(_))),
            "{error:?}"
        );
        assert!(
            error.to_string().contains("add the region 0x100000..="),
            "{error}"
        );
        assert_eq!(held.regions().len(), 1);
    }
}

#[test]
fn a_qemu_storage_daemon_that_is_killed_before_it_answers_hung_up() {
    // Stopped first, so that it can receive the region but not answer; the kill comes from another
    // thread while the update waits, or just before it sends: both are a hang-up.
    let (sender, receiver) = mpsc::channel();
    let killer = thread::spawn(move || {
        // Nothing comes where there is no such daemon.
        if let Ok(pid) = receiver.recv() {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    });
    let disturbed = update_disturbed(PATIENCE, move |daemon| {
        daemon.process.stop();
        sender.send(daemon.process.pid()).unwrap();
    });
    killer.join().unwrap();
    if let Some((error, _)) = disturbed {
        assert!(
            matches!(error.failure(), Some(DaemonFailure::HungUp(_))),
            "{error:?}"
        );
    }
}
