//! The share with qemu-storage-daemon, whole, stopped and killed.

use super::*;

/// A connection that does something at the second ADD_MEM_REG.
struct At<F> {
    frontend: Frontend,
    adds: usize,
    act: Option<F>,
}

impl<F: FnOnce()> DaemonConnection for At<F> {
    fn request_acks(&mut self) {
        self.frontend.request_acks();
    }
    fn set_mem_table(
        &mut self,
        regions: &[TableRegion],
    ) -> Result<Option<Vec<u64>>, DaemonFailure> {
        DaemonConnection::set_mem_table(&mut self.frontend, regions)
    }
    fn add_mem_region(&mut self, region: &TableRegion) -> Result<Option<u64>, DaemonFailure> {
        self.adds += 1;
        if self.adds == 2
            && let Some(act) = self.act.take()
        {
            act();
        }
        DaemonConnection::add_mem_region(&mut self.frontend, region)
    }
    fn remove_mem_region(&mut self, region: &TableRegion) -> Result<(), DaemonFailure> {
        DaemonConnection::remove_mem_region(&mut self.frontend, region)
    }
    fn max_mem_slots(&mut self) -> Result<u64, DaemonFailure> {
        self.frontend.max_mem_slots()
    }
    fn barrier(&mut self) -> Result<(), DaemonFailure> {
        self.frontend.barrier()
    }
    fn disconnector(&self) -> Option<Disconnector> {
        DaemonConnection::disconnector(&self.frontend)
    }
}

/// Shares three regions with a qemu-storage-daemon to which `act` happens before the second one.
fn update_disturbed(
    limit: Duration,
    act: impl FnOnce(&mut StorageDaemon),
) -> Option<(ShareError, MemoryTable)> {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let mut daemon = StorageDaemon::start(&image, None)?;
    let (frontend, device) = negotiate(UnixStream::connect(&daemon.socket).unwrap());
    assert!(
        device
            .protocol_features()
            .contains(Features::CONFIGURE_MEM_SLOTS)
    );
    let sink = At {
        frontend,
        adds: 0,
        act: Some(|| act(&mut daemon)),
    };
    let mut share = VhostUserShare::new(sink, device.protocol_features()).with_deadline(limit);
    let error = share
        .update_table(&memory(&[0, 1, 2]).memory_table())
        .unwrap_err();
    assert!(share.broken().is_some());
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
    let (frontend, device) = negotiate(UnixStream::connect(&daemon.socket).unwrap());
    let mut share = VhostUserShare::new(frontend, device.protocol_features());
    let memory = memory(&[0, 10, 20]);
    share.update_table(&memory.memory_table()).unwrap();
    let mut driver = driver(&memory, &mut share, &device);
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
        let report = share
            .update_table(&without(&memory, &[10, 20]).memory_table())
            .unwrap();
        assert_eq!(report.removed, 2);
        let report = share.update_table(&memory.memory_table()).unwrap();
        assert_eq!(report.added, 2);
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
    let mut killer = None;
    let disturbed = update_disturbed(PATIENCE, |daemon| {
        daemon.process.stop();
        let pid = daemon.process.pid();
        killer = Some(thread::spawn(move || {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }));
    });
    if let Some((error, _)) = disturbed {
        assert!(
            matches!(error.failure(), Some(DaemonFailure::HungUp(_))),
            "{error:?}"
        );
        killer.unwrap().join().unwrap();
    }
}
