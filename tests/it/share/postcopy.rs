//! Memory that changes while postcopy listens: a peer that is strict about the order of messages,
//! and qemu-storage-daemon, which really waits for pages.

use std::sync::Mutex;

use vhost::vhost_user::VhostUserFrontend;
use vm_memory::GuestAddressSpace;

use super::postcopy_faults::{PAGE, READ, late_page, place_of, resolve, userfaultfd};
use super::postcopy_peer::{BASE, Strict};
use super::*;

/// The regions that the handler was told of, each with its base.
pub(super) type Bases = Arc<Mutex<Vec<(GuestRange, u64)>>>;

fn told(bases: &Bases) -> Vec<(u64, u64)> {
    let bases = bases.lock().unwrap();
    let told = bases
        .iter()
        .map(|(range, base)| (range.start_addr().0 / MIB, *base));
    told.collect()
}

/// Has postcopy listen; gives the descriptor that faults are read from.
fn listen(frontend: &mut Frontend, share: &mut VhostUserShare) -> File {
    let faults = frontend.postcopy_advise().unwrap();
    frontend.postcopy_listen().unwrap();
    share.set_postcopy(true);
    faults
}

#[test]
fn regions_that_are_plugged_while_postcopy_listens_are_acknowledged_at_once() {
    for acks in [Features::REPLY_ACK, Features::empty()] {
        let features = Features::CONFIGURE_MEM_SLOTS | acks;
        let (mut frontend, mut share, bases, peer) = Strict::start(features, None, None);
        listen(&mut frontend, &mut share);
        // Two regions at once, then one by one.
        let space = AddressSpace::new(memory(&[0, 2]));
        let id = space.attach("blk", share).unwrap();
        for start in [10, 20] {
            space.insert(regions(&[start]).remove(0)).told_all();
        }
        space.remove((GuestAddress(2 * MIB), MIB)).told_all();
        let base = |start| (start, BASE + start * MIB);
        assert_eq!(told(&bases), [0, 2, 10, 20].map(base));

        // Afterwards it is as it was before.
        frontend.postcopy_end().unwrap();
        let end = |share: &mut VhostUserShare| share.set_postcopy(false);
        space.with_listener(&id, end).unwrap();
        space.insert(regions(&[30]).remove(0)).told_all();
        assert_eq!(told(&bases).len(), 4);

        drop((space.detach(id).unwrap(), frontend));
        assert_eq!(peer.join().unwrap(), [0, 10, 20, 30]);
    }
}

#[test]
fn a_whole_table_is_acknowledged_at_once_while_postcopy_listens() {
    for acks in [Features::REPLY_ACK, Features::empty()] {
        let (mut frontend, mut share, bases, peer) = Strict::start(acks, None, None);
        listen(&mut frontend, &mut share);
        for start in [0, 2] {
            share.update_memory(&memory(&[start])).unwrap();
        }
        assert_eq!(told(&bases), [(0, BASE), (2, BASE + 2 * MIB)]);
        drop((share, frontend));
        assert_eq!(peer.join().unwrap(), [2]);
    }
}

#[test]
fn a_daemon_that_goes_instead_of_returning_a_base_is_not_acknowledged() {
    let features = Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK;
    let (mut frontend, mut share, bases, peer) = Strict::start(features, Some(1), None);
    listen(&mut frontend, &mut share);
    let space = AddressSpace::new(memory(&[0]));
    let id = space.attach("blk", share).unwrap();
    space.insert(regions(&[10]).remove(0)).unwrap_err();
    assert_eq!(peer.join().unwrap(), [0, 10]);
    assert_eq!(told(&bases), [(0, BASE)]);
    let share = space.detach(id).unwrap();
    assert!(share.broken().unwrap().to_string().contains("hung up"));
}

#[test]
fn pages_that_are_waited_for_right_after_the_acknowledgement_have_a_known_base() {
    let slots = Features::CONFIGURE_MEM_SLOTS | Features::REPLY_ACK;
    let Some(userfaultfd) = userfaultfd() else {
        return;
    };
    let (mut frontend, mut share, bases, peer) = Strict::start(slots, None, Some(userfaultfd));
    let faults = listen(&mut frontend, &mut share);
    let place_of = move |address: u64| {
        let known = bases.lock().unwrap();
        let mut places = known.iter().filter_map(|(range, base)| {
            let offset = address.checked_sub(*base)?;
            (offset < range.size()).then(|| range.start_addr().0 + offset)
        });
        places
            .next()
            .expect("faults are where the handler was told")
    };
    let (stop, stopped) = UnixStream::pair().unwrap();
    let resolver = thread::spawn(move || resolve(&faults, place_of, &stopped));

    let space = AddressSpace::new(memory(&[1]));
    let id = space.attach("blk", share).unwrap();
    for start in [10, 20] {
        space.insert(regions(&[start]).remove(0)).told_all();
    }
    drop((space.detach(id).unwrap(), frontend));
    // Its readers have got what they waited for, or it would not end.
    assert_eq!(peer.join().unwrap(), [1, 10, 20]);
    drop(stop);
    let mut resolved = resolver.join().unwrap();
    resolved.sort_unstable();
    assert_eq!(resolved, [1, 10, 20].map(|start| start * MIB + READ));
}

/// What postcopy does with a qemu-storage-daemon that has a disk of `image`.
struct Postcopy {
    daemon: StorageDaemon,
    share: VhostUserShare,
    vmm: Vmm,
    faults: File,
    bases: Bases,
}

impl Postcopy {
    /// `None`: there is no such daemon here, or none that can do it.
    fn listen(image: &std::path::Path) -> Option<Self> {
        let daemon = StorageDaemon::start(image, None)?;
        let stream = UnixStream::connect(&daemon.socket).unwrap();
        let (frontend, features) =
            agree(stream, Features::REPLY_ACK | Features::PAGEFAULT).unwrap();
        let mut vmm = Vmm { frontend, features };
        if !vmm.features.contains(Features::PAGEFAULT) {
            support::skip("qemu-storage-daemon may not use userfaultfd(2) here");
            return None;
        }
        let bases = Bases::default();
        let told = Arc::clone(&bases);
        let mut share = vmm
            .share()
            .with_base_handler(move |range, base| told.lock().unwrap().push((range, base)));
        // Before any region, and for whole tables only: QEMU 10's daemons go at the
        // acknowledgement of ADD_MEM_REG, because it brings no descriptor.
        let faults = listen(&mut vmm.frontend, &mut share);
        Some(Self {
            daemon,
            share,
            vmm,
            faults,
            bases,
        })
    }
}

#[test]
fn qemu_storage_daemon_waits_for_late_pages_of_regions_that_were_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, vec![0x42; 1 << 20]).unwrap();
    let Some(postcopy) = Postcopy::listen(&image) else {
        return;
    };
    let Postcopy {
        daemon,
        share,
        mut vmm,
        faults,
        bases,
    } = postcopy;
    let space = AddressSpace::new(memory(&[0]));
    let id = space.attach("blk", share).unwrap();
    space.insert(regions(&[10]).remove(0)).told_all();
    // A whole table is mapped anew each time.
    let starts: Vec<u64> = told(&bases).iter().map(|(start, _)| *start).collect();
    assert_eq!(starts, [0, 0, 10]);

    let (stop, stopped) = UnixStream::pair().unwrap();
    let all = GuestMemoryShm::clone(&space.published().memory());
    let (pid, known) = (daemon.process.pid(), all.clone());
    let place = move |address| place_of(pid, &known, address);
    let resolver = thread::spawn(move || resolve(&faults, place, &stopped));
    let start = |share: &mut VhostUserShare| vmm.driver(&all, share);
    let mut driver = space.with_listener(&id, start).unwrap();

    // The daemon reads a page that no process has written, and then writes another one.
    let (late, other) = (10 * MIB + 7 * PAGE, 10 * MIB + 9 * PAGE);
    driver
        .write(0, &[(GuestAddress(late), PAGE as u32)])
        .unwrap();
    driver
        .read(8, &[(GuestAddress(other), PAGE as u32)])
        .unwrap();
    driver.flush().unwrap();
    let disk = fs::read(&image).unwrap();
    assert_eq!(disk[..PAGE as usize], late_page(late));
    let mut page = [0; PAGE as usize];
    all.read_slice(&mut page, GuestAddress(other)).unwrap();
    assert_eq!(page, [0x42; PAGE as usize]);

    // Afterwards it takes regions as ever, and no daemon waits for pages.
    vmm.frontend.postcopy_end().unwrap();
    let end = |share: &mut VhostUserShare| share.set_postcopy(false);
    space.with_listener(&id, end).unwrap();
    drop(stop);
    let resolved = resolver.join().unwrap();
    assert!(resolved.contains(&late), "{resolved:x?}");
    assert!(resolved.contains(&other), "{resolved:x?}");
    space.insert(regions(&[20]).remove(0)).told_all();
    assert_eq!(told(&bases).len(), 3);
    let end = GuestAddress(11 * MIB - PAGE);
    driver.read(16, &[(end, PAGE as u32)]).unwrap();
}
