//! Panics around changes: when listeners come and go, are used and refreshed; in listeners of
//! regions, in bitmaps, and in sockets.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use guest_memory_shm::mock::MockDaemon;
use nix::errno::Errno;
use vhost::vhost_user::VhostUserProtocolFeatures as Features;
use vm_memory::bitmap::Bitmap;

use super::inside::listens;
use super::panics::{Bomb, PLACES, WAYS, panics};
use super::*;
use crate::frontend::agree;

#[test]
fn a_listener_that_panics_when_it_is_attached_is_given_back() {
    let space = space();
    for place in PLACES {
        let error = space
            .attach("a", panics(&[1], place, WAYS[0].0))
            .unwrap_err();
        let text = chain(&error);
        assert!(text.contains("it panicked: a listener's bug"), "{text}");
        // What it was told was taken back.
        let listener = error.into_listener();
        assert_eq!((listener.told, &listener.held), (2, &vec![]), "{place:?}");
    }

    // It panics at what it is told, and when that is taken back.
    for place in PLACES {
        let error = space.attach("b", panics(&[1, 2], place, WAYS[2].0));
        let error = error.unwrap_err();
        assert!(error.to_string().ends_with(", and is stale"), "{error}");
        assert_eq!(error.into_listener().told, 2);
    }
    assert!(space.listeners().unwrap().is_empty());
    space.insert(region(4)).told_all();
}

#[test]
fn who_panics_when_refreshed_is_stale_until_it_does_not() {
    for place in PLACES {
        let space = space();
        let a = space.attach("a", panics(&[2], place, WAYS[2].0)).unwrap();
        let error = chain(&space.refresh(&a).unwrap_err());
        assert!(error.contains("it panicked"), "{error}");
        let status = space.listeners().unwrap().remove(0).to_string();
        assert!(status.contains("it panicked"), "{status}");
        space.refresh(&a).unwrap();
        assert!(space.listeners().unwrap()[0].stale().is_none());
    }
}

#[test]
fn a_closure_that_panics_on_a_listener_is_its_callers_and_changes_go_on() {
    let (space, log) = (space(), Said::default());
    let a = space.attach("a", script("a", &log)).unwrap();
    let work = || space.with_listener(&a, |_| panic_any(7));
    let payload = catch_unwind(AssertUnwindSafe(work)).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&7));
    space.insert(region(4)).told_all();
    assert_eq!(held(&space, &a, all), [0, 4]);
}

#[test]
fn listeners_that_panic_when_they_are_dropped_are_all_dropped() {
    static DROPPED: AtomicUsize = AtomicUsize::new(0);
    struct Last(bool);
    impl MemoryListener for Last {
        fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
        fn update(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
    }
    impl Drop for Last {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
            match self.0 {
                true => panic_any(Bomb),
                false => panic!("a listener's bug"),
            }
        }
    }
    let space = space();
    for bomb in [true, false, true] {
        space.attach("a", Last(bomb)).unwrap();
    }
    space.insert(region(4)).told_all();
    // Two panics at once would end the process.
    drop(space);
    assert_eq!(DROPPED.load(Ordering::Relaxed), 3);
}

/// It takes a region, or lets it go, before or after it panics.
#[derive(Default)]
struct Dma {
    held: Vec<u64>,
    /// What it panics at, and whether it has done it then.
    panics: Option<(char, bool)>,
}

impl Dma {
    fn tell(&mut self, what: char, region: &GuestRegionShm) -> Result<(), ListenerError> {
        let at = region.range().start_addr().0 / MIB;
        let done = match self.panics {
            Some((when, done)) if when == what => {
                self.panics = None;
                Some(done)
            }
            _ => None,
        };
        assert!(done != Some(false), "a listener's bug");
        let there = self.held.contains(&at);
        match what {
            '+' if there => return Err(ListenerError::refused("it is there")),
            '+' => self.held.push(at),
            _ if !there => return Err(ListenerError::refused("it is not there")),
            _ => self.held.retain(|other| *other != at),
        }
        assert!(done != Some(true), "a listener's bug");
        Ok(())
    }
}

impl RegionListener for Dma {
    fn region_add(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        self.tell('+', region)
    }
    fn region_remove(&mut self, region: &GuestRegionShm) -> Result<(), ListenerError> {
        self.tell('-', region)
    }
}

#[test]
fn a_listener_of_regions_that_panics_holds_what_readers_see_all_the_same() {
    for what in ['+', '-'] {
        for done in [false, true] {
            let space = space();
            space.insert(region(4)).told_all();
            let dma = space
                .attach("dma", RegionAdapter::new(Dma::default()))
                .unwrap();
            let arm = |dma: &mut RegionAdapter<Dma>| dma.get_mut().panics = Some((what, done));
            space.with_listener(&dma, arm).unwrap();
            // One comes and one goes.
            let change = space.transaction().insert(region(8));
            let change = change.remove((GuestAddress(4 * MIB), MIB));
            let error = change.commit().unwrap_err().to_string();
            assert!(error.contains("\"dma\" refuses"), "{error}");
            let held = |dma: &mut RegionAdapter<Dma>| {
                let mut held = dma.get_ref().held.clone();
                held.sort_unstable();
                assert_eq!(dma.regions().len(), held.len());
                held
            };
            let holds = space.with_listener(&dma, held).unwrap();
            assert_eq!(holds, present(&space), "{what}{done}");
            assert_eq!(present(&space), [0, 4]);
            assert!(space.listeners().unwrap()[0].stale().is_none());

            space.insert(region(8)).told_all();
            assert_eq!(space.with_listener(&dma, held).unwrap(), [0, 4, 8]);
        }
    }
}

thread_local! {
    /// Whether bitmaps panic when this thread drops them.
    static ARMED: Cell<bool> = const { Cell::new(false) };
}

/// A bitmap whose drop can panic: it is dropped wherever the last of a memory is.
#[derive(Debug, Default)]
struct Fragile;

impl Drop for Fragile {
    fn drop(&mut self) {
        assert!(!ARMED.replace(false), "a bitmap's bug");
    }
}

impl vm_memory::bitmap::WithBitmapSlice<'_> for Fragile {
    type S = ();
}

impl Bitmap for Fragile {
    fn mark_dirty(&self, _: usize, _: usize) {}
    fn dirty_at(&self, _: usize) -> bool {
        false
    }
    fn slice_at(&self, _: usize) {}
}

#[test]
fn a_memory_that_panics_when_it_is_dropped_by_a_publication_does_not_stop_it() {
    /// In the middle of a change it puts a memory into the mirror, whose drop panics: it is
    /// dropped when the new one is published.
    struct Saboteur(GuestMemoryAtomic<GuestMemoryShm<Fragile>>, Vec<usize>);
    impl MemoryListener<Fragile> for Saboteur {
        fn check(&mut self, _: &GuestMemoryShm<Fragile>) -> Result<(), ListenerError> {
            Ok(())
        }
        fn update(&mut self, memory: &GuestMemoryShm<Fragile>) -> Result<(), ListenerError> {
            self.1.push(memory.num_regions());
            if memory.num_regions() > 1 {
                let foreign = fragile(64);
                self.0.lock().unwrap().replace(foreign);
                ARMED.set(true);
            }
            Ok(())
        }
    }
    fn fragile(at: u64) -> GuestMemoryShm<Fragile> {
        GuestMemoryShm::<()>::builder()
            .with_bitmap(|_| Fragile)
            .add_ram(RamOptions::new(), [(GuestAddress(at * MIB), MIB)])
            .build()
            .unwrap()
    }
    let space = AddressSpace::new(fragile(0));
    let saboteur = Saboteur(space.atomic(), Vec::new());
    let id = space.attach("a", saboteur).unwrap();
    let place = (GuestAddress(4 * MIB), MIB);
    let new = |_| Fragile;
    let region = GuestRegionShm::new_with_bitmap((place.0, place.1), &RamOptions::new(), new);
    space.insert(region.unwrap()).told_all();
    assert!(!ARMED.get(), "nothing was dropped");
    assert_eq!(space.published().memory().num_regions(), 2);
    assert_eq!(space.atomic().memory().num_regions(), 2);
    let told = space.with_listener(&id, |saboteur| saboteur.1.clone());
    assert_eq!(told.unwrap(), [1, 2]);
    // What it did is an error, at the next change.
    let error = space.remove((place.0, place.1)).unwrap_err();
    assert!(
        error.to_string().contains("AddressSpace::atomic()"),
        "{error}"
    );
    space.remove((place.0, place.1)).told_all();
}

#[test]
fn a_socket_that_cannot_be_had_or_panics_when_it_is_taken_leaves_the_daemon_away() {
    /// It panics, or there is no descriptor for it.
    struct Faulty(bool);
    impl DaemonSocket for Faulty {
        fn into_socket(self) -> io::Result<OwnedFd> {
            assert!(!self.0, "a socket's bug");
            Err(io::Error::from_raw_os_error(Errno::EMFILE as i32))
        }
    }
    let space = space();
    let daemon = MockDaemon::builder().start_unnamed().unwrap();
    let connect = || {
        let wanted = Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS;
        agree(daemon.connect().unwrap(), wanted).unwrap()
    };
    let (frontend, features) = connect();
    let share = VhostUserShare::new(&frontend, features).unwrap();
    let id = space.attach("daemon", share).unwrap();
    drop(frontend);
    for (panics, text) in [(true, "it panicked: a socket's bug"), (false, "ulimit -n")] {
        let error = chain(&space.reconnect(&id, Faulty(panics), features).unwrap_err());
        assert!(error.contains(text), "{error}");
        let status = space.listeners().unwrap().remove(0).to_string();
        assert!(status.contains(text), "{status}");
        // It is away, and so it lags; nothing is left of the connection from before.
        daemon.wait_disconnected(PATIENCE).unwrap();
        let report = space.insert(region(4)).unwrap();
        assert!(report.stale()[0].is(&id));

        let (frontend, features) = connect();
        space.reconnect(&id, &frontend, features).unwrap();
        assert_eq!(daemon.table().len(), 2);
        space.remove((GuestAddress(4 * MIB), MIB)).told_all();
    }
}

#[test]
fn a_handler_of_bases_that_panics_breaks_its_share_and_the_change_is_undone() {
    let features = Features::REPLY_ACK | Features::CONFIGURE_MEM_SLOTS;
    let connect = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let daemon = thread::spawn(|| listens(theirs));
        let handler = |range: GuestRange, _| {
            assert!(range.start_addr().0 != 4 * MIB, "a handler's bug");
        };
        let share = VhostUserShare::new(ours, features).unwrap();
        let mut share = share.with_deadline(PATIENCE).with_base_handler(handler);
        share.set_postcopy(true);
        (share, daemon)
    };
    let (space, log) = (space(), Said::default());
    let a = space.attach("a", script("a", &log)).unwrap();
    let (share, daemon) = connect();
    let b = space.attach("b", share).unwrap();
    let error = chain(&space.insert(region(4)).unwrap_err());
    assert!(error.contains("\"b\" refuses"), "{error}");
    assert!(error.contains("a handler's bug"), "{error}");
    assert_eq!(held(&space, &a, all), [0]);
    let broken = space.with_listener(&b, |share| share.broken().map(ToString::to_string));
    assert_eq!(broken.unwrap().unwrap(), "the handler of bases panicked");
    assert!(space.listeners().unwrap()[1].stale().is_some());
    // It was hung up on before it was acknowledged.
    daemon.join().unwrap().unwrap_err();

    // Without an address space it is an error, too.
    let (mut share, daemon) = connect();
    let memory = |at| GuestMemoryShm::from_regions(vec![region(at)]).unwrap();
    share.update_memory(&memory(2)).unwrap();
    for _ in 0..2 {
        let error = share.update_memory(&memory(4)).unwrap_err();
        assert!(matches!(error, ShareError::Broken { .. }), "{error}");
        assert!(error.to_string().contains("the handler of bases panicked"));
    }
    daemon.join().unwrap().unwrap_err();
}
