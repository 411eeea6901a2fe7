//! Which system calls each operation makes: the table of docs/porting.md, as data.
//!
//! The names are those of x86_64: on aarch64 `poll` is `ppoll`, `readlink` is `readlinkat`, and
//! `unlink` is `unlinkat`.

use std::any::Any;

use nix::libc::{self, c_long};

use super::operations::{self as op, Work};
use crate::isolation::HugePool;
use crate::kvm::new_vm;
use crate::numa::numa;

/// A system call: its name, its number, and what of its arguments filters look at.
#[derive(Clone, Copy)]
pub(super) struct Call {
    pub(super) name: &'static str,
    pub(super) number: c_long,
    pub(super) argument: Option<Argument>,
}

/// Which argument has which value: 1 is the second.
#[derive(Clone, Copy)]
pub(super) struct Argument {
    pub(super) which: u8,
    pub(super) name: &'static str,
    pub(super) value: u64,
}

pub(super) struct Row {
    pub(super) operation: &'static str,
    /// What it needs of this machine, to be kept meanwhile; says why it is not to be had.
    pub(super) needs: fn() -> Option<Box<dyn Any>>,
    /// The same for different RAM, daemons or users.
    pub(super) cases: &'static [fn() -> Work],
    /// The calls that are always made.
    pub(super) calls: &'static [&'static [Call]],
    /// Those that depend on what the RAM, the machine or the daemon is like: the filter allows
    /// them, and no test shows that they are made.
    pub(super) sometimes: &'static [Call],
}

impl Row {
    const fn sometimes(self, sometimes: &'static [Call]) -> Self {
        Self { sometimes, ..self }
    }

    const fn on_nodes(self) -> Self {
        let needs = || numa().then(|| Box::new(()) as Box<dyn Any>);
        Self { needs, ..self }
    }

    const fn on_huge_pages(self) -> Self {
        let needs =
            || Some(Box::new(HugePool::with_available(op::HUGE, 2 * op::SIZE / op::HUGE)?) as _);
        Self { needs, ..self }
    }

    const fn on_kvm(self) -> Self {
        let needs = || Some(Box::new(new_vm()?) as _);
        Self { needs, ..self }
    }
}

const fn call(name: &'static str, number: c_long) -> Call {
    Call {
        name,
        number,
        argument: None,
    }
}

const fn with(call: Call, which: u8, name: &'static str, value: u64) -> Call {
    Call {
        argument: Some(Argument { which, name, value }),
        ..call
    }
}

/// A constant of libc as the argument, under its own name.
macro_rules! with {
    ($call:expr, $which:literal, $value:ident) => {
        with($call, $which, stringify!($value), libc::$value as u64)
    };
}

/// What any program does: its allocator, locks, signals, its end, and a panic's message.
///
/// With debug assertions the standard library also looks whether what it closes is open.
pub(super) const BASE: &[Call] = &[
    BRK,
    call("clock_gettime", libc::SYS_clock_gettime),
    call("exit_group", libc::SYS_exit_group),
    with!(FCNTL, 1, F_GETFD),
    call("futex", libc::SYS_futex),
    call("getrandom", libc::SYS_getrandom),
    with!(MADVISE, 2, MADV_DONTNEED),
    call("mmap", libc::SYS_mmap),
    call("mremap", libc::SYS_mremap),
    call("munmap", libc::SYS_munmap),
    call("restart_syscall", libc::SYS_restart_syscall),
    call("rt_sigprocmask", libc::SYS_rt_sigprocmask),
    call("rt_sigreturn", libc::SYS_rt_sigreturn),
    call("sched_yield", libc::SYS_sched_yield),
    call("sigaltstack", libc::SYS_sigaltstack),
    call("write", libc::SYS_write),
];

const BRK: Call = call("brk", libc::SYS_brk);
const FCNTL: Call = call("fcntl", libc::SYS_fcntl);
const MADVISE: Call = call("madvise", libc::SYS_madvise);
const FALLOCATE: Call = call("fallocate", libc::SYS_fallocate);
const CACHESTAT: Call = call("cachestat", 451);
const CLOSE: Call = call("close", libc::SYS_close);
const FTRUNCATE: Call = call("ftruncate", libc::SYS_ftruncate);
const GETDENTS: Call = call("getdents64", libc::SYS_getdents64);
const GETPID: Call = call("getpid", libc::SYS_getpid);
const MEMFD_CREATE: Call = call("memfd_create", libc::SYS_memfd_create);
const MPROTECT: Call = call("mprotect", libc::SYS_mprotect);
const NEWFSTATAT: Call = call("newfstatat", libc::SYS_newfstatat);
const OPENAT: Call = call("openat", libc::SYS_openat);
const LSEEK: Call = call("lseek", libc::SYS_lseek);
const MINCORE: Call = call("mincore", libc::SYS_mincore);
const POLL: Call = call("poll", libc::SYS_poll);
const PREAD: Call = call("pread64", libc::SYS_pread64);
const READ: Call = call("read", libc::SYS_read);
const READLINK: Call = call("readlink", libc::SYS_readlink);
const STATFS: Call = call("statfs", libc::SYS_statfs);
const STATX: Call = call("statx", libc::SYS_statx);

const ADD_SEALS: Call = with!(FCNTL, 1, F_ADD_SEALS);
const GET_SEALS: Call = with!(FCNTL, 1, F_GET_SEALS);
const GETFL: Call = with!(FCNTL, 1, F_GETFL);
const DUPFD: Call = with!(FCNTL, 1, F_DUPFD_CLOEXEC);
const DONTDUMP: Call = with!(MADVISE, 2, MADV_DONTDUMP);
const HUGEPAGE: Call = with!(MADVISE, 2, MADV_HUGEPAGE);
const POPULATE_WRITE: Call = with!(MADVISE, 2, MADV_POPULATE_WRITE);
const REMOVE: Call = with!(MADVISE, 2, MADV_REMOVE);
const FSIZE: Call = with!(call("prlimit64", libc::SYS_prlimit64), 1, RLIMIT_FSIZE);
const SETSOCKOPT: Call = call("setsockopt", libc::SYS_setsockopt);
const PASSCRED: Call = with!(SETSOCKOPT, 2, SO_PASSCRED);
const PASSPIDFD: Call = with!(SETSOCKOPT, 2, SO_PASSPIDFD);
const INVALIDATE: Call = with!(call("msync", libc::SYS_msync), 2, MS_INVALIDATE);
const KEEP_SIZE: Call = with!(FALLOCATE, 1, FALLOC_FL_KEEP_SIZE);

/// What this machine has of memory, and what the process may have: files of /proc and /sys.
const LIMITS: &[Call] = &[CLOSE, OPENAT, PREAD, READ, STATX];
/// A file of /sys, read once.
const SETTING: &[Call] = &[CLOSE, OPENAT, READ];
const MESSAGES: &[Call] = &[
    call("recvfrom", libc::SYS_recvfrom),
    call("recvmsg", libc::SYS_recvmsg),
    call("sendmsg", libc::SYS_sendmsg),
];
/// An answer that is there already is not waited for.
const WAITS: &[Call] = &[POLL];
/// Pools of huge pages.
const POOLS: &[Call] = &[GETDENTS, NEWFSTATAT];
/// RAM of which some is allocated already; pools of huge pages.
const ALLOCATED: &[Call] = &[CACHESTAT, GETDENTS, LSEEK, NEWFSTATAT];
/// `PAGEMAP_SCAN` of linux/fs.h, with the size of `struct pm_scan_arg`.
const PAGEMAP_SCAN: Call = with(IOCTL, 1, "PAGEMAP_SCAN", 0xc060_6610);
/// `FALLOC_FL_PUNCH_HOLE` is only valid with `FALLOC_FL_KEEP_SIZE`.
const PUNCH_HOLE: Call = with(
    FALLOCATE,
    1,
    "FALLOC_FL_PUNCH_HOLE \\| FALLOC_FL_KEEP_SIZE",
    3,
);
/// Which process writes to a log.
const WRITER: &[Call] = &[PASSCRED, PASSPIDFD];
/// Before Linux 6.5 it is looked up.
const WAITS_AND_WRITER: &[Call] = &[GETPID, OPENAT, POLL, READLINK];
/// A daemon that hung up: whether it is dead, and that it is forgotten then.
const FORMER: &[Call] = &[CLOSE, POLL, PREAD];
const ENDED: &[Call] = &[POLL, PREAD];
/// Answers that come together have one pidfd.
const CLOSES_WAITS_AND_WRITER: &[Call] = &[CLOSE, GETPID, OPENAT, POLL, READLINK];
const THREADS: &[Call] = &[
    call("clone3", libc::SYS_clone3),
    call("exit", libc::SYS_exit),
    MPROTECT,
    with!(call("prctl", libc::SYS_prctl), 0, PR_SET_NAME),
    call("rseq", libc::SYS_rseq),
    call("set_robust_list", libc::SYS_set_robust_list),
];
const FILE: &[Call] = &[FTRUNCATE, FSIZE, GET_SEALS, OPENAT, STATFS, STATX];
const MEMFD: &[Call] = &[ADD_SEALS, FTRUNCATE, FSIZE, GET_SEALS, MEMFD_CREATE, STATX];

const fn row(
    operation: &'static str,
    cases: &'static [fn() -> Work],
    calls: &'static [&'static [Call]],
) -> Row {
    Row {
        operation,
        needs: || Some(Box::new(())),
        cases,
        calls,
        sometimes: &[],
    }
}

pub(super) const TABLE: &[Row] = &[
    row("creating a memfd", &[op::memfd], &[MEMFD]),
    row(
        "creating a memfd of huge pages",
        &[op::huge_memfd],
        &[MEMFD, LIMITS, POOLS],
    )
    .on_huge_pages(),
    row(
        "creating POSIX shm",
        &[op::posix_shm],
        &[FILE, &[GETPID, call("unlink", libc::SYS_unlink)]],
    ),
    row("creating a nameless file", &[op::nameless_file], &[FILE]),
    row("creating a file with a name", &[op::named_file], &[FILE]),
    row("adopting a descriptor", &[op::adopt], &[ADOPT]),
    row(
        "mapping (building a memory)",
        &[op::map, op::map_adopted],
        &[LIMITS, &[DONTDUMP]],
    )
    .sometimes(POOLS),
    row(
        "mapping an adopted file on a file system",
        &[op::map_adopted_file],
        &[LIMITS, &[DONTDUMP, STATFS]],
    )
    .sometimes(POOLS),
    row("mapping, in core dumps", &[op::map_dumped], &[LIMITS]).sometimes(POOLS),
    row(
        "mapping, huge pages",
        &[op::map_huge],
        &[LIMITS, &[DONTDUMP]],
    )
    .sometimes(POOLS)
    .on_huge_pages(),
    row(
        "mapping, transparent huge pages",
        &[op::map_transparent],
        &[LIMITS, &[DONTDUMP, HUGEPAGE]],
    )
    .sometimes(POOLS),
    row(
        "mapping, on NUMA nodes",
        &[op::map_on_nodes, op::map_adopted_on_nodes],
        &[LIMITS, &[DONTDUMP, call("mbind", libc::SYS_mbind)]],
    )
    .sometimes(&[CACHESTAT, GETDENTS, LSEEK, NEWFSTATAT, STATFS])
    .on_nodes(),
    row(
        "populating: allocating",
        &[op::allocate],
        &[LIMITS, THREADS, START, &[KEEP_SIZE]],
    )
    .sometimes(ALLOCATED),
    row(
        "populating: prefaulting, also in the background",
        &[
            op::prefault,
            op::prefault_in_background,
            op::prefault_by_one,
        ],
        &[LIMITS, THREADS, START, &[KEEP_SIZE, POPULATE_WRITE]],
    )
    .sometimes(ALLOCATED),
    row(
        "populating, huge pages",
        &[op::prefault_huge],
        &[LIMITS, THREADS, START, &[POPULATE_WRITE]],
    )
    .sometimes(&[CACHESTAT, KEEP_SIZE, GETDENTS, LSEEK, NEWFSTATAT])
    .on_huge_pages(),
    row(
        "populating, on NUMA nodes",
        &[op::prefault_on_nodes],
        &[
            LIMITS,
            THREADS,
            START,
            &[KEEP_SIZE, POPULATE_WRITE],
            &[call("sched_setaffinity", libc::SYS_sched_setaffinity)],
        ],
    )
    .sometimes(ALLOCATED)
    .on_nodes(),
    row(
        "sharing with a daemon",
        &[op::share, op::share_whole_tables, op::share_without_acks],
        &[&[DUPFD], MESSAGES],
    )
    .sometimes(WAITS),
    row(
        "a change under daemons",
        &[
            op::change,
            op::change_of_whole_tables,
            op::change_without_acks,
        ],
        &[MESSAGES],
    )
    .sometimes(WAITS),
    row(
        "a change under daemons that log",
        &[op::change_under_log],
        &[
            MESSAGES,
            WRITER,
            &[CLOSE, DONTDUMP, FTRUNCATE, FSIZE, STATX],
        ],
    )
    .sometimes(WAITS_AND_WRITER),
    row("reconnecting", &[op::reconnect], &[&[DUPFD], MESSAGES]).sometimes(WAITS),
    row(
        "starting a daemon's log",
        &[op::start_log],
        &[MEMFD, MESSAGES, WRITER, &[DONTDUMP]],
    )
    .sometimes(CLOSES_WAITS_AND_WRITER),
    row(
        "harvesting it",
        &[op::harvest, op::harvest_after_hang_up],
        &[],
    )
    .sometimes(FORMER),
    row("stopping it", &[op::stop_log], &[&[CLOSE]]).sometimes(ENDED),
    row(
        "a session: connecting",
        &[op::connect],
        &[CONNECT, MESSAGES],
    )
    .sometimes(PATIENCE),
    row(
        "a session: connecting, with a backend channel",
        &[op::connect_with_channel],
        &[
            CONNECT,
            MESSAGES,
            &[call("socketpair", libc::SYS_socketpair), CLOSE],
        ],
    )
    .sometimes(WAITS),
    row(
        "a session: starting a ring with an in-flight buffer",
        &[op::start_ring_with_inflight],
        &[MESSAGES, &[STATX]],
    )
    .sometimes(WAITS),
    row(
        "a session: its memory",
        &[op::attach_session, op::change_under_session],
        &[MESSAGES],
    )
    .sometimes(WAITS),
    row(
        "a session: starting a ring, reading configuration",
        &[op::start_ring, op::config],
        &[MESSAGES],
    )
    .sometimes(WAITS),
    row(
        "a session: stopping a ring",
        &[op::stop_ring],
        &[MESSAGES, &[CLOSE]],
    )
    .sometimes(WAITS),
    row(
        "a session: starting its log",
        &[op::start_session_log],
        &[MEMFD, MESSAGES, WRITER, &[DONTDUMP]],
    )
    .sometimes(CLOSES_WAITS_AND_WRITER),
    row("a session: harvesting it", &[op::harvest_session], &[]).sometimes(FORMER),
    row(
        "a session: stopping it",
        &[op::stop_session_log],
        &[MESSAGES, &[CLOSE]],
    )
    .sometimes(ENDED),
    row(
        "a session: reconnecting",
        &[op::reconnect_session],
        &[&[CLOSE], CONNECT, MESSAGES],
    )
    .sometimes(WAITS),
    row(
        "taking a memory table, and letting go of it (the daemon's end)",
        &[op::receive],
        &[ADOPT, &[CLOSE, DONTDUMP]],
    ),
    row(
        "a change under KVM",
        &[op::change_under_kvm],
        &[&[SET_SLOT]],
    )
    .on_kvm(),
    row(
        "KVM's log: starting, harvesting, stopping",
        &[op::harvest_kvm],
        &[&[SET_SLOT, GET_LOG, MPROTECT]],
    )
    .on_kvm(),
    row("discarding", &[op::discard], &[&[INVALIDATE, REMOVE]])
        .sometimes(&[CACHESTAT, PUNCH_HOLE, LSEEK, STATX]),
    row(
        "discarding, huge pages",
        &[op::discard_huge],
        &[&[INVALIDATE, REMOVE]],
    )
    .sometimes(&[CACHESTAT, PUNCH_HOLE, LSEEK, STATX])
    .on_huge_pages(),
    row(
        "`stats`",
        &[op::stats],
        &[SETTING, &[CACHESTAT, READLINK, STATX]],
    )
    .sometimes(&[PAGEMAP_SCAN, LSEEK, MINCORE]),
    row("`extents`", &[op::extents], &[&[CACHESTAT, STATX]]).sometimes(&[LSEEK, MINCORE]),
    row("dropping a memory", &[op::drop_memory], &[&[CLOSE]]),
    row(
        "dropping a share, a session",
        &[op::drop_share, op::drop_session],
        &[&[CLOSE]],
    ),
    row("dropping KVM's slots", &[op::drop_slots], &[&[SET_SLOT]]).on_kvm(),
];

const ADOPT: &[Call] = &[GETFL, GET_SEALS, STATFS, STATX];
const SOCKET: Call = with!(call("socket", libc::SYS_socket), 0, AF_UNIX);
const CONNECT: &[Call] = &[call("connect", libc::SYS_connect), SOCKET];
const IOCTL: Call = call("ioctl", libc::SYS_ioctl);
const SET_SLOT: Call = with(IOCTL, 1, "KVM_SET_USER_MEMORY_REGION", 0x4020_ae46);
const GET_LOG: Call = with(IOCTL, 1, "KVM_GET_DIRTY_LOG", 0x4010_ae42);
/// A daemon that does not listen yet, or that has not answered yet.
const PATIENCE: &[Call] = &[CLOSE, POLL];

/// How a thread finds the bounds of its stack.
const START: &[Call] = &[
    GETPID,
    call("gettid", libc::SYS_gettid),
    call("sched_getaffinity", libc::SYS_sched_getaffinity),
];
