//! Giving 1 GiB of populated RAM back: `GuestMemoryShm::discard` against the bare system call.
//!
//! `cargo bench --bench discard` prints the median times of both, measured in turn on the same
//! RAM, and their ratio; and the cost of discarding one page, as a balloon does.
#![allow(
    unsafe_code,
    reason = "the bare system call is made to compare with it"
)]

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use guest_memory_shm::{BackingSource, GuestMemoryShm, RamOptions};
use nix::fcntl::posix_fallocate;
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const PAGE: u64 = 4096;

fn main() {
    // Cargo runs benches as tests too.
    let test = std::env::args().any(|arg| arg == "--test");
    let (size, rounds) = if test { (1 << 20, 1) } else { (1 << 30, 9) };
    println!(
        "{:<12}{:>10}{:>14}{:>14}{:>8}",
        "backing", "size", "bare call", "discard", "ratio"
    );
    for (name, backing) in [
        ("memfd", BackingSource::Memfd),
        ("POSIX shm", BackingSource::PosixShm),
    ] {
        for (size, text, rounds) in [(size, "1 GiB", rounds), (PAGE, "4 KiB", rounds * 1000)] {
            let memory = GuestMemoryShm::<()>::builder()
                .add_ram(
                    RamOptions::new().with_backing(backing.clone()),
                    [(GuestAddress(0), size)],
                )
                .build()
                .expect("the RAM can be had");
            let (mut bare, mut ours) = (Vec::new(), Vec::new());
            for round in 0..rounds {
                // Whichever comes first may find caches warmer.
                for bare_now in [round % 2 == 0, round % 2 == 1] {
                    let (method, times): (fn(&GuestMemoryShm, u64), _) = if bare_now {
                        (bare_call, &mut bare)
                    } else {
                        (discard, &mut ours)
                    };
                    times.push(time(&memory, size, method));
                }
            }
            let (bare, ours) = (median(bare), median(ours));
            let ratio = ours.as_secs_f64() / bare.as_secs_f64();
            println!("{name:<12}{text:>10}{bare:>14.1?}{ours:>14.1?}{ratio:>8.3}");
        }
    }
}

/// The time that `method` takes on RAM of which every page is there and mapped.
fn time(memory: &GuestMemoryShm, size: u64, method: fn(&GuestMemoryShm, u64)) -> Duration {
    let backing = memory.iter().next().expect("there is one").backing();
    let len = i64::try_from(size).expect("small");
    posix_fallocate(backing.as_fd(), 0, len).expect("there is memory");
    for at in (0..size).step_by(4096) {
        memory
            .write_obj(1u8, GuestAddress(at))
            .expect("there is RAM");
    }
    let start = Instant::now();
    method(memory, size);
    let elapsed = start.elapsed();
    assert_eq!(backing.allocated().expect("fstat works"), 0);
    elapsed
}

fn discard(memory: &GuestMemoryShm, size: u64) {
    let discarded = memory.discard((GuestAddress(0), size)).expect("discarded");
    assert_eq!(discarded.freed, size);
}

fn bare_call(memory: &GuestMemoryShm, size: u64) {
    let start = memory
        .get_host_address(GuestAddress(0))
        .expect("there is RAM");
    let start = NonNull::new(start).expect("mapped").cast::<c_void>();
    let len = usize::try_from(size).expect("64 bits");
    // SAFETY: the range is mapped, and there is no reference to it.
    let done = unsafe { madvise(start, len, MmapAdvise::MADV_REMOVE) };
    done.expect("removed");
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
