//! Whether options go together, as far as that can be said without asking the system.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::error::{OptionsError, Result};
use super::qemu::BackendType;
use super::{Access, BackingSource, DiscardData, PageSize, Populate, RamOptions, Sealing};
use crate::host::base_page_size;
use crate::range::RangePart;

/// The longest that a file can be, in bytes.
const LONGEST: u64 = i64::MAX.unsigned_abs();

impl RamOptions {
    /// Checks everything that the options say, each by itself and all together.
    ///
    /// Nothing is created, and the system is asked for nothing: whether there are such huge pages,
    /// such nodes, such a file and enough room, is found out when RAM is built. Building calls
    /// this first, and so does reading a string.
    ///
    /// ```
    /// use guest_memory_shm::{OptionsError, Populate, RamOptions, Reserve};
    ///
    /// let options = RamOptions::new()
    ///     .with_populate(Populate::Allocate)
    ///     .with_reserve(Reserve::Off);
    /// let refused = options.check().unwrap_err();
    /// assert!(matches!(refused, OptionsError::Conflict { .. }));
    /// ```
    ///
    /// # Errors
    ///
    /// An [`OptionsError`] that names the property, as QEMU calls it, its value and what to write
    /// instead.
    pub fn check(&self) -> Result<()> {
        self.check_name()?;
        self.check_backing()?;
        self.check_all_else()
    }

    /// As [`check`](Self::check), for RAM on an object that exists.
    pub(crate) fn check_existing(&self) -> Result<()> {
        self.check_name()?;
        let refused = |property, value: String| {
            let value = value.into();
            Err(OptionsError::NotOfExisting { property, value })
        };
        match &self.backing {
            BackingSource::Memfd => {}
            BackingSource::PosixShm => {
                let of = BackendType::of(&self.backing).name();
                return refused("qom-type", of.to_owned());
            }
            BackingSource::File(path) => return refused("mem-path", readable(path)),
        }
        if self.sealing == Sealing::Unsealed {
            return refused("seal", "off".to_owned());
        }
        if self.offset != 0 {
            return refused("offset", format!("{:#x}", self.offset));
        }
        if self.access == Access::ReadOnly {
            return refused("readonly", "on".to_owned());
        }
        if self.discard_data == DiscardData::OnDrop {
            return refused("discard-data", "on".to_owned());
        }
        self.check_all_else()
    }

    /// Checks what does not depend on the kind of backing.
    fn check_all_else(&self) -> Result<()> {
        let page_size = self.check_page_size()?;
        self.check_sizes(page_size)?;
        self.check_writing()?;
        if self.numa.name() != "default" && self.numa.nodes().is_empty() {
            return Err(OptionsError::PolicyWithoutNodes {
                policy: self.numa.name(),
            });
        }
        Ok(())
    }

    fn check_name(&self) -> Result<()> {
        match &self.name {
            Some(name) if !is_identifier(name) => Err(OptionsError::Value {
                property: "id",
                value: name.as_str().into(),
            }),
            _ => Ok(()),
        }
    }

    /// Checks that the backing has each option.
    fn check_backing(&self) -> Result<()> {
        let only_for_files = [
            ("align", self.align.is_some()),
            ("offset", self.offset != 0),
            ("readonly", self.access == Access::ReadOnly),
            ("discard-data", self.discard_data == DiscardData::OnDrop),
        ];
        let only_for_memfds = [("seal=off", self.sealing == Sealing::Unsealed)];
        match &self.backing {
            BackingSource::File(path) => check_path(path)?,
            _ => {
                if let Some(property) = misplaced(&only_for_files) {
                    return Err(self.not_of_backing(property));
                }
            }
        }
        match misplaced(&only_for_memfds) {
            Some(property) if self.backing != BackingSource::Memfd => {
                Err(self.not_of_backing(property))
            }
            _ => Ok(()),
        }
    }

    fn not_of_backing(&self, property: &'static str) -> OptionsError {
        let of = BackendType::of(&self.backing).name();
        OptionsError::NotOfBacking { property, of }
    }

    /// The size of the pages in bytes, as far as it is known. All that is known of a hugetlb
    /// pool's default size, and of a file's pages, is that base pages divide them.
    fn check_page_size(&self) -> Result<u64> {
        for size in [self.asked_huge_size(), self.unused.hugetlb_size] {
            if let Some(size) = size.filter(|size| !size.is_power_of_two()) {
                return Err(OptionsError::HugePageSize { size });
            }
        }
        match (self.page_size, &self.backing) {
            (PageSize::Huge(_), BackingSource::PosixShm | BackingSource::File(_)) => {
                Err(self.not_of_backing("hugetlb"))
            }
            (PageSize::Huge(Some(size)), BackingSource::Memfd) => Ok(size),
            _ => Ok(base_page_size()),
        }
    }

    fn asked_huge_size(&self) -> Option<u64> {
        match self.page_size {
            PageSize::Huge(size) => size,
            PageSize::Base | PageSize::Transparent => None,
        }
    }

    fn check_sizes(&self, page_size: u64) -> Result<()> {
        if let Some(size) = self.size {
            if size == 0 || size > LONGEST {
                return Err(OptionsError::Size {
                    size,
                    limit: LONGEST,
                });
            }
            RangePart::Size.check_aligned(size, page_size)?;
        }
        self.check_align(page_size)?;
        RangePart::Offset.check_aligned(self.offset, page_size)?;
        let size = self.size.unwrap_or(0);
        match self.offset.checked_add(size) {
            Some(end) if end <= LONGEST => Ok(()),
            _ => Err(OptionsError::PastLongestFile {
                offset: self.offset,
                size,
            }),
        }
    }

    /// Checks the alignment against the size of the pages.
    pub(crate) fn check_align(&self, page_size: u64) -> Result<()> {
        match self.align {
            // As in QEMU, 0 means unset.
            None | Some(0) => Ok(()),
            Some(align) if align.is_power_of_two() && align.is_multiple_of(page_size) => Ok(()),
            Some(align) => Err(OptionsError::Align { align, page_size }),
        }
    }

    /// Refuses what would write to RAM that is read-only, or allocate RAM that is not reserved.
    pub(crate) fn check_writing(&self) -> Result<()> {
        if self.access == Access::ReadOnly && self.discard_data == DiscardData::OnDrop {
            return Err(OptionsError::Conflict {
                first: "discard-data=on",
                second: "readonly=on",
            });
        }
        let first = match self.populate {
            Populate::Lazy => return Ok(()),
            Populate::Allocate => "populate=allocate",
            Populate::Prefault => "prealloc=on",
        };
        let second = if self.is_unreserved() {
            "reserve=off"
        } else if self.access == Access::ReadOnly {
            "readonly=on"
        } else {
            return Ok(());
        };
        Err(OptionsError::Conflict { first, second })
    }
}

fn misplaced(properties: &[(&'static str, bool)]) -> Option<&'static str> {
    properties
        .iter()
        .find_map(|(property, is_set)| is_set.then_some(*property))
}

fn check_path(path: &Path) -> Result<()> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(OptionsError::Value {
            property: "mem-path",
            value: readable(path).into(),
        });
    }
    Ok(())
}

fn readable(path: &Path) -> String {
    path.to_string_lossy().escape_default().to_string()
}

/// QEMU's rule for ids.
fn is_identifier(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}
