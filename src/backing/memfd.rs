//! Sealed memfds, of base pages or from a hugetlb pool (memfd_create(2)).

use std::fs::File;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::error::{BackingError, Result};
use super::hugetlb;
use super::kind::BackingKind;
use super::seals::{self, Seals};
use crate::options::RamOptions;

/// The name in `/proc/PID/maps` and `/proc/PID/fd`; it need not be unique.
const NAME: &str = "guest-memory-shm";

/// A memfd of `len` bytes with these seals, with pages from the hugetlb pool of `huge` bytes if
/// given.
///
/// The order matters: the size is sealed before the memfd is mapped or sent to another process.
pub(super) fn create(
    options: &RamOptions,
    len: u64,
    huge: Option<u64>,
    seals: Seals,
) -> Result<File> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if let Some(page_size) = huge {
        flags |= hugetlb::memfd_flags(page_size);
    }
    let kind = match huge {
        Some(_) => BackingKind::HugetlbMemfd,
        None => BackingKind::Memfd,
    };
    let file = create_noexec(shown_name(options), flags);
    let file = File::from(file.map_err(|errno| BackingError::create(kind, len, errno.into()))?);
    file.set_len(len)
        .map_err(|source| BackingError::Resize { kind, len, source })?;
    seals::add(&file, seals).map_err(|source| BackingError::Create { kind, len, source })?;
    Ok(file)
}

/// The name of the options, or a general one, as much of it as memfd_create(2) takes: it is only
/// shown, so a long one is no reason to refuse RAM.
fn shown_name(options: &RamOptions) -> &str {
    const LONGEST: usize = 249;
    let name = options.name().unwrap_or(NAME);
    // Names that passed the check are ASCII, and can be cut anywhere.
    name.get(..LONGEST).unwrap_or(name)
}

/// Creates the memfd non-executable where the kernel knows `MFD_NOEXEC_SEAL` (Linux 6.3).
///
/// Older kernels reject the flag with EINVAL; then only that flag is dropped.
fn create_noexec(name: &str, flags: MFdFlags) -> nix::Result<std::os::fd::OwnedFd> {
    // nix has no name for the flag yet; the value is from linux/memfd.h.
    const MFD_NOEXEC_SEAL: u32 = 0x8;
    let noexec = flags | MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL);
    match memfd_create(name, noexec) {
        Err(Errno::EINVAL) => memfd_create(name, flags),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nix::fcntl::{FcntlArg, fcntl};

    use super::*;
    use crate::host::descriptors::name_of;

    #[test]
    fn a_name_is_shown_as_far_as_the_kernel_takes_it() {
        for (len, shown) in [(1, 1), (249, 249), (300, 249)] {
            let options = RamOptions::new().with_name("a".repeat(len));
            let file = create(&options, 4096, None, seals::RAM).unwrap();
            assert_eq!(name_of(file), Some("a".repeat(shown)));
        }
    }

    fn sealed(len: u64) -> File {
        create(&RamOptions::new(), len, None, seals::RAM).unwrap()
    }

    #[test]
    fn a_memfd_is_sealed_against_any_change_of_size() {
        let file = sealed(1 << 20);
        assert!(seals::read(&file).unwrap().contains(seals::RAM));
        for len in [0, 4096, 2 << 20] {
            let refused = file.set_len(len).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EPERM as i32), "{len}");
        }
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn no_seal_can_be_added_later() {
        let file = sealed(1 << 20);
        let refused = seals::add(&file, Seals::FUTURE_WRITE).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::EPERM as i32));
    }

    #[test]
    fn a_memfd_is_not_executable_where_the_kernel_knows_the_flag() {
        let file = sealed(4096);
        if seals::read(&file).unwrap().contains(Seals::EXEC) {
            assert_eq!(file.metadata().unwrap().permissions().mode() & 0o111, 0);
        }
    }

    #[test]
    fn an_unsealed_memfd_can_be_resized_but_never_sealed() {
        let file = create(&RamOptions::new(), 1 << 20, None, Seals::SEAL).unwrap();
        file.set_len(4096).unwrap();
        file.set_len(1 << 20).unwrap();
        let refused = seals::add(&file, Seals::WRITE).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::EPERM as i32));
    }

    #[test]
    fn a_memfd_is_closed_on_exec() {
        let file = sealed(4096);
        assert_eq!(fcntl(&file, FcntlArg::F_GETFD).unwrap(), 1);
    }
}
