//! Seccomp filters that ask a supervisor about system calls (seccomp_unotify(2)).
#![expect(
    unsafe_code,
    reason = "seccomp(2) and its ioctls take raw pointers, and hand out a bare descriptor"
)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{
    self, BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, c_long, c_ulong,
    seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog,
};

/// Where `struct seccomp_data` has the number of the call.
const NUMBER: u32 = 0;

/// Has the calls of this thread, and of the threads that it starts from now on, wait for a
/// supervisor: those with the numbers in `watched`, or all. Gives the supervisor's descriptor.
///
/// Never asked about are the end of a thread, and futexes: locks and channels of the standard
/// library cannot fail.
pub(super) fn install(watched: Option<&[c_long]>) -> Result<OwnedFd, Errno> {
    let mut program = program(watched);
    let program = sock_fprog {
        len: program.len().try_into().unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: a number is set for this thread; nothing is pointed to.
    let answer = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    Errno::result(answer)?;
    // SAFETY: the program lives through the call, which copies it and checks it.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    let listener = Errno::result(answer)?.try_into().unwrap();
    // SAFETY: the kernel just made this descriptor, for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}

/// Whether this process may have filters with supervisors, of which a thread has one at most.
pub(super) fn can_install() -> Result<(), Errno> {
    let attempt = std::thread::spawn(|| install(Some(&[])).map(drop));
    attempt.join().expect("it does not panic")
}

fn program(watched: Option<&[c_long]>) -> Vec<sock_filter> {
    let load = |at| statement(BPF_LD | BPF_W | BPF_ABS, at);
    let equal = |number: c_long, then, otherwise| sock_filter {
        code: (BPF_JMP | BPF_JEQ | BPF_K).try_into().unwrap(),
        jt: then,
        jf: otherwise,
        k: number.try_into().unwrap(),
    };
    let answer = |action| statement(BPF_RET | BPF_K, action);
    let (ask, allow) = (
        answer(libc::SECCOMP_RET_USER_NOTIF),
        answer(libc::SECCOMP_RET_ALLOW),
    );

    let mut program = vec![load(NUMBER)];
    for number in [libc::SYS_futex, libc::SYS_exit, libc::SYS_exit_group] {
        program.extend([equal(number, 0, 1), allow]);
    }
    match watched {
        None => program.push(ask),
        Some(watched) => {
            for number in watched {
                program.extend([equal(*number, 0, 1), ask]);
            }
            program.push(allow);
        }
    }
    program
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code.try_into().unwrap(),
        jt: 0,
        jf: 0,
        k,
    }
}

/// Waits for the next call; `None` once no thread has the filter any more.
pub(super) fn receive(listener: &OwnedFd) -> Option<seccomp_notif> {
    loop {
        let mut poll = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one element, which lives through the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, -1) };
        match Errno::result(ready) {
            Err(Errno::EINTR) => continue,
            answer => assert_eq!(answer, Ok(1)),
        }
        if poll.revents & libc::POLLIN == 0 {
            return None;
        }
        // SAFETY: it is made of integers only. The kernel wants it zeroed.
        let mut call: seccomp_notif = unsafe { std::mem::zeroed() };
        const RECEIVE: c_ulong = 0xc050_2100;
        // SAFETY: the kernel writes a structure of this type, which lives through the call.
        let answer = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut call) };
        match Errno::result(answer) {
            Ok(_) => return Some(call),
            // It was taken otherwise, or the thread is gone.
            Err(Errno::EINTR | Errno::ENOENT) => {}
            Err(errno) => panic!("SECCOMP_IOCTL_NOTIF_RECV: {errno}"),
        }
    }
}

/// Answers a call with an error, or lets it happen.
pub(super) fn answer(listener: &OwnedFd, call: &seccomp_notif, error: Option<Errno>) {
    let response = seccomp_notif_resp {
        id: call.id,
        val: 0,
        error: error.map_or(0, |errno| -(errno as i32)),
        flags: match error {
            Some(_) => 0,
            None => 1, // SECCOMP_USER_NOTIF_FLAG_CONTINUE
        },
    };
    const SEND: c_ulong = 0xc018_2101;
    // SAFETY: the kernel reads a structure of this type, which lives through the call.
    let answer = unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const response) };
    match Errno::result(answer) {
        // The thread is gone.
        Ok(_) | Err(Errno::ENOENT) => {}
        Err(errno) => panic!("SECCOMP_IOCTL_NOTIF_SEND: {errno}"),
    }
}

/// Closes a descriptor in the place of a call that is answered with an error.
pub(super) fn close(fd: i32) {
    // SAFETY: its owner gives it up in the call that waits for an answer.
    unsafe { libc::close(fd) };
}

/// Unmaps what munmap(2) did not, because it was to fail.
pub(super) fn unmap(range: std::ops::Range<u64>) {
    let len = usize::try_from(range.end - range.start).unwrap();
    let start = usize::try_from(range.start).unwrap();
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: its owner gave it up, and nothing refers to it any more.
    let answer = unsafe { libc::munmap(start, len) };
    assert_eq!(answer, 0);
}

/// Whether a descriptor is one of a folder. Allocates nothing.
pub(super) fn is_folder(fd: u64) -> bool {
    // SAFETY: it is made of integers only.
    let mut found: libc::stat = unsafe { std::mem::zeroed() };
    let fd = fd.try_into().unwrap_or(-1);
    // SAFETY: the kernel writes a structure of this type, which lives through the call.
    let answer = unsafe { libc::fstat(fd, &raw mut found) };
    answer == 0 && found.st_mode & libc::S_IFMT == libc::S_IFDIR
}

/// Has the allocator keep what it has, so that it makes hardly any call of its own.
pub(super) fn calm_the_allocator() {
    const SETTINGS: [(i32, i32); 4] = [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, 1 << 30),
        (libc::M_TRIM_THRESHOLD, 1 << 30),
        (libc::M_TOP_PAD, 64 << 20),
    ];
    for (setting, value) in SETTINGS {
        // SAFETY: a number of the allocator's is set, before there are other threads.
        let done = unsafe { libc::mallopt(setting, value) };
        assert_eq!(done, 1);
    }
}
