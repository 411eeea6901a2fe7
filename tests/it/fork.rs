//! Children that may die: a fork that does one thing.
#![allow(
    unsafe_code,
    reason = "fork(2) is unsafe, and so is the touch of an address that may not be mapped"
)]

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// What became of a child that did `action` and then left with status 0.
///
/// The other threads of this process are not in the child, and may have held any lock: `action`
/// may only make system calls and touch memory.
fn child(action: impl FnOnce()) -> WaitStatus {
    // SAFETY: the child only does what is safe in a signal handler, as `action` promises, and
    // leaves by _exit.
    let forked = unsafe { fork() };
    match forked.expect("a process can be had") {
        ForkResult::Parent { child } => waitpid(child, None).expect("the child is ours"),
        ForkResult::Child => {
            no_core_dump();
            // A panic must not reach the test runner, of which the child has a copy.
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
            // SAFETY: _exit(2) ends the process at once, and has no condition.
            unsafe { nix::libc::_exit(i32::from(done.is_err())) }
        }
    }
}

fn no_core_dump() {
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
}

/// The signal that a child of this process dies of when it does `action`, if it dies.
///
/// `action` may only make system calls and touch memory, as in a signal handler.
pub(crate) fn dies_of(action: impl FnOnce()) -> Option<Signal> {
    match child(action) {
        WaitStatus::Exited(_, 0) => None,
        WaitStatus::Signaled(_, signal, _) => Some(signal),
        other => panic!("{other:?}"),
    }
}

/// The signal that a child of this process dies of when it reads the byte at `addr`.
pub(crate) fn dies_of_reading(addr: *const u8) -> Option<Signal> {
    dies_of(|| {
        // SAFETY: none is needed: if nothing can be read there, the child dies, which is what
        // the caller wants to know. A volatile read is not optimised away.
        let _ = unsafe { addr.read_volatile() };
    })
}

/// The signal that a child of this process dies of when it writes the byte at `addr`.
pub(crate) fn dies_of_writing(addr: *mut u8) -> Option<Signal> {
    dies_of(|| {
        // SAFETY: as above; what is there is guest RAM, to which nobody has a reference.
        unsafe { addr.write_volatile(1) }
    })
}

/// The byte at `addr`, which must be mapped; what is there may be changed by others.
pub(crate) fn byte_at(addr: *const u8) -> u8 {
    assert_eq!(dies_of_reading(addr), None);
    // SAFETY: a child has just read it; the caller keeps it mapped.
    unsafe { addr.read_volatile() }
}

#[test]
fn a_child_that_touches_nothing_wrong_lives() {
    let byte = 7u8;
    assert_eq!(dies_of_reading(&raw const byte), None);
    assert_eq!(dies_of_reading(std::ptr::null()), Some(Signal::SIGSEGV));
}
