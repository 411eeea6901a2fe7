//! What readers get, and the mirror for those who want vm-memory's type.

use super::*;

/// Whether both are of the same regions, rather than of equal ones.
fn same(one: &GuestMemoryShm, other: &GuestMemoryShm) -> bool {
    let pairs = one.iter().zip(other.iter());
    one.num_regions() == other.num_regions() && pairs.fold(true, |all, (a, b)| all && a.is(b))
}

/// Whether a change says that the mirror was replaced.
fn says_replaced<T>(done: Result<T, AddressSpaceError>) -> bool {
    matches!(done, Err(AddressSpaceError::MirrorReplaced))
}

#[test]
fn readers_and_the_mirror_see_the_same_memory_at_every_step() {
    struct Compares(PublishedMemory, GuestMemoryAtomic<GuestMemoryShm>);
    impl MemoryListener for Compares {
        fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
        fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
            assert!(same(&self.0.memory(), &self.1.memory()));
            match memory.num_regions() {
                // The one that is to be undone.
                3 => Err(refused()),
                _ => Ok(()),
            }
        }
    }
    let space = space();
    let (readers, mirror) = (space.published(), space.atomic());
    let compares = Compares(readers.clone(), mirror.clone());
    space.attach("a", compares).unwrap();
    let same = || assert!(same(&readers.memory(), &mirror.memory()));
    same();
    space.insert(region(4)).told_all();
    assert_eq!(mib(&mirror.memory()), [0, 4]);
    same();
    space.insert(region(8)).unwrap_err();
    let change = space.transaction().remove((GuestAddress(0), MIB));
    let change = change.insert(region(8)).insert(region(10));
    change.commit().unwrap_err();
    assert_eq!(mib(&mirror.memory()), [0, 4]);
    same();
    space.remove((GuestAddress(4 * MIB), MIB)).told_all();
    assert_eq!(mib(&mirror.memory()), [0]);
    same();
    // Both outlive the address space.
    drop(space);
    assert_eq!(mib(&readers.clone().memory()), [0]);
    same();
}

#[test]
fn a_foreign_memory_in_the_mirror_is_an_error_once_and_is_put_back() {
    let (space, log) = (space(), Said::default());
    let a = space.attach("a", script("a", &log)).unwrap();
    said(&log);
    let replace = |memory| space.atomic().lock().unwrap().replace(memory);
    for _ in 0..2 {
        replace(GuestMemoryShm::from_regions(vec![region(0), region(4)]).unwrap());
        // Readers never see it.
        assert_eq!(present(&space), [0]);
        assert!(says_replaced(space.insert(region(8))));
        assert_eq!(said(&log), [], "a listener was told");
        assert_eq!(mib(&space.atomic().memory()), [0]);
        space.insert(region(8)).told_all();
        assert_eq!(mib(&space.atomic().memory()), [0, 8]);
        space.remove((GuestAddress(8 * MIB), MIB)).told_all();
        said(&log);
    }
    assert_eq!(held(&space, &a, all), [0]);

    // It need not change anything to find that out; and who holds the lock without replacing
    // anything, or puts the very same memory there, has done nothing.
    replace(GuestMemoryShm::new());
    assert!(says_replaced(space.transaction().commit()));
    space.transaction().commit().told_all();
    drop(space.atomic().lock());
    replace(GuestMemoryShm::clone(&space.published().memory()));
    space.insert(region(4)).told_all();
}

#[test]
fn a_foreign_memory_that_a_change_meets_is_an_error_at_the_next() {
    struct Replaces(GuestMemoryAtomic<GuestMemoryShm>);
    impl MemoryListener for Replaces {
        fn check(&mut self, _: &GuestMemoryShm) -> Result<(), ListenerError> {
            Ok(())
        }
        fn update(&mut self, memory: &GuestMemoryShm) -> Result<(), ListenerError> {
            if memory.num_regions() == 2 {
                self.0.lock().unwrap().replace(GuestMemoryShm::new());
            }
            Ok(())
        }
    }
    let space = space();
    space.attach("a", Replaces(space.atomic())).unwrap();
    space.insert(region(4)).told_all();
    assert_eq!(mib(&space.atomic().memory()), [0, 4]);
    assert!(says_replaced(space.remove((GuestAddress(4 * MIB), MIB))));
    assert_eq!(present(&space), [0, 4]);
    space.remove((GuestAddress(4 * MIB), MIB)).told_all();
}

/// A thread that panicked while it had the lock of the mirror is no reason not to publish.
#[test]
fn a_poisoned_mirror_is_written_to() {
    let space = space();
    let mirror = space.atomic();
    let panics = std::thread::spawn(move || {
        let _exclusive = mirror.lock().unwrap();
        panic!("a device's bug");
    });
    assert!(panics.join().is_err());
    assert!(space.atomic().lock().is_err());
    space.insert(region(4)).told_all();
    assert_eq!(mib(&space.atomic().memory()), [0, 4]);
}

#[test]
fn debug_shows_the_regions() {
    let space = space();
    let shown = format!("{:?}", space.published());
    assert!(
        shown.starts_with("PublishedMemory(GuestMemoryShm ["),
        "{shown}"
    );
}
