//! Regions that are refused for their descriptors: kinds, seals, huge pages, limits.

use std::os::unix::net::UnixStream;

use guest_memory_shm::{BackingError, BackingSource, InvalidRange, PageSize, RangePart};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use super::*;
use crate::fork::dies_of_reading;
use crate::isolation::{HugePool, in_own_process};
use crate::proc::leaves_nothing;

const HUGE: u64 = 2 << 20;

fn take(policy: &ReceivePolicy, file: impl Into<OwnedFd>) -> Result<ReceivedTable, ReceiveError> {
    map_table([good(0)], [file.into()], policy)
}

fn of(policy: AdoptPolicy) -> ReceivePolicy {
    ReceivePolicy::new().with_descriptors(policy)
}

fn required() -> AdoptPolicy {
    AdoptPolicy::new().with_required_seals()
}

fn added() -> AdoptPolicy {
    AdoptPolicy::new().with_added_seals()
}

/// The error of the region's descriptor or mapping.
#[track_caller]
fn cause(error: &ReceiveError) -> &MemoryError {
    assert!(error.to_string().starts_with("region 0x"), "{error}");
    cause_at(0, error)
}

#[test]
fn an_unsealed_file_is_refused_when_the_policy_demands_seals() {
    in_own_process(|| {
        let error = leaves_nothing(|| take(&of(required()), unsealed(MIB)).unwrap_err());
        assert!(matches!(
            cause(&error),
            MemoryError::Backing(BackingError::NotSealed { .. })
        ));
        assert_eq!(error.reply_code(), 1);
        assert!(error.to_string().contains("MFD_ALLOW_SEALING"), "{error}");

        let half = unsealed(MIB);
        fcntl(&half, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        assert!(take(&of(required()), half).is_err());

        let options = RamOptions::new().with_backing(BackingSource::PosixShm);
        let shm = ShmBacking::create(&options, MIB).unwrap();
        let fd = shm.as_fd().try_clone_to_owned().unwrap();
        let error = take(&of(required()), fd).unwrap_err();
        assert!(matches!(
            cause(&error),
            MemoryError::Backing(BackingError::NotSealed { .. })
        ));
    });
}

#[test]
fn a_frontend_cannot_truncate_a_file_that_the_policy_wants_sealed() {
    in_own_process(|| {
        for (policy, file, dies) in [
            (AdoptPolicy::new(), unsealed(MIB), Some(Signal::SIGBUS)),
            (added(), unsealed(MIB), None),
            (required(), sealed(MIB), None),
        ] {
            let table = take(&of(policy.clone()), file.try_clone().unwrap()).unwrap();
            let truncated = ftruncate(&file, 0);
            assert_eq!(truncated.is_ok(), dies.is_some(), "{policy:?}");
            let host = table.memory().get_host_address(GuestAddress(PAGE)).unwrap();
            assert_eq!(dies_of_reading(host), dies, "{policy:?}");
        }
    });
}

#[test]
fn a_file_that_is_truncated_before_it_is_mapped_is_refused() {
    let file = unsealed(MIB);
    let sent = file.try_clone().unwrap();
    ftruncate(&file, PAGE as i64).unwrap();
    let error = take(&ReceivePolicy::new(), sent).unwrap_err();
    let MemoryError::Backing(BackingError::TooShort { len: PAGE, .. }) = cause(&error) else {
        panic!("{error:?}");
    };
}

#[test]
fn a_file_that_is_sealed_against_writing_is_refused_whatever_the_policy() {
    for flag in [SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_FUTURE_WRITE] {
        for policy in [AdoptPolicy::new(), added(), required()] {
            let file = unsealed(MIB);
            fcntl(&file, FcntlArg::F_ADD_SEALS(flag)).unwrap();
            let error = take(&of(policy.clone()), file).unwrap_err();
            assert!(matches!(
                cause(&error),
                MemoryError::Backing(BackingError::WriteSealed { .. })
            ));
        }
    }
}

#[test]
fn a_descriptor_that_is_no_memory_is_refused_and_closed() {
    in_own_process(|| {
        let make: [fn() -> OwnedFd; 4] = [
            || std::io::pipe().unwrap().0.into(),
            || UnixStream::pair().unwrap().0.into(),
            || File::open("/").unwrap().into(),
            || {
                File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/zero")
                    .unwrap()
                    .into()
            },
        ];
        let read_only = || -> OwnedFd {
            use std::os::fd::AsRawFd;
            let file = sealed(MIB);
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            File::open(path).unwrap().into()
        };
        for make in make.into_iter().chain([read_only as fn() -> OwnedFd]) {
            let error = leaves_nothing(|| take(&ReceivePolicy::new(), make()).unwrap_err());
            cause(&error);
            assert_eq!(error.reply_code(), 9, "{error}");
        }
    });
}

#[test]
fn a_file_on_disk_is_refused_unless_the_policy_allows_it() {
    // The directory of the crate: the one for temporary files can be a tmpfs.
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(MIB).unwrap();
    let error = take(&ReceivePolicy::new(), file.try_clone().unwrap()).unwrap_err();
    assert!(matches!(
        cause(&error),
        MemoryError::Backing(BackingError::OnDisk { .. })
    ));
    assert_eq!(error.reply_code(), 9);
    let policy = ReceivePolicy::new().with_descriptors(AdoptPolicy::new().with_disk_files());
    assert!(take(&policy, file).is_ok());
}

#[test]
fn the_second_of_two_descriptors_is_named_and_the_first_is_given_back() {
    in_own_process(|| {
        let error = leaves_nothing(|| {
            let files = [sealed(MIB), unsealed(MIB)];
            map_table([good(0), good(1)], files, &require_seals()).unwrap_err()
        });
        cause_at(1, &error);
    });
}

#[test]
fn huge_pages_are_mapped_where_all_of_a_region_is_at_huge_pages() {
    in_own_process(|| {
        let Some(_pool) = HugePool::with_available(HUGE, 4) else {
            return;
        };
        let options = RamOptions::new().with_page_size(PageSize::Huge(Some(HUGE)));
        let theirs = ShmBacking::create(&options, 4 * HUGE).unwrap();
        let fd = || theirs.as_fd().try_clone_to_owned().unwrap();
        let map = |region| map_table([region], [fd()], &require_seals());

        let table = map(region(HUGE, 2 * HUGE, USER + PAGE, 2 * HUGE)).unwrap();
        table
            .memory()
            .write_obj(1_u8, GuestAddress(3 * HUGE - 1))
            .unwrap();
        assert_eq!(table.guest_addr(USER + PAGE), Some(GuestAddress(HUGE)));

        // At base pages, but not at huge ones.
        for (at, region) in [
            (RangePart::Address, region(PAGE, HUGE, USER, 0)),
            (RangePart::Offset, region(0, HUGE, USER, PAGE)),
            (RangePart::Size, region(0, 0xa_0000, USER, 0)),
        ] {
            let error = leaves_nothing(|| map(region).unwrap_err());
            let MemoryError::Range(InvalidRange::Unaligned {
                part,
                page_size: HUGE,
                ..
            }) = cause(&error)
            else {
                panic!("{error:?}");
            };
            assert_eq!(*part, at);
        }
        let error = leaves_nothing(|| map(region(0, 5 * HUGE, USER, 0)).unwrap_err());
        assert!(
            matches!(
                cause(&error),
                MemoryError::Backing(BackingError::TooShort { .. })
            ),
            "{error:?}"
        );
    });
}

#[test]
fn a_pool_that_is_short_is_an_error_and_not_a_sigbus() {
    in_own_process(|| {
        let Some(_pool) = HugePool::with_available(HUGE, 0) else {
            return;
        };
        // No process has mapped the frontend's file yet, so nothing of the pool is promised to it.
        let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB | MFdFlags::MFD_CLOEXEC;
        let file = File::from(memfd_create("theirs", flags).unwrap());
        file.set_len(HUGE).unwrap();
        let region = region(0, HUGE, USER, 0);
        let error = leaves_nothing(|| {
            let file = file.try_clone().unwrap();
            map_table([region], [file], &ReceivePolicy::new()).unwrap_err()
        });
        let short = cause(&error).shortage().unwrap();
        assert_eq!((short.needed, short.left), (HUGE, 0));
        assert_eq!(error.reply_code(), 12);
    });
}

#[test]
fn a_daemon_without_address_space_refuses_and_keeps_its_table() {
    in_own_process(|| {
        let old = table(2);
        let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
        setrlimit(Resource::RLIMIT_AS, 4 << 30, hard).unwrap();
        let giant = region(8 * MIB, 1 << 40, 0, 0);
        let error = leaves_nothing(|| old.add(giant, [sealed(1 << 40)]).unwrap_err());
        assert!(matches!(cause(&error), MemoryError::Map(_)));
        assert_eq!(error.reply_code(), 12);
        // The second of a table, when the first is mapped already.
        let error = leaves_nothing(|| {
            let files = vec![sealed(MIB), sealed(1 << 40)];
            map(&[good(0), giant], files).unwrap_err()
        });
        cause_at(1, &error);
        assert_eq!(old.ring(USER, MIB).unwrap(), GuestAddress(0));
        assert!(old.add(good(2), [sealed(MIB)]).is_ok());
    });
}
