//! Children that may die: a fork that does one thing.
#![allow(
    unsafe_code,
    reason = "fork(2) is unsafe, and so is the touch of an address that may not be mapped"
)]

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::isolation::remove_names_of;

/// What became of a child that did `action` and then left with status 0.
///
/// The other threads of this process are not in the child, and may have held any lock: `action`
/// may only make system calls and touch memory.
fn child(action: impl FnOnce()) -> WaitStatus {
    // SAFETY: the child only does what is safe in a signal handler, as `action` promises, and
    // leaves by _exit.
    let forked = unsafe { fork() };
    match forked.expect("a process can be had") {
        ForkResult::Parent { child } => {
            let end = waitpid(child, None).expect("the child is ours");
            // One that was killed between making a name and removing it has left that.
            remove_names_of(child.as_raw().cast_unsigned());
            end
        }
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

/// Lets a program have no descriptor of this process but the three standard ones.
///
/// Not all that libraries receive from sockets is closed on exec: a test that looks at what its
/// process has would see what others had when it was started.
pub(crate) fn inherits_no_descriptor(command: &mut Command) {
    let close_on_exec = || {
        let flags = nix::libc::CLOSE_RANGE_CLOEXEC.cast_signed();
        // SAFETY: the call only marks descriptors; nothing in the child uses them before exec.
        let answer = unsafe { nix::libc::close_range(3, u32::MAX, flags) };
        nix::errno::Errno::result(answer)?;
        Ok(())
    };
    // SAFETY: the closure makes one system call, and allocates nothing.
    unsafe { command.pre_exec(close_on_exec) };
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
        // SAFETY: as above; what is there is guest RAM, to which there is no reference.
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

/// Another process that maps a backing and looks into it, or writes to it, when told to.
///
/// It holds copies of all descriptors of this process: to be used in a process of its own
/// (`isolation::in_own_process`), where no other test waits for a descriptor to be closed.
pub(crate) struct Peer {
    pid: nix::unistd::Pid,
    orders: std::fs::File,
    answers: std::fs::File,
}

impl Peer {
    /// A process that maps the first `len` bytes of the file.
    pub(crate) fn mapping(file: impl std::os::fd::AsFd, len: usize) -> Self {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        use std::io::{Read, Write};

        let (orders_in, orders) = nix::unistd::pipe().expect("a pipe can be had");
        let (answers, answers_out) = nix::unistd::pipe().expect("a pipe can be had");
        // SAFETY: the child only makes system calls and touches memory, and leaves by _exit.
        let forked = unsafe { fork() };
        let child = match forked.expect("a process can be had") {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                no_core_dump();
                // So that it sees the end of its orders.
                drop((orders, answers));
                let work = || {
                    let (mut orders, mut answers) = (
                        std::fs::File::from(orders_in),
                        std::fs::File::from(answers_out),
                    );
                    let len = std::num::NonZeroUsize::new(len).expect("something to map");
                    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
                    // SAFETY: a new mapping where the kernel wants it.
                    let start = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, 0) };
                    let start = start.expect("mapped").cast::<u8>();
                    let mut order = [0; 10];
                    while orders.read_exact(&mut order).is_ok() {
                        let at: [u8; 8] = order[..8].try_into().expect("eight bytes");
                        let at = u64::from_ne_bytes(at) as usize % len;
                        let byte = start.as_ptr().wrapping_add(at);
                        if order[8] == 1 {
                            // SAFETY: inside the mapping, to which there is no reference.
                            unsafe { byte.write_volatile(order[9]) };
                        }
                        // SAFETY: as above.
                        let found = unsafe { byte.read_volatile() };
                        answers.write_all(&[found]).expect("the parent listens");
                    }
                };
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
                // SAFETY: _exit(2) ends the process at once, and has no condition.
                unsafe { nix::libc::_exit(i32::from(done.is_err())) }
            }
        };
        Self {
            pid: child,
            orders: orders.into(),
            answers: answers.into(),
        }
    }

    /// The byte that it reads at the offset.
    pub(crate) fn read(&mut self, at: u64) -> u8 {
        self.order(at, [0, 0])
    }

    /// Has it write a byte at the offset.
    pub(crate) fn write(&mut self, at: u64, byte: u8) {
        assert_eq!(self.order(at, [1, byte]), byte);
    }

    fn order(&mut self, at: u64, what: [u8; 2]) -> u8 {
        use std::io::{Read, Write};
        let mut order = at.to_ne_bytes().to_vec();
        order.extend(what);
        self.orders.write_all(&order).expect("the peer listens");
        let mut answer = [0];
        self.answers.read_exact(&mut answer).expect("it answers");
        answer[0]
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It blocks in read(2), and nothing of it is worth a farewell.
        let _ = nix::sys::signal::kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}
