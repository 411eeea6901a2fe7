//! Seals on a file: what no process may do to it any more (fcntl(2), "File Sealing").

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

bitflags::bitflags! {
    /// What no process may do to a file any more, whichever descriptor it holds.
    ///
    /// ```
    /// use guest_memory_shm::{RamOptions, Seals, ShmBacking};
    ///
    /// let backing = ShmBacking::create(&RamOptions::new(), 4096)?;
    /// assert_eq!(backing.seals() & Seals::RESIZE, Seals::RESIZE);
    /// # Ok::<(), guest_memory_shm::Error>(())
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Seals: u32 {
        /// No more seals can be added. Alone, the mark of a tmpfs file that cannot be sealed,
        /// which is displayed as `none possible`.
        #[doc(alias = "F_SEAL_SEAL")]
        const SEAL = 0x1;
        /// The file cannot become shorter: no process can take pages away from a mapping.
        #[doc(alias = "F_SEAL_SHRINK")]
        const SHRINK = 0x2;
        /// The file cannot become longer.
        #[doc(alias = "F_SEAL_GROW")]
        const GROW = 0x4;
        /// The file cannot be written.
        #[doc(alias = "F_SEAL_WRITE")]
        const WRITE = 0x8;
        /// No new writable mapping can be made.
        #[doc(alias = "F_SEAL_FUTURE_WRITE")]
        const FUTURE_WRITE = 0x10;
        /// The file cannot become executable.
        #[doc(alias = "F_SEAL_EXEC")]
        const EXEC = 0x20;
        /// The file keeps its size.
        const RESIZE = Self::SHRINK.bits() | Self::GROW.bits();
    }
}

/// The seals of RAM: its size is fixed, and no more seals follow, because `F_SEAL_WRITE` or
/// `F_SEAL_FUTURE_WRITE` from a daemon would stop discards and later daemons.
pub(super) const RAM: Seals = Seals::RESIZE.union(Seals::SEAL);

/// What the kernel says of every file on a tmpfs that is no memfd: it has no seals, and will never
/// have one. So it does of a memfd that was created without `MFD_ALLOW_SEALING`.
pub(super) const NO_SEALS: Seals = Seals::SEAL;

#[cfg(feature = "serde")]
crate::units::serialized_as_text!(Seals);

/// As it is displayed: names with `|` between them, or `none`, or `none possible`.
#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Seals {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == NONE_POSSIBLE {
            return Ok(NO_SEALS);
        }
        let names = text.split('|').filter(|name| *name != "none");
        let seals = names.map(|name| {
            let found = NAMES.iter().find(|(_, known)| *known == name);
            let unknown = || serde::de::Error::custom(format!("there is no seal {name:?}"));
            found.map(|(seal, _)| *seal).ok_or_else(unknown)
        });
        seals.collect()
    }
}

const NAMES: [(Seals, &str); 6] = [
    (Seals::SEAL, "seal"),
    (Seals::SHRINK, "shrink"),
    (Seals::GROW, "grow"),
    (Seals::WRITE, "write"),
    (Seals::FUTURE_WRITE, "future-write"),
    (Seals::EXEC, "exec"),
];

const NONE_POSSIBLE: &str = "none possible";

impl fmt::Display for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set: Vec<&str> = NAMES
            .iter()
            .filter(|(seal, _)| self.contains(*seal))
            .map(|(_, name)| *name)
            .collect();
        f.pad(&if *self == NO_SEALS {
            NONE_POSSIBLE.to_owned()
        } else if set.is_empty() {
            "none".to_owned()
        } else {
            set.join("|")
        })
    }
}

/// The seals on a file; none where the file system has no seals.
pub(super) fn read(file: &impl AsFd) -> io::Result<Seals> {
    match fcntl(file, FcntlArg::F_GET_SEALS) {
        Ok(bits) => Ok(Seals::from_bits_retain(bits.unsigned_abs())),
        Err(Errno::EINVAL) => Ok(Seals::empty()),
        Err(errno) => Err(errno.into()),
    }
}

/// Adds seals to a file.
pub(super) fn add(file: &impl AsFd, seals: Seals) -> io::Result<()> {
    let bits = seals.bits().cast_signed();
    fcntl(
        file,
        FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(bits)),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seals_print_by_name() {
        assert_eq!(Seals::empty().to_string(), "none");
        assert_eq!(Seals::SEAL.to_string(), "none possible");
        assert_eq!(RAM.to_string(), "seal|shrink|grow");
    }
}
