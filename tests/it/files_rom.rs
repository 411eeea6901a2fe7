//! ROMs: files mapped for reading only.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_memory_shm::{
    Access, BackingError, BackingKind, DiscardData, FileError, GuestMemoryShm, GuestRegionShm,
    GuestRom, InvalidRange, MemoryError, OptionsError, RamOptions, RangePart, ShmBacking,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use vm_memory::GuestAddress;

use crate::files::{file_options, pattern};
use crate::fork::{dies_of_reading, dies_of_writing};
use crate::isolation::{
    PAGE, assert_refused, in_own_process, in_own_process_leaving_nothing, shm_dir,
};
use crate::proc::{leaves_nothing, maps_in};

const MIB: u64 = 1 << 20;
const START: GuestAddress = GuestAddress(0xfff0_0000);

/// A file with 64 pages of a pattern that is read-only.
fn firmware() -> (TempDir, PathBuf) {
    let dir = shm_dir();
    let path = dir.path().join("firmware");
    fs::write(&path, pattern(64 * PAGE)).unwrap();
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&path, permissions).unwrap();
    (dir, path)
}

fn rom_options(path: impl AsRef<Path>) -> RamOptions {
    file_options(path).with_access(Access::ReadOnly)
}

#[test]
fn a_rom_has_the_contents_of_the_file_from_the_offset_on() {
    let (_dir, path) = firmware();
    let options = rom_options(&path).with_offset(2 * PAGE);
    let rom = GuestRom::new((START, 8 * PAGE), &options).unwrap();
    assert_eq!(rom.range().start_addr(), START);
    assert_eq!(rom.range().size(), 8 * PAGE);
    assert_eq!(rom.offset(), 2 * PAGE);
    assert_eq!(rom.backing().kind(), BackingKind::ShmFile);

    let contents = pattern(64 * PAGE);
    for (offset, len) in [(0, 8 * PAGE), (1, 1), (PAGE - 1, 2), (8 * PAGE, 0), (5, 0)] {
        let mut bytes = vec![0; len as usize];
        rom.read(offset, &mut bytes).unwrap();
        let at = (2 * PAGE + offset) as usize;
        assert!(
            bytes == contents[at..at + len as usize],
            "{offset:#x} {len}"
        );
    }
    let mut bytes = [0; 2];
    for (offset, size) in [(8 * PAGE - 1, 2_u64), (8 * PAGE, 2), (u64::MAX, 2)] {
        assert_refused!(
            rom.read(offset, &mut bytes),
            MemoryError::OutsideRom { .. },
            format!(
                "{size} bytes at offset {offset:#x} are not all in the ROM of 32 KiB: read less"
            ),
        );
    }
    assert_eq!(bytes, [0; 2]);
}

#[test]
fn a_rom_is_mapped_shared_for_reading_only_and_a_write_is_sigsegv() {
    let (_dir, path) = firmware();
    let rom = GuestRom::new((START, 64 * PAGE), &rom_options(&path)).unwrap();
    let start = rom.as_ptr().addr() as u64;
    let lines = maps_in(start..start + 64 * PAGE);
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].permissions, "r--s");
    assert!(lines[0].path.ends_with("/firmware"));
    let flags = fcntl(rom.backing().as_fd(), FcntlArg::F_GETFL).unwrap();
    let access = OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE;
    assert_eq!(access, OFlag::O_RDONLY);

    let last = rom.as_ptr().wrapping_add(64 * PAGE as usize - 1);
    for at in [rom.as_ptr(), last] {
        assert_eq!(dies_of_reading(at), None);
        assert_eq!(dies_of_writing(at.cast_mut()), Some(Signal::SIGSEGV));
    }
    // Guards on either side, as regions have them.
    for outside in [rom.as_ptr().wrapping_sub(1), last.wrapping_add(1)] {
        assert_eq!(dies_of_reading(outside), Some(Signal::SIGSEGV));
    }
    assert!(fs::read(&path).unwrap() == pattern(64 * PAGE));
}

#[test]
fn what_another_process_writes_to_the_file_is_seen() {
    let (_dir, path) = firmware();
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    #[allow(clippy::permissions_set_readonly_false, reason = "of a temporary file")]
    permissions.set_readonly(false);
    fs::set_permissions(&path, permissions).unwrap();
    let rom = GuestRom::new((START, 64 * PAGE), &rom_options(&path)).unwrap();
    let read = || {
        let mut bytes = [0; 4];
        rom.read(PAGE, &mut bytes).unwrap();
        bytes
    };
    assert_ne!(&read(), b"new!");
    let status = Command::new("sh")
        .args([
            "-c",
            "printf 'new!' | dd of=\"$0\" bs=1 seek=4096 conv=notrunc 2>/dev/null",
        ])
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(&read(), b"new!");
    // Through the mapping too: the byte there is the one in the file, or the child dies.
    let at = rom.as_ptr().wrapping_add(PAGE as usize);
    let seen = crate::fork::byte_at(at);
    assert_eq!(seen, b'n');
}

#[test]
fn a_rom_is_no_part_of_a_memory() {
    in_own_process(|| {
        let (_dir, path) = firmware();
        let options = rom_options(&path);
        let text = "a file that is opened for reading only (readonly=on) cannot be RAM, which \
                    guests and daemons write: map it with GuestRom, or open it for writing";
        let rom = GuestRom::new((START, 64 * PAGE), &options).unwrap();
        let backing = ShmBacking::create(&options, MIB / 4).unwrap();
        leaves_nothing(|| {
            assert_refused!(
                GuestRegionShm::<()>::new((START, 64 * PAGE), &options),
                MemoryError::ReadOnlyRam,
                text
            );
            for source in [rom.backing(), &backing] {
                assert_refused!(
                    GuestRegionShm::<()>::from_backing(source, 0, (START, 64 * PAGE)),
                    MemoryError::ReadOnlyRam,
                    text
                );
                let built = GuestMemoryShm::<()>::builder()
                    .add_backing(source, 0, [(START, PAGE)])
                    .build();
                assert_refused!(built, MemoryError::ReadOnlyRam, text);
            }
            // Refused before the first is created.
            let other = path.with_file_name("other");
            let built = GuestMemoryShm::<()>::builder()
                .add_ram(file_options(&other), [(GuestAddress(0), MIB)])
                .add_ram(options.clone(), [(START, PAGE)])
                .build();
            assert_refused!(built, MemoryError::ReadOnlyRam, text);
            assert!(!other.exists());
        });
    });
}

#[test]
fn what_cannot_be_a_rom_is_refused_and_nothing_is_created() {
    in_own_process_leaving_nothing!(|| {
        let dir = shm_dir();
        let path = |name| dir.path().join(name);
        File::create(path("empty")).unwrap();
        for (name, found) in [
            ("empty", "is empty"),
            ("missing", "does not exist"),
            ("", "is a directory"),
        ] {
            assert_refused!(
                GuestRom::new((START, PAGE), &rom_options(path(name))),
                MemoryError::Backing(BackingError::File(FileError::NothingToRead { .. })),
                format!(
                    "{} {found}: a ROM needs a file that has contents",
                    path(name).display()
                ),
            );
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::metadata(path("empty")).unwrap().len(), 0);

        fs::write(path("short"), pattern(PAGE + 1000)).unwrap();
        let short = rom_options(path("short"));
        assert!(GuestRom::new((START, PAGE), &short).is_ok());
        assert!(matches!(
            GuestRom::new((START, 2 * PAGE), &short),
            Err(MemoryError::Backing(BackingError::File(
                FileError::TooShort { len: 5096, .. }
            )))
        ));
        assert!(matches!(
            GuestRom::new((START, 1000), &short),
            Err(MemoryError::Range(InvalidRange::Unaligned {
                part: RangePart::Size,
                value: 1000,
                ..
            }))
        ));
        assert!(matches!(
            GuestRom::new((GuestAddress(1), PAGE), &short),
            Err(MemoryError::Range(InvalidRange::Unaligned {
                part: RangePart::Address,
                ..
            }))
        ));
        assert!(matches!(
            GuestRom::new((START, PAGE), &short.with_discard_data(DiscardData::OnDrop)),
            Err(MemoryError::Backing(BackingError::Options(
                OptionsError::Conflict { .. }
            )))
        ));
        assert!(fs::read(path("short")).unwrap() == pattern(PAGE + 1000));
        for options in [
            file_options(path("short")),
            RamOptions::new().with_access(Access::ReadOnly),
        ] {
            assert_refused!(
                GuestRom::new((START, PAGE), &options),
                MemoryError::WritableRom,
                "a ROM is made of a file that is opened for reading only: use \
                 BackingSource::File and Access::ReadOnly (mem-path=..., readonly=on, rom=on)",
            );
        }
    });
}

#[test]
fn a_truncated_rom_is_an_error_to_read_and_no_signal() {
    let dir = shm_dir();
    let path = dir.path().join("rom");
    fs::write(&path, pattern(4 * PAGE)).unwrap();
    let rom = GuestRom::new((START, 4 * PAGE), &rom_options(&path)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(PAGE).unwrap();
    let mut bytes = [0; 8];
    rom.read(PAGE - 8, &mut bytes).unwrap();
    assert!(matches!(
        rom.read(PAGE - 4, &mut bytes),
        Err(MemoryError::Backing(BackingError::Truncated { end, now, .. }))
            if (end, now) == (4 * PAGE, PAGE)
    ));
    // The control: the mapping has no such answer.
    let gone = rom.as_ptr().wrapping_add(PAGE as usize);
    assert_eq!(dies_of_reading(gone), Some(Signal::SIGBUS));
    // Back again, it can be read again.
    file.write_all_at(&[9; 8], PAGE - 4).unwrap();
    rom.read(PAGE - 4, &mut bytes).unwrap();
    assert_eq!(bytes, [9; 8]);
}
