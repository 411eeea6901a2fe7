//! Calls of the address space from inside of its own changes, which would wait for themselves.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Weak;
use std::thread;

use vhost::vhost_user::VhostUserProtocolFeatures as Features;

use super::*;

/// What every method says that would have to wait.
fn all_refuse(space: &AddressSpace, id: Option<&ListenerId<Script>>) {
    let reentrant = |failed: Option<AddressSpaceError>| match failed {
        Some(error @ AddressSpaceError::Reentrant) => {
            assert!(error.to_string().contains("wait for itself"), "{error}");
        }
        other => panic!("{other:?}"),
    };
    reentrant(space.insert(region(32)).err());
    reentrant(space.remove((GuestAddress(0), MIB)).err());
    reentrant(space.transaction().commit().err());
    reentrant(space.listeners().err());
    let error = space
        .attach("z", script("z", &Said::default()))
        .unwrap_err();
    let (error, listener) = error.into_parts();
    reentrant(Some(error));
    assert_eq!(listener.updates, 0);
    if let Some(id) = id {
        reentrant(space.with_listener(id, |_| ()).err());
        reentrant(space.refresh(id).err());
        reentrant(space.detach(id.clone()).err());
    }
    // These never wait.
    assert!(!present(space).is_empty());
    assert!(space.atomic().memory().num_regions() > 0);
    let shown = format!("{space:?}");
    assert!(shown.contains("a change is under way"), "{shown}");
}

/// Does something whenever it is called.
struct Does<F> {
    what: F,
    in_steps: bool,
}

impl<F: FnMut() + Send + 'static> MemoryListener for Does<F> {
    fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        (self.what)();
        Ok(())
    }
    fn update(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
        (self.what)();
        Ok(())
    }
    fn begin_update<'a>(
        &'a mut self,
        _: &GuestMemoryShm,
        _: Instant,
    ) -> Option<Box<dyn Exchange + 'a>> {
        if !self.in_steps {
            return None;
        }
        (self.what)();
        let calls = Cell::new(0);
        let what = RefCell::new(&mut self.what);
        Some(Box::new(DoesInSteps { what, calls }))
    }
}

/// Does something at each of its four calls, the last of which is its drop.
struct DoesInSteps<'a, F: FnMut()> {
    what: RefCell<&'a mut F>,
    calls: Cell<usize>,
}

impl<F: FnMut()> DoesInSteps<'_, F> {
    fn call(&self) -> usize {
        (self.what.borrow_mut())();
        self.calls.set(self.calls.get() + 1);
        self.calls.get()
    }
}

impl<F: FnMut()> Exchange for DoesInSteps<'_, F> {
    fn advance(&mut self, _: Instant) -> Option<Result<(), ListenerError>> {
        (self.call() > 1).then_some(Ok(()))
    }
    fn waits_for(&self) -> WaitFor<'_> {
        self.call();
        WaitFor::moment(Instant::now())
    }
}

impl<F: FnMut()> Drop for DoesInSteps<'_, F> {
    fn drop(&mut self) {
        self.call();
    }
}

/// Calls everything of the address space, and counts how often it did.
fn meddler(
    space: &Arc<AddressSpace>,
    id: &ListenerId<Script>,
    in_steps: bool,
    calls: &Arc<Mutex<usize>>,
) -> Does<impl FnMut() + Send + 'static> {
    let (space, id, calls) = (Arc::downgrade(space), id.clone(), calls.clone());
    Does {
        what: move || {
            all_refuse(&Weak::upgrade(&space).unwrap(), Some(&id));
            *calls.lock().unwrap() += 1;
        },
        in_steps,
    }
}

#[test]
fn a_listener_that_calls_the_address_space_is_told_so() {
    // Told: by one call, or by five of an exchange.
    for (in_steps, told) in [(false, 1), (true, 5)] {
        let (space, log, calls) = (Arc::new(space()), Said::default(), Arc::default());
        let id = space.attach("a", script("a", &log)).unwrap();
        for name in ["b", "c", "d"] {
            let meddler = meddler(&space, &id, in_steps, &calls);
            space.attach(name, meddler).unwrap();
        }
        *calls.lock().unwrap() = 0;
        space.insert(region(4)).told_all();
        space.remove((GuestAddress(4 * MIB), MIB)).told_all();
        // Each is asked and told, twice.
        assert_eq!(*calls.lock().unwrap(), 3 * 2 * (1 + told));
        assert_eq!(present(&space), [0]);
        assert_eq!(space.listeners().unwrap().len(), 4);
        let shown = format!("{space:?}");
        assert!(shown.contains("name: \"b\""), "{shown}");
    }
}

#[test]
fn the_closure_of_with_listener_cannot_call_it_either() {
    let (space, log) = (space(), Said::default());
    let id = space.attach("a", script("a", &log)).unwrap();
    let called = space.with_listener(&id, |_| {
        all_refuse(&space, Some(&id));
        7
    });
    assert_eq!(called.unwrap(), 7);
    space.insert(region(4)).told_all();
}

#[test]
fn what_is_dropped_or_displayed_in_a_change_cannot_call_it_either() {
    #[derive(Debug)]
    struct Meddles(Weak<AddressSpace>, Arc<Mutex<usize>>);
    impl Meddles {
        fn meddle(&self) {
            if let Some(space) = self.0.upgrade() {
                all_refuse(&space, None);
                *self.1.lock().unwrap() += 1;
            }
        }
    }
    impl Drop for Meddles {
        fn drop(&mut self) {
            self.meddle();
        }
    }
    impl std::fmt::Display for Meddles {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.meddle();
            f.write_str("it died")
        }
    }
    impl std::error::Error for Meddles {}
    struct Dies(Weak<AddressSpace>, Arc<Mutex<usize>>);
    impl MemoryListener for Dies {
        fn check(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
            match memory.num_regions() {
                1 => Ok(()),
                _ => Err(ListenerError::away(Meddles(self.0.clone(), self.1.clone()))),
            }
        }
        fn update(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
    }
    let (space, calls) = (Arc::new(space()), Arc::default());
    let dies = Dies(Arc::downgrade(&space), Arc::clone(&calls));
    space.attach("a", dies).unwrap();
    let report = space.insert(region(4)).unwrap();
    // Displayed, once.
    assert_eq!(report.stale()[0].to_string(), "\"a\" is stale (it died)");
    assert_eq!(*calls.lock().unwrap(), 1);
    drop(report);
    // Dropped, when it is told the next memory.
    space.remove((GuestAddress(4 * MIB), MIB)).told_all();
    assert_eq!(*calls.lock().unwrap(), 2);
}

#[test]
fn a_listener_may_change_another_address_space_but_not_by_way_of_it_its_own() {
    let (first, second) = (Arc::new(space()), Arc::new(space()));
    let calls = Arc::new(Mutex::new(0));
    // Its listeners are told side by side.
    for name in ["a", "b"] {
        let (first, calls) = (Arc::downgrade(&first), Arc::clone(&calls));
        let meddles = Does {
            what: move || {
                let first = first.upgrade().unwrap();
                // While nothing of the first is under way it could be changed from here.
                if first.listeners().is_err() {
                    all_refuse(&first, None);
                    *calls.lock().unwrap() += 1;
                }
            },
            in_steps: true,
        };
        second.attach(name, meddles).unwrap();
    }
    let changes = {
        let second = Arc::downgrade(&second);
        let mut next = 100;
        move || {
            next += 2;
            let second = second.upgrade().unwrap();
            second.insert(region(next)).told_all();
        }
    };
    first
        .attach(
            "c",
            Does {
                what: changes,
                in_steps: false,
            },
        )
        .unwrap();
    *calls.lock().unwrap() = 0;
    first.insert(region(4)).told_all();
    // Two changes of the second, one when the listener is asked and one when it is told: in each,
    // both are asked, and told by five calls.
    assert_eq!(present(&second).len(), 1 + 4);
    assert_eq!(*calls.lock().unwrap(), 2 * 2 * (1 + 5));
}

#[test]
fn other_threads_wait_for_a_change_and_go_on_after_it() {
    let (space, calls) = (Arc::new(space()), Arc::new(Mutex::new(Vec::new())));
    let weak = Arc::downgrade(&space);
    let threads = Arc::clone(&calls);
    let starts = move || {
        let space = weak.upgrade().unwrap();
        if present(&space).len() == 1 && threads.lock().unwrap().is_empty() {
            let other = thread::spawn(move || space.insert(region(8)).map(drop));
            threads.lock().unwrap().push(other);
        }
    };
    space
        .attach(
            "a",
            Does {
                what: starts,
                in_steps: false,
            },
        )
        .unwrap();
    space.insert(region(4)).told_all();
    let other = calls.lock().unwrap().pop().unwrap();
    other.join().unwrap().unwrap();
    assert_eq!(present(&space), [0, 4, 8]);
}

/// A daemon while postcopy listens: it has as many slots as it likes, takes everything, and gives
/// the base 7.
pub(super) fn listens(mut socket: UnixStream) -> io::Result<()> {
    const GET_FEATURES: u32 = 1;
    const ADD_MEM_REG: u32 = 37;
    let mut header = [0; 12];
    loop {
        socket.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        socket.read_exact(&mut body)?;
        let answer = match word(0) {
            // The acknowledgement of a base.
            ADD_MEM_REG if body.len() == 8 => continue,
            ADD_MEM_REG => {
                body[24..32].copy_from_slice(&7_u64.to_ne_bytes());
                body
            }
            GET_FEATURES | 36 => 8_u64.to_ne_bytes().to_vec(),
            _ => vec![0; 8],
        };
        let header = [word(0), 1 | 4, answer.len() as u32].map(u32::to_ne_bytes);
        socket.write_all(&[header.as_flattened(), &answer].concat())?;
    }
}

#[test]
fn a_handler_of_bases_cannot_call_it_either() {
    let (space, calls) = (Arc::new(space()), Arc::new(Mutex::new(0)));
    let features = Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS;
    let attach = |name| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let daemon = thread::spawn(|| listens(theirs));
        let (inner, calls) = (Arc::downgrade(&space), Arc::clone(&calls));
        let handler = move |_, base| {
            assert_eq!(base, 7);
            all_refuse(&inner.upgrade().unwrap(), None);
            *calls.lock().unwrap() += 1;
        };
        let share = VhostUserShare::new(ours, features).unwrap();
        let mut share = share.with_deadline(PATIENCE).with_base_handler(handler);
        share.set_postcopy(true);
        space.attach(name, share).unwrap();
        daemon
    };
    let daemons = ["a", "b"].map(attach);
    assert_eq!(*calls.lock().unwrap(), 2);
    space.insert(region(4)).told_all();
    assert_eq!(*calls.lock().unwrap(), 4);
    drop(space);
    for daemon in daemons {
        // It was hung up on.
        daemon.join().unwrap().unwrap_err();
    }
}
