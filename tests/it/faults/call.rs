//! System calls as cases name them, and how each may fail.

use std::fmt;

use nix::errno::Errno::{self, *};
use nix::libc::{self, c_long, seccomp_notif};

use super::filter;

/// A system call, told apart from others of its name where one argument makes it another call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Call {
    pub(super) number: c_long,
    kind: u64,
}

/// What mmap(2) is asked for.
const FILE: u64 = 0;
const ADDRESS_SPACE: u64 = 1;
const STACK: u64 = 2;
const HEAP: u64 = 3;

/// What close(2) closes.
const FOLDER: u64 = 1;

/// `MFD_NOEXEC_SEAL` of linux/memfd.h, which older kernels do not know.
const NOEXEC_SEAL: u32 = 8;

/// Linux before 6.5: no cachestat(2); before 6.7: no PAGEMAP_SCAN.
pub(super) const WITHOUT_SCANS: &[(Call, Errno)] = &[
    (Call::new(451, 0), ENOSYS),
    (Call::new(libc::SYS_ioctl, 0xc060_6610), ENOTTY),
];

impl Call {
    const fn new(number: c_long, kind: u64) -> Self {
        Self { number, kind }
    }

    pub(super) fn of(call: &seccomp_notif) -> Self {
        let arguments = call.data.args;
        let kind = match i64::from(call.data.nr) {
            libc::SYS_mmap => kind_of_mapping(&arguments),
            libc::SYS_close if filter::is_folder(arguments[0]) => FOLDER,
            libc::SYS_memfd_create => arguments[1] & u64::from(NOEXEC_SEAL),
            libc::SYS_fcntl | libc::SYS_ioctl => arguments[1] & 0xffff_ffff,
            libc::SYS_madvise | libc::SYS_mprotect => arguments[2],
            _ => 0,
        };
        Self {
            number: call.data.nr.into(),
            kind,
        }
    }

    fn name(self) -> &'static str {
        name_of(self.number)
    }

    /// Whether a failure of it ends the process by design of others than this crate, and so is not
    /// played. Each with its reason:
    ///
    /// - Memory for the heap: the allocator says so, and the standard library aborts
    ///   (`handle_alloc_error`). The signal stack of a new thread is asked for in the same way.
    /// - The guard page of that signal stack: the standard library panics outside of what the
    ///   thread's owner could catch.
    /// - rseq(2) of a new thread: the C library ends the process.
    pub(super) fn is_exempt(self) -> bool {
        matches!(
            (self.number, self.kind),
            (libc::SYS_mmap, HEAP)
                | (libc::SYS_brk | libc::SYS_mremap | libc::SYS_rseq, _)
                | (libc::SYS_mprotect, 0)
        )
    }

    /// Whether it gives something back: failing, it leaves that, wherever it is called.
    pub(super) fn gives_back(self) -> bool {
        matches!(
            self.number,
            libc::SYS_munmap | libc::SYS_unlink | libc::SYS_unlinkat
        )
    }

    /// How it may fail: what its man page lists, or what a seccomp filter or a security module
    /// answers, but for what only a wrong argument can lead to.
    pub(super) fn errors(self) -> &'static [Errno] {
        match self.name() {
            "mmap" => &[ENOMEM, EAGAIN, EPERM, EACCES, ENODEV, EINVAL],
            "munmap" => &[ENOMEM],
            "mprotect" => &[ENOMEM, EACCES],
            "madvise" => &[
                EINTR, EAGAIN, ENOMEM, EINVAL, EPERM, EIO, EFAULT, EHWPOISON, ENOSYS, EOPNOTSUPP,
            ],
            "mincore" => &[EAGAIN, ENOMEM, EPERM, ENOSYS],
            "mbind" => &[ENOMEM, EINVAL, EIO, EPERM, ENOSYS],
            "cachestat" => &[ENOSYS, EPERM, EOPNOTSUPP, EINVAL],
            "memfd_create" => &[EMFILE, ENFILE, ENOMEM, EPERM, EACCES, ENOSYS, EINVAL],
            // EINTR is for FIFOs, slow devices and locks.
            "open" | "openat" => &[
                EMFILE, ENFILE, ENOMEM, ENOSPC, EACCES, EPERM, ENOENT, EROFS, EIO, EEXIST, ENOSYS,
            ],
            "ftruncate" => &[EINTR, EIO, ENOSPC, EPERM, EFBIG, EINVAL, ENOMEM],
            "fallocate" => &[
                EINTR, ENOSPC, EIO, EPERM, EFBIG, EOPNOTSUPP, ENOSYS, EINVAL, ENOMEM,
            ],
            "fcntl" => &[EPERM, EBUSY, EINVAL, EAGAIN, EMFILE, ENFILE, ENOSYS, EACCES],
            "fstat" | "stat" | "lstat" | "newfstatat" | "statx" => {
                &[EIO, ENOMEM, EACCES, EPERM, ENOSYS, EOVERFLOW]
            }
            "statfs" | "fstatfs" => &[EINTR, EIO, ENOMEM, EACCES, EPERM, ENOSYS],
            // ENXIO is no failure: it says that there is no more data.
            "lseek" => &[EINVAL, EIO, EPERM, EOPNOTSUPP],
            "read" | "pread64" | "readv" => &[EINTR, EIO, EAGAIN, ENOMEM, EPERM, EACCES, EINVAL],
            "readlink" | "readlinkat" => &[EACCES, EINVAL, EIO, ENOENT, ENOMEM],
            "getdents64" => &[EIO, EACCES, ENOMEM, ENOENT],
            "write" | "pwrite64" | "writev" => &[EINTR, EIO, EAGAIN, ENOSPC, EPIPE, EPERM],
            "unlink" | "unlinkat" => &[EACCES, EIO, EPERM, EROFS, EBUSY],
            // The standard library panics where a folder cannot be closed for another reason.
            "close" if self.kind == FOLDER => &[EINTR],
            "close" => &[EINTR, EIO],
            "clone" | "clone3" => &[EAGAIN, ENOMEM, EPERM, ENOSYS],
            "socket" | "socketpair" | "accept" | "accept4" | "eventfd2" | "epoll_create1"
            | "dup" | "pipe2" => &[EMFILE, ENFILE, ENOMEM, EPERM, EACCES, EINTR],
            "connect" => &[EINTR, EAGAIN, ECONNREFUSED, EACCES, EPERM, ENOMEM],
            "sendmsg" | "sendto" => &[
                EINTR,
                EAGAIN,
                ENOBUFS,
                ENOMEM,
                EPIPE,
                ECONNRESET,
                ETOOMANYREFS,
                EPERM,
                ENOSYS,
            ],
            "recvmsg" | "recvfrom" => &[EINTR, EAGAIN, ENOMEM, ECONNRESET, EPERM, ENOSYS],
            "poll" | "ppoll" => &[EINTR, ENOMEM, EINVAL, EPERM],
            "epoll_wait" | "epoll_pwait" => &[EINTR],
            "epoll_ctl" => &[ENOMEM, ENOSPC, EPERM],
            "getsockopt" | "setsockopt" | "shutdown" | "getsockname" | "getpeername" | "bind"
            | "listen" => &[ENOMEM, ENOBUFS, EPERM, EACCES, ENOTCONN, ENOSYS],
            // Those that are made here are interrupted by what kills only.
            "ioctl" => &[
                EAGAIN, EINVAL, ENOMEM, EPERM, ENOTTY, EEXIST, ENOSPC, EIO, ENOSYS,
            ],
            "sched_getaffinity" => &[EPERM, EINVAL, ENOSYS],
            // Anything else is what fills the seed of a hash table: with others than these the
            // standard library panics.
            "getrandom" => &[EINTR, ENOSYS, EPERM],
            "nanosleep" | "clock_nanosleep" => &[EINTR],
            "sched_yield" | "getpid" | "gettid" => &[],
            _ => &[EPERM, ENOSYS, EINVAL, ENOMEM],
        }
    }

    /// Whether all further calls may fail by this error, too: it is a state, and no caller tries
    /// again for as long as it lasts.
    pub(super) fn may_last(self, errno: Errno) -> bool {
        let lasts = match errno {
            EINTR => false,
            EAGAIN | ENOMEM | ENOBUFS => !matches!(self.name(), "read" | "write" | "getrandom"),
            _ => true,
        };
        lasts && !self.gives_back() && self.number != libc::SYS_close
    }

    /// Whether vhost makes the call again for as long as it fails by this error: what ends that is
    /// the end of the connection, after which no kernel says so any more.
    pub(super) fn is_tried_again_by_vhost(self, errno: Errno) -> bool {
        let moves = matches!(self.name(), "sendmsg" | "recvmsg" | "recvfrom" | "sendto");
        moves && matches!(errno, EAGAIN | ENOMEM | ENOBUFS)
    }
}

/// Whether a call asks what is at a path.
pub(super) fn looks_at_a_path(call: &seccomp_notif) -> bool {
    const EMPTY: u64 = libc::AT_EMPTY_PATH as u64;
    let flags = match i64::from(call.data.nr) {
        libc::SYS_stat | libc::SYS_lstat => 0,
        libc::SYS_statx => call.data.args[2],
        libc::SYS_newfstatat => call.data.args[3],
        _ => EMPTY,
    };
    flags & EMPTY == 0
}

fn kind_of_mapping(arguments: &[u64; 6]) -> u64 {
    let [_, _, protection, flags, fd, _] = *arguments;
    let has = |flag: i32| flags & u64::from(flag.unsigned_abs()) != 0;
    match (has(libc::MAP_ANONYMOUS), protection) {
        (false, _) => {
            debug_assert_ne!(fd & 0xffff_ffff, 0xffff_ffff);
            FILE
        }
        (true, 0) if has(libc::MAP_STACK) => STACK,
        (true, 0) => ADDRESS_SPACE,
        (true, _) => HEAP,
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self.kind) {
            ("", _) => write!(f, "call {}", self.number),
            ("mmap", ADDRESS_SPACE) => write!(f, "mmap(address space)"),
            ("mmap", STACK) => write!(f, "mmap(stack)"),
            ("mmap", HEAP) => write!(f, "mmap(heap)"),
            ("mmap", _) => write!(f, "mmap(file)"),
            ("close", FOLDER) => write!(f, "close(folder)"),
            (name @ ("fcntl" | "madvise" | "memfd_create" | "mprotect"), kind) => {
                write!(f, "{name}({kind})")
            }
            (name @ "ioctl", kind) => write!(f, "{name}({kind:#x})"),
            (name, _) => write!(f, "{name}"),
        }
    }
}

/// The calls that are met, and the one that libc has no name for yet.
const NAMES: &[(c_long, &str)] = &[
    (451, "cachestat"),
    (libc::SYS_accept, "accept"),
    (libc::SYS_accept4, "accept4"),
    (libc::SYS_bind, "bind"),
    (libc::SYS_brk, "brk"),
    (libc::SYS_clock_nanosleep, "clock_nanosleep"),
    (libc::SYS_clone, "clone"),
    (libc::SYS_clone3, "clone3"),
    (libc::SYS_close, "close"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_dup, "dup"),
    (libc::SYS_epoll_create1, "epoll_create1"),
    (libc::SYS_epoll_ctl, "epoll_ctl"),
    (libc::SYS_epoll_pwait, "epoll_pwait"),
    (libc::SYS_epoll_wait, "epoll_wait"),
    (libc::SYS_eventfd2, "eventfd2"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_fcntl, "fcntl"),
    (libc::SYS_fstat, "fstat"),
    (libc::SYS_fstatfs, "fstatfs"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_getdents64, "getdents64"),
    (libc::SYS_getpeername, "getpeername"),
    (libc::SYS_getpid, "getpid"),
    (libc::SYS_getrandom, "getrandom"),
    (libc::SYS_getsockname, "getsockname"),
    (libc::SYS_getsockopt, "getsockopt"),
    (libc::SYS_gettid, "gettid"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_listen, "listen"),
    (libc::SYS_lseek, "lseek"),
    (libc::SYS_lstat, "lstat"),
    (libc::SYS_madvise, "madvise"),
    (libc::SYS_mbind, "mbind"),
    (libc::SYS_memfd_create, "memfd_create"),
    (libc::SYS_mincore, "mincore"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_mremap, "mremap"),
    (libc::SYS_munmap, "munmap"),
    (libc::SYS_nanosleep, "nanosleep"),
    (libc::SYS_newfstatat, "newfstatat"),
    (libc::SYS_open, "open"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_pipe2, "pipe2"),
    (libc::SYS_poll, "poll"),
    (libc::SYS_ppoll, "ppoll"),
    (libc::SYS_prctl, "prctl"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_prlimit64, "prlimit64"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_read, "read"),
    (libc::SYS_readlink, "readlink"),
    (libc::SYS_readlinkat, "readlinkat"),
    (libc::SYS_readv, "readv"),
    (libc::SYS_recvfrom, "recvfrom"),
    (libc::SYS_recvmsg, "recvmsg"),
    (libc::SYS_rseq, "rseq"),
    (libc::SYS_rt_sigprocmask, "rt_sigprocmask"),
    (libc::SYS_sched_getaffinity, "sched_getaffinity"),
    (libc::SYS_sched_yield, "sched_yield"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_set_robust_list, "set_robust_list"),
    (libc::SYS_setsockopt, "setsockopt"),
    (libc::SYS_shutdown, "shutdown"),
    (libc::SYS_sigaltstack, "sigaltstack"),
    (libc::SYS_socket, "socket"),
    (libc::SYS_socketpair, "socketpair"),
    (libc::SYS_stat, "stat"),
    (libc::SYS_statfs, "statfs"),
    (libc::SYS_statx, "statx"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_write, "write"),
    (libc::SYS_writev, "writev"),
];

fn name_of(number: c_long) -> &'static str {
    let found = NAMES.iter().find(|(known, _)| *known == number);
    found.map_or("", |(_, name)| name)
}
