//! No thread is started for daemons, and no child disturbs them.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use guest_memory_shm::mock::Fault;
use guest_memory_shm::{Exchange, ListenerError, MemoryListener, WaitFor};
use nix::errno::Errno;
use nix::libc::{SYS_clone, SYS_clone3};
use nix::sys::signal::Signal;
use seccompiler::{SeccompAction, apply_filter};

use super::*;
use crate::fork::dies_of;
use crate::isolation::in_own_process;
use crate::seccomp::{Call, deadly, filter, forbidden};

/// What starts a thread or a process.
const CLONES: [Call; 2] = [(SYS_clone, None), (SYS_clone3, None)];

type Tasks = BTreeSet<String>;

/// The threads of this process, by number.
fn tasks() -> Tasks {
    let all = std::fs::read_dir("/proc/self/task").unwrap();
    all.map(|task| task.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Looks at the threads whenever it is told something: before it, meanwhile and after it.
#[derive(Clone, Default)]
struct Looks(Arc<Mutex<Tasks>>);

impl Looks {
    fn look(&self) {
        self.0.lock().unwrap().extend(tasks());
    }
}

impl MemoryListener for Looks {
    fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        self.look();
        Ok(())
    }
    fn update(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        unreachable!("it has an exchange")
    }
    fn begin_update<'a>(
        &'a mut self,
        _: &GuestMemoryShm,
        _: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        self.look();
        Some(Box::new(LooksInSteps(self.clone(), 0)))
    }
}

struct LooksInSteps(Looks, usize);

impl Exchange for LooksInSteps {
    fn advance(&mut self, _: Instant) -> Option<Result<(), ListenerError>> {
        self.0.look();
        self.1 += 1;
        (self.1 > 3).then_some(Ok(()))
    }
    fn waits_for(&self) -> WaitFor<'_> {
        WaitFor::moment(Instant::now())
    }
}

/// All that is done with daemons, while the listener looks. `run` runs each step: what the daemons
/// do before it, such as starting threads for a connection, is done by then.
fn all_that_is_done(
    daemons: &[MockDaemon; 3],
    looks: &Looks,
    run: &mut dyn FnMut(&mut dyn FnMut()),
) {
    let mut step = |mut work: Box<dyn FnMut() + '_>| run(&mut *work);
    let space = space();
    let mut shares: Vec<_> = daemons
        .iter()
        .map(|daemon| share(daemon, PATIENCE))
        .collect();
    let mut ids = Vec::new();
    step(Box::new(|| {
        ids.extend(
            shares
                .drain(..)
                .map(|share| space.attach("disk", share).unwrap()),
        );
        space.attach("looks", looks.clone()).unwrap();
    }));
    let id = &ids[0];
    step(Box::new(|| space.insert(region(4)).told_all()));
    step(Box::new(|| {
        let place = (GuestAddress(4 * MIB), MIB);
        let change = space.transaction().remove(place).insert(region(4));
        change.insert(region(8)).commit().told_all();
    }));
    step(Box::new(|| {
        space.remove((GuestAddress(8 * MIB), MIB)).told_all()
    }));
    step(Box::new(|| space.refresh(id).unwrap()));
    step(Box::new(|| {
        let log = |share: &mut Share| {
            share.start_log().unwrap();
            drop(share.drain_dirty());
        };
        space.with_listener(id, log).unwrap();
        space.insert(region(8)).told_all();
        drop(space.with_listener(id, Share::stop_log).unwrap());
    }));
    daemons[1].inject(1, Fault::Refuse);
    step(Box::new(|| drop(space.insert(region(12)).unwrap_err())));

    // One that is silent, until its deadline.
    set_limit(&space, id, Duration::from_millis(20));
    daemons[0].inject(1, Fault::NeverAnswer);
    step(Box::new(|| {
        let report = space.insert(region(12)).unwrap();
        assert!(report.stale()[0].is(id));
    }));
    // And back.
    set_limit(&space, id, PATIENCE);
    daemons[0].wait_disconnected(PATIENCE).unwrap();
    let (frontend, features) = connect(&daemons[0]);
    step(Box::new(|| {
        space.reconnect(id, &frontend, features).unwrap()
    }));
    for daemon in daemons {
        assert_eq!(mapped(daemon), published(&space));
    }

    let first = ids.remove(0);
    let mut first = Some(first);
    step(Box::new(|| {
        drop(space.detach(first.take().unwrap()).unwrap())
    }));
    let mut space = Some(space);
    step(Box::new(|| drop(space.take())));
}

fn start() -> [MockDaemon; 3] {
    std::array::from_fn(|_| MockDaemon::builder().start_unnamed().unwrap())
}

#[test]
fn no_thread_is_started_by_anything_that_is_done_with_daemons() {
    in_own_process(|| {
        let (daemons, looks) = (start(), Looks::default());
        let mut seen = 0;
        all_that_is_done(&daemons, &looks, &mut |work| {
            let before = tasks();
            work();
            looks.look();
            // Those of a daemon whose connection has ended may be gone.
            let during = std::mem::take(&mut *looks.0.lock().unwrap());
            let new: Tasks = during.difference(&before).cloned().collect();
            assert_eq!(new, Tasks::new());
            seen += 1;
        });
        assert_eq!(seen, 11);
        // One that is started is seen.
        let before = tasks();
        let during = std::thread::spawn(tasks).join().unwrap();
        assert_eq!(during.difference(&before).count(), 1);
    });
}

#[test]
fn all_is_done_where_a_thread_that_is_started_is_the_end() {
    in_own_process(|| {
        let daemons = start();
        // The daemons' threads have no filter: they were started by another one.
        let looks = Looks::default();
        deadly(&CLONES, || {
            all_that_is_done(&daemons, &looks, &mut |work| work())
        });

        // The filter is one.
        let start = || std::thread::Builder::new().spawn(|| ()).map(drop);
        let refused = forbidden(&CLONES, Errno::EPERM, start).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::EPERM as i32));
        let program = filter(&CLONES, SeccompAction::KillProcess);
        let dies = dies_of(|| {
            apply_filter(&program).unwrap();
            let _ = start();
        });
        assert_eq!(dies, Some(Signal::SIGSYS));
    });
}

#[test]
fn a_child_that_drops_its_copy_of_an_address_space_says_nothing_to_the_daemons() {
    in_own_process(|| {
        let (mut space, daemons) = (Some(space()), start());
        let ids = {
            let space = space.as_ref().unwrap();
            let attach = |daemon| space.attach("disk", share(daemon, PATIENCE)).unwrap();
            daemons.each_ref().map(attach)
        };
        for daemon in &daemons {
            daemon.clear_requests();
        }
        assert_eq!(dies_of(|| drop(space.take())), None);
        let space = space.unwrap();
        for daemon in &daemons {
            assert!(daemon.is_connected());
            assert_eq!(daemon.requests(), []);
        }
        space.insert(region(4)).told_all();
        for (daemon, id) in daemons.iter().zip(&ids) {
            assert_eq!(mapped(daemon), published(&space));
            space.refresh(id).unwrap();
        }
    });
}
