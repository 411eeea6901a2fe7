//! A daemon made of the vhost crate and `receive`, served over a real socket.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use guest_memory_shm::{GuestRegionShm, VhostUserShare};
use tempfile::TempDir;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{
    BackendListener, Error as ProtocolError, Frontend, Listener, VhostUserFrontend,
    VhostUserProtocolFeatures as Features,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::GuestAddressSpace;

use super::handler::{Handler, PROTOCOL};
use super::*;
use crate::isolation::in_own_process;
use crate::proc::leaves_nothing_but_heaps;

/// For what comes at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(10);
const SLOTS: usize = 16;

/// The daemon, serving one frontend after the other until it is dropped.
struct Daemon {
    handler: Arc<Mutex<Handler>>,
    directory: TempDir,
    serving: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Serves `frontends` connections; a refused message does not end one.
    fn start(policy: ReceivePolicy, frontends: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let handler = Arc::new(Mutex::new(Handler::new(policy)));
        let mut listener = Listener::new(directory.path().join("socket"), true).unwrap();
        let served = handler.clone();
        let serving = thread::spawn(move || {
            for _ in 0..frontends {
                let mut accept = BackendListener::new(&mut listener, served.clone()).unwrap();
                let mut connection = accept.accept().unwrap().unwrap();
                // A refusal has been answered, and the next message can follow.
                while let Ok(())
                | Err(ProtocolError::ReqHandlerError(_) | ProtocolError::InvalidMessage) =
                    connection.handle_request()
                {}
            }
        });
        Self {
            handler,
            directory,
            serving: Some(serving),
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A frontend that wants every message acknowledged.
    fn frontend(&self, features: Features) -> Frontend {
        let mut frontend = Frontend::from_stream(self.connect(), 1);
        frontend.set_owner().unwrap();
        frontend
            .set_features(frontend.get_features().unwrap())
            .unwrap();
        frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(features).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend
    }

    fn handler(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap()
    }

    /// Asserts that the daemon has `memory`, all of it and nothing else, and reads what is in it.
    #[track_caller]
    fn has(&self, memory: &GuestMemoryShm) {
        let handler = self.handler();
        let table = memory.memory_table();
        let expected: Vec<_> = table
            .regions()
            .iter()
            .map(|r| {
                let (range, user) = (r.range(), r.user_addr());
                region(range.start_addr().0, range.size(), user, r.mmap_offset())
            })
            .collect();
        assert_eq!(handler.table.regions(), expected);
        let published = handler.memory.memory();
        assert_eq!(published.num_regions(), expected.len());
        for region in memory.iter() {
            let addr = region.range().start_addr();
            let value = addr.0 ^ 0x1234_5678;
            memory.write_obj(value, addr).unwrap();
            assert_eq!(published.read_obj::<u64>(addr).unwrap(), value);
        }
    }
}

impl Drop for Daemon {
    /// Waits until the last frontend has hung up.
    fn drop(&mut self) {
        let serving = self.serving.take().unwrap();
        if !thread::panicking() {
            serving.join().unwrap();
        }
    }
}

fn info(region: ReceivedRegion, file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.guest_addr.0,
        memory_size: region.size,
        userspace_addr: region.user_addr,
        mmap_offset: region.mmap_offset,
        mmap_handle: file.as_raw_fd(),
    }
}

fn plugged(memory: &GuestMemoryShm, start: u64) -> GuestMemoryShm {
    let region = GuestRegionShm::new((GuestAddress(start), MIB), &RamOptions::new()).unwrap();
    memory.insert_region(Arc::new(region)).unwrap()
}

#[test]
fn a_share_gives_its_table_and_each_change_of_it() {
    for features in [PROTOCOL, Features::REPLY_ACK] {
        let daemon = Daemon::start(require_seals().with_mem_slots(SLOTS), 1);
        let mut share = VhostUserShare::new(&daemon.frontend(features), features).unwrap();
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 2 << 20)];
        let mut memory = GuestMemoryShm::from_ranges(&ranges).unwrap();
        share.update_table(&memory.memory_table()).unwrap();
        daemon.has(&memory);
        // In one region each: the handlers of the daemon know no other.
        for start in [4 * MIB, 6 * MIB, 2 * MIB] {
            memory = plugged(&memory, start);
            share.update_table(&memory.memory_table()).unwrap();
            daemon.has(&memory);
        }
        for start in [6 * MIB, 0] {
            (memory, _) = memory.remove_region(GuestAddress(start), MIB).unwrap();
            share.update_table(&memory.memory_table()).unwrap();
            daemon.has(&memory);
        }
        drop(share);
    }
}

#[test]
fn more_regions_than_slots_are_refused_by_the_frontend_and_by_the_daemon() {
    let daemon = Daemon::start(require_seals().with_mem_slots(2), 1);
    let mut frontend = daemon.frontend(PROTOCOL);
    let file = sealed(MIB);
    for n in 0..2 {
        frontend.add_mem_region(&info(good(n), &file)).unwrap();
    }
    assert!(frontend.add_mem_region(&info(good(2), &file)).is_err());
    assert_eq!(daemon.handler().table.regions(), [good(0), good(1)]);
    frontend.remove_mem_region(&info(good(0), &file)).unwrap();
    frontend.add_mem_region(&info(good(2), &file)).unwrap();
    assert_eq!(daemon.handler().table.regions(), [good(1), good(2)]);
    drop(frontend);
}

#[test]
fn rings_are_translated_by_the_table_and_must_be_in_one_region() {
    let daemon = Daemon::start(require_seals(), 1);
    let frontend = daemon.frontend(PROTOCOL);
    let file = sealed(2 * MIB);
    // Neighbours, which a ring must not use as one.
    let regions = [region(0, MIB, USER, 0), region(MIB, MIB, USER + MIB, MIB)];
    let infos = regions.map(|region| info(region, &file));
    frontend.set_mem_table(&infos).unwrap();
    frontend.set_vring_num(0, 256).unwrap();
    let place = |desc, avail, used| {
        let config = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        };
        frontend.set_vring_addr(0, &config)
    };
    place(USER + MIB - 4096, USER, USER + MIB).unwrap();
    let expected = [MIB - 4096, 0, MIB].map(GuestAddress);
    assert_eq!(daemon.handler().rings, Some(expected));
    for (desc, avail, used) in [
        (USER + MIB - 4080, USER, USER + 8192),
        (USER, USER + MIB - 512, USER + 8192),
        (USER, USER + 4096, USER + 2 * MIB - 2048),
        (USER, USER - 4096, USER + 8192),
        (0, USER, USER + 8192),
        (USER, USER + 4096, USER + 2 * MIB),
    ] {
        assert!(
            place(desc, avail, used).is_err(),
            "{desc:x} {avail:x} {used:x}"
        );
        assert_eq!(daemon.handler().rings, Some(expected));
    }
    drop(frontend);
}

/// What a hostile frontend sends, each with a file that it may or may not suit.
fn hostile() -> Vec<(&'static str, ReceivedRegion, File)> {
    let last = u64::MAX - (u64::MAX % PAGE);
    let beside = |guest, size, user, offset| region(64 * MIB + guest, size, user, offset);
    let far = USER + 64 * MIB;
    vec![
        (
            "guest overlap",
            region(MIB - PAGE, MIB, far, 0),
            sealed(MIB),
        ),
        (
            "user overlap",
            beside(0, MIB, USER + MIB - PAGE, 0),
            sealed(MIB),
        ),
        ("both again", good(0), sealed(MIB)),
        ("guest wrap", region(last, MIB, far, 0), sealed(MIB)),
        ("user wrap", beside(0, MIB, last, 0), sealed(MIB)),
        ("offset wrap", beside(0, MIB, far, last), sealed(MIB)),
        (
            "longer than the file",
            beside(0, 2 * MIB, far, 0),
            sealed(MIB),
        ),
        ("past the file", beside(0, MIB, far, PAGE), sealed(MIB)),
        ("empty file", beside(0, PAGE, far, 0), sealed(0)),
        ("guest unaligned", beside(8, PAGE, far, 0), sealed(MIB)),
        ("size unaligned", beside(0, 5000, far, 0), sealed(MIB)),
        ("offset unaligned", beside(0, PAGE, far, 8), sealed(MIB)),
        ("not sealed", beside(0, MIB, far, 0), unsealed(MIB)),
        (
            "no memory",
            beside(0, PAGE, far, 0),
            File::open("/dev/null").unwrap(),
        ),
        (
            "a directory",
            beside(0, PAGE, far, 0),
            File::open("/").unwrap(),
        ),
    ]
}

#[test]
fn a_hostile_frontend_gets_a_refusal_and_the_daemon_goes_on_with_its_old_table() {
    in_own_process(|| {
        let daemon = Daemon::start(require_seals().with_mem_slots(SLOTS), 1);
        let mut frontend = daemon.frontend(PROTOCOL);
        let ours = [sealed(MIB), sealed(MIB)];
        let infos = [0, 1].map(|n| info(good(n), &ours[usize::try_from(n).unwrap()]));
        frontend.set_mem_table(&infos).unwrap();
        let goes_on = |frontend: &mut Frontend| {
            frontend.get_features().unwrap();
            let handler = daemon.handler();
            assert_eq!(handler.table.regions(), [good(0), good(1)]);
            assert_eq!(handler.memory.memory().num_regions(), 2);
        };
        leaves_nothing_but_heaps(|| {
            for (name, region, file) in hostile() {
                let forged = info(region, &file);
                let refused = |answer: vhost::Result<_>| {
                    let error = answer.expect_err(name);
                    let vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError) =
                        error
                    else {
                        panic!("{name}: {error:?}");
                    };
                };
                refused(frontend.add_mem_region(&forged).map(drop));
                goes_on(&mut frontend);
                refused(frontend.set_mem_table(&[infos[0], forged]).map(drop));
                goes_on(&mut frontend);
                // Alone it may be no overlap.
                if !["guest overlap", "user overlap", "both again"].contains(&name) {
                    refused(frontend.set_mem_table(&[forged]).map(drop));
                    goes_on(&mut frontend);
                    refused(frontend.remove_mem_region(&forged));
                    goes_on(&mut frontend);
                }
            }
            let many: Vec<_> = (0..17).map(|n| info(good(n), &ours[0])).collect();
            assert!(
                frontend.set_mem_table(&many).is_err(),
                "more than the slots"
            );
            goes_on(&mut frontend);
        });
        // A good change is taken as before.
        frontend.add_mem_region(&info(good(2), &ours[1])).unwrap();
        frontend
            .remove_mem_region(&info(good(0), &ours[0]))
            .unwrap();
        assert_eq!(daemon.handler().table.regions(), [good(1), good(2)]);
        frontend.set_mem_table(&infos).unwrap();
        goes_on(&mut frontend);
        drop(frontend);
    });
}
