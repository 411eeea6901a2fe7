//! Populating that is cancelled or fails: undone, without a byte lost, and with its cause named.

use std::fs::{self, File};

use guest_memory_shm::{
    AdoptPolicy, BackingSource, CancelToken, Error, GuestMemoryShm, OnFailure, PageSize, Populate,
    PopulateError, PopulateOptions, RamOptions, Reserve, ShmBacking,
};
use nix::mount::MsFlags;
use nix::sys::signal::Signal;
use nix::sys::statvfs::statvfs;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::fork::dies_of;
use crate::isolation::{HugePool, PAGE, in_own_process, mount_tmpfs, own_mounts};
use crate::populate::{HUGE, MIB, allocated, memory, range, threads};
use crate::proc::leaves_nothing_but_heaps;
use crate::support::{huge_pages_short, room_short};

const SIZE: u64 = 64 * MIB;
const MODES: [Populate; 2] = [Populate::Allocate, Populate::Prefault];

/// Populates until the first piece is done, calls `meanwhile`, and cancels; gives what was done.
fn cancelled_half_way(
    memory: &GuestMemoryShm,
    mode: Populate,
    on_failure: OnFailure,
    meanwhile: impl FnOnce() + Send,
) -> u64 {
    let mut meanwhile = Some(meanwhile);
    let token = CancelToken::new();
    let options = PopulateOptions::new(mode)
        .with_threads(threads(2))
        .with_on_failure(on_failure)
        .with_cancel(token.clone())
        .with_progress(|_| {
            if let Some(meanwhile) = meanwhile.take() {
                meanwhile();
            }
            token.cancel();
        });
    match memory.populate(options) {
        Err(PopulateError::Cancelled { done, total, .. }) => {
            assert_eq!(total, SIZE);
            assert!(done > 0 && done < total, "{done}");
            done
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_allocated_before_it_was_cancelled_is_given_back() {
    for mode in MODES {
        let memory = memory(RamOptions::new(), SIZE);
        let mut most = 0;
        cancelled_half_way(&memory, mode, OnFailure::GiveBack, || {
            most = allocated(&memory);
        });
        assert!(most > 0, "the control");
        assert_eq!(allocated(&memory), 0, "{mode:?}");
        // It can be had all the same.
        memory.populate(PopulateOptions::new(mode)).unwrap();
        assert_eq!(allocated(&memory), SIZE);
    }
}

#[test]
fn what_was_there_before_stays_when_it_is_cancelled() {
    for mode in MODES {
        let memory = memory(RamOptions::new(), SIZE);
        let written = || (0..SIZE).step_by(100 * PAGE as usize);
        for at in written() {
            // Zeros, too: they are the guest's.
            memory.write_obj(at % 3, GuestAddress(at)).unwrap();
        }
        let before = allocated(&memory);
        assert_eq!(before, written().count() as u64 * PAGE);
        cancelled_half_way(&memory, mode, OnFailure::GiveBack, || {});
        assert_eq!(allocated(&memory), before, "{mode:?}");
        for at in written() {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), at % 3);
        }
        // All that was read was there.
        assert_eq!(allocated(&memory), before, "{mode:?}");
    }
}

#[test]
fn what_a_guest_wrote_meanwhile_is_never_lost() {
    for mode in MODES {
        let memory = memory(RamOptions::new(), SIZE);
        let places = [0, 7 * PAGE, MIB + 8, 9 * MIB, SIZE - 8];
        cancelled_half_way(&memory, mode, OnFailure::GiveBack, || {
            for at in places {
                memory.write_obj(0xcafe_u64, GuestAddress(at)).unwrap();
            }
        });
        assert_eq!(allocated(&memory), places.len() as u64 * PAGE, "{mode:?}");
        for at in places {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), 0xcafe);
        }
    }
}

#[test]
fn pages_that_were_promised_before_stay_promised() {
    // lseek(2) takes such pages for holes.
    let memory = memory(RamOptions::new(), SIZE);
    let part = PopulateOptions::new(Populate::Allocate).with_range(range(0, 20 * MIB));
    memory.populate(part).unwrap();
    cancelled_half_way(&memory, Populate::Prefault, OnFailure::GiveBack, || {});
    assert!(allocated(&memory) >= 20 * MIB);
}

#[test]
fn on_request_everything_is_kept() {
    for mode in MODES {
        let memory = memory(RamOptions::new(), SIZE);
        let done = cancelled_half_way(&memory, mode, OnFailure::Keep, || {});
        assert_eq!(allocated(&memory), done, "{mode:?}");
    }
}

#[test]
fn a_token_cancels_before_and_in_the_middle() {
    let memory = memory(RamOptions::new(), SIZE);
    for at_once in [true, false] {
        let token = CancelToken::new();
        let other = token.clone();
        let options = PopulateOptions::new(Populate::Prefault)
            .with_threads(threads(1))
            .with_cancel(token.clone())
            .with_progress(move |_| other.cancel());
        if at_once {
            token.cancel();
        }
        match memory.populate(options) {
            Err(PopulateError::Cancelled { done, .. }) => {
                assert_eq!(done == 0, at_once, "{done}");
                assert!(done < SIZE);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(allocated(&memory), 0);
    }
}

#[test]
fn cancelling_when_all_is_done_is_too_late() {
    let memory = memory(RamOptions::new(), MIB);
    let token = CancelToken::new();
    let options = PopulateOptions::new(Populate::Prefault)
        .with_cancel(token.clone())
        .with_progress(|progress| {
            if progress.done == progress.total {
                token.cancel();
            }
        });
    assert_eq!(memory.populate(options).unwrap().bytes, MIB);
}

#[test]
fn a_panic_of_the_callback_reaches_the_caller_and_leaves_no_thread() {
    in_own_process(|| {
        let memory = memory(RamOptions::new(), SIZE);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let options = PopulateOptions::new(Populate::Prefault)
                .with_threads(threads(2))
                .with_progress(|_| panic!("on purpose"));
            memory.populate(options)
        }));
        assert!(panicked.is_err());
        crate::populate::no_thread_populates();
    });
}

/// What a callback panics with, and what may panic again.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        // Twice at once would end the process.
        assert!(std::thread::panicking(), "a payload that panics");
    }
}

#[test]
fn a_panic_of_the_callback_gives_the_pages_back_as_an_error_does() {
    for mode in MODES {
        for (on_failure, all_given_back) in [(OnFailure::GiveBack, true), (OnFailure::Keep, false)]
        {
            let memory = memory(RamOptions::new(), SIZE);
            memory.write_obj(7u8, GuestAddress(5 * PAGE)).unwrap();
            let mut most = 0;
            let options = PopulateOptions::new(mode)
                .with_threads(threads(2))
                .with_on_failure(on_failure)
                .with_progress(|_| {
                    most = allocated(&memory);
                    std::panic::panic_any(Bomb)
                });
            let populating = std::panic::AssertUnwindSafe(|| memory.populate(options));
            let panic = std::panic::catch_unwind(populating).unwrap_err();
            assert!(panic.is::<Bomb>(), "the callback's own panic");
            std::mem::forget(panic);
            assert!(most > PAGE, "the control");
            let left = allocated(&memory);
            assert_eq!(left == PAGE, all_given_back, "{mode:?}: {left}");
            assert_eq!(memory.read_obj::<u8>(GuestAddress(5 * PAGE)).unwrap(), 7);
        }
    }
}

/// Lazy RAM on POSIX shm, however small /dev/shm is.
fn unreserved(size: u64) -> GuestMemoryShm {
    let options = RamOptions::new()
        .with_backing(BackingSource::PosixShm)
        .with_reserve(Reserve::Off);
    memory(options, size)
}

#[test]
fn a_file_system_that_is_too_small_is_named_and_gets_everything_back() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=24m");
        let free = || {
            let stat = statvfs("/dev/shm").unwrap();
            stat.blocks_available() * stat.fragment_size()
        };
        let before = free();
        leaves_nothing_but_heaps(|| {
            let memory = unreserved(SIZE);
            memory.write_obj(7u8, GuestAddress(5 * PAGE)).unwrap();
            for mode in MODES {
                let options = PopulateOptions::new(mode).with_threads(threads(2));
                let error = Error::from(memory.populate(options).unwrap_err());
                match &error {
                    Error::Populate(PopulateError::Shortage { range, .. }) => {
                        let (needed, free) = room_short(&error).unwrap();
                        assert!(free < range.size() && range.last_addr().0 < SIZE, "{error}");
                        assert!((SIZE - 24 * MIB..SIZE).contains(&needed), "{error}");
                    }
                    other => panic!("{mode:?}: {other:?}"),
                }
                let text = error.to_string();
                assert!(
                    text.contains("the file system that backs the RAM holds 24 MiB"),
                    "{text}"
                );
                assert!(text.contains("or use a memfd backing"), "{text}");
                assert_eq!(allocated(&memory), PAGE, "{mode:?}");
                assert_eq!(free(), before - PAGE);
            }
            assert_eq!(memory.read_obj::<u8>(GuestAddress(5 * PAGE)).unwrap(), 7);
        });
        assert_eq!(free(), before);
    });
}

#[test]
fn ram_that_is_promised_raises_no_signal_when_the_file_system_is_full() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m");
        for mode in MODES {
            let memory = unreserved(16 * MIB);
            let promised = range(MIB, 4 * MIB);
            let options = PopulateOptions::new(mode).with_range(promised);
            memory.populate(options).unwrap();
            // Another file takes all the rest.
            let ballast = vec![1; 8 * MIB as usize];
            assert!(fs::write("/dev/shm/ballast", &ballast).is_err());
            let child = |start: u64, size: u64| {
                let host = memory.get_host_address(GuestAddress(start)).unwrap();
                dies_of(|| touch(host, size))
            };
            assert_eq!(child(MIB, 4 * MIB), None, "{mode:?}");
            // The control: a page past it cannot be had.
            assert_eq!(child(5 * MIB, PAGE), Some(Signal::SIGBUS));
            fs::remove_file("/dev/shm/ballast").unwrap();
        }
    });
}

#[allow(unsafe_code, reason = "only a store can be SIGBUS")]
fn touch(host: *mut u8, size: u64) {
    for at in (0..size as usize).step_by(PAGE as usize) {
        // SAFETY: the address is in a region of guest RAM, to which there is no reference; if
        // there is no page, the child dies, which is what the caller wants to know.
        unsafe { host.wrapping_add(at).write_volatile(1) }
    }
}

#[test]
fn a_pool_of_huge_pages_that_is_too_small_is_named_and_gets_everything_back() {
    in_own_process(|| {
        let Some(pool) = HugePool::with_available(HUGE, 2) else {
            return;
        };
        let free = pool.free();
        let options = RamOptions::new()
            .with_page_size(PageSize::Huge(Some(HUGE)))
            .with_reserve(Reserve::Off);
        let memory = memory(options, 5 * HUGE);
        for mode in MODES {
            let error = memory.populate(PopulateOptions::new(mode).with_threads(threads(1)));
            assert_eq!(
                huge_pages_short(&error.unwrap_err().into()),
                Some((3, 0)),
                "{mode:?}"
            );
            assert_eq!((pool.free(), allocated(&memory)), (free, 0), "{mode:?}");
        }
    });
}

#[test]
fn a_backing_that_was_truncated_is_named_and_not_made_longer_again() {
    for mode in MODES {
        let file: File = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(16 * MIB).unwrap();
        let fd = file.try_clone().unwrap().into();
        let backing = ShmBacking::adopt(fd, &AdoptPolicy::new()).unwrap();
        let memory = GuestMemoryShm::<()>::builder()
            .add_backing(&backing, 0, [(GuestAddress(0), 16 * MIB)])
            .build()
            .unwrap();
        file.set_len(MIB).unwrap();
        let refused = memory.populate(PopulateOptions::new(mode));
        assert!(
            matches!(
                refused,
                Err(PopulateError::Truncated { end, now, .. })
                    if (end, now) == (16 * MIB, MIB)
            ),
            "{refused:?}"
        );
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), MIB);
        assert_eq!(backing.allocated().unwrap(), 0);
    }
}
