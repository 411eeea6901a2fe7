//! Descriptors that cannot be RAM: refused, and given back as they were.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use guest_memory_shm::{
    AdoptPolicy, BackingError, BackingKind, Error, GuestMemoryShm, GuestRegionShm, InvalidRange,
    MemoryError, RamOptions, RangePart, Seals, ShmBacking,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{dup, ftruncate};
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::isolation::{PAGE, assert_refused, in_own_process_leaving_nothing};

const MIB: u64 = 1 << 20;

/// A memfd that can be sealed, with nothing done to it.
fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("theirs", MFdFlags::MFD_ALLOW_SEALING).expect("created"));
    file.set_len(len).expect("long enough");
    file
}

fn seal(file: &File, seals: SealFlag) {
    fcntl(file, FcntlArg::F_ADD_SEALS(seals)).expect("sealed");
}

/// Adopts `fd`, and on refusal asserts that it comes back: the same number, the same file.
fn adopt(fd: impl Into<OwnedFd>, policy: &AdoptPolicy) -> Result<ShmBacking, Error> {
    let fd = fd.into();
    let number = fd.as_raw_fd();
    let link = || std::fs::read_link(format!("/proc/self/fd/{number}")).expect("it is open");
    let target = link();
    ShmBacking::adopt(fd, policy).map_err(|refused| {
        assert_eq!(refused.to_string(), refused.error().to_string());
        assert_eq!(link(), target, "it was closed");
        let same = ShmBacking::adopt(refused.into_fd(), policy).expect_err("refused again");
        let text = same.to_string();
        let fd = same.into_fd();
        assert_eq!((fd.as_raw_fd(), link()), (number, target));
        let error: Error = ShmBacking::adopt(fd, policy).expect_err("and again").into();
        assert_eq!(error.to_string(), text);
        error
    })
}

/// Any seals, sealed already, and sealed now.
fn policies() -> [AdoptPolicy; 3] {
    let policy = AdoptPolicy::new();
    [
        policy.clone(),
        policy.clone().with_required_seals(),
        policy.with_added_seals(),
    ]
}

#[test]
fn what_is_no_memory_is_refused_by_its_name() {
    in_own_process_leaving_nothing!(|| {
        let (reader, writer) = std::io::pipe().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")
            .unwrap();
        let cases: [(OwnedFd, &str); 6] = [
            (reader.into(), "pipe"),
            (writer.into(), "pipe"),
            (socket.into(), "socket"),
            (File::open(dir.path()).unwrap().into(), "directory"),
            (device.into(), "character device"),
            (EventFd::new().unwrap().into(), "special file"),
        ];
        for (fd, name) in cases {
            for policy in [AdoptPolicy::new(), AdoptPolicy::new().with_disk_files()] {
                let fd = fd.try_clone().unwrap();
                assert_refused!(
                    adopt(fd, &policy),
                    Error::Backing(BackingError::NotMemory { .. }),
                    format!(
                        "cannot adopt a descriptor of a {name}: RAM needs a memfd, POSIX shm or \
                         hugetlbfs file"
                    ),
                );
            }
        }
    });
}

#[test]
fn a_descriptor_that_comes_back_can_still_be_used() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let refused = ShmBacking::adopt(ours.into(), &AdoptPolicy::new()).unwrap_err();
    let mut ours = UnixStream::from(refused.into_fd());
    std::io::Write::write_all(&mut ours, b"still here").unwrap();
    drop(ours);
    assert_eq!(std::io::read_to_string(theirs).unwrap(), "still here");
}

#[test]
fn a_descriptor_that_is_open_for_one_direction_only_is_refused() {
    in_own_process_leaving_nothing!(|| {
        let file = memfd(MIB);
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let read_only = File::open(&again).unwrap();
        let write_only = File::options().write(true).open(&again).unwrap();
        // For the path only: it can be neither read nor written.
        let path_only = File::options()
            .read(true)
            .custom_flags(nix::libc::O_PATH)
            .open(&again)
            .unwrap();
        for fd in [read_only, write_only, path_only] {
            assert_refused!(
                adopt(fd, &AdoptPolicy::new()),
                Error::Backing(BackingError::NotWritable),
                "cannot adopt a descriptor that is not open for reading and writing: open it \
                 O_RDWR",
            );
        }
        let both = File::options().read(true).write(true).open(&again).unwrap();
        assert!(adopt(both, &AdoptPolicy::new()).is_ok());
    });
}

#[test]
fn a_file_that_is_too_short_is_refused_and_not_made_longer() {
    in_own_process_leaving_nothing!(|| {
        let policy = AdoptPolicy::new().with_min_len(2 * MIB);
        let file = memfd(MIB);
        assert_refused!(
            adopt(file.try_clone().unwrap(), &policy),
            Error::Backing(BackingError::TooShort {
                len: MIB,
                needed: 0x20_0000,
                ..
            }),
            "cannot adopt a file of 1 MiB for RAM of 2 MiB: touching RAM past the end of the \
             file would be SIGBUS, make the file longer first",
        );
        assert_eq!(file.metadata().unwrap().len(), MIB);
        assert_refused!(
            adopt(memfd(0), &AdoptPolicy::new()),
            Error::Backing(BackingError::TooShort {
                len: 0,
                needed: PAGE,
                ..
            }),
            "cannot adopt a file of 0 bytes for RAM of 4 KiB: touching RAM past the end of the \
             file would be SIGBUS, make the file longer first",
        );
        let exact = adopt(memfd(2 * MIB), &policy).unwrap();
        assert_eq!(
            (exact.size(), exact.kind()),
            (2 * MIB, BackingKind::AdoptedMemfd)
        );
        assert_eq!(exact.kind().to_string(), "adopted memfd");
    });
}

#[test]
fn a_file_that_is_not_whole_pages_is_refused() {
    in_own_process_leaving_nothing!(|| {
        assert_refused!(
            adopt(memfd(MIB + 1), &AdoptPolicy::new()),
            Error::Range(InvalidRange::Unaligned {
                part: RangePart::Size,
                value: 0x10_0001,
                page_size: PAGE,
                ..
            }),
            "size 1.0 MiB (1048577 bytes) is not a multiple of the page size 4 KiB: the nearest \
             larger is 1028 KiB",
        );
    });
}

#[test]
fn a_file_on_disk_is_refused_unless_it_is_meant() {
    in_own_process_leaving_nothing!(|| {
        // The directory of the crate: the one for temporary files can be a tmpfs.
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.set_len(MIB).unwrap();
        let error = adopt(file.try_clone().unwrap(), &AdoptPolicy::new()).unwrap_err();
        let Error::Backing(BackingError::OnDisk { fs_type, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(
            error.to_string(),
            format!(
                "cannot adopt a file on a file system of type {fs_type:#x}: RAM on disk is slow \
                 and is written back, allow it with AdoptPolicy::with_disk_files if that is meant"
            )
        );

        let policy = AdoptPolicy::new().with_disk_files();
        let backing = adopt(file.try_clone().unwrap(), &policy).unwrap();
        assert_eq!(backing.kind(), BackingKind::AdoptedFile);
        assert_eq!((backing.seals(), backing.size()), (Seals::empty(), MIB));
        let region = GuestRegionShm::<()>::from_backing(&backing, PAGE, (GuestAddress(0), PAGE));
        region
            .unwrap()
            .write_slice(b"on disk", MemoryRegionAddress(1))
            .unwrap();
        let mut bytes = [0; 7];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, PAGE + 1).unwrap();
        assert_eq!(&bytes, b"on disk");
        for policy in [
            policy.clone().with_required_seals(),
            policy.clone().with_added_seals(),
        ] {
            let refused = adopt(file.try_clone().unwrap(), &policy);
            assert!(matches!(
                refused,
                Err(Error::Backing(BackingError::NotSealed { .. }))
            ));
        }
    });
}

#[test]
fn a_file_that_cannot_be_written_is_refused_whatever_the_policy() {
    in_own_process_leaving_nothing!(|| {
        for (flag, name) in [
            (SealFlag::F_SEAL_WRITE, "write"),
            (SealFlag::F_SEAL_FUTURE_WRITE, "future-write"),
        ] {
            for policy in policies() {
                let file = memfd(MIB);
                seal(
                    &file,
                    flag | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW,
                );
                assert_refused!(
                    adopt(file, &policy),
                    Error::Backing(BackingError::WriteSealed { .. }),
                    format!(
                        "cannot adopt a file whose seals are: shrink|grow|{name}; RAM must be \
                         writable, ask its owner for one without write seals"
                    ),
                );
            }
        }
    });
}

#[test]
fn an_unsealed_memfd_is_adopted_as_the_policy_says() {
    in_own_process_leaving_nothing!(|| {
        let [any, required, added] = policies();
        let file = memfd(MIB);
        let clone = || file.try_clone().unwrap();
        assert_refused!(
            adopt(clone(), &required),
            Error::Backing(BackingError::NotSealed { .. }),
            "cannot adopt a file whose size is not sealed (its seals are: none): ask its owner \
             for a memfd made with MFD_ALLOW_SEALING (and sealed against shrinking and growing), \
             or trust the owner and adopt it without AdoptPolicy::with_required_seals",
        );
        let any = adopt(clone(), &any).unwrap();
        assert_eq!(any.seals(), Seals::empty());
        ftruncate(&file, MIB as i64 * 2).unwrap();
        ftruncate(&file, MIB as i64).unwrap();

        let added = adopt(clone(), &added).unwrap();
        assert_eq!(added.seals(), Seals::RESIZE | Seals::SEAL);
        for len in [0, 2 * MIB] {
            assert_eq!(ftruncate(&file, len as i64), Err(Errno::EPERM));
        }
        // Sealed as it is now, it is what was required.
        assert!(adopt(clone(), &required).is_ok());
    });
}

#[test]
fn half_a_seal_is_not_enough_where_the_size_must_be_sealed() {
    for (flag, name) in [
        (SealFlag::F_SEAL_SHRINK, "shrink"),
        (SealFlag::F_SEAL_GROW, "grow"),
    ] {
        let file = memfd(MIB);
        seal(&file, flag);
        let clone = file.try_clone().unwrap();
        let require = AdoptPolicy::new().with_required_seals();
        let error = adopt(clone, &require).unwrap_err().to_string();
        assert!(error.contains(&format!(" are: {name}): ")), "{error}");
        // The missing half is added, unless no seal can be added any more.
        seal(&file, SealFlag::F_SEAL_SEAL);
        let add = AdoptPolicy::new().with_added_seals();
        assert!(matches!(
            adopt(file, &add),
            Err(Error::Backing(BackingError::NotSealed { .. }))
        ));
        let file = memfd(MIB);
        seal(&file, flag);
        assert!(adopt(file, &add).unwrap().seals().contains(Seals::RESIZE));
    }
}

#[test]
fn posix_shm_can_be_adopted_but_not_sealed() {
    in_own_process_leaving_nothing!(|| {
        let options = RamOptions::new().with_backing(guest_memory_shm::BackingSource::PosixShm);
        let theirs = ShmBacking::create(&options, MIB).unwrap();
        let fd = || dup(theirs.as_fd()).unwrap();
        for policy in &policies()[1..] {
            let error = adopt(fd(), policy).unwrap_err();
            assert!(
                matches!(error, Error::Backing(BackingError::NotSealed { .. })),
                "{error:?}"
            );
            let text = error.to_string();
            assert!(text.contains("(its seals are: none possible)"), "{text}");
            assert!(text.contains("trust the owner"), "{text}");
        }
        let ours = adopt(fd(), &AdoptPolicy::new()).unwrap();
        assert_eq!(ours, theirs);
        assert_eq!(ours.kind().to_string(), "adopted shm");
        assert!(!ours.seals().intersects(Seals::RESIZE));
    });
}

#[test]
fn a_refused_file_is_not_sealed() {
    let file = memfd(MIB);
    let policy = AdoptPolicy::new().with_min_len(2 * MIB).with_added_seals();
    assert!(adopt(file.try_clone().unwrap(), &policy).is_err());
    assert_eq!(fcntl(&file, FcntlArg::F_GET_SEALS), Ok(0));
    file.set_len(2 * MIB).unwrap();
    assert!(adopt(file, &policy).is_ok());
}

#[test]
fn an_owner_who_resizes_the_file_meanwhile_cannot_make_its_length_wrong() {
    let policy = AdoptPolicy::new().with_added_seals();
    for _ in 0..500 {
        let file = memfd(MIB);
        let owners = file.try_clone().unwrap();
        let adopted = std::thread::scope(|scope| {
            let (ready, resizing) = std::sync::mpsc::channel();
            scope.spawn(move || {
                // Until it is sealed.
                for turn in 0.. {
                    let len = if turn % 2 == 0 { PAGE } else { MIB };
                    if ftruncate(&owners, len as i64).is_err() {
                        return;
                    }
                    let _ = ready.send(());
                }
            });
            resizing.recv().unwrap();
            ShmBacking::adopt(file.try_clone().unwrap().into(), &policy).unwrap()
        });
        assert_eq!(adopted.size(), file.metadata().unwrap().len());
    }
}

#[test]
fn a_file_that_was_truncated_after_its_adoption_is_not_mapped() {
    in_own_process_leaving_nothing!(|| {
        let file = memfd(MIB);
        let backing = adopt(file.try_clone().unwrap(), &AdoptPolicy::new()).unwrap();
        let build = || {
            GuestMemoryShm::<()>::builder()
                .add_backing(&backing, 0, [(GuestAddress(0), MIB)])
                .build()
        };
        ftruncate(&file, PAGE as i64).unwrap();
        assert_refused!(
            build(),
            MemoryError::Backing(BackingError::Truncated { now: PAGE, .. }),
            "the backing had at least 1 MiB and has 4 KiB now: another process truncated it, \
             touching what is gone would be SIGBUS; use a sealed memfd or a trusted peer",
        );
        ftruncate(&file, MIB as i64).unwrap();
        assert!(build().is_ok());
    });
}
