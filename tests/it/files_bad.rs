//! Files that cannot be RAM: refused by name, and nothing of the attempt stays.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

use guest_memory_shm::{
    BackingError, BackingKind, DiscardData, Error, FileError, GuestMemoryShm, GuestRegionShm,
    MapError, MemoryError, OptionsError, RamOptions, Reserve, ShmBacking,
};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::unistd::{Uid, geteuid, mkfifo, seteuid};
use vm_memory::GuestAddress;

use crate::files::{file_options, pattern};
use crate::isolation::{
    PAGE, assert_refused, in_own_process, in_own_process_leaving_nothing, mount_tmpfs, own_mounts,
    shm_dir,
};
use crate::proc::leaves_nothing;
use crate::support::skip;

const MIB: u64 = 1 << 20;
pub(crate) fn region(options: &RamOptions, size: u64) -> Result<GuestRegionShm, Error> {
    Ok(GuestRegionShm::new((GuestAddress(0), size), options)?)
}

pub(crate) fn memory(options: &RamOptions, size: u64) -> Result<GuestMemoryShm, Error> {
    GuestMemoryShm::builder()
        .add_ram(RamOptions::new(), [(GuestAddress(1 << 60), PAGE)])
        .add_ram(options.clone(), [(GuestAddress(0), size)])
        .build()
        .map_err(Error::from)
}

/// Asserts that RAM of `size` bytes is refused in each way to ask for it, with the same text.
pub(crate) fn refused(options: &RamOptions, size: u64, text: &str) {
    leaves_nothing(|| {
        for error in [
            region(options, size).map(drop),
            memory(options, size).map(drop),
            ShmBacking::create(options, size)
                .map(drop)
                .map_err(Error::from),
        ] {
            assert_eq!(error.expect_err("refused").to_string(), text);
        }
    });
}

pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_file_with_contents_that_is_too_short_is_refused_and_not_made_longer() {
    in_own_process(|| {
        let dir = shm_dir();
        let path = dir.path().join("short");
        fs::write(&path, pattern(MIB)).unwrap();
        let shown = path.display();
        for (offset, size, have) in [
            (0, 2 * MIB, "2 MiB at offset 0x0"),
            (PAGE, MIB, "1 MiB at offset 0x1000"),
            (MIB, PAGE, "4 KiB at offset 0x100000"),
        ] {
            refused(
                &file_options(&path).with_offset(offset),
                size,
                &format!(
                    "{shown} has 1 MiB, too short for {have}: a file that is not empty is never \
                     made longer, so make it longer first (truncate -s {}) or ask for less",
                    offset + size
                ),
            );
        }
        assert!(fs::read(&path).unwrap() == pattern(MIB));
        // The controls: what fits, at the start and at the end.
        assert!(region(&file_options(&path), MIB).is_ok());
        assert!(region(&file_options(&path).with_offset(MIB - PAGE), PAGE).is_ok());
    });
}

#[test]
fn numbers_that_do_not_fit_pages_are_refused() {
    in_own_process(|| {
        let dir = shm_dir();
        let path = dir.path().join("ram");
        for offset in [1, 0x400, 0x1fff] {
            let nearest = offset / PAGE * PAGE;
            let text = format!(
                "offset {offset:#x} is not a multiple of the page size 4 KiB: the nearest is \
                 {nearest:#x}"
            );
            refused(&file_options(&path).with_offset(offset), MIB, &text);
        }
        for align in [1, 0x400, 0x30_0000, u64::MAX] {
            let text = format!(
                "align={align:#x}: expected a power of two that is at least the page size 4 KiB"
            );
            refused(&file_options(&path).with_align(align), MIB, &text);
        }
        let size = "size 4.8 KiB (5000 bytes) is not a multiple of the page size 4 KiB: the \
                    nearest larger is 8 KiB";
        refused(&file_options(&path), 5000, size);
        leaves_nothing(|| {
            let beyond = file_options(&path).with_offset(u64::MAX - PAGE + 1);
            assert!(matches!(
                memory(&beyond, MIB),
                Err(Error::Options(OptionsError::PastLongestFile { .. }))
            ));
            for (offset, size) in [((1 << 63) - MIB, MIB), ((1 << 63) - PAGE, MIB)] {
                let options = file_options(&path).with_offset(offset);
                assert!(matches!(
                    ShmBacking::create(&options, size),
                    Err(BackingError::Length { .. })
                ));
                assert!(matches!(
                    memory(&options, size),
                    Err(Error::Backing(BackingError::Length { .. }))
                ));
            }
            assert!(matches!(
                ShmBacking::create(&file_options(&path).with_offset(PAGE), 0),
                Err(BackingError::Length { len: 0, .. })
            ));
        });
        assert_eq!(names(dir.path()), [""; 0]);
    });
}

#[test]
fn what_is_no_file_is_refused_by_its_name_without_opening_it() {
    in_own_process(|| {
        let dir = shm_dir();
        // Opening it would wait for a writer.
        mkfifo(&dir.path().join("fifo"), Mode::S_IRWXU).unwrap();
        let _listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        for (path, found) in [
            (dir.path().join("fifo"), "pipe"),
            (dir.path().join("socket"), "socket"),
            ("/dev/zero".into(), "character device"),
        ] {
            let text = format!(
                "{} is a {found}: RAM needs a regular file, or a directory for a nameless one",
                path.display()
            );
            refused(&file_options(&path), MIB, &text);
        }
    });
}

#[test]
fn paths_that_lead_nowhere_are_refused_with_the_reason() {
    in_own_process(|| {
        let dir = shm_dir();
        let path = |name: &str| dir.path().join(name);
        symlink("missing", path("dangling")).unwrap();
        symlink("loop", path("loop")).unwrap();
        File::create(path("file")).unwrap();
        let dangling = format!(
            "{} is a symbolic link to something that does not exist: create that, or remove the \
             link",
            path("dangling").display()
        );
        refused(&file_options(path("dangling")), MIB, &dangling);
        let long = "n".repeat(300);
        for (name, remedy) in [
            (
                "missing/ram",
                "its directory does not exist, create that first",
            ),
            (
                "missing/",
                "its directory does not exist, create that first",
            ),
            (
                "loop",
                "its symbolic links lead in a circle, name the file itself",
            ),
            (
                "file/ram",
                "a part of the path is no directory, check the path",
            ),
            (&long, "the name is too long, use a shorter one"),
        ] {
            let text = format!("cannot open {}: {remedy}", path(name).display());
            refused(&file_options(path(name)), MIB, &text);
        }
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, ["dangling", "file", "loop"]);
        assert_eq!(fs::metadata(path("file")).unwrap().len(), 0);
    });
}

#[test]
fn what_the_user_may_not_open_or_create_is_refused() {
    in_own_process(|| {
        if !geteuid().is_root() {
            return skip("only root may become another user");
        }
        let dir = shm_dir();
        let open = shm_dir();
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(open.path(), everybody).unwrap();
        let theirs = open.path().join("theirs");
        fs::write(&theirs, pattern(MIB)).unwrap();
        seteuid(Uid::from_raw(65534)).unwrap();
        for path in [
            dir.path().join("ram"),
            dir.path().to_owned(),
            open.path().join("ram"),
            open.path().to_owned(),
            theirs,
        ] {
            let text = format!(
                "cannot open {}: that is not permitted, check the owner and the mode of the file \
                 and of its directory",
                path.display()
            );
            refused(&file_options(&path), MIB, &text);
        }
        seteuid(Uid::from_raw(0)).unwrap();
        assert_eq!(names(dir.path()), [""; 0]);
    });
}

#[test]
fn a_read_only_file_system_is_named() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        mount_tmpfs(dir.path().to_str().unwrap(), MsFlags::empty(), "size=8m");
        let file = dir.path().join("file");
        fs::write(&file, pattern(MIB)).unwrap();
        let again = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount_tmpfs(dir.path().to_str().unwrap(), again, "size=8m");
        for path in [file, dir.path().join("new"), dir.path().to_owned()] {
            let text = format!(
                "cannot open {}: its file system is read-only, remount it read-write or use the \
                 file as a ROM",
                path.display()
            );
            refused(&file_options(&path), MIB, &text);
        }
        umount(dir.path()).unwrap();
    });
}

#[test]
fn discard_data_is_refused_where_nothing_can_be_freed() {
    in_own_process(|| {
        if !own_mounts() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        // A file system that has no holes.
        let none = MsFlags::empty();
        mount(Some("ramfs"), dir.path(), Some("ramfs"), none, None::<&str>).unwrap();
        let path = dir.path().join("ram");
        let options = file_options(&path);
        let text = format!(
            "discard-data=on cannot be kept for {}: its file system cannot free parts of a file, \
             so leave it off",
            path.display()
        );
        let discard = options.clone().with_discard_data(DiscardData::OnDrop);
        refused(&discard, MIB, &text);
        assert_eq!(names(dir.path()), [""; 0]);
        let ram = region(&options, MIB).unwrap();
        assert_eq!(ram.backing().kind(), BackingKind::File);
        drop(ram);
        umount(dir.path()).unwrap();
    });
}

#[test]
fn a_file_that_is_sealed_against_writing_is_refused() {
    in_own_process_leaving_nothing!(|| {
        let file = File::from(memfd_create("theirs", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        file.set_len(MIB).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // A memfd can be opened by its path in procfs, as any other file.
        let ram = region(&file_options(&path), MIB).unwrap();
        assert_eq!(ram.backing().kind(), BackingKind::ShmFile);
        drop(ram);
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE)).unwrap();
        assert_refused!(
            region(&file_options(&path), MIB),
            Error::File(FileError::WriteSealed { .. }),
            format!(
                "{path} cannot be RAM, its seals are: future-write; use a file without write \
                 seals, or map it as a ROM"
            ),
        );
    });
}

#[test]
fn a_file_that_cannot_be_mapped_shared_is_refused() {
    in_own_process(|| {
        // sysfs says that its files have a page, and maps none of them.
        let path = "/sys/kernel/mm/transparent_hugepage/enabled";
        if !geteuid().is_root() || !Path::new(path).exists() {
            return skip("there is no file that cannot be mapped");
        }
        leaves_nothing(|| {
            let options = file_options(path).with_reserve(Reserve::Off);
            assert_refused!(
                region(&options, PAGE),
                Error::Map(MapError::NotShareable { .. }),
                "cannot map 4 KiB of the file shared: its file system or its seals do not allow \
                 that, use a file on a tmpfs, a hugetlbfs or a local disk",
            );
        });
    });
}

#[test]
fn a_file_that_is_truncated_between_creation_and_mapping_is_refused() {
    let dir = shm_dir();
    let path = dir.path().join("ram");
    let backing = ShmBacking::create(&file_options(&path).with_offset(MIB), MIB).unwrap();
    let map = || GuestRegionShm::<()>::from_backing(&backing, MIB, (GuestAddress(0), MIB));
    assert!(map().is_ok());
    let file = File::options().write(true).open(&path).unwrap();
    // What is left of a page is not SIGBUS.
    file.set_len(2 * MIB - 1).unwrap();
    assert!(map().is_ok());
    file.set_len(2 * MIB - PAGE).unwrap();
    assert!(matches!(
        map(),
        Err(MemoryError::Backing(BackingError::Truncated { end, now, .. }))
            if (end, now) == (2 * MIB, 2 * MIB - PAGE)
    ));
}
