//! Which system calls each operation makes: the table of docs/porting.md, as data.
//!
//! The names are those of x86_64: on aarch64 `poll` is `ppoll`, `readlink` is `readlinkat`, and
//! `unlink` is `unlinkat`.

use nix::libc::{self, c_long};

use super::operations::{self as op, Work};
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
    /// Whether this machine can do it; says why not.
    pub(super) possible: fn() -> bool,
    pub(super) prepare: fn() -> Work,
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
const GETPID: Call = call("getpid", libc::SYS_getpid);
const MEMFD_CREATE: Call = call("memfd_create", libc::SYS_memfd_create);
const OPENAT: Call = call("openat", libc::SYS_openat);
const LSEEK: Call = call("lseek", libc::SYS_lseek);
const MINCORE: Call = call("mincore", libc::SYS_mincore);
const POLL: Call = call("poll", libc::SYS_poll);
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
const PASSCRED: Call = with!(call("setsockopt", libc::SYS_setsockopt), 2, SO_PASSCRED);
const INVALIDATE: Call = with!(call("msync", libc::SYS_msync), 2, MS_INVALIDATE);
const KEEP_SIZE: Call = with!(FALLOCATE, 1, FALLOC_FL_KEEP_SIZE);

/// What this machine has of memory, and what the process may have: files of /proc and /sys.
const LIMITS: &[Call] = &[
    CLOSE,
    OPENAT,
    call("pread64", libc::SYS_pread64),
    READ,
    STATX,
];
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
const POOLS: &[Call] = &[call("getdents64", libc::SYS_getdents64)];
/// RAM of which some is allocated already; pools of huge pages.
const ALLOCATED: &[Call] = &[CACHESTAT, call("getdents64", libc::SYS_getdents64), LSEEK];
/// `PAGEMAP_SCAN` of linux/fs.h, with the size of `struct pm_scan_arg`.
const PAGEMAP_SCAN: Call = with(
    call("ioctl", libc::SYS_ioctl),
    1,
    "PAGEMAP_SCAN",
    0xc060_6610,
);
/// `FALLOC_FL_PUNCH_HOLE` is only valid with `FALLOC_FL_KEEP_SIZE`.
const PUNCH_HOLE: Call = with(
    FALLOCATE,
    1,
    "FALLOC_FL_PUNCH_HOLE \\| FALLOC_FL_KEEP_SIZE",
    3,
);
/// Which process writes to a log.
const WRITER: &[Call] = &[GETPID, OPENAT, PASSCRED, READLINK];
const THREADS: &[Call] = &[
    call("clone3", libc::SYS_clone3),
    call("exit", libc::SYS_exit),
    call("mprotect", libc::SYS_mprotect),
    with!(call("prctl", libc::SYS_prctl), 0, PR_SET_NAME),
    call("rseq", libc::SYS_rseq),
    call("set_robust_list", libc::SYS_set_robust_list),
];
const FILE: &[Call] = &[FTRUNCATE, FSIZE, GET_SEALS, OPENAT, STATFS, STATX];
const MEMFD: &[Call] = &[ADD_SEALS, FTRUNCATE, FSIZE, GET_SEALS, MEMFD_CREATE, STATX];

const fn row(
    operation: &'static str,
    prepare: fn() -> Work,
    calls: &'static [&'static [Call]],
) -> Row {
    let possible = || true;
    Row {
        operation,
        possible,
        prepare,
        calls,
        sometimes: &[],
    }
}

const fn numa_row(
    operation: &'static str,
    prepare: fn() -> Work,
    calls: &'static [&'static [Call]],
) -> Row {
    Row {
        possible: numa,
        ..row(operation, prepare, calls)
    }
}

pub(super) const TABLE: &[Row] = &[
    row("creating a memfd", op::memfd, &[MEMFD]),
    row(
        "creating POSIX shm",
        op::posix_shm,
        &[FILE, &[GETPID, call("unlink", libc::SYS_unlink)]],
    ),
    row("creating a nameless file", op::nameless_file, &[FILE]),
    row("creating a file with a name", op::named_file, &[FILE]),
    row(
        "adopting a descriptor",
        op::adopt,
        &[&[GETFL, GET_SEALS, STATFS, STATX]],
    ),
    row(
        "mapping (building a memory)",
        op::map,
        &[LIMITS, &[DONTDUMP]],
    )
    .sometimes(POOLS),
    row("mapping, in core dumps", op::map_dumped, &[LIMITS]).sometimes(POOLS),
    row(
        "mapping, transparent huge pages",
        op::map_transparent,
        &[LIMITS, &[DONTDUMP, HUGEPAGE]],
    )
    .sometimes(POOLS),
    numa_row(
        "mapping, on NUMA nodes",
        op::map_on_nodes,
        &[LIMITS, &[DONTDUMP, call("mbind", libc::SYS_mbind)]],
    )
    .sometimes(POOLS),
    row(
        "populating: allocating",
        op::allocate,
        &[LIMITS, THREADS, START, &[KEEP_SIZE]],
    )
    .sometimes(ALLOCATED),
    row(
        "populating: prefaulting",
        op::prefault,
        &[LIMITS, THREADS, START, &[KEEP_SIZE, POPULATE_WRITE]],
    )
    .sometimes(ALLOCATED),
    numa_row(
        "populating, on NUMA nodes",
        op::prefault_on_nodes,
        &[
            LIMITS,
            THREADS,
            START,
            &[KEEP_SIZE, POPULATE_WRITE],
            &[call("sched_setaffinity", libc::SYS_sched_setaffinity)],
        ],
    )
    .sometimes(ALLOCATED),
    row("sharing with a daemon", op::share, &[&[DUPFD], MESSAGES]).sometimes(WAITS),
    row("a change under daemons", op::change, &[MESSAGES]).sometimes(WAITS),
    row(
        "a change under daemons that log",
        op::change_under_log,
        &[
            MESSAGES,
            WRITER,
            &[CLOSE, DONTDUMP, FTRUNCATE, FSIZE, STATX],
        ],
    )
    .sometimes(WAITS),
    row("reconnecting", op::reconnect, &[&[DUPFD], MESSAGES]).sometimes(WAITS),
    row(
        "starting a daemon's log",
        op::start_log,
        &[MEMFD, MESSAGES, WRITER, &[DONTDUMP]],
    )
    .sometimes(WAITS),
    row("harvesting it", op::harvest, &[]),
    row("stopping it", op::stop_log, &[&[CLOSE]]),
    row(
        "discarding",
        op::discard,
        &[SETTING, &[INVALIDATE, REMOVE, STATX]],
    )
    .sometimes(&[CACHESTAT, PUNCH_HOLE, LSEEK]),
    row(
        "`stats`",
        op::stats,
        &[SETTING, &[CACHESTAT, READLINK, STATX]],
    )
    .sometimes(&[PAGEMAP_SCAN, LSEEK, MINCORE]),
    row("`extents`", op::extents, &[&[CACHESTAT, STATX]]).sometimes(&[LSEEK, MINCORE]),
    row("dropping a memory", op::drop_memory, &[&[CLOSE]]),
    row("dropping a share", op::drop_share, &[&[CLOSE]]),
];

/// How a thread finds the bounds of its stack.
const START: &[Call] = &[
    GETPID,
    call("gettid", libc::SYS_gettid),
    call("sched_getaffinity", libc::SYS_sched_getaffinity),
];
