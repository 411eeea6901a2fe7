//! Populating in the background: asked, waited for, cancelled, and dropped.

use std::sync::mpsc;

use guest_memory_shm::{
    CancelToken, GuestMemoryShm, OnFailure, Populate, PopulateError, PopulateHandle,
    PopulateOptions, RamOptions,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::fork::dies_of;
use crate::isolation::in_own_process;
use crate::populate::{
    MIB, allocated, memory, no_thread_populates, populating_threads, range, threads,
};
use crate::proc::leaves_nothing_but_heaps;

const SIZE: u64 = 64 * MIB;

/// Populating that stands still after its first piece, until it is let go; gives the handle, how
/// much is done, and what lets it go.
fn standing_still(
    memory: &GuestMemoryShm,
    options: PopulateOptions<'static>,
) -> (PopulateHandle, u64, mpsc::Sender<()>) {
    let (reached, here) = mpsc::channel();
    let (go, gone) = mpsc::channel();
    let options = options
        .with_threads(threads(1))
        .with_progress(move |progress| {
            // Only the first time a thread listens.
            if reached.send(progress.done).is_ok() {
                let _ = gone.recv();
            }
        });
    let handle = memory.populate_in_background(options).unwrap();
    let done = here.recv().unwrap();
    (handle, done, go)
}

fn prefault() -> PopulateOptions<'static> {
    PopulateOptions::new(Populate::Prefault)
}

#[test]
fn the_vmm_goes_on_and_asks_how_far_it_is() {
    let memory = memory(RamOptions::new(), SIZE);
    let (handle, done, go) = standing_still(&memory, prefault());
    assert!(!handle.is_finished());
    let progress = handle.progress();
    assert_eq!((progress.done, progress.total), (done, SIZE));
    assert!(done > 0 && done < SIZE);
    // The guest runs meanwhile.
    memory.write_obj(1u64, GuestAddress(0)).unwrap();
    memory.write_obj(2u64, GuestAddress(SIZE - 8)).unwrap();
    drop(go);
    let populated = handle.wait().unwrap();
    assert_eq!((populated.bytes, populated.threads), (SIZE, 1));
    assert_eq!(allocated(&memory), SIZE);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 1);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(SIZE - 8)).unwrap(), 2);
}

#[test]
fn cancelling_keeps_what_is_there_unless_told_otherwise() {
    for (on_failure, kept) in [
        (None, true),
        (Some(OnFailure::Keep), true),
        (Some(OnFailure::GiveBack), false),
    ] {
        let memory = memory(RamOptions::new(), SIZE);
        let options = match on_failure {
            Some(on_failure) => prefault().with_on_failure(on_failure),
            None => prefault(),
        };
        let token = CancelToken::new();
        let (handle, _, go) = standing_still(&memory, options.with_cancel(token.clone()));
        token.cancel();
        drop(go);
        match handle.wait() {
            Err(PopulateError::Cancelled { done, total, .. }) => {
                assert!(done < total, "{done}");
                assert_eq!(allocated(&memory), if kept { done } else { 0 });
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn dropping_the_handle_cancels_and_leaves_no_thread() {
    in_own_process(|| {
        let drop_it = || {
            let memory = memory(RamOptions::new(), SIZE);
            let token = CancelToken::new();
            let cancelled = token.clone();
            let (reached, here) = mpsc::channel();
            let options = prefault()
                .with_threads(threads(1))
                .with_cancel(token)
                .with_progress(move |_| {
                    reached.send(()).unwrap();
                    // Stands still until the handle is dropped.
                    while !cancelled.is_cancelled() {
                        std::thread::yield_now();
                    }
                });
            let handle = memory.populate_in_background(options).unwrap();
            here.recv().unwrap();
            assert!(populating_threads() > 0, "the control");
            drop(handle);
            no_thread_populates();
            let there = allocated(&memory);
            assert!(there > 0 && there < SIZE, "{there}");
        };
        drop_it();
        leaves_nothing_but_heaps(drop_it);
    });
}

#[test]
fn dropping_the_handle_after_a_callback_panicked_is_harmless() {
    /// Panics when it is dropped, too.
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("a payload that panics");
        }
    }
    in_own_process(|| {
        let memory = memory(RamOptions::new(), SIZE);
        let options = prefault()
            .with_on_failure(OnFailure::GiveBack)
            .with_progress(|_| std::panic::panic_any(Bomb));
        let handle = memory.populate_in_background(options).unwrap();
        while !handle.is_finished() {
            std::thread::yield_now();
        }
        // During a panic, a second one would end the process.
        let panicking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _handle = handle;
            panic!("on purpose");
        }));
        assert!(panicking.is_err());
        assert_eq!(allocated(&memory), 0, "what was populated is given back");
        no_thread_populates();
    });
}

#[test]
fn a_handle_in_a_child_of_fork_is_harmless() {
    in_own_process(|| {
        let memory = memory(RamOptions::new(), SIZE);
        let (handle, done, go) = standing_still(&memory, prefault());
        let mut slot = Some(handle);
        // Dropped first: the handle waits for what waits for it.
        let go = go;
        let child = |action: &mut dyn FnMut(PopulateHandle)| {
            assert_eq!(dies_of(|| action(slot.take().unwrap())), None);
        };
        // What they take is theirs: a copy.
        let mut child = child;
        child(&mut |handle| drop(handle));
        child(&mut |handle| {
            assert!(handle.is_finished());
            assert_eq!(handle.progress().done, done);
            assert!(matches!(handle.wait(), Err(PopulateError::OtherProcess)));
        });
        // The control: here it goes on as if nothing had been.
        drop(go);
        assert_eq!(slot.unwrap().wait().unwrap().bytes, SIZE);
    });
}

#[test]
fn the_ram_stays_until_it_is_populated_when_the_memory_is_dropped() {
    let first = memory(RamOptions::new(), SIZE);
    let backing = first.iter().next().unwrap().backing().clone();
    let (handle, _, go) = standing_still(&first, prefault());
    drop(first);
    drop(go);
    assert_eq!(handle.wait().unwrap().bytes, SIZE);
    assert_eq!(backing.allocated().unwrap(), SIZE);
}

#[test]
fn a_bad_range_is_refused_at_once() {
    let memory = memory(RamOptions::new(), MIB);
    let refused = memory.populate_in_background(prefault().with_range(range(0, 2 * MIB)));
    assert!(matches!(refused, Err(PopulateError::NotRam { .. })));
}

#[test]
fn a_panic_of_the_callback_is_told_to_the_one_who_waits() {
    let memory = memory(RamOptions::new(), SIZE);
    let options = prefault().with_progress(|_| panic!("on purpose"));
    let handle = memory.populate_in_background(options).unwrap();
    let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handle.wait()));
    let panic = waited.unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
}
