//! System calls that a seccomp filter forbids, as VMMs do: another way is taken, or it is said.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{
    MADV_POPULATE_WRITE, SYS_fallocate, SYS_fstatfs, SYS_madvise, SYS_memfd_create, SYS_msync,
    SYS_openat, SYS_statfs, c_long,
};
use nix::mount::{MsFlags, umount};
use nix::sys::signal::Signal;
use nix::sys::statfs::fstatfs;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use vm_memory::{FileOffset, GuestAddress};

use guest_memory_shm::{
    AdoptPolicy, BackingError, BackingSource, BuildNote, CancelToken, CoreDump, DiscardError,
    GuestMemoryShm, OnFailure, OnShortage, PageSize, Populate, PopulateError, PopulateOptions,
    RamOptions, Reserve, ResourceLimit, ShmBacking, ThpObstacle,
};

use crate::fork::dies_of;
use crate::isolation::{PAGE, assert_refused, in_own_process, mount_tmpfs, own_mounts};
use crate::populate::{MIB, allocated, memory, threads};
use crate::support::chain;

const SIZE: u64 = 32 * MIB;
const MODES: [Populate; 2] = [Populate::Allocate, Populate::Prefault];
/// What filters answer that let the process live.
const ANSWERS: [Errno; 3] = [Errno::EPERM, Errno::EACCES, Errno::ENOSYS];

/// A call, and, if it is only forbidden then, what an argument is: (which, comparison, value).
pub(crate) type Call = (c_long, Option<(u8, SeccompCmpOp, u64)>);

/// Does something in a thread for which a filter answers each of these calls, and for the threads
/// that it starts.
pub(crate) fn forbidden<R: Send>(
    calls: &[Call],
    errno: Errno,
    work: impl FnOnce() -> R + Send,
) -> R {
    filtered(&filter(calls, SeccompAction::Errno(errno as u32)), work)
}

/// Does something in a thread in which each of these calls ends the process, by SIGSYS.
pub(crate) fn deadly<R: Send>(calls: &[Call], work: impl FnOnce() -> R + Send) -> R {
    filtered(&filter(calls, SeccompAction::KillProcess), work)
}

/// A filter that allows all but these calls.
pub(crate) fn filter(calls: &[Call], answer: SeccompAction) -> BpfProgram {
    let rule = |(call, argument): &Call| {
        let only = argument.clone().map(|(which, compared, value)| {
            let condition = SeccompCondition::new(which, SeccompCmpArgLen::Dword, compared, value);
            SeccompRule::new(vec![condition.unwrap()]).unwrap()
        });
        (*call, only.into_iter().collect())
    };
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let rules = calls.iter().map(rule).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, arch).unwrap();
    BpfProgram::try_from(filter).unwrap()
}

fn filtered<R: Send>(program: &BpfProgram, work: impl FnOnce() -> R + Send) -> R {
    let filtered = || {
        apply_filter(program).unwrap();
        work()
    };
    std::thread::scope(|scope| scope.spawn(filtered).join().unwrap())
}

const FALLOCATE: Call = (SYS_fallocate, None);
const MADVISE: Call = (SYS_madvise, None);

#[test]
fn ram_is_allocated_without_fallocate() {
    for errno in ANSWERS {
        for mode in MODES {
            let populated = forbidden(&[FALLOCATE], errno, || {
                let options = RamOptions::new().with_populate(mode);
                allocated(&memory(options, SIZE))
            });
            assert_eq!(populated, SIZE, "{errno} {mode:?}");
        }
    }
    // The control: an answer that means something else is an error.
    let failed = forbidden(&[FALLOCATE], Errno::EIO, || {
        memory(RamOptions::new(), SIZE).populate(PopulateOptions::new(Populate::Allocate))
    });
    assert!(
        matches!(failed, Err(PopulateError::Allocate { .. })),
        "{failed:?}"
    );
}

#[test]
fn ram_is_allocated_without_any_advice_and_what_is_not_advised_is_reported() {
    for errno in ANSWERS {
        for backing in [BackingSource::Memfd, BackingSource::PosixShm] {
            let options = RamOptions::new()
                .with_backing(backing)
                .with_page_size(PageSize::Transparent)
                .with_core_dump(CoreDump::Exclude)
                .with_populate(Populate::Allocate);
            let built = forbidden(&[MADVISE], errno, || {
                GuestMemoryShm::<()>::builder()
                    .add_ram(options, [(GuestAddress(0), SIZE)])
                    .build_with_report()
            });
            let (memory, report) = built.unwrap();
            assert_eq!(allocated(&memory), SIZE, "{errno}");
            let text = report.to_string();
            let notes: Vec<_> = report.notes().map(|(_, note)| note).collect();
            assert!(
                matches!(
                    notes[..],
                    [
                        BuildNote::InCoreDumps { .. },
                        BuildNote::NotHuge(ThpObstacle::Refused { .. })
                    ]
                ),
                "{text}"
            );
            assert!(text.contains("leave the RAM out of core dumps"), "{text}");
            assert!(text.contains("the kernel refuses the advice"), "{text}");
        }
    }
}

#[test]
fn pages_that_a_filter_does_not_let_be_mapped_are_an_error_that_names_the_call() {
    for (calls, mode) in [
        (&[MADVISE][..], Populate::Prefault),
        (&[MADVISE, FALLOCATE], Populate::Allocate),
    ] {
        let failed = forbidden(calls, Errno::EPERM, || {
            let memory = memory(RamOptions::new(), SIZE);
            let failed = memory.populate(PopulateOptions::new(mode)).unwrap_err();
            assert_eq!(allocated(&memory), 0);
            failed
        });
        assert!(matches!(failed, PopulateError::Map { .. }), "{failed:?}");
        assert!(failed.to_string().contains("MADV_POPULATE_WRITE"));
    }
}

#[test]
fn pages_are_given_back_without_advice() {
    for errno in ANSWERS {
        forbidden(&[MADVISE, (SYS_msync, None)], errno, || {
            let memory = memory(RamOptions::new().with_populate(Populate::Allocate), SIZE);
            let discarded = memory.discard((GuestAddress(MIB), MIB)).unwrap();
            assert_eq!(discarded.freed, MIB);
            assert_eq!(allocated(&memory), SIZE - MIB);
        });
        forbidden(&[MADVISE], errno, || {
            let memory = memory(RamOptions::new(), SIZE);
            let token = CancelToken::new();
            let options = PopulateOptions::new(Populate::Allocate)
                .with_threads(threads(2))
                .with_on_failure(OnFailure::GiveBack)
                .with_cancel(token.clone())
                .with_progress(|_| token.cancel());
            let cancelled = memory.populate(options);
            assert!(matches!(cancelled, Err(PopulateError::Cancelled { done, .. }) if done > 0));
            assert_eq!(allocated(&memory), 0, "{errno}");
        });
    }
    // The control: with neither way it is an error.
    forbidden(&[MADVISE, FALLOCATE], Errno::EPERM, || {
        let memory = memory(RamOptions::new(), MIB);
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        assert!(matches!(
            memory.discard((GuestAddress(0), PAGE)),
            Err(DiscardError::Failed { .. })
        ));
        assert_eq!(allocated(&memory), PAGE);
    });
}

#[test]
fn a_call_that_is_to_be_made_again_without_end_ends() {
    let populate = Some((2, SeccompCmpOp::Eq, MADV_POPULATE_WRITE as u64));
    let madvise = (SYS_madvise, populate);
    for (call, errno) in [
        (madvise.clone(), Errno::EAGAIN),
        (madvise.clone(), Errno::EINTR),
        (FALLOCATE, Errno::EAGAIN),
    ] {
        let failed = forbidden(&[call], errno, || {
            let memory = memory(RamOptions::new(), SIZE);
            let options = PopulateOptions::new(Populate::Prefault).with_threads(threads(1));
            let failed = memory.populate(options).unwrap_err();
            assert_eq!(allocated(&memory), 0);
            failed
        });
        assert!(
            matches!(
                failed,
                PopulateError::Allocate { .. } | PopulateError::Map { .. }
            ),
            "{failed:?}"
        );
        let code = format!("os error {}", errno as i32);
        let text = chain(&failed);
        assert!(text.contains(&code), "{text}");
    }
    // Signals that come faster than it can be done: it is done in another way.
    let populated = forbidden(&[FALLOCATE], Errno::EINTR, || {
        allocated(&memory(
            RamOptions::new().with_populate(Populate::Allocate),
            SIZE,
        ))
    });
    assert_eq!(populated, SIZE);
}

#[test]
fn a_system_that_is_out_of_files_is_not_told_to_raise_the_limit_of_the_process() {
    let memfd = RamOptions::new();
    let shm = RamOptions::new().with_backing(BackingSource::PosixShm);
    let file = RamOptions::new().with_backing(BackingSource::File("/dev/shm".into()));
    let huge = RamOptions::new().with_page_size(PageSize::Huge(None));
    for (options, call) in [
        (memfd, SYS_memfd_create),
        (shm, SYS_openat),
        (file, SYS_openat),
        (huge, SYS_openat),
    ] {
        let build = || {
            GuestMemoryShm::<()>::builder()
                .add_ram(options.clone(), [(GuestAddress(0), 1 << 30)])
                .build()
                .unwrap_err()
        };
        let system = forbidden(&[(call, None)], Errno::ENFILE, build);
        let limit = &system.shortage().unwrap().limit;
        assert_eq!(*limit, ResourceLimit::SystemDescriptors, "{system:?}");
        assert_eq!(
            system.to_string(),
            "no file can be opened: the whole system has as many open as it may, raise the limit \
             (sysctl fs.file-max), or close some"
        );
        // The control.
        let process = forbidden(&[(call, None)], Errno::EMFILE, build);
        let limit = &process.shortage().unwrap().limit;
        assert!(
            matches!(limit, ResourceLimit::Descriptors { .. }),
            "{process:?}"
        );
        assert!(process.to_string().contains("RLIMIT_NOFILE"), "{process}");
    }
}

#[test]
fn who_cannot_look_whether_there_is_memory_is_told_so() {
    let memory = memory(RamOptions::new(), MIB);
    for (errno, remedy) in [
        (Errno::EMFILE, "RLIMIT_NOFILE"),
        (Errno::ENFILE, "fs.file-max"),
    ] {
        forbidden(&[(SYS_openat, None)], errno, || {
            let options = || PopulateOptions::new(Populate::Allocate);
            let refused = memory.populate(options()).unwrap_err();
            assert!(matches!(refused, PopulateError::CannotLook { .. }));
            assert!(refused.to_string().contains(remedy), "{refused}");
            assert_eq!(allocated(&memory), 0);
            let anyway = options().with_on_shortage(OnShortage::TryAnyway);
            memory.populate(anyway).unwrap();
            assert_eq!(allocated(&memory), MIB);
            memory.discard((GuestAddress(0), MIB)).unwrap();
        });
    }
}

/// A file of 32 MiB of each kind that can be adopted.
fn files() -> [File; 3] {
    let created = ShmBacking::create(&RamOptions::new(), SIZE).unwrap();
    let memfd = File::from(created.as_fd().try_clone_to_owned().unwrap());
    let shm = tempfile::tempfile_in("/dev/shm").unwrap();
    let disk = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for file in [&shm, &disk] {
        file.set_len(SIZE).unwrap();
    }
    [memfd, shm, disk]
}

/// Builds RAM of all kinds, populates it, asks about it, and gives pages back.
fn all_that_ram_is_for() {
    let place = |memory: GuestMemoryShm| {
        memory
            .populate(PopulateOptions::new(Populate::Prefault))
            .unwrap();
        assert_eq!(memory.stats().unwrap().allocated(), SIZE);
        assert_eq!(memory.extents(PAGE).unwrap().ranges.len(), 1);
        memory.discard((GuestAddress(MIB), MIB)).unwrap();
    };
    let dir = || BackingSource::File("/dev/shm".into());
    let disk = || BackingSource::File(env!("CARGO_TARGET_TMPDIR").into());
    for source in [BackingSource::Memfd, BackingSource::PosixShm, dir(), disk()] {
        place(memory(RamOptions::new().with_backing(source), SIZE));
    }
    for file in files() {
        let fd = OwnedFd::from(file.try_clone().unwrap());
        let policy = AdoptPolicy::new().with_disk_files().with_options(
            RamOptions::new()
                .with_populate(Populate::Allocate)
                .with_reserve(Reserve::On),
        );
        let backing = ShmBacking::adopt(fd, &policy).unwrap();
        let adopted = GuestMemoryShm::<()>::builder()
            .add_backing(&backing, 0, [(GuestAddress(0), SIZE)])
            .build();
        place(adopted.unwrap());
        let range = (
            GuestAddress(0),
            SIZE as usize,
            Some(FileOffset::new(file, 0)),
        );
        place(GuestMemoryShm::from_ranges_with_files([range]).unwrap());
    }
}

fn adopt_all() {
    for file in files() {
        let policy = AdoptPolicy::new().with_disk_files();
        ShmBacking::adopt(file.into(), &policy).unwrap();
    }
}

#[test]
fn where_fstatfs_ends_the_process_it_is_never_called() {
    in_own_process(|| {
        let calls = [(SYS_fstatfs, None)];
        deadly(&calls, all_that_ram_is_for);
        if own_mounts() {
            mount_tmpfs("/dev/shm", MsFlags::empty(), "size=8m");
            let full = deadly(&calls, || {
                let sparse = RamOptions::new()
                    .with_backing(BackingSource::PosixShm)
                    .with_reserve(Reserve::Off);
                let populate = PopulateOptions::new(Populate::Allocate);
                memory(sparse, SIZE).populate(populate).unwrap_err()
            });
            assert!(full.to_string().contains("holds 8 MiB"), "{full}");
            umount("/dev/shm").unwrap();
        }
        // The control.
        let file = tempfile::tempfile().unwrap();
        let program = filter(&calls, SeccompAction::KillProcess);
        let killer = dies_of(|| {
            apply_filter(&program).unwrap();
            let _ = fstatfs(&file);
        });
        assert_eq!(killer, Some(Signal::SIGSYS));
    });
}

#[test]
fn without_procfs_or_statfs_files_are_asked_about_by_number() {
    for errno in ANSWERS {
        forbidden(&[(SYS_statfs, None)], errno, adopt_all);
        let neither = [(SYS_statfs, None), (SYS_fstatfs, None)];
        let refused = forbidden(&neither, errno, || {
            let [memfd, ..] = files();
            let refused = ShmBacking::adopt(memfd.into(), &AdoptPolicy::new());
            refused.map_err(BackingError::from)
        });
        assert_refused!(
            refused,
            BackingError::FileSystemUnknown { .. },
            "cannot ask on which file system a descriptor is that is to become RAM: mount procfs \
             at /proc, and let a seccomp filter allow statfs(2)"
        );
    }
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        mount_tmpfs("/proc", MsFlags::empty(), "size=1m");
        adopt_all();
        umount("/proc").unwrap();
    });
}
