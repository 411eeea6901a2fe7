//! A seccomp filter as VMMs have one: any system call but those that are named here ends the
//! process, in all of its threads.
//!
//! The calls are those of glibc. No other file of this program is used here: the tests install
//! this filter, too.

use std::collections::BTreeMap;
use std::error::Error;

use nix::libc::{self, c_int, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};

/// A call, and which of its arguments must have which value, if one is looked at.
pub(crate) type Call = (c_long, Option<(u8, u64)>);

const fn call(number: c_long) -> Call {
    (number, None)
}

const fn fcntl(command: c_int) -> Call {
    (libc::SYS_fcntl, Some((1, command.unsigned_abs() as u64)))
}

#[allow(clippy::unnecessary_cast, reason = "with musl its type is another")]
const fn ioctl(request: libc::Ioctl) -> Call {
    (libc::SYS_ioctl, Some((1, request as u64)))
}

const fn madvise(advice: c_int) -> Call {
    (libc::SYS_madvise, Some((2, advice.unsigned_abs() as u64)))
}

/// What docs/porting.md names: the base set, and what RAM, a session and its changes need.
pub(crate) const CRATE: &[Call] = &[
    // Any program.
    call(libc::SYS_brk),
    call(libc::SYS_clock_gettime),
    call(libc::SYS_exit_group),
    fcntl(libc::F_GETFD),
    call(libc::SYS_futex),
    call(libc::SYS_getrandom),
    madvise(libc::MADV_DONTNEED),
    call(libc::SYS_mmap),
    call(libc::SYS_mremap),
    call(libc::SYS_munmap),
    // The kernel makes it, for a wait that SIGSTOP and SIGCONT have interrupted.
    call(libc::SYS_restart_syscall),
    call(libc::SYS_rt_sigprocmask),
    call(libc::SYS_rt_sigreturn),
    call(libc::SYS_sched_yield),
    call(libc::SYS_sigaltstack),
    call(libc::SYS_write),
    // RAM to hot-add: a memfd, POSIX shared memory, its mapping, and what is short if it fails.
    fcntl(libc::F_ADD_SEALS),
    fcntl(libc::F_GET_SEALS),
    call(libc::SYS_close),
    call(libc::SYS_ftruncate),
    call(libc::SYS_getdents64),
    call(libc::SYS_getpid),
    call(libc::SYS_memfd_create),
    call(libc::SYS_openat),
    call(libc::SYS_pread64),
    call(libc::SYS_read),
    call(libc::SYS_statfs),
    call(libc::SYS_statx),
    madvise(libc::MADV_DONTDUMP),
    #[cfg(target_arch = "x86_64")]
    call(libc::SYS_readlink),
    #[cfg(not(target_arch = "x86_64"))]
    call(libc::SYS_readlinkat),
    #[cfg(target_arch = "x86_64")]
    call(libc::SYS_unlink),
    #[cfg(not(target_arch = "x86_64"))]
    call(libc::SYS_unlinkat),
    // A session.
    (
        libc::SYS_socket,
        Some((0, libc::AF_UNIX.unsigned_abs() as u64)),
    ),
    call(libc::SYS_connect),
    fcntl(libc::F_DUPFD_CLOEXEC),
    call(libc::SYS_recvfrom),
    call(libc::SYS_recvmsg),
    call(libc::SYS_sendmsg),
    #[cfg(target_arch = "x86_64")]
    call(libc::SYS_poll),
    #[cfg(not(target_arch = "x86_64"))]
    call(libc::SYS_ppoll),
    // Threads: those for I/O are started when their daemons are there.
    call(libc::SYS_clone3),
    call(libc::SYS_exit),
    call(libc::SYS_gettid),
    call(libc::SYS_mprotect),
    (
        libc::SYS_prctl,
        Some((0, libc::PR_SET_NAME.unsigned_abs() as u64)),
    ),
    call(libc::SYS_rseq),
    call(libc::SYS_sched_getaffinity),
    call(libc::SYS_set_robust_list),
];

/// What is needed beside it.
const OWN: &[Call] = &[
    // The guest's driver: eventfds, and what waits for them.
    call(libc::SYS_epoll_create1),
    call(libc::SYS_epoll_ctl),
    call(libc::SYS_epoll_pwait),
    #[cfg(target_arch = "x86_64")]
    call(libc::SYS_epoll_wait),
    call(libc::SYS_eventfd2),
    // A copy of the disk: its size, its end, its name.
    call(libc::SYS_fsync),
    call(libc::SYS_getcwd),
    call(libc::SYS_linkat),
    call(libc::SYS_lseek),
    call(libc::SYS_prlimit64),
    #[cfg(target_arch = "x86_64")]
    call(libc::SYS_rename),
    #[cfg(not(target_arch = "riscv64"))]
    call(libc::SYS_renameat),
    call(libc::SYS_renameat2),
    // Whether there is a terminal, and how wide it is.
    ioctl(libc::TCGETS),
    ioctl(libc::TIOCGWINSZ),
    // A signal that is waited for, and the end by it.
    call(libc::SYS_rt_sigtimedwait),
    call(libc::SYS_tgkill),
];

/// What daemons in this process need beside that.
const DAEMON: &[Call] = &[
    call(libc::SYS_accept4),
    call(libc::SYS_bind),
    call(libc::SYS_getsockname),
    call(libc::SYS_listen),
    call(libc::SYS_newfstatat),
    call(libc::SYS_shutdown),
];

/// Has any other call end this process from now on. `daemons` are in this process, or not. Tells
/// how many calls are left.
///
/// All threads that there are have the filter then, and those that they start.
pub(crate) fn enter(daemons: bool) -> Result<usize, Box<dyn Error + Send + Sync>> {
    let of_daemons = if daemons { DAEMON } else { &[] };
    let mut rules: BTreeMap<_, Vec<SeccompRule>> = BTreeMap::new();
    for (number, argument) in CRATE.iter().chain(OWN).chain(of_daemons) {
        let rules = rules.entry(*number).or_default();
        if let Some((which, value)) = *argument {
            let (len, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
            let condition = SeccompCondition::new(which, len, equal, value)?;
            rules.push(SeccompRule::new(vec![condition])?);
        }
    }
    let calls = rules.len();
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, kill, allow, arch)?;
    apply_filter_all_threads(&BpfProgram::try_from(filter)?)?;
    Ok(calls)
}
